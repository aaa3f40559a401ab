"""A small diffusion model on handwritten digits that every install has."""

from zoo.models.unet import PRESETS, UNetConfig
from zoo.train.data.images import ImageData
from zoo.train.experiment import Experiment, Optimizer
from zoo.train.objectives import Denoising
from zoo.train.samplers import ImageSampler


def ddpm_digits() -> Experiment[UNetConfig, ImageData, Denoising, ImageSampler]:
    """A DDPM U-Net on scikit-learn's digits: three minutes on two CPU cores, ends in a grid of samples.

    Command:  zoo train ddpm-digits
    Data:     digits (1797 handwritten digits of 8 x 8 pixels), part of scikit-learn
    Model:    2 levels of width 32 and 64, self-attention at 4 x 4, 0.7 M parameters; cosine noise schedule
    """
    return Experiment(
        name="ddpm-digits",
        model=PRESETS["ddpm-digits"],
        data=ImageData(source="digits"),
        objective=Denoising(),
        sampler=ImageSampler(),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=100, b2=0.99, weight_decay=0.01),
        steps=1000,
        batch_size=128,
        ema=0.995,
        eval_every=500,
        checkpoint_every=500,
    )
