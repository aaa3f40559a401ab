"""Dropout by key."""

import jax
import jax.numpy as jnp

from zoo.layers.linear import LayerError


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate); key None leaves x as it is.

    The mask depends on the key and on global indices alone, so that every sharding drops the same elements. Raises
    LayerError for a rate outside [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise LayerError(f"dropout {rate} is not a probability below 1: choose a number from 0 to below 1")
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def split(key: jax.Array | None, count: int) -> tuple[jax.Array | None, ...]:
    """`count` keys from one, or as many None."""
    return (None,) * count if key is None else tuple(jax.random.split(key, count))
