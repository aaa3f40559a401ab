"""Dropout of attention probabilities by a counter: which are dropped is a hash of (key, b, n, q, k).

The indices are global, so that every implementation, block size and sharding drops the same ones, and nothing is kept
for the backward pass. The mixing function is lowbias32 (Wellons, https://github.com/skeeto/hash-prospector): integer
operations alone, exact on every platform. It is not cryptographic.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from zoo.kernels.mask import AttentionError

# Signed, for vector units have no unsigned integers; the bits are the same.
_LANES = (0x9E3779B9 - 2**32, 0x85EBCA6B - 2**32)
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32


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
    first, second = row_words(seed, batch[:, None, None], heads[:, None], query)
    return pairs_kept(rate, first[..., None], second[..., None], key)


def row_words(seed: Sequence[jax.Array] | jax.Array, *counters: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two int32 words for every row of scores: of the seed's words and the row's indices, which broadcast."""
    first, second = (jnp.int32(lane) for lane in _LANES)
    for word in (*seed, *counters):
        word = word.astype(jnp.int32)
        first, second = _mix(first ^ word), _mix(second ^ word)
    return first, second


def pairs_kept(rate: float, first: jax.Array, second: jax.Array, key: jax.Array) -> jax.Array:
    """Which of a row's probabilities stay, by `row_words` and the key's index; the arrays broadcast."""
    x = first ^ (key.astype(jnp.int32) * jnp.int32(_LANES[0]))
    x = (x ^ _shifted(x, 16)) * jnp.int32(_FIRST)
    x = x ^ second
    x = (x ^ _shifted(x, 15)) * jnp.int32(_SECOND)
    x = x ^ _shifted(x, 16)
    # Flipping the sign bit of both sides turns a comparison of unsigned numbers into one of signed ones.
    least = min(round(rate * 2**32), 2**32 - 1) - 2**31
    return (x ^ jnp.int32(-(2**31))) >= jnp.int32(least)


def _mix(x: jax.Array) -> jax.Array:
    """lowbias32: a bijection of 32-bit words in which every input bit reaches every output bit."""
    x = (x ^ _shifted(x, 16)) * jnp.int32(_FIRST)
    x = (x ^ _shifted(x, 15)) * jnp.int32(_SECOND)
    return x ^ _shifted(x, 16)


def _shifted(x: jax.Array, bits: int) -> jax.Array:
    return jax.lax.shift_right_logical(x, jnp.int32(bits))
