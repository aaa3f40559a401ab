"""The U-Net of denoising diffusion (Ho et al. 2020, arXiv 2006.11239, appendix B)."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.layers.convolution import Conv, GroupNorm
from zoo.layers.dropout import split
from zoo.layers.linear import LayerError, Precision, check_sizes
from zoo.layers.unet import (
    Downsample,
    ResidualBlock,
    SpatialAttention,
    TimeEmbedding,
    Upsample,
    constrain_image,
    zeros,
)
from zoo.models.noising import Noising


@dataclass(frozen=True)
class UNetConfig:
    """Level i works on images of 1 / 2^i of the size, with width * multipliers[i] channels.

    attention_levels: levels whose residual blocks are each followed by self-attention; the middle always has it.
    num_heads: heads of every attention. groups: of every normalisation.
    noising: the noise that the network's time counts. Objectives and samplers read it here, so that they cannot
        disagree.
    """

    image_channels: int = 3
    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks_per_level: int = 2
    attention_levels: tuple[int, ...] = (1,)
    num_heads: int = 1
    groups: int = 32
    epsilon: float = 1e-6
    dropout: float = 0.0
    noising: Noising = Noising()
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        names = ("image_channels", "width", "blocks_per_level", "num_heads", "groups")
        check_sizes(**{name: getattr(self, name) for name in names})
        check_sizes(**{f"multipliers[{i}]": multiplier for i, multiplier in enumerate(self.multipliers)})
        if not self.multipliers:
            raise LayerError("multipliers () make no level: give one for each level, such as (1, 2)")
        if self.width % 2 or self.width < 4:
            raise LayerError(f"width {self.width} has no sinusoids of time: choose an even number from 4")
        for level in self.attention_levels:
            if not 0 <= level < len(self.multipliers):
                raise LayerError(
                    f"attention_levels names {level}, and the levels are 0 to {len(self.multipliers) - 1}: choose there"
                )

    def build(self, rngs: nnx.Rngs) -> "UNet":
        return UNet(self, rngs=rngs)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    def skips(self) -> list[list[int]]:
        """Channels of the activations that each level hands across, in the order in which they are made."""
        first = [self.width, *self.channels[:-1]]
        return [[first[i], *[c] * self.blocks_per_level] for i, c in enumerate(self.channels)]

    def forward_flops(self, shape: tuple[int, ...]) -> float:
        """FLOPs of one image's forward pass, `shape` its (Y, X, C): convolutions, projections, attention's products."""
        height, width, image_channels = shape
        time_width = 4 * self.width

        def conv(pixels: int, inputs: int, outputs: int, size: int = 3) -> float:
            return 2.0 * pixels * inputs * outputs * size**2

        def residual(pixels: int, inputs: int, outputs: int) -> float:
            shortcut = 0.0 if inputs == outputs else conv(pixels, inputs, outputs, 1)
            time = 2.0 * time_width * outputs
            return conv(pixels, inputs, outputs) + conv(pixels, outputs, outputs) + shortcut + time

        def attention(pixels: int, channels: int) -> float:
            return 4 * conv(pixels, channels, channels, 1) + 2 * 2.0 * pixels**2 * channels

        total = 2.0 * time_width * (self.width + time_width)
        below = 0
        for level, (c, skips) in enumerate(zip(self.channels, self.skips(), strict=True)):
            pixels = (height >> level) * (width >> level)
            down = [skips[0]] + [c] * (self.blocks_per_level - 1)
            above = self.channels[level + 1] if level + 1 < len(self.channels) else c
            up = [x + skip for x, skip in zip([above] + [c] * self.blocks_per_level, reversed(skips), strict=True)]
            total += sum(residual(pixels, inputs, c) for inputs in down + up)
            if level in self.attention_levels:
                total += len(down + up) * attention(pixels, c)
            if level:
                total += conv(pixels, skips[0], skips[0]) + conv(4 * pixels, c, c)
            below = pixels
        c = self.channels[-1]
        total += 2 * residual(below, c, c) + attention(below, c)
        return (
            total + conv(height * width, image_channels, self.width) + conv(height * width, self.width, image_channels)
        )


class Level(nnx.Module):
    """The blocks of one level on one side, each a residual block with or without attention behind it."""

    def __init__(self, config: UNetConfig, level: int, inputs: list[int], *, rngs: nnx.Rngs):
        channels, attends = config.channels[level], level in config.attention_levels
        residual, attention = _blocks(config, rngs)
        self.blocks = nnx.List([residual(c, channels) for c in inputs])
        self.attentions = nnx.List([attention(channels) if attends else None for _ in inputs])

    def __call__(self, block: int, x: jax.Array, time: jax.Array, *, key: jax.Array | None) -> jax.Array:
        """x through block number `block`; time [B, 4 * width]."""
        x = self.blocks[block](x, time, key=key)
        attention = self.attentions[block]
        return x if attention is None else attention(x)


class UNet(nnx.Module):
    """Predicts the noise in images, from the images and the time that says how much there is."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels, skips = config.channels, config.skips()
        last = len(channels) - 1
        options = {"rngs": rngs, "precision": config.precision}
        residual, attention = _blocks(config, rngs)
        self.time = TimeEmbedding(config.width, 4 * config.width, **options)
        self.conv_in = Conv(config.image_channels, config.width, in_axis=None, **options)
        self.down = nnx.List([Level(config, i, skips[i][:-1], rngs=rngs) for i in range(last + 1)])
        self.downsamples = nnx.List([Downsample(channels[i], **options) for i in range(last)])
        self.middle_in = residual(channels[-1], channels[-1])
        self.middle_attention = attention(channels[-1])
        self.middle_out = residual(channels[-1], channels[-1])
        up = []
        for i in range(last + 1):
            coming = [channels[min(i + 1, last)], *[channels[i]] * config.blocks_per_level]
            up.append([x + skip for x, skip in zip(coming, reversed(skips[i]), strict=True)])
        self.up = nnx.List([Level(config, i, inputs, rngs=rngs) for i, inputs in enumerate(up)])
        self.upsamples = nnx.List([Upsample(channels[i + 1], **options) for i in range(last)])
        self.norm_out = GroupNorm(config.width, config.groups, epsilon=config.epsilon, precision=config.precision)
        self.conv_out = Conv(config.width, config.image_channels, out_axis=None, init=zeros, **options)

    def __call__(self, images: jax.Array, time: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """images [B, Y, X, C] and time [B] (0 the least noisy): the noise [B, Y, X, C], float32.

        key: for dropout; None drops nothing. Raises LayerError where the images do not fit the network.
        """
        config = self.config
        self._check(images)
        levels, blocks = len(config.channels), config.blocks_per_level
        keys = iter(split(key, levels * (2 * blocks + 1) + 2))
        emb = self.time(time)
        x = constrain_image(self.conv_in(images.astype(config.precision.compute)))
        skips = [x]
        for level in range(levels):
            if level:
                x = self.downsamples[level - 1](x)
                skips.append(x)
            for block in range(blocks):
                x = self.down[level](block, x, emb, key=next(keys))
                skips.append(x)
        x = self.middle_in(x, emb, key=next(keys))
        x = self.middle_attention(x)
        x = self.middle_out(x, emb, key=next(keys))
        for level in reversed(range(levels)):
            for block in range(blocks + 1):
                x = self.up[level](block, jnp.concatenate([x, skips.pop()], -1), emb, key=next(keys))
            if level:
                x = self.upsamples[level - 1](x)
        return self.conv_out(jax.nn.silu(self.norm_out(x))).astype(jnp.float32)

    def _check(self, images: jax.Array) -> None:
        config = self.config
        multiple = 2 ** (len(config.channels) - 1)
        if images.ndim != 4 or images.shape[-1] != config.image_channels:
            raise LayerError(f"images have shape {images.shape}: the network takes [B, Y, X, {config.image_channels}]")
        if images.shape[1] % multiple or images.shape[2] % multiple:
            raise LayerError(
                f"images are {images.shape[1]} x {images.shape[2]}, which {len(config.channels)} levels do not halve "
                f"evenly: choose multiples of {multiple}, or fewer multipliers"
            )


def _blocks(config: UNetConfig, rngs: nnx.Rngs) -> tuple[partial[ResidualBlock], partial[SpatialAttention]]:
    options = {"groups": config.groups, "epsilon": config.epsilon, "precision": config.precision, "rngs": rngs}
    residual = partial(ResidualBlock, time_width=4 * config.width, dropout=config.dropout, **options)
    return residual, partial(SpatialAttention, num_heads=config.num_heads, **options)


PRESETS: dict[str, UNetConfig] = {
    "ddpm-cifar10": UNetConfig(dropout=0.1),
    "ddpm-digits": UNetConfig(
        image_channels=1,
        width=32,
        multipliers=(1, 2),
        blocks_per_level=1,
        num_heads=4,
        groups=8,
        noising=Noising("cosine"),
    ),
}
