"""Dropout's counter hash: the right share, no pattern, a function of key and global indices alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.kernels import AttentionError, attention
from zoo.kernels.dropout import keep, words

SHAPE = (2, 3, 128, 256)


def bits(seed: int, rate: float = 0.5, start: tuple[int, ...] = (0, 0, 0, 0), shape: tuple[int, ...] = SHAPE):
    indices = [jnp.arange(a, a + n, dtype=jnp.int32) for a, n in zip(start, shape, strict=True)]
    return np.asarray(keep(words(jax.random.key(seed)), rate, *indices))


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_share(rate: float) -> None:
    """Within five standard deviations, over all and in every row and column of scores."""
    kept = bits(0, rate)
    for axes in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (1, 2, 3), (0, 2, 3)):
        count = np.prod([SHAPE[axis] for axis in axes])
        deviation = np.sqrt(rate * (1 - rate) / count)
        assert np.max(np.abs(kept.mean(axes) - (1 - rate))) < 5 * deviation


@pytest.mark.parametrize("axis", range(4))
def test_neighbours_are_independent(axis: int) -> None:
    kept = bits(1)
    first, second = np.take(kept, range(SHAPE[axis] - 1), axis), np.take(kept, range(1, SHAPE[axis]), axis)
    agreement = np.mean(first == second)
    assert abs(agreement - 0.5) < 5 * 0.5 / np.sqrt(first.size)


def test_keys_differ() -> None:
    agreement = np.mean(bits(2) == bits(3))
    assert abs(agreement - 0.5) < 5 * 0.5 / np.sqrt(np.prod(SHAPE))


def test_a_block_is_cut_from_the_whole() -> None:
    block = bits(4, start=(1, 1, 32, 64), shape=(1, 2, 16, 32))
    np.testing.assert_array_equal(block, bits(4)[1:, 1:, 32:48, 64:96])


def test_expectation_and_determinism() -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 8, 2, 4)) for i in range(3))
    drop = jax.jit(lambda key: attention(q, k, v, dropout=0.3, dropout_key=key))
    np.testing.assert_array_equal(drop(jax.random.key(0)), drop(jax.random.key(0)))
    many = jax.vmap(drop)(jax.random.split(jax.random.key(1), 4000))
    error = np.abs(many.mean(0) - attention(q, k, v)) / (many.std(0) / np.sqrt(len(many)))
    assert error.max() < 5
    np.testing.assert_array_equal(attention(q, k, v, dropout=0.3), attention(q, k, v))


def test_errors_name_the_thing() -> None:
    q = jnp.ones((1, 2, 1, 4))
    with pytest.raises(AttentionError, match=r"dropout=1\.0"):
        attention(q, q, q, dropout=1.0, dropout_key=jax.random.key(0))
    with pytest.raises(AttentionError, match="dropout_key has shape"):
        attention(q, q, q, dropout=0.5, dropout_key=jax.random.split(jax.random.key(0)))
