"""Vision transformers from scratch: on ImageNet, and a small one on handwritten digits that every install has."""

from dataclasses import replace

from zoo.models.vit import PRESETS, ViTConfig
from zoo.train.data.images import ImageData
from zoo.train.experiment import Experiment, Optimizer
from zoo.train.objectives import Classification
from zoo.train.samplers import ClassSampler

ViT = Experiment[ViTConfig, ImageData, Classification, ClassSampler]

EPOCHS = 90
IMAGES = 1_281_167  # of ImageNet's training split
BATCH = 1024


def vit_digits() -> ViT:
    """A ViT on scikit-learn's digits: two minutes on two CPU cores, ends in a grid of classified images.

    Command:  zoo train vit-digits
    Data:     digits (1797 handwritten digits of 8 x 8 pixels), part of scikit-learn
    Model:    4 layers of width 64 over 16 patches of 2 x 2, their mean scored; 0.14 M parameters
    Result:   177 of the 178 held-out digits (99.4 %) at step 800, seed 0, on a CPU
    """
    return Experiment(
        name="vit-digits",
        model=PRESETS["vit-digits"],
        data=ImageData(source="digits"),
        objective=Classification(label_smoothing=0.1),
        sampler=ClassSampler(),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=100, b2=0.99, weight_decay=0.1),
        steps=800,
        batch_size=128,
        ema=0.99,
        eval_every=200,
        checkpoint_every=400,
    )


def vit_s16() -> ViT:
    """ViT-S/16 from scratch on ImageNet-1k, after Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k".

    Command:   zoo train vit-s16 --mesh data=8
               zoo train vit-s16 --data.source FOLDER      FOLDER: one folder of pictures a class
    Data:      imagenet2012 of TFDS, whose archives you fetch by hand; 200 GB of pixels are then written to the cache
    Schedule:  the paper's 90 epochs of batches of 1024, the mean of the patches scored, no dropout. Its decay of
               1e-4 is not multiplied by the rate's peak of 1e-3, and ours is: 0.1 is the same
    Not here:  random crops (images are their middle square), RandAugment, mixup, fixed sinusoidal positions (these are
               learned), and the tanh layer below the scores. Expect less than the paper's 76.5 %
    Result:    not run by this project; vit-digits runs the same objective to its end
    Hardware:  1024 images a step: for 8 accelerators of 16 GB or more
    """
    return _imagenet("vit-s16", "vit-small-patch16-224")


def vit_b16() -> ViT:
    """ViT-B/16 from scratch on ImageNet-1k, by the recipe of vit-s16: the paper's is of that size alone.

    Command:   zoo train vit-b16 --mesh data=8
    Data:      imagenet2012 of TFDS, as for vit-s16, and as there without random crops, RandAugment and mixup: expect
               that a model of this size overfits
    Result:    not run by this project; vit-digits runs the same objective to its end
    Hardware:  1024 images a step: for 8 accelerators of 32 GB or more
    """
    return _imagenet("vit-b16", "vit-base-patch16-224")


def _imagenet(name: str, preset: str) -> ViT:
    """The recipe of one size."""
    return Experiment(
        name=name,
        model=replace(PRESETS[preset], pool="mean", norm_epsilon=1e-6),
        data=ImageData(source="imagenet2012:5.1.0", size=224, flip=True),
        objective=Classification(),
        sampler=ClassSampler(rows=4, columns=5),
        optimizer=Optimizer(
            learning_rate=1e-3, warmup_steps=10_000, final_fraction=0.0, b2=0.999, moment_dtype="bfloat16"
        ),
        steps=EPOCHS * IMAGES // BATCH,
        batch_size=BATCH,
        eval_every=2500,
        checkpoint_every=1000,
        keep_every=20_000,
    )
