"""Which query attends to which key: one description, composable with `&`, that kernels can skip blocks by.

`Mask` is what callers write. `Side` holds what is known of the queries or of the keys (index, position, segment), cut
to any block; `allowed` evaluates the mask on two sides, `block_kinds` says which pairs of blocks it leaves empty.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Where = Callable[[jax.Array, jax.Array], jax.Array]
PerSide = ArrayLike | tuple[ArrayLike, ArrayLike]

Limits = tuple[int | None, int | None]

PADDING_INDEX = 2**31 - 1

_NO_SEGMENT = -(2**31)


class AttentionError(ValueError):
    """Arguments of attention that do not fit; one line that names the thing, the value and the mend."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("prefix", "segments", "positions", "lengths"),
    meta_fields=("causal", "window", "where"),
)
@dataclass(frozen=True, eq=False)
class Mask:
    """Query q may attend to key k where every condition that is set holds; `Mask()` allows everything.

    causal: position(q) >= position(k).
    window: an int W keeps position(q) - position(k) < W and implies `causal`; a pair (left, right) keeps
        -right <= position(q) - position(k) <= left, either of them None for no limit on that side.
    prefix: [] or [B], with `causal`: keys at positions below it are seen by every query (prefix language models).
    segments: int [B, T] (T equal S), or a (query [B, T], key [B, S]) pair: equal segments alone attend to each other.
        Segment 0 is padding, which attends to nothing and is attended by nothing; -2^31 is no segment.
    positions: int [T] or [B, T], or a (query, key) pair; counted from 0 where not given. Packed documents restart
        them, decoding starts them at an offset, XLNet permutes them. They serve causal, window, prefix, where and
        `Bias`, in every mask that this one is combined with.
    lengths: int [B]: keys whose index (not position) is below it are there.
    where: f(query position, key position) -> bool, for static patterns. It is called with int32 arrays that broadcast
        against each other, of whole lengths or of blocks, and must be elementwise. Kernels take functions of these two
        alone, and cannot skip blocks by them.
    """

    causal: bool = False
    window: int | Limits | None = None
    prefix: ArrayLike | None = None
    segments: PerSide | None = None
    positions: PerSide | None = None
    lengths: ArrayLike | None = None
    where: Where | None = None

    def __post_init__(self) -> None:
        if isinstance(self.window, SupportsIndex):
            width = operator.index(self.window)
            if width < 1:
                raise AttentionError(f"window={width} keeps no key: give at least 1 (the query's own position)")
            object.__setattr__(self, "causal", True)
            object.__setattr__(self, "window", (width - 1, None))
        elif self.window is not None:
            if len(self.window) != 2:
                raise AttentionError(f"window={self.window}: give one int, or a pair (left, right)")
            object.__setattr__(self, "window", tuple(self.window))
        if self.prefix is not None and not self.causal:
            raise AttentionError("prefix= widens a causal mask: give causal=True with it")

    @property
    def limits(self) -> Limits:
        """The window's (left, right)."""
        return self.window if isinstance(self.window, tuple) else (None, None)

    def __and__(self, other: "Mask") -> "Mask":
        """Both conditions at once; segments and positions may come from one side only."""
        for name in ("segments", "positions"):
            a, b = getattr(self, name), getattr(other, name)
            if a is not None and b is not None and a is not b:
                raise AttentionError(f"both masks name {name}: give {name} in one of them")
        causal = self.causal or other.causal
        prefix = None
        if causal and all(m.prefix is not None for m in (self, other) if m.causal):
            prefix = _smaller(self.prefix, other.prefix)
        return Mask(
            causal=causal,
            window=_narrower(self.limits, other.limits),
            prefix=prefix,
            segments=other.segments if self.segments is None else self.segments,
            positions=other.positions if self.positions is None else self.positions,
            lengths=_smaller(self.lengths, other.lengths),
            where=_Both(self.where, other.where) if self.where and other.where else self.where or other.where,
        )


@dataclass(frozen=True)
class _Both:
    """Two patterns at once; compares by value, so that jit's cache sees equal masks as equal."""

    first: Where
    second: Where

    def __call__(self, query: jax.Array, key: jax.Array) -> jax.Array:
        return self.first(query, key) & self.second(query, key)


def _smaller(a: ArrayLike | None, b: ArrayLike | None) -> ArrayLike | None:
    if a is None or b is None:
        return b if a is None else a
    return jnp.minimum(a, b)


def _narrower(a: Limits, b: Limits) -> Limits:
    left, right = (min((x for x in pair if x is not None), default=None) for pair in zip(a, b, strict=True))
    return left, right


class Rules(NamedTuple):
    """The static part of a resolved mask.

    consecutive: positions of queries, and of keys, are known to rise by one from each place in the array to the next.
    """

    causal: bool
    left: int | None
    right: int | None
    where: Where | None
    consecutive: bool


@partial(jax.tree_util.register_dataclass, data_fields=("index", "positions", "segments"), meta_fields=("start",))
@dataclass(frozen=True)
class Side:
    """What a mask knows of L queries or keys: global index [L], positions [1 or B, L], segments alike or None.

    start: what index and positions both count from, where that is known before the program runs; else None.
    """

    index: jax.Array
    positions: jax.Array
    segments: jax.Array | None
    start: int | None = None

    @property
    def length(self) -> int:
        return self.index.shape[0]

    def padded(self, length: int) -> "Side":
        """Lengthened at the end: positions and segments repeat, the index becomes PADDING_INDEX."""
        extra, xp = length - self.length, array_module(self.index)
        if not extra:
            return self
        index = xp.pad(self.index, (0, extra), constant_values=PADDING_INDEX)
        rows = (self.positions, self.segments)
        positions, segments = jax.tree.map(lambda x: xp.pad(x, ((0, 0), (0, extra)), mode="edge"), rows)
        return Side(index, positions, segments, self.start)

    def block(self, start: jax.Array | int, length: int) -> "Side":
        """From a place that the program may know alone."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, length, axis=-1), self.moved())

    def part(self, start: int, length: int) -> "Side":
        side = jax.tree.map(lambda x: x[..., start : start + length], self)
        return side if self.start is None else dataclasses.replace(side, start=self.start + start)

    def known(self) -> "Side | None":
        """The same in numpy, where nothing of it has to wait for the program to run; else None."""
        if self.start is None or self.segments is not None:
            return None
        index = self.start + np.arange(self.length, dtype=np.int32)
        return dataclasses.replace(self, index=index, positions=index[None])

    def moved(self) -> "Side":
        """With a start that only the program knows."""
        return dataclasses.replace(self, start=None)


@partial(jax.tree_util.register_dataclass, data_fields=("query", "key", "prefix", "lengths"), meta_fields=("rules",))
@dataclass(frozen=True)
class ResolvedMask:
    """A mask with its shapes settled: prefix and lengths are [1 or B] or None. lengths limit the keys' index."""

    query: Side
    key: Side
    prefix: jax.Array | None
    lengths: jax.Array | None
    rules: Rules

    @property
    def hides(self) -> bool:
        """Whether any pair may be masked."""
        rules = self.rules
        limits = (rules.left, rules.right, rules.where, self.lengths, self.query.segments)
        return rules.causal or any(limit is not None for limit in limits)

    def padded(self, queries: int, keys: int) -> "ResolvedMask":
        """Lengthened to whole blocks; the added keys are masked, the added queries are for the caller to drop."""
        lengths = self.lengths
        if keys > self.key.length and lengths is None:
            lengths = array_module(self.key.index).full((1,), PADDING_INDEX, "int32")
        return dataclasses.replace(self, query=self.query.padded(queries), key=self.key.padded(keys), lengths=lengths)

    def rows(self, start: jax.Array | int, count: int) -> "ResolvedMask":
        """Of `count` of the batch's rows, from one on that the program may know alone."""

        def cut(x: jax.Array | None) -> jax.Array | None:
            return x if x is None or x.shape[0] == 1 else jax.lax.dynamic_slice_in_dim(x, start, count)

        def side(one: Side) -> Side:
            return dataclasses.replace(one, positions=cut(one.positions), segments=cut(one.segments))

        sides = side(self.query), side(self.key)
        return ResolvedMask(*sides, prefix=cut(self.prefix), lengths=cut(self.lengths), rules=self.rules)

    def moved(self) -> "ResolvedMask":
        """For arrays that are cut over devices or laid in another order."""
        return dataclasses.replace(self, query=self.query.moved(), key=self.key.moved())

    def known(self) -> "ResolvedMask | None":
        """The same in numpy, where nothing of it has to wait for the program to run; else None."""
        query, key = self.query.known(), self.key.known()
        if query is None or key is None or self.prefix is not None or self.lengths is not None:
            return None
        return dataclasses.replace(self, query=query, key=key)


def resolve(
    mask: Mask,
    batch: int,
    queries: int,
    keys: int,
    first_query: jax.Array | int = 0,
    first_key: jax.Array | int = 0,
) -> ResolvedMask:
    """The mask for arrays of these sizes; raises AttentionError where one of its arrays does not fit."""
    left, right = mask.limits
    segments = _pair(mask.segments, "segments", batch, queries, keys)
    positions = _pair(mask.positions, "positions", batch, queries, keys)
    sides = []
    firsts = (first_query, first_key)
    for first, length, position, segment in zip(firsts, (queries, keys), positions, segments, strict=True):
        index = first + jnp.arange(length, dtype=jnp.int32)
        start = first if isinstance(first, int) and position is None else None
        sides.append(Side(index, index[None] if position is None else position, segment, start))
    return ResolvedMask(
        *sides,
        prefix=_per_row(mask.prefix, "prefix", batch),
        lengths=_per_row(mask.lengths, "lengths", batch),
        rules=Rules(mask.causal, left, right, mask.where, consecutive=mask.positions is None),
    )


def _pair(
    value: PerSide | None, name: str, batch: int, queries: int, keys: int
) -> tuple[jax.Array | None, jax.Array | None]:
    if value is None:
        return None, None
    if not isinstance(value, tuple | list):
        if queries != keys:
            raise AttentionError(f"mask {name} is one array and T={queries}, S={keys}: give a (query, key) pair")
        value = (value, value)
    checked = []
    for array, length, side in zip(value, (queries, keys), ("query", "key"), strict=True):
        array = jnp.asarray(array)
        array = array[None] if array.ndim == 1 else array
        if array.shape not in ((batch, length), (1, length)):
            raise AttentionError(f"mask {side} {name} have shape {array.shape}: they must be ({batch}, {length})")
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise AttentionError(f"mask {side} {name} are {array.dtype}: they must be integers")
        checked.append(array.astype(jnp.int32))
    return checked[0], checked[1]


def _per_row(value: ArrayLike | None, name: str, batch: int) -> jax.Array | None:
    if value is None:
        return None
    array = jnp.asarray(value, jnp.int32)
    array = array[None] if array.ndim == 0 else array
    if array.shape not in ((batch,), (1,)):
        raise AttentionError(f"mask {name} has shape {array.shape}: it must be ({batch},), one number a row")
    return array


def allowed(mask: ResolvedMask, query: Side, key: Side) -> jax.Array:
    """Whether each of t queries may attend to each of s keys: bool [1 or B, 1, t, s]."""
    queries = jax.tree.map(lambda x: x[..., None, :, None], query)
    keys = jax.tree.map(lambda x: x[..., None, None, :], key)
    prefix, lengths = (None if x is None else x[:, None, None, None] for x in (mask.prefix, mask.lengths))
    keep = pairs_allowed(mask.rules, queries, keys, prefix, lengths)
    return jnp.ones((1, 1, query.length, key.length), bool) if keep is None else keep


def pairs_allowed(
    rules: Rules, query: Side, key: Side, prefix: jax.Array | None, lengths: jax.Array | None
) -> jax.Array | None:
    """The mask of pairs, of arrays that broadcast against each other; None where nothing is hidden."""
    q, k = query.positions, key.positions
    conditions = []
    if rules.causal:
        conditions.append(q >= k if prefix is None else (q >= k) | (k < prefix))
    if rules.left is not None:
        conditions.append(q - k <= rules.left)
    if rules.right is not None:
        conditions.append(q - k >= -rules.right)
    if rules.where is not None:
        pattern = rules.where(q, k)
        if pattern.dtype != bool:
            raise AttentionError(f"mask where= must give bool for every pair of positions: it gave {pattern.dtype}")
        conditions.append(pattern)
    if query.segments is not None and key.segments is not None:
        # One comparison instead of two; the least integer is no segment.
        conditions.append(query.segments == jnp.where(key.segments == 0, _NO_SEGMENT, key.segments))
    if lengths is not None:
        conditions.append(key.index < lengths)
    return functools.reduce(operator.and_, conditions) if conditions else None


def array_module(x: Any) -> Any:
    """jax.numpy for arrays of JAX, numpy for numpy's."""
    return x.__array_namespace__()


class BlockKinds(NamedTuple):
    """Per row and pair of blocks, bool [1 or B, queries, keys].

    needed: may hold an allowed pair; whole: holds allowed pairs only.
    """

    needed: jax.Array
    whole: jax.Array


def block_kinds(mask: ResolvedMask, query_block: int, key_block: int) -> BlockKinds:
    """By the range of positions, segments and indices in each block; lengths must be multiples of the blocks.

    A mask in numpy gives numpy arrays.
    """
    rules, xp = mask.rules, array_module(mask.query.index)
    q_min, q_max = _ranges(mask.query.positions, query_block)
    k_min, k_max = _ranges(mask.key.positions, key_block)
    q_min, q_max, k_min, k_max = q_min[:, :, None], q_max[:, :, None], k_min[:, None], k_max[:, None]
    needed = xp.ones((1, mask.query.length // query_block, mask.key.length // key_block), bool)
    whole = needed & (rules.where is None)
    if rules.causal:
        prefix = -PADDING_INDEX if mask.prefix is None else mask.prefix[:, None, None]
        needed &= (q_max >= k_min) | (k_min < prefix)
        whole &= (q_min >= k_max) | (k_max < prefix)
    if rules.left is not None:
        needed &= q_min - k_max <= rules.left
        whole &= q_max - k_min <= rules.left
    if rules.right is not None:
        needed &= q_max - k_min >= -rules.right
        whole &= q_min - k_max >= -rules.right
    if mask.query.segments is not None and mask.key.segments is not None:
        q_low, q_high = (x[:, :, None] for x in _ranges(mask.query.segments, query_block))
        k_low, k_high = (x[:, None] for x in _ranges(mask.key.segments, key_block))
        needed &= (q_low <= k_high) & (k_low <= q_high) & ((q_low != 0) | (q_high != 0))
        whole &= (q_low == q_high) & (k_low == k_high) & (q_low == k_low) & (q_low != 0)
    if mask.lengths is not None:
        low, high = _ranges(mask.key.index[None], key_block)
        needed &= low[:, None] < mask.lengths[:, None, None]
        whole &= high[:, None] < mask.lengths[:, None, None]
    return BlockKinds(*xp.broadcast_arrays(needed, whole))


def _ranges(x: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Least and greatest value in each block: [b, L] to two of [b, L / block]."""
    blocks = x.reshape(x.shape[0], -1, block)
    return blocks.min(-1), blocks.max(-1)
