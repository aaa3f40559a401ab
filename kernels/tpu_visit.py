"""What the TPU kernels' passes share: static numbers, scores, and what one visit of queries to keys has of the call.

Scores lie transposed, keys down the sublanes and queries along the lanes, so that a statistic of the queries is one row
of registers and sums over keys are additions of registers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from zoo.kernels import dropout as dropouts
from zoo.kernels.mask import PADDING_INDEX, Rules, Side, pairs_allowed
from zoo.kernels.tpu_bias import LOG2_E, Diagonals
from zoo.kernels.tpu_blocks import Blocks
from zoo.kernels.tpu_pair_bias import PairBlock
from zoo.kernels.work_list import Code

SUBLANES = 8


class Counted(NamedTuple):
    """Queries and keys whose index and position both count on: from what number, and how many keys there are."""

    query: int
    key: int
    keys: int


class Spec(NamedTuple):
    """Static numbers of one kernel. rows: of the mask, 1 or B; group: query heads per key/value head.

    counted: None where indices or positions are known only to the program, or there are segments. sees_itself: whether
    each query attends to the key at its own position, and those of a block lie in the first block of keys it visits.
    """

    blocks: Blocks
    code: Code
    rows: int
    group: int
    rules: Rules
    counted: Counted | None
    sees_itself: bool
    hides: bool
    segments: bool
    prefix: bool
    lengths: bool
    scale: float
    soft_cap: float | None
    bounded: bool
    dropout: float
    dtype: jnp.dtype
    precision: jax.lax.Precision

    @property
    def strip(self) -> int:
        """Keys of a strip, the unit that masks skip within a block."""
        return self.blocks.keys // self.code.strips

    @property
    def capacity(self) -> int:
        """Places for the visits of one row in the list."""
        return self.code.queries * self.code.keys

    @property
    def sees_pairs(self) -> bool:
        return self.hides or self.dropout > 0

    @property
    def query_factor(self) -> float:
        """What queries are multiplied by, so that their products are scores in base 2, or what tanh is taken of."""
        return self.scale / self.score_factor

    @property
    def score_factor(self) -> float:
        """What turns those products, or the tanh, into scores."""
        return 1 / LOG2_E if self.soft_cap is None else self.soft_cap


class Scalars(NamedTuple):
    """In scalar memory: visits of the work list; prefix and lengths [rows]; for dropout seed, global rows and heads."""

    visits: Any
    seed: Any
    batch: Any
    heads: Any
    prefix: Any
    lengths: Any


def product(spec: Spec, x: jax.Array, y: jax.Array, over: tuple[int, int]) -> jax.Array:
    """Of two matrices over one dimension of each; summed in float32."""
    dims = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision=spec.precision, preferred_element_type=jnp.float32)


def scores(spec: Spec, products: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Scores in base 2, of the products of keys and scaled queries, and the soft cap's tanh or None."""
    if spec.soft_cap is None:
        return products, None
    capped = jnp.tanh(products)
    return capped * (spec.soft_cap * LOG2_E), capped


class Visit:
    """One visit, in a kernel: its blocks and flags, which pairs its mask and dropout keep, and their bias.

    packed: the visit as the work list has it; row, head: of the arrays.
    sides: references to int32 [3, t] and [3, s] of its queries and keys: global index, position and segment; None where
    counted.
    """

    def __init__(
        self,
        spec: Spec,
        scalars: Scalars,
        packed: jax.Array,
        sides: tuple[Any, Any],
        row: Any,
        head: Any,
        bias: Diagonals | PairBlock | None,
    ) -> None:
        self.spec, self.scalars, self.row, self.head, self.bias = spec, scalars, row, head, bias
        self.flags = spec.code.flags(packed)
        self.query_block, self.key_block = spec.code.query(packed), spec.code.key(packed)
        self.queries, self.keys = sides

    def before(self, head_starts: Any) -> None:
        """What the bias does before the visit: it is laid out, and sums are cleared."""
        if self.bias is not None:
            self.bias.before(head_starts, self.flags)

    def after(self, head_ends: Any) -> None:
        """What the bias does after the visit of a backward pass: gradients are added up."""
        if self.bias is not None:
            self.bias.after(head_ends, self.flags)

    def own_keys(self) -> jax.Array:
        """Where in the visit's block of keys those lie that are at the positions of its queries."""
        blocks, counted = self.spec.blocks, self.spec.counted
        assert counted is not None
        first = counted.query - counted.key + self.query_block * blocks.queries
        return pl.multiple_of(first - self.key_block * blocks.keys, blocks.queries)

    def _query_side(self, start: int, shape: tuple[int, ...]) -> Side:
        """For a tile of [s, t] pairs."""
        spec, size = self.spec, shape[1]
        if spec.counted is not None:
            first = spec.counted.query + self.query_block * spec.blocks.queries + start
            index = first + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
            return Side(index, index, None)
        rows = [self.queries[i : i + 1, start : start + size] for i in range(3)]
        return Side(rows[0], rows[1], rows[2] if spec.segments else None)

    def _key_side(self, start: Any, shape: tuple[int, ...]) -> Side:
        """For a tile of [s, t] pairs."""
        spec = self.spec
        if spec.counted is not None:
            place = self.key_block * spec.blocks.keys + start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            index = spec.counted.key + place
            padded = jnp.where(place < spec.counted.keys, index, PADDING_INDEX) if spec.lengths else index
            return Side(padded, index, None)
        columns = jnp.transpose(self.keys[:, pl.ds(start, shape[0])])
        index, positions, segments = (columns[:, i : i + 1] for i in range(3))
        return Side(index, positions, segments if spec.segments else None)

    def masked(self, x: jax.Array, key_start: Any, query_start: int) -> jax.Array:
        """Scores [s, t] with -inf where the mask forbids."""
        spec, size = self.spec, x.shape
        if not spec.hides:
            return x
        row = self.row if spec.rows > 1 else 0
        prefix = self.scalars.prefix[row] if spec.prefix else None
        lengths = self.scalars.lengths[row] if spec.lengths else None
        query, key = self._query_side(query_start, size), self._key_side(key_start, size)
        keep = pairs_allowed(spec.rules, query, key, prefix, lengths)
        return x if keep is None else jnp.where(keep, x, -jnp.inf)

    def dropped(self, x: jax.Array, key_start: Any, query_start: int) -> jax.Array:
        """Weights [s, t] without those that dropout takes; its factor 1 / (1 - rate) is left to the caller."""
        spec, size = self.spec, x.shape
        if not spec.dropout:
            return x
        seed = [self.scalars.seed[i] for i in range(self.scalars.seed.shape[0])]
        counters = self.scalars.batch[self.row], self.scalars.heads[self.head]
        query, key = self._query_side(query_start, size), self._key_side(key_start, size)
        words = dropouts.row_words(seed, *counters, query.index)
        return jnp.where(dropouts.pairs_kept(spec.dropout, *words, key.index), x, 0)
