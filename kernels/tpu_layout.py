"""How a problem's arrays are laid out and cut for the TPU kernels.

Heads whose size is a multiple of the 128 lanes are read where they lie, as columns of [B, L, N H]; others are moved to
[B, N, L, H] first. A Place says which block of which head of which row the kernel is at.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from zoo.kernels import tpu_bias, work_list
from zoo.kernels.mask import ResolvedMask, Side
from zoo.kernels.problem import Problem
from zoo.kernels.tpu_bias import ByDistance, Diagonals
from zoo.kernels.tpu_blocks import LANES, Blocks
from zoo.kernels.tpu_pair_bias import ByPair, PairBlock
from zoo.kernels.tpu_pairs import Counted, Scalars, Spec
from zoo.kernels.work_list import Code, WorkList

STRIP = 512
"""Most keys of a strip."""

BOUND = 55.0
"""Scores within it need no maximum: their exponentials, 2^-80 to 2^80, leave values 2^-46 to 2^20 their place."""

ZERO = np.int32(0)
"""In index maps, which are of 32-bit integers whatever `jax_enable_x64` says."""

Place = Callable[..., tuple[Any, Any, Any]]
"""(row, block, head) at given grid indices, which the references of Scalars follow."""


class Operand(NamedTuple):
    """An array, or the shape of a result, and how it is cut for the kernel."""

    array: Any
    spec: pl.BlockSpec


class Call(NamedTuple):
    """A problem, the static numbers of its kernel, its mask padded to whole blocks, its work list, and its bias."""

    problem: Problem
    spec: Spec
    mask: ResolvedMask
    scalars: Scalars
    steps: jax.Array | int
    bias: ByDistance | ByPair | None

    @classmethod
    def of(cls, problem: Problem, blocks: Blocks, apart: jax.Array | None = None) -> "Call":
        """apart: of a bias, see `tpu_bias.apart`; of the problem's own mask where not given."""
        p, code = problem, code_of(problem, blocks)
        mask = p.mask.padded(code.queries * blocks.queries, code.keys * blocks.keys)
        spec = Spec(
            blocks=blocks,
            code=code,
            rows=mask_rows(mask),
            group=p.shape.heads // p.shape.kv_heads,
            rules=mask.rules,
            counted=_counted(p.mask),
            sees_itself=_sees_itself(p, blocks),
            hides=mask.hides,
            segments=mask.query.segments is not None,
            prefix=mask.prefix is not None,
            lengths=mask.lengths is not None,
            scale=p.scale,
            soft_cap=p.soft_cap,
            bounded=p.bound is not None and p.bound <= BOUND,
            dropout=p.dropout,
            dtype=p.q.dtype,
            precision=p.precision,
        )
        work = _work(p.mask, spec)
        none = jnp.zeros((1,), jnp.int32)

        def per_row(x: jax.Array | None) -> jax.Array:
            return none if x is None else jnp.broadcast_to(x, (spec.rows,))

        seed = none if p.seed is None else jax.lax.bitcast_convert_type(p.seed, jnp.int32)
        counters = (p.batch, p.heads) if p.dropout else (none, none)
        scalars = Scalars(work.visits, seed, *counters, per_row(mask.prefix), per_row(mask.lengths))
        bias = None
        if tpu_bias.by_distance(p):
            apart = tpu_bias.apart(p.mask) if apart is None else apart
            bias = ByDistance.of(p, apart, mask.query.length, mask.key.length)
        elif p.bias is not None:
            bias = ByPair.of(p, mask, blocks, _written(work, spec))
        return cls(p, spec, mask, scalars, work.steps, bias)

    @property
    def queries(self) -> int:
        """Padded."""
        return self.mask.query.length

    @property
    def keys(self) -> int:
        """Padded."""
        return self.mask.key.length

    def visit(self, scalars: Sequence[Any], row: Any, step: Any) -> Any:
        return scalars[0][(row * self.spec.capacity if self.spec.rows > 1 else 0) + step]

    def query_block(self, scalars: Sequence[Any], row: Any, step: Any) -> Any:
        return self.spec.code.query(self.visit(scalars, row, step))

    def key_block(self, scalars: Sequence[Any], row: Any, step: Any) -> Any:
        return self.spec.code.key(self.visit(scalars, row, step))

    def bias_of(self, named: dict[str, Any], visit: Any) -> Diagonals | PairBlock | None:
        """The bias of a visit; takes its references out of `named`."""
        if self.bias is None:
            return None
        spec, references = self.spec, [named.pop(name, None) for name in ("bias", "laid", "sums", "d_bias")]
        if isinstance(self.bias, ByPair):
            return PairBlock(references[0], references[3])
        return Diagonals(spec.blocks, spec.code.keys, (spec.code.query(visit), spec.code.key(visit)), *references)

    def name(self, direction: str) -> str:
        blocks = self.spec.blocks
        return f"flash_{direction}_h{self.problem.shape.head_dim}_q{blocks.rows}_k{blocks.step}"


def _counted(mask: ResolvedMask) -> Counted | None:
    query, key = mask.query, mask.key
    if query.start is None or key.start is None or query.segments is not None or key.segments is not None:
        return None
    return Counted(query.start, key.start, key.length)


def _sees_itself(problem: Problem, blocks: Blocks) -> bool:
    """See Spec."""
    p, counted, rules = problem, _counted(problem.mask), problem.mask.rules
    if counted is None or p.bias is not None or p.mask.lengths is not None or rules.where is not None:
        return False
    apart = counted.query - counted.key
    there = 0 <= apart <= counted.keys - p.shape.queries and (rules.left is None or rules.left >= 0)
    last = rules.causal or rules.right == 0
    return there and last and p.mask.prefix is None and apart % blocks.queries == blocks.keys % blocks.queries == 0


def _work(mask: ResolvedMask, spec: Spec) -> WorkList:
    """A constant of the program, as long as what is visited, where the mask is known before it runs."""
    code, blocks = spec.code, spec.blocks
    size, known = (code.queries * blocks.queries, code.keys * blocks.keys), mask.known()
    work = work_list.build((known or mask).padded(*size), code, spec.rows, blocks.queries, blocks.keys)
    return work if known is None else WorkList(jnp.asarray(work.visits[: work.steps]), int(work.steps))


def _written(work: WorkList, spec: Spec) -> jax.Array | None:
    """Which blocks any visit is to: bool [rows, blocks of queries, of keys]; None where that is known to be all."""
    if isinstance(work.steps, int) and work.steps == spec.capacity:
        return None
    code, visits = spec.code, work.visits.reshape(spec.rows, -1)
    none = jnp.zeros((spec.rows, code.queries, code.keys), bool)
    return none.at[jnp.arange(spec.rows)[:, None], code.query(visits), code.key(visits)].set(True)


def code_of(problem: Problem, blocks: Blocks) -> Code:
    shape = problem.shape
    strips = blocks.keys // math.gcd(blocks.keys, STRIP)
    return Code(-(-shape.queries // blocks.queries), -(-shape.keys // blocks.keys), strips)


def mask_rows(mask: ResolvedMask) -> int:
    """1 where all rows have one mask, else B."""
    arrays = (mask.query.positions, mask.query.segments, mask.key.positions, mask.key.segments)
    return max(x.shape[0] for x in (*arrays, mask.prefix, mask.lengths) if x is not None)


def heads(x: jax.Array, length: int, rows: int, place: Place) -> Operand:
    """[B, L, N, X], padded to `length`, in blocks of `rows`."""
    x = _padded(x, length, axis=1)
    array = x.reshape(*x.shape[:2], -1) if x.shape[3] % LANES == 0 else x.swapaxes(1, 2)
    return Operand(array, _blocks(x.shape[3], rows, place))


def result(shape: tuple[int, int, int, int], like: jax.Array, rows: int, place: Place, dtype: Any = None) -> Operand:
    """For [B, L, N, X], which `restored` gives back; `like` tells its type and the mesh axes it varies over."""
    b, length, n, width = shape
    laid = (b, length, n * width) if width % LANES == 0 else (b, n, length, width)
    return Operand(shape_like(laid, like, dtype or like.dtype), _blocks(width, rows, place))


def restored(x: jax.Array, length: int, count: int) -> jax.Array:
    """[B, length, count, X]."""
    x = x.reshape(*x.shape[:2], count, -1) if x.ndim == 3 else x.swapaxes(1, 2)
    return x[:, :length]


def shape_like(shape: tuple[int, ...], like: jax.Array, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def by_row(array: Any, columns: int, place: Place) -> Operand:
    """[B, N, count, L] in blocks of `columns`."""

    def index(*indices: Any) -> tuple:
        row, block, head = place(*indices)
        return row, head, ZERO, block

    return Operand(array, pl.BlockSpec((None, None, array.shape[2], columns), index))


def by_head(array: Any, place: Place) -> Operand:
    """[1 or B, N, X, Y], whole for each head."""

    def index(*indices: Any) -> tuple:
        row, _, head = place(*indices)
        return row if array.shape[0] > 1 else ZERO, head, ZERO, ZERO

    return Operand(array, pl.BlockSpec((None, None, *array.shape[2:]), index))


def by_pair(array: Any, blocks: Blocks, query: Place, key: Place) -> Operand:
    """[1 or B, 1 or N, T, S] in blocks of pairs."""

    def index(*indices: Any) -> tuple:
        row, of_queries, head = query(*indices)
        where = [place if size > 1 else ZERO for place, size in zip((row, head), array.shape[:2], strict=True)]
        return *where, of_queries, key(*indices)[1]

    return Operand(array, pl.BlockSpec((None, None, blocks.queries, blocks.keys), index))


def bias_operands(
    call: Call, query: Place, key: Place, *, backward: bool
) -> tuple[dict[str, Operand], dict[str, Operand], dict[str, Any]]:
    """What a bias adds to a kernel's inputs, outputs and scratch."""
    if call.bias is None:
        return {}, {}, {}
    array, shape = call.bias.values(), call.problem.shape
    sums = shape_like((shape.batch, shape.heads, *array.shape[2:]), array, jnp.float32)
    if isinstance(call.bias, ByPair):
        values, d_values = (by_pair(x, call.spec.blocks, query, key) for x in (array, sums))
        return {"bias": values}, {"d_bias": d_values} if backward else {}, {}
    names = ["laid", "sums"] if backward else ["laid"]
    room = Diagonals.scratch(call.spec.blocks, array, len(names))
    scratch: dict[str, Any] = dict.fromkeys(names, room)
    return {"bias": by_head(array, query)}, {"d_bias": by_head(sums, query)} if backward else {}, scratch


def sides(call: Call, query: Place, key: Place) -> dict[str, Operand]:
    """int32 [rows, 3, L] of queries and of keys: index, position and segment; nothing where the kernel needs none."""
    spec = call.spec
    if not spec.sees_pairs or spec.counted is not None:
        return {}

    def operand(side: Side, columns: int, place: Place) -> Operand:
        segments = jnp.zeros_like(side.positions) if side.segments is None else side.segments
        full = (spec.rows, side.length)
        array = jnp.stack([jnp.broadcast_to(x, full) for x in (side.index, side.positions, segments)], axis=1)

        def index(*indices: Any) -> tuple:
            row, block, _ = place(*indices)
            return row if spec.rows > 1 else ZERO, ZERO, block

        return Operand(array, pl.BlockSpec((None, 3, columns), index))

    return {
        "query_side": operand(call.mask.query, spec.blocks.queries, query),
        "key_side": operand(call.mask.key, spec.blocks.keys, key),
    }


def _padded(x: jax.Array, length: int, axis: int) -> jax.Array:
    extra = [(0, length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, extra) if length > x.shape[axis] else x


def _blocks(width: int, rows: int, place: Place) -> pl.BlockSpec:
    def by_head(*indices: Any) -> tuple:
        row, block, head = place(*indices)
        return row, head, block, ZERO

    if width % LANES == 0:
        return pl.BlockSpec((None, rows, width), place)
    return pl.BlockSpec((None, None, rows, width), by_head)
