"""One call of the TPU kernels: the static numbers of its kernel, its mask, its work list and its bias."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from zoo.kernels import tpu_bias, work_list
from zoo.kernels.mask import ResolvedMask, Side
from zoo.kernels.problem import Problem
from zoo.kernels.tpu_bias import ByDistance
from zoo.kernels.tpu_blocks import Blocks
from zoo.kernels.tpu_layout import ZERO, Buffers, Operand, Place
from zoo.kernels.tpu_pair_bias import ByPair
from zoo.kernels.tpu_visit import Counted, Scalars, Spec, Visit
from zoo.kernels.work_list import Code, WorkList

STRIP = 512
"""Most keys of a strip."""

BOUND = 55.0
"""Scores within it need no maximum: their exponentials, 2^-80 to 2^80, leave values 2^-46 to 2^20 their place."""


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
        p, shape = problem, problem.shape
        mask = p.mask.padded(*blocks.padded(shape.queries, shape.keys))
        spec = Spec(
            blocks=blocks,
            code=code_of(blocks, shape.queries, shape.keys),
            rows=mask_rows(mask),
            group=shape.heads // shape.kv_heads,
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
            bias = ByDistance.of(p, blocks, apart, mask.query.length, mask.key.length)
        elif p.bias is not None:
            bias = ByPair.of(p, mask, blocks, partial(_written, work, spec))
        return cls(p, spec, mask, scalars, work.steps, bias)

    @property
    def queries(self) -> int:
        """Padded."""
        return self.mask.query.length

    @property
    def keys(self) -> int:
        """Padded."""
        return self.mask.key.length

    def packed(self, scalars: Sequence[Any], row: Any, step: Any) -> Any:
        """A visit as the work list has it."""
        return scalars[0][(row * self.spec.capacity if self.spec.rows > 1 else 0) + step]

    def query_block(self, scalars: Sequence[Any], row: Any, step: Any) -> Any:
        return self.spec.code.query(self.packed(scalars, row, step))

    def key_block(self, scalars: Sequence[Any], row: Any, step: Any) -> Any:
        return self.spec.code.key(self.packed(scalars, row, step))

    def sides(self, query: Place, key: Place) -> dict[str, Operand]:
        """int32 [rows, 3, L] of queries and of keys: index, position, segment; nothing where the kernel needs none."""
        spec = self.spec
        if not spec.sees_pairs or spec.counted is not None:
            return {}
        return {
            "query_side": _side(spec, self.mask.query, spec.blocks.queries, query),
            "key_side": _side(spec, self.mask.key, spec.blocks.keys, key),
        }

    def bias_buffers(self, query: Place, key: Place, *, backward: bool) -> Buffers:
        """What the bias adds to a kernel's."""
        return Buffers() if self.bias is None else self.bias.buffers(query, key, backward=backward)

    def visit(self, scalars: Scalars, named: dict[str, Any], row: Any, head: Any, step: Any) -> Visit:
        """In a kernel; takes what it reads out of `named`, the kernel's references."""
        code, packed = self.spec.code, self.packed(scalars, row, step)
        bias = None if self.bias is None else self.bias.at(code.query(packed), code.key(packed), named)
        sides = named.pop("query_side", None), named.pop("key_side", None)
        return Visit(self.spec, scalars, packed, sides, row, head, bias)

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
    ahead = counted.query - counted.key
    there = 0 <= ahead <= counted.keys - p.shape.queries and (rules.left is None or rules.left >= 0)
    last = rules.causal or rules.right == 0
    return there and last and p.mask.prefix is None and ahead % blocks.queries == blocks.keys % blocks.queries == 0


def _work(mask: ResolvedMask, spec: Spec) -> WorkList:
    """A constant of the program, as long as what is visited, where the mask is known before it runs."""
    blocks, known = spec.blocks, mask.known()
    size = blocks.padded(mask.query.length, mask.key.length)
    work = work_list.build((known or mask).padded(*size), spec.code, spec.rows, blocks.queries, blocks.keys)
    return work if known is None else WorkList(jnp.asarray(work.visits[: work.steps]), int(work.steps))


def _written(work: WorkList, spec: Spec) -> jax.Array | None:
    """Which blocks any visit is to: bool [rows, blocks of queries, of keys]; None where that is known to be all."""
    if isinstance(work.steps, int) and work.steps == spec.capacity:
        return None
    code, visits = spec.code, work.visits.reshape(spec.rows, -1)
    none = jnp.zeros((spec.rows, code.queries, code.keys), bool)
    return none.at[jnp.arange(spec.rows)[:, None], code.query(visits), code.key(visits)].set(True)


def code_of(blocks: Blocks, queries: int, keys: int) -> Code:
    """queries, keys: lengths."""
    return Code(*blocks.counts(queries, keys), strips=blocks.keys // math.gcd(blocks.keys, STRIP))


def mask_rows(mask: ResolvedMask) -> int:
    """1 where all rows have one mask, else B."""
    arrays = (mask.query.positions, mask.query.segments, mask.key.positions, mask.key.segments)
    return max(x.shape[0] for x in (*arrays, mask.prefix, mask.lengths) if x is not None)


def _side(spec: Spec, side: Side, columns: int, place: Place) -> Operand:
    segments = jnp.zeros_like(side.positions) if side.segments is None else side.segments
    full = (spec.rows, side.length)
    array = jnp.stack([jnp.broadcast_to(x, full) for x in (side.index, side.positions, segments)], axis=1)

    def index(*indices: Any) -> tuple:
        row, block, _ = place(*indices)
        return row if spec.rows > 1 else ZERO, ZERO, block

    return Operand(array, pl.BlockSpec((None, 3, columns), index))
