"""Blocks of U-Nets over images [B, Y, X, C]: residual blocks, attention, resampling, time and class embeddings."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.kernels.memory import recomputed
from zoo.layers.attention import MultiHeadAttention
from zoo.layers.convolution import Conv, GroupNorm, fan_average, scaled
from zoo.layers.dropout import dropout
from zoo.layers.feedforward import FeedForward
from zoo.layers.linear import Embed, LayerError, Linear, Precision
from zoo.layers.norms import LayerNorm
from zoo.layers.transformer import Block
from zoo.sharding import constrain

zeros = jax.nn.initializers.zeros


def constrain_image(x: jax.Array) -> jax.Array:
    return constrain(x, "act_batch", "act_y", "act_x", "act_channels")


def check_images(images: jax.Array, channels: int) -> None:
    """Raises LayerError unless they are [B, Y, X, channels]."""
    if images.ndim != 4 or images.shape[-1] != channels:
        raise LayerError(f"images have shape {images.shape}: the network takes [B, Y, X, {channels}]")


def sinusoidal_time(
    time: jax.Array, width: int, *, longest: float = 10000.0, shift: int = 1, cosines_first: bool = False
) -> jax.Array:
    """time [B] to [B, width] float32: sines, then cosines, of frequencies longest^(-i / (width / 2 - shift)).

    With shift 1 the last of them is 1 / longest (Ho et al. 2020); with 0 it is the next that would be (Vaswani et al.
    2017). width must be even, and its half more than shift.
    """
    half = width // 2
    frequencies = jnp.exp(jnp.arange(half, dtype=jnp.float32) * (-math.log(longest) / (half - shift)))
    angles = time.astype(jnp.float32)[:, None] * frequencies
    waves = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(waves[::-1] if cosines_first else waves, -1)


class TimeEmbedding(nnx.Module):
    """Sinusoids of width `channels` through two linear maps with a SiLU between: time [B] to [B, width].

    shift, cosines_first: as `sinusoidal_time` takes them.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        rngs: nnx.Rngs,
        shift: int = 1,
        cosines_first: bool = False,
        precision: Precision = Precision(),
    ):
        self.channels, self.compute = channels, precision.compute
        self.shift, self.cosines_first = shift, cosines_first
        options = {"rngs": rngs, "precision": precision, "init": fan_average}
        self.expand = Linear(channels, width, axes=(None, "mlp"), **options)
        self.mix = Linear(width, width, axes=("mlp", "time"), **options)

    def __call__(self, time: jax.Array) -> jax.Array:
        x = sinusoidal_time(time, self.channels, shift=self.shift, cosines_first=self.cosines_first)
        x = x.astype(self.compute)
        return self.mix(jax.nn.silu(self.expand(x)))


class ClassEmbedding(nnx.Module):
    """A vector for each class, which is added to that of the time: classes [B] int32 to [B, width].

    A class that there is none of becomes NaN. (Nichol and Dhariwal 2021, arXiv 2102.09672.)
    """

    def __init__(self, classes: int, width: int, *, rngs: nnx.Rngs, precision: Precision = Precision()):
        self.embed = Embed(classes, width, rngs=rngs, precision=precision)

    def __call__(self, classes: jax.Array) -> jax.Array:
        # The table's rows are padded, and its lookup finds nothing before the first.
        return self.embed(jnp.where(classes < self.embed.vocab_size, classes, -1))


class ResidualBlock(nnx.Module):
    """x + conv(dropout(silu(norm(conv(silu(norm(x))) + time)))); the last convolution starts at zero.

    Where the channels change, x goes through a 1 x 1 convolution. (Ho et al. 2020, appendix B.)
    time_width: None for a block that is told no time, as those of an autoencoder are.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_width: int | None,
        groups: int,
        rngs: nnx.Rngs,
        epsilon: float = 1e-6,
        dropout: float = 0.0,
        precision: Precision = Precision(),
    ):
        self.dropout = dropout
        options = {"rngs": rngs, "precision": precision}
        self.norm_in = GroupNorm(in_channels, groups, epsilon=epsilon, precision=precision)
        self.conv_in = Conv(in_channels, out_channels, **options)
        self.time = (
            None
            if time_width is None
            else Linear(time_width, out_channels, axes=("time", "conv_out"), init=fan_average, **options)
        )
        self.norm_out = GroupNorm(out_channels, groups, epsilon=epsilon, precision=precision)
        self.conv_out = Conv(out_channels, out_channels, init=zeros, **options)
        self.shortcut = (
            None
            if in_channels == out_channels
            else Linear(in_channels, out_channels, axes=("conv_in", "conv_out"), init=fan_average, **options)
        )

    def __call__(self, x: jax.Array, time: jax.Array | None = None, *, key: jax.Array | None = None) -> jax.Array:
        """x [B, Y, X, I], time [B, time_width]: [B, Y, X, O]. key: for dropout; None drops nothing."""
        if (time is None) != (self.time is None):
            raise LayerError("a residual block is called with time if it is made with time_width, else without")
        h = recomputed(_activated, self.norm_in.coefficients(x), self.conv_in, x)
        if self.time is not None and time is not None:
            h = h + self.time(jax.nn.silu(time))[:, None, None, :]
        h = constrain_image(h)
        h = recomputed(partial(_activated, rate=self.dropout), self.norm_out.coefficients(h), self.conv_out, h, key)
        return constrain_image((x if self.shortcut is None else self.shortcut(x)) + h)


def _activated(
    norm: tuple[jax.Array, jax.Array], conv: Conv, x: jax.Array, key: jax.Array | None = None, *, rate: float = 0.0
) -> jax.Array:
    """norm: its coefficients for x."""
    return conv(dropout(jax.nn.silu(scaled(x, norm, conv.precision.compute)), rate, key))


class SpatialAttention(nnx.Module):
    """x + attention among all pixels of norm(x); its output projection starts at zero."""

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        groups: int,
        rngs: nnx.Rngs,
        epsilon: float = 1e-6,
        precision: Precision = Precision(),
    ):
        self.norm = GroupNorm(channels, groups, epsilon=epsilon, precision=precision)
        self.attention = MultiHeadAttention(
            channels, num_heads, rngs=rngs, precision=precision, init=fan_average, out_init=zeros
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return constrain_image(x + recomputed(_attended, self.norm.coefficients(x), self.attention, x))


def _attended(norm: tuple[jax.Array, jax.Array], attention: MultiHeadAttention, x: jax.Array) -> jax.Array:
    """norm: its coefficients for x."""
    pixels = scaled(x, norm, attention.compute).reshape(x.shape[0], -1, x.shape[-1])
    return attention(pixels).output.reshape(x.shape)


class SpatialTransformer(nnx.Module):
    """x + a transformer block over all pixels of norm(x), which also attends to a context (Rombach et al. 2022, E.2.1).

    The block, pre-norm self-attention, cross-attention and a feed-forward network of GEGLU (Shazeer 2020) four times as
    wide, stands between two projections, of which the last starts at zero.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        context_width: int,
        groups: int,
        rngs: nnx.Rngs,
        epsilon: float = 1e-6,
        precision: Precision = Precision(),
    ):
        options: dict[str, Any] = {"rngs": rngs, "precision": precision, "init": fan_average}
        self.norm = GroupNorm(channels, groups, epsilon=epsilon, precision=precision)
        self.project_in = Linear(channels, channels, axes=("conv_in", "embed"), **options)
        attention = partial(MultiHeadAttention, channels, num_heads, bias=False, out_bias=True, **options)
        self.block = Block(
            attention(),
            FeedForward(channels, 4 * channels, activation="gelu", gated=True, **options),
            partial(LayerNorm, channels, precision=precision),
            cross_attention=attention(kv_width=context_width),
        )
        self.project_out = Linear(
            channels, channels, axes=("embed", "conv_out"), rngs=rngs, precision=precision, init=zeros
        )

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """x [B, Y, X, C] and context [B, S, E] in the compute dtype: [B, Y, X, C]."""
        pixels = self.project_in(self.norm(x).reshape(x.shape[0], -1, x.shape[-1]))
        pixels = self.block(pixels, context=context).x
        return constrain_image(x + self.project_out(pixels).reshape(x.shape))


class Downsample(nnx.Module):
    """A 3 x 3 convolution of stride 2: [B, Y, X, C] to [B, Y / 2, X / 2, C]; padding: zeros before and after a side."""

    def __init__(
        self,
        channels: int,
        *,
        rngs: nnx.Rngs,
        padding: tuple[int, int] = (0, 1),
        precision: Precision = Precision(),
    ):
        self.conv = Conv(channels, channels, stride=2, padding=padding, rngs=rngs, precision=precision)

    def __call__(self, x: jax.Array) -> jax.Array:
        return constrain_image(self.conv(x))


class Upsample(nnx.Module):
    """Every pixel four times, then a 3 x 3 convolution: [B, Y, X, C] to [B, 2 Y, 2 X, C]."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, precision: Precision = Precision()):
        self.conv = Conv(channels, channels, rngs=rngs, precision=precision)

    def __call__(self, x: jax.Array) -> jax.Array:
        return constrain_image(recomputed(_enlarged, x, self.conv))


def _enlarged(x: jax.Array, conv: Conv) -> jax.Array:
    return conv(x.repeat(2, axis=1).repeat(2, axis=2))
