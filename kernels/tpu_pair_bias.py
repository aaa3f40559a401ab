"""A bias of each pair in the TPU kernels: an array, or a function of more than the distance, evaluated as an array.

A visit reads its block of the array and writes the block of its gradient, both transposed on the way; blocks that no
visit writes are known from the work list. Both arrays are quadratic in length, so that a call is taken up to a size.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from zoo.kernels import bias as biases
from zoo.kernels import tpu_blocks
from zoo.kernels.bias import Bias
from zoo.kernels.mask import ResolvedMask, Side
from zoo.kernels.problem import Problem, Shape, varying_axes, varying_over
from zoo.kernels.tpu_bias import LOG2_E, by_distance
from zoo.kernels.tpu_blocks import Blocks
from zoo.kernels.tpu_layout import Buffers, Place, by_pair, shape_like
from zoo.kernels.work_list import WHOLE

MOST_BYTES = 2**29
"""Of the bias as the kernels read it and its gradient, where the caller's own array does not take as much."""


def bytes_of(problem: Problem) -> int:
    """Of copies and gradient of the bias, in whole blocks; 0 without one, and for one of the distance."""
    p, shape = problem, problem.shape
    if p.bias is None or by_distance(p):
        return 0
    pairs, exact = 0, True
    for blocks in (tpu_blocks.find("forward", p), tpu_blocks.find("backward", p)):
        size = blocks.padded(shape.queries, shape.keys)
        pairs = max(pairs, math.prod(size))
        exact &= isinstance(p.bias, jax.Array) and p.bias.shape[2:] == size and _taken(p.bias.dtype)
    gradient = 4 * shape.batch * shape.heads * pairs
    if exact:
        return gradient
    if isinstance(p.bias, Bias):
        return 2 * gradient
    return gradient + p.bias.shape[0] * p.bias.shape[1] * pairs * (p.bias.dtype.itemsize if _taken(p.bias.dtype) else 4)


def _taken(dtype: jnp.dtype) -> bool:
    """Whether the kernels read it."""
    return dtype in (jnp.bfloat16, jnp.float32)


def refusal(problem: Problem) -> str | None:
    """Why the kernels cannot take the call's bias, or None."""
    size, bias = bytes_of(problem), problem.bias
    own = bias.nbytes if isinstance(bias, jax.Array) else 0
    if size <= max(MOST_BYTES, own):
        return None
    kind = "is an array" if own else "depends on more of the positions than key - query"
    return f"its bias {kind}: with its gradient that takes {size / 2**30:.1f} GiB a device, above {MOST_BYTES / 2**30}"


class ByPair(NamedTuple):
    """The bias of a call.

    shape: of the call; query, key: sides of the mask, padded to whole blocks; written(): bool [1 or B, blocks of
    queries, of keys], of those that a visit is to, or None where that is known to be all.
    """

    bias: jax.Array | Bias
    heads: jax.Array
    shape: Shape
    query: Side
    key: Side
    blocks: Blocks
    written: Callable[[], jax.Array | None]

    @classmethod
    def of(
        cls, problem: Problem, mask: ResolvedMask, blocks: Blocks, written: Callable[[], jax.Array | None]
    ) -> "ByPair":
        """mask: padded."""
        assert problem.bias is not None
        return cls(problem.bias, problem.heads, problem.shape, mask.query, mask.key, blocks, written)

    def buffers(self, query: Place, key: Place, *, backward: bool) -> Buffers:
        """What it adds to a kernel's."""
        array = self._values()
        sums = shape_like((self.shape.batch, self.shape.heads, *self._padded), array, jnp.float32)
        values, d_values = (by_pair(x, self.blocks, query, key) for x in (array, sums))
        return Buffers({"bias": values}, {"d_bias": d_values} if backward else {})

    def at(self, query_block: Any, key_block: Any, named: dict[str, Any]) -> "PairBlock":
        """Of one visit, in a kernel; takes its references out of `named`."""
        return PairBlock(named.pop("bias"), named.pop("d_bias", None))

    @property
    def _padded(self) -> tuple[int, int]:
        return self.query.length, self.key.length

    def _values(self) -> jax.Array:
        """Float32, or bfloat16 where the bias is, [1 or B, 1 or N, T, S], padded."""
        if isinstance(self.bias, Bias):
            return self._evaluated(self.bias)
        x: Any = biases.padded(self.bias, *self._padded)
        x = x if _taken(x.dtype) else x.astype(jnp.float32)
        return jnp.broadcast_to(x, (*x.shape[:2], *self._padded))

    def _evaluated(self, bias: Bias) -> jax.Array:
        """A tile at a time: what the function makes on its way may be large."""

        def tile(i: Any, j: Any) -> jax.Array:
            x = biases.block(bias, self.heads, *self._sides(i, j))
            x = jnp.broadcast_to(x, (*x.shape[:2], self.blocks.rows, self.blocks.step))
            return x if _taken(x.dtype) else x.astype(jnp.float32)

        def put(whole: jax.Array, i: Any, j: Any) -> jax.Array:
            return jax.lax.dynamic_update_slice(whole, tile(i, j), (0, 0, i, j))

        one = jax.eval_shape(tile, 0, 0)
        return self._over_tiles(put, jnp.zeros((*one.shape[:2], *self._padded), one.dtype))

    def gradient(self, sums: jax.Array) -> Any:
        """Like the array, or the tables, in float32; sums: gradient of the scores, [B, N, T, S], padded."""
        if isinstance(self.bias, Bias):
            return self._of_tables(self.bias, sums)
        written = self.written()
        if written is not None:
            there = jnp.repeat(jnp.repeat(written, self.blocks.queries, 1), self.blocks.keys, 2)
            sums = jnp.where(there[:, None], sums, 0)
        sums = sums[:, :, : self.shape.queries, : self.shape.keys]
        return sums.sum([axis for axis, size in enumerate(self.bias.shape) if size == 1], keepdims=True)

    def _of_tables(self, bias: Bias, sums: jax.Array) -> Any:
        rows, step, written = self.blocks.rows, self.blocks.step, self.written()

        def add(total: Any, i: Any, j: Any) -> Any:
            scores = jax.lax.dynamic_slice(sums, (0, 0, i, j), (*sums.shape[:2], rows, step))
            if written is not None:
                there = written[:, i // self.blocks.queries, j // self.blocks.keys]
                scores = jnp.where(there[:, None, None, None], scores, 0)
            return biases.add_gradient(total, bias, scores, self.heads, *self._sides(i, j))

        return self._over_tiles(add, biases.zero_gradient(bias, jnp.dtype(jnp.float32)), sums, written)

    def _sides(self, i: Any, j: Any) -> tuple[Side, Side]:
        return self.query.block(i, self.blocks.rows), self.key.block(j, self.blocks.step)

    def _over_tiles(self, body: Callable[[Any, Any, Any], Any], carry: Any, *others: jax.Array | None) -> Any:
        """The last carry of body(carry, first query, first key) over tiles; others: what it reads besides."""
        rows, step = self.blocks.rows, self.blocks.step
        across = self.key.length // step
        carry = varying_over(carry, varying_axes((self.bias, self.heads, self.query, self.key, others)))

        def one(n: jax.Array, carry: Any) -> Any:
            return body(carry, n // across * rows, n % across * step)

        return jax.lax.fori_loop(jnp.int32(0), jnp.int32(self.query.length // rows * across), one, carry)


class PairBlock:
    """The bias of one visit, in a kernel: references to its values and, backward, to their gradient, both [t, s].

    It has what `Diagonals` has.
    """

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
        """The gradient of scores [s, t], of keys and queries from these of the visit on, which has them once."""
        size, width = gradient.shape
        self.gradient[query : query + width, pl.ds(key, size)] = gradient.T


def block_bytes(blocks: Blocks) -> int:
    """Of values and gradients in VMEM, twice each."""
    return 4 * 4 * blocks.queries * blocks.keys
