"""A bias of each pair in the TPU kernels: an array, or a function of more than the distance, evaluated as an array.

A visit reads its block of the array and writes the block of its gradient, both transposed on the way; blocks that no
visit writes are known from the work list. Both are quadratic in length, so that no more is taken than `chunked` would
hold in blocks of scores, or than the caller's own array has.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from zoo.kernels import bias as biases
from zoo.kernels.bias import Bias
from zoo.kernels.mask import Side
from zoo.kernels.problem import Problem
from zoo.kernels.tpu_bias import LOG2_E, by_distance
from zoo.kernels.tpu_blocks import Blocks
from zoo.kernels.work_list import WHOLE

MOST_BYTES = 2**29
"""Of one float32 value for each pair, row and head."""


def bytes_of(problem: Problem) -> int:
    """Of the gradient: a float32 for each pair, row and head; 0 without a bias, and for one of the distance."""
    shape = problem.shape
    if problem.bias is None or by_distance(problem):
        return 0
    return 4 * shape.batch * shape.heads * shape.queries * shape.keys


def refusal(problem: Problem) -> str | None:
    """Why the kernels cannot take the call's bias pair by pair, or None."""
    size, bias = bytes_of(problem), problem.bias
    own = 4 * bias.size if isinstance(bias, jax.Array) else 0
    if size <= max(MOST_BYTES, own):
        return None
    kind = "is an array" if own else "depends on more of the positions than key - query"
    return f"its bias {kind}, whose gradient takes {size / 2**30:.1f} GiB a device, above {MOST_BYTES / 2**30:.1f}"


class ByPair(NamedTuple):
    """The bias of a call.

    shape: of the scores, [B, N, T, S]; padded: T and S in whole blocks.
    """

    bias: jax.Array | Bias
    heads: jax.Array
    query: Side
    key: Side
    shape: tuple[int, int, int, int]
    padded: tuple[int, int]

    @classmethod
    def of(cls, problem: Problem, queries: int, keys: int) -> "ByPair":
        """queries, keys: padded."""
        p, shape = problem, problem.shape
        assert p.bias is not None
        size = (shape.batch, shape.heads, shape.queries, shape.keys)
        return cls(p.bias, p.heads, p.mask.query, p.mask.key, size, (queries, keys))

    @property
    def _learned(self) -> Any:
        return self.bias.tables if isinstance(self.bias, Bias) else self.bias

    def _values(self, learned: Any) -> jax.Array:
        """[1 or B, 1 or N, T, S]."""
        bias = Bias(self.bias.function, learned) if isinstance(self.bias, Bias) else learned
        x = biases.block(bias, self.heads, self.query, self.key, (0, 0))
        return jnp.broadcast_to(x, (*x.shape[:2], *self.shape[2:]))

    def laid_out(self) -> jax.Array:
        """Float32, or bfloat16 where the bias is, [1 or B, 1 or N, T, S], padded."""
        x = self._values(self._learned)
        extra = [(0, whole - size) for whole, size in zip(self.padded, x.shape[2:], strict=True)]
        return jnp.pad(x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32), ((0, 0), (0, 0), *extra))

    def gradient(self, sums: jax.Array, written: jax.Array | None) -> Any:
        """Like the array, or the tables, in float32.

        sums: gradient of the scores, [B, N, T, S], padded; written: bool [1 or B, blocks of queries, of keys], or None
        where all are.
        """
        if written is not None:
            of_queries, of_keys = (whole // count for whole, count in zip(self.padded, written.shape[1:], strict=True))
            sums = jnp.where(jnp.repeat(jnp.repeat(written, of_queries, 1), of_keys, 2)[:, None], sums, 0)
        sums = sums[:, :, : self.shape[2], : self.shape[3]]

        def whole(learned: Any) -> jax.Array:
            return jnp.broadcast_to(self._values(learned).astype(jnp.float32), self.shape)

        (learned,) = jax.vjp(whole, jax.tree.map(lambda x: x.astype(jnp.float32), self._learned))[1](sums)
        return learned


class PairBlock:
    """The bias of one visit, in a kernel: references to its values and, backward, to their gradient, both [t, s]."""

    def __init__(self, values: Any, gradient: Any = None) -> None:
        self.values, self.gradient = values, gradient

    def before(self, head_starts: Any, flags: Any) -> None:
        """What comes before a visit: strips that it leaves out have no gradient."""
        if self.gradient is not None:

            @pl.when((flags != 0) & ((flags & WHOLE) == 0))
            def _clear() -> None:
                self.gradient[...] = jnp.zeros(self.gradient.shape, jnp.float32)

    def after(self, head_ends: Any, flags: Any) -> None:
        """What comes after a visit of the backward pass: nothing."""

    def tile(self, key: Any, query: int, shape: tuple[int, ...]) -> jax.Array:
        """The bias in base 2 of scores [s, t] = shape, of keys and queries from these of the visit on."""
        return self.values[query : query + shape[1], pl.ds(key, shape[0])].astype(jnp.float32).T * LOG2_E

    def add(self, gradient: jax.Array, key: Any, query: int) -> None:
        """The gradient of scores [s, t], of keys and queries from these of the visit on."""
        size, width = gradient.shape
        self.gradient[query : query + width, pl.ds(key, size)] = gradient.T


def block_bytes(blocks: Blocks) -> int:
    """Of values and gradients in VMEM, twice each."""
    return 4 * 4 * blocks.queries * blocks.keys
