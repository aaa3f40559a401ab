"""The U-Net of denoising diffusion (Ho et al. 2020, arXiv 2006.11239, appendix B), and Stable Diffusion's.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models": where the network is told a text,
a transformer block that attends to it stands in the place of each self-attention. Classes are told as the time is
(Nichol and Dhariwal 2021).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.kernels.memory import gradient_materialized
from zoo.layers.convolution import Conv, GroupNorm
from zoo.layers.dropout import split
from zoo.layers.linear import LayerError, Precision, check_sizes
from zoo.layers.unet import (
    ClassEmbedding,
    Downsample,
    ResidualBlock,
    SpatialAttention,
    SpatialTransformer,
    TimeEmbedding,
    Upsample,
    check_images,
    constrain_image,
    zeros,
)
from zoo.models import published_unet
from zoo.models.noising import Noising
from zoo.models.published import Layout
from zoo.sharding import constrain

PADDINGS = ((0, 1), (1, 1))


@dataclass(frozen=True)
class UNetConfig:
    """Level i works on images of 1 / 2^i of the size, with channels[i] channels.

    image_channels, out_channels: of images, and of what is predicted of them; None: the same.
    image_size: (Y, X) that the network was trained on. It reads others too.
    attention_levels: levels whose residual blocks are each followed by attention; the middle always has it.
    num_heads: heads of every attention, or of those of each level; the middle has the last level's.
    context_width: of the states of a text, to which every attention's transformer block attends; None: there is none,
        and attention is among pixels alone.
    num_classes: of images, one of which the network is told; None: it is told none.
    null_class: whether there is one class more, the last, that stands for none, as guidance without a classifier asks.
    groups, epsilon: of normalisations; those before transformer blocks have 1e-6 whatever it is.
    downsample_padding: zeros before and after each side of an image that is halved.
    cosines_first, frequency_shift: how time is written, see zoo.layers.unet.sinusoidal_time.
    dropout: of residual blocks.
    linear_projections: whether published weights have the projections around transformer blocks as matrices, not as
        convolutions of 1 x 1: they compute the same.
    upcast_attention: whether published configs ask for attention's scores in float32, as they are here in any case.
    noising: the noise that the network's time counts. Objectives and samplers read it here, so that they cannot
        disagree.
    """

    image_channels: int = 3
    out_channels: int | None = None
    image_size: tuple[int, int] | None = None
    channels: tuple[int, ...] = (128, 256, 256, 256)
    blocks_per_level: int = 2
    attention_levels: tuple[int, ...] = (1,)
    num_heads: int | tuple[int, ...] = 1
    context_width: int | None = None
    num_classes: int | None = None
    null_class: bool = False
    groups: int = 32
    epsilon: float = 1e-6
    downsample_padding: tuple[int, int] = (0, 1)
    cosines_first: bool = False
    frequency_shift: int = 1
    dropout: float = 0.0
    linear_projections: bool = False
    upcast_attention: bool = False
    noising: Noising = Noising()
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(**{name: getattr(self, name) for name in ("image_channels", "blocks_per_level", "groups")})
        optional = {name: getattr(self, name) for name in ("out_channels", "context_width", "num_classes")}
        check_sizes(**{name: value for name, value in optional.items() if value is not None})
        for name in ("channels", "heads", "image_size"):
            check_sizes(**{f"{name}[{i}]": size for i, size in enumerate(getattr(self, name) or ())})
        levels = len(self.channels)
        if not levels:
            raise LayerError("channels () make no level: give a number for each level, such as (32, 64)")
        if len(self.heads) != levels:
            raise LayerError(
                f"num_heads {self.num_heads} is for {len(self.heads)} levels, not {levels}: give one for each"
            )
        if self.null_class and self.num_classes is None:
            raise LayerError("null_class is one class more, and num_classes is None: say how many there are")
        if self.downsample_padding not in PADDINGS:
            raise LayerError(f"downsample_padding {self.downsample_padding} does not halve: choose (0, 1) or (1, 1)")
        if self.channels[0] % 2 or not 0 <= self.frequency_shift < self.channels[0] // 2:
            raise LayerError(
                f"channels[0] {self.channels[0]} and frequency_shift {self.frequency_shift} make no sinusoids of time: "
                f"choose an even number, and a shift from 0 that is less than half of it"
            )
        for level in self.attention_levels:
            if not 0 <= level < levels:
                raise LayerError(f"attention_levels names {level}, and the levels are 0 to {levels - 1}: choose there")

    def build(self, rngs: nnx.Rngs) -> "UNet":
        return UNet(self, rngs=rngs)

    @property
    def heads(self) -> tuple[int, ...]:
        """Heads of each level."""
        return (self.num_heads,) * len(self.channels) if isinstance(self.num_heads, int) else self.num_heads

    @property
    def predicted_channels(self) -> int:
        return self.out_channels or self.image_channels

    @property
    def class_vectors(self) -> int | None:
        return None if self.num_classes is None else self.num_classes + self.null_class

    def skips(self) -> list[list[int]]:
        """Channels of the activations that each level hands across, in the order in which they are made."""
        first = [self.channels[0], *self.channels[:-1]]
        return [[first[i], *[c] * self.blocks_per_level] for i, c in enumerate(self.channels)]

    def down_inputs(self, level: int) -> list[int]:
        """Channels of what each residual block of a level takes on the way down."""
        return self.skips()[level][:-1]

    def up_inputs(self, level: int) -> list[int]:
        """Channels of what each residual block of a level takes on the way up, with what is handed across."""
        above = self.channels[min(level + 1, len(self.channels) - 1)]
        coming = [above, *[self.channels[level]] * self.blocks_per_level]
        return [x + skip for x, skip in zip(coming, reversed(self.skips()[level]), strict=True)]

    def forward_flops(self, shape: tuple[int, ...], context_length: int = 77) -> float:
        """FLOPs of one image's forward pass, `shape` its (Y, X, C): convolutions, projections, attention's products.

        context_length: states of the text, where the network is told one.
        """
        height, width, image_channels = shape
        return sum(self._flops(height, width, image_channels, context_length))

    def _flops(self, height: int, width: int, image_channels: int, context_length: int) -> Iterator[float]:
        first, last = self.channels[0], len(self.channels) - 1
        time_width = 4 * first

        def conv(pixels: int, inputs: int, outputs: int, size: int = 3) -> float:
            return 2.0 * pixels * inputs * outputs * size**2

        def residual(pixels: int, inputs: int, outputs: int) -> float:
            shortcut = 0.0 if inputs == outputs else conv(pixels, inputs, outputs, 1)
            time = 2.0 * time_width * outputs
            return conv(pixels, inputs, outputs) + conv(pixels, outputs, outputs) + shortcut + time

        def attention(pixels: int, channels: int) -> float:
            among_pixels = 4 * conv(pixels, channels, channels, 1) + 4.0 * pixels**2 * channels
            if self.context_width is None:
                return among_pixels
            keys_and_values = 2 * conv(context_length, self.context_width, channels, 1)
            # Two projections around the block, two of cross-attention, and the feed-forward network's three of 4.
            others = (2 + 2 + 12) * conv(pixels, channels, channels, 1) + 4.0 * pixels * context_length * channels
            return among_pixels + keys_and_values + others

        yield 2.0 * time_width * (first + time_width)
        yield conv(height * width, image_channels, first) + conv(height * width, first, self.predicted_channels)
        for level, c in enumerate(self.channels):
            pixels = (height >> level) * (width >> level)
            inputs = self.down_inputs(level) + self.up_inputs(level)
            yield sum(residual(pixels, i, c) for i in inputs)
            if level in self.attention_levels:
                yield len(inputs) * attention(pixels, c)
            if level:
                yield conv(pixels, self.channels[level - 1], self.channels[level - 1]) + conv(4 * pixels, c, c)
            if level == last:
                yield 2 * residual(pixels, c, c) + attention(pixels, c)

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "UNetConfig":
        """From the config.json of a UNet2DModel or UNet2DConditionModel; raises PublishedError for what is not here."""
        return cls(**published_unet.own_fields(fields))

    def to_published(self) -> dict[str, Any]:
        """The config.json of this U-Net, which says nothing of its noising; raises PublishedError where there is none.

        The null class is one of the classes there.
        """
        return published_unet.published_fields(self)

    def published_layout(self) -> Layout:
        return published_unet.layout(self)


class Level(nnx.Module):
    """The blocks of one level on one side, each a residual block with or without attention behind it."""

    def __init__(self, config: UNetConfig, level: int, inputs: list[int], *, rngs: nnx.Rngs):
        channels, attends = config.channels[level], level in config.attention_levels
        residual, attention = _blocks(config, rngs)
        self.blocks = nnx.List([residual(c, channels) for c in inputs])
        self.attentions = nnx.List([attention(level) if attends else None for _ in inputs])

    def __call__(
        self, block: int, x: jax.Array, time: jax.Array, context: jax.Array | None, *, key: jax.Array | None
    ) -> jax.Array:
        """x through block number `block`; time [B, 4 * channels[0]]."""
        return _attended(self.attentions[block], self.blocks[block](x, time, key=key), context)


class UNet(nnx.Module):
    """Predicts the noise in images, or what else it was trained to, from the images and the time that says how much.

    Raises LayerError where images, or what the network is told beside them, do not fit it.
    """

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels, first, last = config.channels, config.channels[0], len(config.channels) - 1
        options = {"rngs": rngs, "precision": config.precision}
        residual, attention = _blocks(config, rngs)
        self.time = TimeEmbedding(
            first, 4 * first, shift=config.frequency_shift, cosines_first=config.cosines_first, **options
        )
        vectors = config.class_vectors
        self.classes = None if vectors is None else ClassEmbedding(vectors, 4 * first, **options)
        self.conv_in = Conv(config.image_channels, first, in_axis=None, **options)
        self.down = nnx.List([Level(config, i, config.down_inputs(i), rngs=rngs) for i in range(last + 1)])
        self.downsamples = nnx.List(
            [Downsample(channels[i], padding=config.downsample_padding, **options) for i in range(last)]
        )
        self.middle_in = residual(channels[-1], channels[-1])
        self.middle_attention = attention(last)
        self.middle_out = residual(channels[-1], channels[-1])
        self.up = nnx.List([Level(config, i, config.up_inputs(i), rngs=rngs) for i in range(last + 1)])
        self.upsamples = nnx.List([Upsample(channels[i + 1], **options) for i in range(last)])
        self.norm_out = GroupNorm(first, config.groups, epsilon=config.epsilon, precision=config.precision)
        self.conv_out = Conv(first, config.predicted_channels, out_axis=None, init=zeros, **options)

    def __call__(
        self,
        images: jax.Array,
        time: jax.Array,
        *,
        classes: jax.Array | None = None,
        context: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """images [B, Y, X, C] and time [B] (0 the least noisy): the prediction [B, Y, X, out channels], float32.

        classes: [B] int32, each below num_classes, or num_classes for none (null_class).  context: [B, S, E], a text's
        states.  Each is given where the network is told it, and only there.
        key: for dropout; None drops nothing.
        """
        config = self.config
        self._check(images, classes, context)
        levels, blocks = len(config.channels), config.blocks_per_level
        keys = iter(split(key, levels * (2 * blocks + 1) + 2))
        emb = self.time(time)
        if self.classes is not None and classes is not None:
            emb = emb + self.classes(classes)
        if context is not None:
            context = context.astype(config.precision.compute)
        x = constrain_image(self.conv_in(images.astype(config.precision.compute)))
        skips = [x]
        for level in range(levels):
            if level:
                x = self.downsamples[level - 1](x)
                skips.append(x)
            for block in range(blocks):
                x = self.down[level](block, x, emb, context, key=next(keys))
                skips.append(x)
        x = self.middle_in(x, emb, key=next(keys))
        x = _attended(self.middle_attention, x, context)
        x = self.middle_out(x, emb, key=next(keys))
        for level in reversed(range(levels)):
            for block in range(blocks + 1):
                x = self.up[level](block, _joined(x, skips.pop()), emb, context, key=next(keys))
            if level:
                x = self.upsamples[level - 1](x)
        return self.conv_out(jax.nn.silu(self.norm_out(x))).astype(jnp.float32)

    def _check(self, images: jax.Array, classes: jax.Array | None, context: jax.Array | None) -> None:
        config = self.config
        multiple = 2 ** (len(config.channels) - 1)
        check_images(images, config.image_channels)
        if images.shape[1] % multiple or images.shape[2] % multiple:
            raise LayerError(
                f"images are {images.shape[1]} x {images.shape[2]}, which {len(config.channels)} levels do not halve "
                f"evenly: choose multiples of {multiple}, or fewer levels"
            )
        for name, told, field in (("classes", classes, "num_classes"), ("context", context, "context_width")):
            if told is None and getattr(config, field) is not None:
                raise LayerError(f"{name} is missing: a network with {field} {getattr(config, field)} is told it")
            if told is not None and getattr(config, field) is None:
                raise LayerError(f"{name} is given to a network that is not told it: leave it out, or choose {field}")
        rows = images.shape[0]
        if classes is not None and classes.shape != (rows,):
            raise LayerError(f"classes have shape {classes.shape}: the network takes [{rows}], one for each image")
        if context is not None and (
            context.ndim != 3 or context.shape[0] != rows or context.shape[2] != config.context_width
        ):
            raise LayerError(
                f"context has shape {context.shape}: the network takes [{rows}, S, {config.context_width}]"
            )


def _blocks(config: UNetConfig, rngs: nnx.Rngs) -> tuple[partial[ResidualBlock], Any]:
    """What makes a residual block from its channels, and what makes the attention of a level."""
    options = {"groups": config.groups, "precision": config.precision, "rngs": rngs}
    residual = partial(
        ResidualBlock, time_width=4 * config.channels[0], epsilon=config.epsilon, dropout=config.dropout, **options
    )

    def attention(level: int) -> SpatialAttention | SpatialTransformer:
        channels, heads = config.channels[level], config.heads[level]
        if config.context_width is None:
            return SpatialAttention(channels, num_heads=heads, epsilon=config.epsilon, **options)
        return SpatialTransformer(channels, num_heads=heads, context_width=config.context_width, **options)

    return residual, attention


def _joined(x: jax.Array, skip: jax.Array) -> jax.Array:
    """What comes up and what is handed across, [B, Y, X, C + C'], channels whole on every device.

    Said to the partitioner, because with channels cut where C and C' are not equal it gives wrong gradients of the
    kernels that made them, though right ones of all else (jax 0.10.2).
    """
    # The gradient of what is handed across is read much later, and would hold all that it is made of until then.
    joined = jnp.concatenate([x, gradient_materialized(skip)], -1)
    return constrain(joined, "act_batch", "act_y", "act_x", None)


def _attended(attention: Any, x: jax.Array, context: jax.Array | None) -> jax.Array:
    """x through the attention of a level: SpatialAttention, or SpatialTransformer where there is a context, or None."""
    if attention is None:
        return x
    return attention(x) if context is None else attention(x, context)


_STABLE_DIFFUSION: dict[str, Any] = {
    "image_channels": 4,
    "channels": (320, 640, 1280, 1280),
    "attention_levels": (0, 1, 2),
    "epsilon": 1e-5,
    "downsample_padding": (1, 1),
    "cosines_first": True,
    "frequency_shift": 0,
}

_SCALED_LINEAR = Noising("scaled_linear", first_beta=0.00085, last_beta=0.012)

PRESETS: dict[str, UNetConfig] = {
    "ddpm-cifar10": UNetConfig(image_size=(32, 32), dropout=0.1),
    "ddpm-celebahq-256": UNetConfig(
        image_size=(256, 256), channels=(128, 128, 256, 256, 512, 512), attention_levels=(4,)
    ),
    "ddpm-digits": UNetConfig(
        image_channels=1,
        channels=(32, 64),
        blocks_per_level=1,
        num_heads=4,
        num_classes=10,
        null_class=True,
        groups=8,
        noising=Noising("cosine", target="velocity"),
    ),
    "ddpm-fashion": UNetConfig(
        image_channels=1,
        image_size=(28, 28),
        channels=(64, 128, 128),
        attention_levels=(1, 2),
        num_heads=4,
        dropout=0.1,
        noising=Noising("cosine", target="velocity"),
    ),
    "stable-diffusion-v1-5": UNetConfig(
        **_STABLE_DIFFUSION, image_size=(64, 64), num_heads=8, context_width=768, noising=_SCALED_LINEAR
    ),
    "stable-diffusion-2-1": UNetConfig(
        **_STABLE_DIFFUSION,
        image_size=(96, 96),
        num_heads=(5, 10, 20, 20),
        context_width=1024,
        linear_projections=True,
        upcast_attention=True,
        noising=replace(_SCALED_LINEAR, target="velocity"),
    ),
}
