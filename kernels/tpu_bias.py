"""A bias of the distance between query and key alone, in the TPU kernels: ALiBi, T5's buckets, any such function.

Such a bias is constant along the diagonals of the scores. The caller's function, whatever is in it, is evaluated
outside of the kernels, once for each of the T + S distances, and its gradient is taken there, from the sums of the
scores' gradients along each diagonal. A kernel reads the bias of a visit's distances as rows of 128, lays it out as one
array of 128 columns of which every 128 columns of a tile are a range of rows, and sums gradients in another such array.

Whether positions that the caller gives are as far apart as their places in the arrays, or piece by piece so, as in
packed documents, is known only when the program runs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from zoo.kernels import bias as biases
from zoo.kernels.bias import Bias
from zoo.kernels.mask import ResolvedMask, Side
from zoo.kernels.problem import Problem
from zoo.kernels.tpu_blocks import LANES, Blocks, chip, vmem
from zoo.kernels.tpu_layout import Buffers, Place, by_head, shape_like

LOG2_E = 1.4426950408889634

DISTANCE_BYTES = 4 * LANES
"""Of one distance as it is laid out."""

SIDE_BY_SIDE = 4
"""Groups of rows that are laid out at a time: one alone would wait for its own rotations."""


def by_distance(problem: Problem) -> bool:
    """Whether the problem has a bias, and one of the distance."""
    return isinstance(problem.bias, Bias) and biases.depends_on_distance(problem.bias, problem.heads)


def _from_place(mask: ResolvedMask) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Position less place in the array, of queries [r, T] and of keys [r, S], and how far the two are apart [r, 1].

    Padding, where positions say nothing, holds the greatest integer.
    """
    none = jnp.iinfo(jnp.int32).max
    first = []
    for side, lengths in ((mask.query, None), (mask.key, mask.lengths)):
        first.append(jnp.where(_there(side, lengths), side.positions - jnp.arange(side.length, dtype=jnp.int32), none))
    query, key = first
    return query, key, key.min(-1, keepdims=True) - query.min(-1, keepdims=True)


def _there(side: Side, lengths: jax.Array | None) -> jax.Array:
    """Whether a query or key is no padding; broadcasts to [B, L]."""
    there = jnp.ones((1, 1), bool) if side.segments is None else side.segments != 0
    return there if lengths is None else there & (side.index < lengths[:, None])


def apart(mask: ResolvedMask) -> jax.Array:
    """int32 [r, 1], r 1 or B: key - query in positions, less the same in places; right where `keeps_distance` holds."""
    if mask.rules.consecutive:
        return mask.key.positions[:, :1] - mask.query.positions[:, :1]
    return _from_place(mask)[2]


def keeps_distance(mask: ResolvedMask) -> jax.Array:
    """bool []: whether the positions of each pair that may attend are `apart` as their places are.

    So it is within each of several packed documents whose positions start anew.
    """
    query, key, offset = _from_place(mask)
    none = jnp.iinfo(jnp.int32).max
    moved = jnp.where(key == none, none, key - offset)
    segments = [jnp.zeros((1, 1), jnp.int32) if x.segments is None else x.segments for x in (mask.query, mask.key)]
    rows = max(x.shape[0] for x in (query, moved, *segments))

    def joined(parts: Sequence[jax.Array]) -> jax.Array:
        lengths = (query.shape[1], moved.shape[1])
        return jnp.concatenate([jnp.broadcast_to(x, (rows, n)) for x, n in zip(parts, lengths, strict=True)], axis=1)

    segment, place = jax.lax.sort((joined(segments), joined((query, moved))), num_keys=2)
    differs = (place[:, 1:] != place[:, :-1]) & (segment[:, 1:] == segment[:, :-1]) & (place[:, 1:] != none)
    return ~differs.any()


class ByDistance(NamedTuple):
    """The distances of a call, and the bias of each.

    distances: key - query in positions, int32 [r, D], D = T + S padded to whole blocks: from S keys ahead of the first
    query, descending. Those that only padding has repeat the last that are real. batch: B; key_blocks: how many.
    """

    bias: Bias
    heads: jax.Array
    distances: jax.Array
    batch: int
    blocks: Blocks
    key_blocks: int

    @classmethod
    def of(cls, problem: Problem, blocks: Blocks, apart: jax.Array, queries: int, keys: int) -> "ByDistance":
        """apart: of the function `apart`; queries, keys: padded."""
        p, shape = problem, problem.shape
        assert isinstance(p.bias, Bias)
        places = jnp.clip(keys - jnp.arange(queries + keys), 1 - shape.queries, shape.keys - 1)
        return cls(p.bias, p.heads, places.astype(jnp.int32) + apart, shape.batch, blocks, keys // blocks.keys)

    def buffers(self, query: Place, key: Place, *, backward: bool) -> Buffers:
        """What it adds to a kernel's."""
        array, names = self._values(), ["laid", "sums"] if backward else ["laid"]
        sums = shape_like((self.batch, *array.shape[1:]), array, jnp.float32)
        scratch = dict.fromkeys(names, Diagonals.scratch(self.blocks, array, len(names)))
        return Buffers({"bias": by_head(array, query)}, {"d_bias": by_head(sums, query)} if backward else {}, scratch)

    def at(self, query_block: Any, key_block: Any, named: dict[str, Any]) -> "Diagonals":
        """Of one visit, in a kernel; takes its references out of `named`."""
        references = [named.pop(name, None) for name in ("bias", "laid", "sums", "d_bias")]
        return Diagonals(self.blocks, self.key_blocks, (query_block, key_block), *references)

    def _by_distance(self, tables: Any) -> jax.Array:
        shape = (self.distances.shape[0], self.heads.shape[0], 1, self.distances.shape[1])
        index = jnp.zeros(shape[2:], jnp.int32)
        query, key = Side(index[0, :1], index[:, :1], None), Side(index[0], self.distances, None)
        x = biases.block(Bias(self.bias.function, tables), self.heads, query, key)
        return jnp.broadcast_to(x, shape).astype(jnp.float32)

    def _values(self) -> jax.Array:
        """The bias in base 2, float32 [r, N, D / 128, 128]."""
        x = self._by_distance(self.bias.tables) * LOG2_E
        return x.reshape(*x.shape[:2], -1, LANES)

    def gradient(self, sums: jax.Array) -> Any:
        """Of the tables, in float32, from that of the scores summed along diagonals, [B, N, D / 128, 128]."""
        sums = sums.reshape(*sums.shape[:2], 1, -1)
        if self.distances.shape[0] == 1:
            sums = sums.sum(0, keepdims=True)
        (tables,) = jax.vjp(self._by_distance, self.bias.tables)[1](sums)
        return jax.tree.map(lambda x: x.astype(jnp.float32), tables)


class Diagonals:
    """The bias of one visit, in a kernel.

    rows: reference to the bias of a head's distances, [D / 128, 128]; laid: to scratch [R, 128] with the bias of a
    visit, or of a head where there is room: of a visit's rows, row r and lane l belong to query l and key r - t + 128,
    to query 128 + l and key r - t + 256, and so on; sums: to sums of gradients that lie alike, and row_sums: to what
    they add up to, as `rows` lie; both None in the forward pass.
    """

    def __init__(
        self, blocks: Blocks, keys: int, visit: tuple, rows: Any, laid: Any, sums: Any = None, row_sums: Any = None
    ) -> None:
        """keys: blocks of keys in all; visit: the blocks of queries and of keys."""
        self.blocks, self.rows, self.laid, self.sums, self.row_sums = blocks, rows, laid, sums, row_sums
        self.groups, of_visit = laid.shape[0] // LANES, _groups(blocks)
        self.of_head = self.groups == rows.shape[0] - 1
        query, key = visit
        first = query * (blocks.queries // LANES) + (keys - 1 - key) * (blocks.keys // LANES)
        self.first_row = 0 if self.of_head else first
        self.start = (self.groups - of_visit - first) * LANES if self.groups > of_visit else 0

    @staticmethod
    def scratch(blocks: Blocks, rows: jax.Array, arrays: int) -> Any:
        """For the whole of a head where `arrays` of them fit half of VMEM, else for a visit."""
        groups = rows.shape[2] - 1
        fits = arrays * groups * LANES * DISTANCE_BYTES <= vmem() // 2
        return pltpu.VMEM(((groups if fits else _groups(blocks)) * LANES, LANES), jnp.float32)

    def before(self, head_starts: Any, flags: Any) -> None:
        """What comes before a visit."""
        pl.when(head_starts if self.of_head else flags != 0)(self._lay)
        if self.row_sums is not None:

            @pl.when(head_starts)
            def _clear() -> None:
                self.row_sums[...] = jnp.zeros(self.row_sums.shape, jnp.float32)

    def after(self, head_ends: Any, flags: Any) -> None:
        """What comes after a visit of the backward pass."""
        pl.when(head_ends if self.of_head else flags != 0)(self._add_up)

    def tile(self, key: Any, query: int, shape: tuple[int, ...]) -> jax.Array:
        """The bias in base 2 of scores [s, t] = shape, of keys and queries from these of the visit on."""
        columns = [self._column(self.laid, key, shape[0], query + start)[...] for start in range(0, shape[1], LANES)]
        return columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=1)

    def add(self, gradient: jax.Array, key: Any, query: int) -> None:
        """The gradient of scores [s, t], of keys and queries from these of the visit on."""
        size, width = gradient.shape
        for start in range(0, width, LANES):
            column = self._column(self.sums, key, size, query + start)
            column[...] += gradient[:, start : start + LANES]

    def _column(self, scratch: Any, key: Any, size: int, query: int) -> Any:
        """Reference to what belongs to `size` keys and 128 queries of the visit."""
        start = self.start if isinstance(self.start, int) else pl.multiple_of(self.start, LANES)
        # First what belongs to the visit, then static places in it: so the compiler reckons one address, not many.
        of_visit = scratch.at[pl.ds(start, _groups(self.blocks) * LANES), :]
        first = key + (self.blocks.queries - LANES - query)
        return of_visit.at[pl.ds(first if isinstance(first, int) else pl.multiple_of(first, LANES), size), :]

    def _lay(self) -> None:
        """Lane l of row r of a group, both below 128, takes lane l - r of two rows side by side, from the second."""
        later = _later()

        def group(i: Any, left: jax.Array) -> jax.Array:
            right, place = _turned(self._row(i + 1)), self._group(i)
            self.laid[place, :] = jnp.where(later, right, left)
            if self.sums is not None:
                self.sums[place, :] = jnp.zeros((LANES, LANES), jnp.float32)
            return right

        _each(self.groups, group, _turned(self._row(0)))

    def _add_up(self) -> None:
        """The transpose of `_lay`."""
        later, zero = _later(), jnp.zeros((LANES, LANES), jnp.float32)

        def row(i: Any, x: jax.Array) -> None:
            self.row_sums[pl.ds(self.first_row + i, 1), :] += _turned_back(x)

        def group(i: Any, before: jax.Array) -> jax.Array:
            sums = self.sums[self._group(i), :]
            row(i, jnp.where(later, before, sums))
            return sums

        last = _each(self.groups, group, zero)
        row(self.groups, jnp.where(later, last, zero))

    def _row(self, i: Any) -> jax.Array:
        return self.rows[pl.ds(self.first_row + i, 1), :]

    def _group(self, i: Any) -> Any:
        """The rows of scratch that rows i and i + 1 of the distances are laid out in."""
        first = (self.groups - 1 - i) * LANES
        return pl.ds(first if isinstance(first, int) else pl.multiple_of(first, LANES), LANES)


def _each(count: int, body: Callable[[Any, jax.Array], jax.Array], carry: jax.Array) -> jax.Array:
    """The last carry of body(i, carry) for i below count."""

    def several(i: jax.Array, carry: jax.Array) -> jax.Array:
        for part in range(SIDE_BY_SIDE):
            carry = body(i * SIDE_BY_SIDE + part, carry)
        return carry

    rest = count % SIDE_BY_SIDE
    carry = jax.lax.fori_loop(jnp.int32(0), jnp.int32(count // SIDE_BY_SIDE), several, carry)
    for i in range(count - rest, count):
        carry = body(i, carry)
    return carry


def _groups(blocks: Blocks) -> int:
    """Groups of 128 rows that a visit takes."""
    return (blocks.queries + blocks.keys) // LANES - 1


def _later() -> jax.Array:
    """Whether the lane is not before the row, bool [128, 128]."""
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    return lane >= row


def _turned(row: jax.Array) -> jax.Array:
    """[1, 128] as [128, 128], row r of it turned by r lanes."""
    if chip() != "v4":
        return pltpu.roll(jnp.broadcast_to(row, (LANES, LANES)), jnp.int32(0), 1, stride=1, stride_axis=0)
    # Without such an instruction: twice as many rows at a time.
    x = row
    while x.shape[0] < LANES:
        x = jnp.concatenate([x, pltpu.roll(x, jnp.int32(x.shape[0]), 1)], axis=0)
    return x


def _turned_back(x: jax.Array) -> jax.Array:
    """The transpose: every row turned back, and their sum."""
    while x.shape[0] > 1:
        half = x.shape[0] // 2
        x = x[:half] + pltpu.roll(x[half:], jnp.int32(LANES - half), 1)
    return x
