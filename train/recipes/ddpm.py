"""Denoising diffusion from scratch: as published on CIFAR-10, and a smaller one on a folder of IDX files."""

from zoo.models.unet import PRESETS, UNetConfig
from zoo.train.data.images import ImageData
from zoo.train.experiment import Experiment, Optimizer
from zoo.train.image_sampler import ImageSampler
from zoo.train.objectives import Denoising

DDPM = Experiment[UNetConfig, ImageData, Denoising, ImageSampler]


def ddpm_cifar10() -> DDPM:
    """The DDPM of Ho et al. 2020 on CIFAR-10 (arXiv 2006.11239, appendix B).

    Command:   zoo train ddpm-cifar10
               zoo train ddpm-cifar10 --mesh data=8
    Data:      cifar10 of TFDS, images of 32 x 32, mirrored half of the time; a fiftieth of its training split is held
               out, where the paper trains on all of it
    Model:     4 levels of 128 to 256 channels, self-attention at 16 x 16, dropout 0.1; 35.7 M parameters; 1000 steps
               of noise, linear
    Schedule:  the paper's: 800,000 steps of 128 images, Adam at 2e-4 after 5,000 steps of warm-up, gradients clipped
               at 1, an average of the parameters over about 10,000 steps, which is what is sampled from, in 1000 steps
    Result:    not run by this project; ddpm-digits runs the same objective to its end
    Hardware:  one accelerator of 16 GB or more
    """
    return Experiment(
        name="ddpm-cifar10",
        model=PRESETS["ddpm-cifar10"],
        data=ImageData(source="cifar10:3.0.2", flip=True, validation_fraction=0.02),
        objective=Denoising(),
        sampler=ImageSampler(sampler="ddpm", steps=1000),
        optimizer=Optimizer(
            learning_rate=2e-4, warmup_steps=5000, schedule="constant", weight_decay=0.0, b2=0.999, clip_norm=1.0
        ),
        steps=800_000,
        batch_size=128,
        ema=0.9999,
        log_every=100,
        eval_every=10_000,
        checkpoint_every=10_000,
        keep_every=200_000,
    )


def ddpm_fashion() -> DDPM:
    """A DDPM on images of 28 x 28 in a folder of IDX files, such as Fashion-MNIST's.

    Command:   zoo train ddpm-fashion --data.source FOLDER
    Data:      ./fashion-mnist unless given: the four files of github.com/zalandoresearch/fashion-mnist, which is under
               the MIT licence, train-images-idx3-ubyte.gz and so on; the 10,000 images for tests are held out. MNIST's
               do as well
    Model:     3 levels of width 64, 128 and 128, self-attention at 14 x 14 and 7 x 7, 6.8 M parameters; cosine
               schedule, velocity predicted
    Result:    not run to its end by this project; ddpm-digits is, with the same objective
    Hardware:  one accelerator of 8 GB or more
    """
    return Experiment(
        name="ddpm-fashion",
        model=PRESETS["ddpm-fashion"],
        data=ImageData(source="./fashion-mnist"),
        objective=Denoising(),
        sampler=ImageSampler(),
        optimizer=Optimizer(learning_rate=5e-4, warmup_steps=500, b2=0.99, weight_decay=0.01),
        steps=30_000,
        batch_size=128,
        ema=0.999,
        eval_every=2000,
        checkpoint_every=2000,
    )
