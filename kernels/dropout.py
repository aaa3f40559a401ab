"""Dropout of attention probabilities by a counter: which are dropped is a hash of (key, b, n, q, k).

The indices are global, so that every implementation, block size and sharding drops the same ones, and nothing is kept
for the backward pass. The mixing function is lowbias32 (Wellons, https://github.com/skeeto/hash-prospector): integer
operations alone, exact on every platform. It is not cryptographic.
"""

import jax
import jax.numpy as jnp

from zoo.kernels.mask import AttentionError

_LANES = (0x9E3779B9, 0x85EBCA6B)


def words(key: jax.Array) -> jax.Array:
    """The uint32 words of a random key, typed or raw."""
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    if data.dtype != jnp.uint32 or data.ndim != 1:
        raise AttentionError(f"dropout_key has shape {key.shape} and type {key.dtype}: give one jax.random.key(...)")
    return data


def keep(
    seed: jax.Array, rate: float, batch: jax.Array, heads: jax.Array, query: jax.Array, key: jax.Array
) -> jax.Array:
    """Which probabilities stay, each with probability 1 - rate: bool [B, N, t, s].

    seed: `words` of the key; batch [B], heads [N], query [t] and key [s]: global indices.
    """
    counters = (batch[:, None, None], heads[:, None], query)
    rows = [jnp.uint32(lane) for lane in _LANES]
    for word in (*seed, *counters):
        rows = [_mix(row ^ word.astype(jnp.uint32)) for row in rows]
    first, second = (row[..., None] for row in rows)
    x = first ^ (key.astype(jnp.uint32) * jnp.uint32(_LANES[0]))
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = x ^ second
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return (x ^ (x >> 16)) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def _mix(x: jax.Array) -> jax.Array:
    """lowbias32: a bijection of 32-bit words in which every input bit reaches every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
