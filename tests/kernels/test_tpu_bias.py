"""What the TPU kernels can know of a bias: whether its function, and its positions, leave it one of distances."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.kernels import Bias, Mask, tpu_bias
from zoo.kernels.mask import resolve

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
    assert tpu_bias.depends_on_distance(Bias(function, TABLE), jnp.arange(4)) == answer


def test_a_function_is_traced_once_for_each_of_its_shapes() -> None:
    calls = []

    def function(table, head, query, key):
        calls.append(table.shape)
        return table[0, head] * (key - query)

    for heads in (4, 4, 2):
        assert tpu_bias.depends_on_distance(Bias(function, TABLE), jnp.arange(heads))
    assert len(calls) == 2


def test_a_function_without_weak_references() -> None:
    class Slotted(NamedTuple):
        sign: int

        def __call__(self, table, head, query, key):
            return self.sign * table[0, head] * key

    assert not tpu_bias.depends_on_distance(Bias(Slotted(-1), TABLE), jnp.arange(4))


DOCUMENTS = np.array([[1] * 7 + [2] * 9, [3] * 2 + [1] * 10 + [0] * 4])
ANEW = np.array([[*range(7), *range(9)], [*range(2), *range(10), 5, 5, 5, 5]])


@pytest.mark.parametrize(
    ("mask", "kept", "apart"),
    [
        (Mask(), True, [0]),
        (Mask(positions=np.arange(16) + 5), True, [0]),
        (Mask(positions=(np.arange(16) + 100, np.arange(16))), True, [-100]),
        (Mask(segments=DOCUMENTS, positions=ANEW), True, [0, 0]),
        (Mask(segments=(DOCUMENTS, DOCUMENTS), positions=(ANEW + 3, ANEW)), True, [-3, -3]),
        (Mask(positions=ANEW), False, None),
        (Mask(positions=np.arange(16)[::-1]), False, None),
        (Mask(positions=(np.arange(16), 2 * np.arange(16))), False, None),
        (Mask(segments=DOCUMENTS, positions=(ANEW, ANEW + 2 * (DOCUMENTS == 1))), False, None),
        (Mask(lengths=[9, 9], positions=(np.arange(16), np.minimum(np.arange(16), 8))), True, [0, 0]),
    ],
)
def test_keeps_distance(mask: Mask, kept: bool, apart: list[int] | None) -> None:
    resolved = resolve(mask, 2, 16, 16)
    assert bool(tpu_bias.keeps_distance(resolved)) == kept
    if apart is not None:
        assert tpu_bias.apart(resolved)[:, 0].tolist() == apart
