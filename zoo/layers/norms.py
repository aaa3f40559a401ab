"""Normalisations over the last axis, with float32 statistics.

The backward pass keeps their input alone and takes the statistics again, which costs less than reading them.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.layers.linear import Precision


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over x [..., D] (Ba et al. 2016); the variance is biased.

    scale, bias: whether it has these parameters; what a condition modulates has neither.
    """

    def __init__(
        self,
        width: int,
        *,
        epsilon: float = 1e-5,
        scale: bool = True,
        bias: bool = True,
        precision: Precision = Precision(),
    ):
        self.epsilon, self.compute = epsilon, precision.compute
        dtype = jnp.dtype(precision.parameters)
        self.scale = nnx.Param(jnp.ones(width, dtype), axes=("norm",)) if scale else None
        self.bias = nnx.Param(jnp.zeros(width, dtype), axes=("norm",)) if bias else None

    @partial(jax.checkpoint, prevent_cse=False)
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.epsilon)
        if self.scale is not None:
            y = y * self.scale[...]
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(self.compute)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale over x [..., D] (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, *, epsilon: float = 1e-6, precision: Precision = Precision()):
        self.epsilon, self.compute = epsilon, precision.compute
        self.scale = nnx.Param(jnp.ones(width, jnp.dtype(precision.parameters)), axes=("norm",))

    @partial(jax.checkpoint, prevent_cse=False)
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        mean_square = jnp.square(x).mean(-1, keepdims=True)
        return (x * jax.lax.rsqrt(mean_square + self.epsilon) * self.scale[...]).astype(self.compute)
