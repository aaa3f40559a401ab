"""One attention call as implementations get it: checked arrays, a resolved mask, global indices, static numbers."""

import dataclasses
import functools
import operator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from zoo.kernels import bias as biases
from zoo.kernels import dropout as dropouts
from zoo.kernels.mask import AttentionError, Mask, ResolvedMask, Side, resolve

Tree = TypeVar("Tree")


class AttentionOutput(NamedTuple):
    """output [B, T, N, H]; lse [B, T, N], float32: log-sum-exp of each row's scores, without sinks; -inf if empty."""

    output: jax.Array
    lse: jax.Array


class Origin(NamedTuple):
    """Global indices of the first row, query, query head and key of arrays that are a part of a whole."""

    row: jax.Array | int = 0
    query: jax.Array | int = 0
    head: jax.Array | int = 0
    key: jax.Array | int = 0


WHOLE = Origin()


class Shape(NamedTuple):
    """Sizes of a call: B, T, S, N, K, and head size H of q and k."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("q", "k", "v", "mask", "bias", "seed", "batch", "heads"),
    meta_fields=("scale", "soft_cap", "bound", "dropout", "wants_lse", "length_axes"),
)
@dataclass(frozen=True, eq=False)
class Problem:
    """softmax(soft_cap(scale q k) + bias, masked) v, with dropout of the probabilities.

    q [B, T, N, H], k [B, S, K, H], v [B, S, K, H']; bias with four dimensions, or a Bias, or None.
    seed: uint32 words, or None without dropout; batch [B] and heads [N]: global indices of rows and query heads.
    bound: no score is greater or less than it; None where that is not known.
    wants_lse: whether the log-sum-exp is read, and may have a gradient.
    length_axes: mesh axes of the enclosing shard_map that cut T and S alike; none where k and v are whole.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    mask: ResolvedMask
    bias: biases.Given
    seed: jax.Array | None
    batch: jax.Array
    heads: jax.Array
    scale: float
    soft_cap: float | None
    bound: float | None
    dropout: float
    wants_lse: bool = True
    length_axes: tuple[str, ...] = ()

    @property
    def shape(self) -> Shape:
        return _shape(self.q, self.k)

    @property
    def dtype(self) -> jnp.dtype:
        """What scores, sums and accumulators are held in: float32, or float64 for float64 arguments."""
        return jnp.promote_types(self.q.dtype, jnp.float32)

    @property
    def precision(self) -> jax.lax.Precision:
        """Products of float32 arguments are float32 products on every platform; bfloat16 ones take one pass."""
        full = jnp.finfo(self.q.dtype).bits >= 32
        return jax.lax.Precision.HIGHEST if full else jax.lax.Precision.DEFAULT

    def replace(self, **changes: object) -> "Problem":
        return dataclasses.replace(self, **changes)


def build(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    bias: ArrayLike | biases.Given = None,
    soft_cap: float | None = None,
    logits_bound: float | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    scale: float | None = None,
    origin: Origin = WHOLE,
    wants_lse: bool = True,
    length_axes: tuple[str, ...] = (),
) -> Problem:
    """The checked call; raises AttentionError where arguments do not fit one another."""
    shape = check_arrays(q, k, v)
    if not 0.0 <= dropout < 1.0:
        raise AttentionError(f"dropout={dropout} is not a probability below 1: give 0 <= dropout < 1")
    if soft_cap is not None and not soft_cap > 0:
        raise AttentionError(f"soft_cap={soft_cap} is not positive: give a positive number, or None for no cap")
    if logits_bound is not None and not logits_bound > 0:
        raise AttentionError(f"logits_bound={logits_bound} is not positive: give a positive number, or None if unknown")
    bounds = [float(x) for x in (soft_cap, logits_bound) if x is not None]
    seed = None if dropout_key is None or dropout == 0 else dropouts.words(dropout_key)
    resolved = resolve(mask, shape.batch, shape.queries, shape.keys, origin.query, origin.key)
    return Problem(
        q=_without_padding(q, resolved.query, None),
        k=_without_padding(k, resolved.key, resolved.lengths),
        v=_without_padding(v, resolved.key, resolved.lengths),
        mask=resolved,
        bias=biases.check(bias, shape.batch, shape.heads, shape.queries, shape.keys),
        seed=seed,
        batch=origin.row + jnp.arange(shape.batch, dtype=jnp.int32),
        heads=origin.head + jnp.arange(shape.heads, dtype=jnp.int32),
        scale=float(shape.head_dim**-0.5 if scale is None else scale),
        soft_cap=None if soft_cap is None else float(soft_cap),
        bound=min(bounds, default=None) if bias is None else None,
        dropout=0.0 if seed is None else float(dropout),
        wants_lse=wants_lse,
        length_axes=length_axes,
    )


def _without_padding(x: jax.Array, side: Side, lengths: jax.Array | None) -> jax.Array:
    """[B, L, N, H] with zeros in the place of padding, which may hold anything: 0 times NaN is NaN."""
    there = [] if side.segments is None else [side.segments != 0]
    there += [] if lengths is None else [side.index < lengths[:, None]]
    return jnp.where(functools.reduce(operator.and_, there)[:, :, None, None], x, 0) if there else x


def _shape(q: jax.Array, k: jax.Array) -> Shape:
    batch, queries, heads, head_dim = q.shape
    return Shape(batch, queries, k.shape[1], heads, k.shape[2], head_dim)


def check_arrays(q: jax.Array, k: jax.Array, v: jax.Array) -> Shape:
    """Their sizes; raises AttentionError where they do not fit one another."""
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4:
            wanted = "[B, T, N, H]" if name == "q" else "[B, S, K, H]"
            raise AttentionError(f"{name} has shape {array.shape}: it must have four dimensions {wanted}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise AttentionError(f"{name} is {array.dtype}: it must be floating")
        if array.dtype != q.dtype:
            raise AttentionError(f"{name} is {array.dtype} and q is {q.dtype}: cast them to one type")
    shape = _shape(q, k)
    if min(q.shape + k.shape + v.shape) < 1:
        raise AttentionError(f"q {q.shape}, k {k.shape}, v {v.shape}: no dimension may be 0")
    if k.shape[0] != shape.batch or v.shape[0] != shape.batch:
        raise AttentionError(f"q, k and v have {shape.batch}, {k.shape[0]} and {v.shape[0]} rows: B must be one number")
    if k.shape[3] != shape.head_dim:
        raise AttentionError(f"q has head size {shape.head_dim} and k {k.shape[3]}: H must be one number")
    if v.shape[1:3] != k.shape[1:3]:
        raise AttentionError(f"k has [S, K] = {k.shape[1:3]} and v {v.shape[1:3]}: they must be equal")
    if shape.heads % shape.kv_heads:
        raise AttentionError(f"{shape.heads} query heads do not divide over {shape.kv_heads} key/value heads")
    return shape


def keeps_groups(heads: int, kv_heads: int, ways: int) -> bool:
    """Whether each part of the query heads has key/value heads of its own, or one that it shares."""
    return kv_heads % ways == 0 or (heads // kv_heads) % (heads // ways) == 0


def grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """[b, n, t, s] as [b, k, g, t, s] for the scores of grouped heads; n is 1 or N."""
    b, n, *rest = x.shape
    return x.reshape(b, 1, 1, *rest) if n == 1 else x.reshape(b, kv_heads, n // kv_heads, *rest)


def padded(x: jax.Array, length: int, axis: int, value: float = 0) -> jax.Array:
    """`value` at the end of an axis, up to `length`."""
    extra = length - x.shape[axis]
    widths = [(0, extra if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if extra else x


def varying_axes(tree: Any) -> frozenset[str]:
    """The mesh axes that arrays inside shard_map differ over."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))


def varying_over(tree: Tree, axes: frozenset[str]) -> Tree:
    """The tree, every array marked as varying over `axes`: loops inside shard_map ask it of what they start from."""

    def one(x: jax.Array) -> jax.Array:
        missing = axes - varying_axes(x)
        return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(one, tree)
