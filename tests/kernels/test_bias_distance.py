"""Biases of distances: which functions are, and sums of scores by distance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.kernels.bias_distance import depends_on_distance, summed_by_distance

TABLE = jnp.ones((8, 4))


def bucketed(table, head, query, key):
    distance = jnp.clip(jnp.abs(query - key), 0, 7)
    return jnp.where(query >= key, table[distance, head], table[jnp.minimum(distance, 3), head])


@pytest.mark.parametrize(
    ("function", "answer"),
    [
        (lambda table, head, query, key: table[0, head] * (key - query), True),
        (lambda table, head, query, key: table[0, head] * jnp.abs(query.astype(jnp.float32) - key), True),
        (lambda table, head, query, key: table[0, head], True),
        (lambda table, head, query, key: table[0, head] * (jnp.maximum(query, key) - jnp.minimum(query, key)), True),
        (lambda table, head, query, key: jax.nn.relu(query - key) * table[0, head], True),
        (lambda table, head, query, key: jax.checkpoint(bucketed)(table, head, query, key), True),
        (lambda table, head, query, key: -(query - (key + 1)) * table[1, head], True),
        (jax.jit(bucketed), True),
        (lambda table, head, query, key: table[0, head] * key, False),
        (lambda table, head, query, key: table[key % 8, head], False),
        (lambda table, head, query, key: table[0, head] * (2 * key - query), False),
        (lambda table, head, query, key: table[(key // 8 - query // 8) % 8, head], False),
        (lambda table, head, query, key: table[0, head] * (key.astype(jnp.bfloat16) - query), False),
        (lambda table, head, query, key: jnp.where(query > 5, table[0, head], table[1, head]) * (key - query), False),
        (lambda table, head, query, key: (key + query) * table[0, head], False),
    ],
)
def test_depends_on_distance(function, answer: bool) -> None:
    assert depends_on_distance(function, TABLE, 4) == answer


def test_a_function_is_traced_once_for_each_of_its_shapes() -> None:
    calls = []

    def function(table, head, query, key):
        calls.append(table.shape)
        return table[0, head] * (key - query)

    for heads in (4, 4, 2):
        assert depends_on_distance(function, TABLE, heads)
    assert len(calls) == 2


def test_a_function_without_weak_references() -> None:
    class Slotted(NamedTuple):
        sign: int

        def __call__(self, table, head, query, key):
            return self.sign * table[0, head] * key

    assert not depends_on_distance(Slotted(-1), TABLE, 4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (5, 3), (7, 16), (16, 8)])
def test_sums_by_distance_are_traces(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, *shape)).astype(np.float32)
    traces = [np.trace(x, distance, axis1=2, axis2=3) for distance in range(1 - shape[0], shape[1])]
    np.testing.assert_allclose(summed_by_distance(jnp.asarray(x)), np.stack(traces, -1), atol=1e-5)
