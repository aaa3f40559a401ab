"""Positions: a learned table, sinusoids, and rotations of queries and keys."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.layers.linear import Initializer, LayerError, Precision, normal
from zoo.sharding import constrain


class LearnedPositions(nnx.Module):
    """One vector for each of `max_length` positions (Gehring et al. 2017)."""

    def __init__(
        self,
        max_length: int,
        width: int,
        *,
        rngs: nnx.Rngs,
        precision: Precision = Precision(),
        init: Initializer = normal(0.02),
    ):
        self.compute = precision.compute
        table = init(rngs.params(), (max_length, width), jnp.dtype(precision.parameters))
        self.table = nnx.Param(table, axes=("positions", "embed"))

    def __call__(self, positions: jax.Array) -> jax.Array:
        """The vectors of positions [...], int: [..., D]. A position outside the table gives NaN."""
        table = constrain(self.table[...], None, None)
        vectors = table.at[positions].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return vectors.astype(self.compute)


def sinusoids(positions: jax.Array, width: int, *, longest: float = 10000.0) -> jax.Array:
    """positions [...] to [..., width] float32: sines in even columns, cosines in odd (Vaswani et al. 2017).

    Column pair i turns once in 2 pi longest^(2i / width) positions. width must be even.
    """
    angles = positions[..., None] * _frequencies(width, longest)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1).reshape(*positions.shape, width)


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021): turns pairs of a head's features by angles proportional to the position.

    fraction: share of the head size that is turned, from its start; the rest passes through.
    interleaved: pairs are neighbours (2i, 2i + 1) as in the paper; else (i, i + half) as in Llama and GPT-NeoX.
    """

    longest: float = 10000.0
    fraction: float = 1.0
    interleaved: bool = False

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """x [B, T, N, H] turned by positions [B, T] (or any shape that broadcasts to it); computed in float32."""
        width = int(x.shape[-1] * self.fraction) // 2 * 2
        turned, rest = x[..., :width].astype(jnp.float32), x[..., width:]
        angles = positions[..., None, None] * _frequencies(width, self.longest)
        sin, cos = jnp.sin(angles), jnp.cos(angles)
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(turned.shape)
        else:
            a, b = jnp.split(turned, 2, -1)
            turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
        return jnp.concatenate([turned.astype(x.dtype), rest], -1)


def _frequencies(width: int, longest: float) -> jax.Array:
    """Radians per position of each of width / 2 pairs."""
    if width % 2:
        raise LayerError(f"sinusoids need an even width and got {width}: choose {width + 1}")
    return longest ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
