"""Diffusion in the latents of an autoencoder, by a DiT: on digits, and as published on ImageNet."""

from dataclasses import replace

from zoo.models.dit import PRESETS, DiTConfig
from zoo.train.data.latents import LatentData
from zoo.train.experiment import Experiment, Optimizer
from zoo.train.latent_sampler import LatentSampler
from zoo.train.objectives import Denoising

LatentDiffusion = Experiment[DiTConfig, LatentData, Denoising, LatentSampler]


def latent_digits() -> LatentDiffusion:
    """A small DiT over the latents of autoencoder-digits: six minutes on two CPU cores, ends in a grid of digits.

    Command:  zoo train autoencoder-digits --run ./autoencoder-digits
              zoo train latent-digits
    Data:     digits (1797 handwritten digits, scaled to 16 x 16), part of scikit-learn, as that run's latents of
              4 x 4 x 4; they are encoded once, and anew where the run has gone on
    Model:    4 layers of width 96 over 16 patches of 1 x 1, told the class, a tenth of them left out, for guidance;
              cosine noise schedule, velocity predicted
    Result:   a classifier that knows 98.9 % of held-out digits of that size finds all of 1,000 samples to be of the
              class asked for (python -m benchmarks.digits RUN); held-out loss 0.255, seed 0, on a CPU
    """
    return Experiment(
        name="latent-digits",
        model=PRESETS["dit-digits"],
        data=LatentData(source="digits", size=16, autoencoder="./autoencoder-digits"),
        objective=Denoising(class_dropout=0.1),
        sampler=LatentSampler(guidance=2.0),
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=100, b2=0.99, weight_decay=0.01),
        steps=2000,
        batch_size=128,
        ema=0.995,
        eval_every=500,
        checkpoint_every=500,
    )


def dit_xl_2() -> LatentDiffusion:
    """DiT-XL/2 on the latents of ImageNet at 256 x 256 (Peebles and Xie 2023, arXiv 2212.09748, section 4).

    Command:   zoo train dit-xl-2 --mesh fsdp=8 --data.autoencoder FOLDER     FOLDER: sd-vae-ft-ema, of diffusers
    Data:      imagenet2012 of TFDS, whose archives you fetch by hand, encoded once, mirrored too: 250 GB of pixels and
               42 GB of latents in the cache, twice that while they are made: all hosts share the work, and it goes on
               where it was stopped
    Schedule:  the paper's: AdamW at a constant 1e-4 without decay, batches of 256, 400,000 steps (7 million in its last
               table), an average of decay 0.9999, a tenth of the classes left out
    Variance:  learned as in the paper, by the variational bound beside the squared error (Nichol and Dhariwal 2021),
               and sampled with
    Result:    not run by this project
    Hardware:  256 latents a step: for 8 accelerators of 32 GB or more, or --accumulate 2 and more on smaller ones
    """
    return Experiment(
        name="dit-xl-2",
        model=replace(PRESETS["dit-xl-2"], remat="full"),
        data=LatentData(source="imagenet2012:5.1.0", size=256, flip=True, autoencoder="./sd-vae-ft-ema"),
        objective=Denoising(class_dropout=0.1),
        sampler=LatentSampler(rows=2, columns=4, steps=250, sampler="ddpm", guidance=4.0),
        optimizer=Optimizer(
            learning_rate=1e-4, warmup_steps=1, schedule="constant", weight_decay=0.0, b2=0.999, clip_norm=None
        ),
        steps=400_000,
        batch_size=256,
        ema=0.9999,
        log_every=100,
        eval_every=10_000,
        checkpoint_every=5000,
        keep_every=100_000,
    )
