"""What is added to the scores: an array, or a function of positions with learned tables, taken block by block.

The array broadcasts to [B, N, T, S] and is quadratic in length where its last two dimensions are whole. `Bias` is not:
kernels call its function on the positions of one block, forward and backward, and sum the gradients of its tables; for
the TPU kernels it is called on each distance, where it depends on that alone (tpu_bias), else on all pairs
(tpu_pair_bias).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from zoo.kernels import bias_distance
from zoo.kernels.mask import AttentionError, Side

BiasFunction = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


@partial(jax.tree_util.register_dataclass, data_fields=("tables",), meta_fields=("function",))
@dataclass(frozen=True, eq=False)
class Bias:
    """A bias computed from learned tables: function(tables, head, query, key).

    function is called with int32 arrays for some b of the rows and n of the query heads: head [1, n, 1, 1] (global
    indices), query [1 or b, 1, t, 1] and key [1 or b, 1, 1, s] (positions, see `Mask.positions`); what it returns
    broadcasts to [b, n, t, s]. It must treat pairs one by one, take what belongs to a head by `head`, and reach learned
    arrays through `tables` alone, a pytree of floating arrays.

    >>> slopes = jnp.array([0.5, 0.25])  # ALiBi (Press et al. 2022, https://arxiv.org/abs/2108.12409) with two heads
    >>> alibi = Bias(lambda slopes, head, query, key: slopes[head] * (key - query), slopes)
    """

    function: BiasFunction
    tables: Any


Given = jax.Array | Bias | None

Slices = tuple[tuple[jax.Array | int, int], ...]
"""Start and size of a block in each dimension of the padded [B, N, T, S]."""


def check(bias: ArrayLike | Bias | None, batch: int, heads: int, queries: int, keys: int) -> Given:
    """The bias with its four dimensions written out; raises AttentionError where it does not fit."""
    if bias is None:
        return None
    if isinstance(bias, Bias):
        for path, table in jax.tree_util.tree_leaves_with_path(bias.tables):
            if not jnp.issubdtype(jnp.result_type(table), jnp.floating):
                name = jax.tree_util.keystr(path)
                raise AttentionError(f"Bias table {name} is {jnp.result_type(table)}: tables must be floating arrays")
        return Bias(bias.function, jax.tree.map(jnp.asarray, bias.tables))
    array = jnp.asarray(bias)
    full = (batch, heads, queries, keys)
    if array.ndim > 4 or any(a not in (1, b) for a, b in zip(array.shape[::-1], full[::-1], strict=False)):
        raise AttentionError(f"bias has shape {array.shape}: it must broadcast to [B, N, T, S] = {full}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise AttentionError(f"bias is {array.dtype}: give floating numbers, and what to hide as Mask(where=...)")
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def padded(bias: Given, queries: int, keys: int) -> Given:
    """An array bias lengthened to whole blocks; a dimension of 1 stays."""
    if bias is None or isinstance(bias, Bias):
        return bias
    extra = [0 if size == 1 else length - size for size, length in zip(bias.shape[2:], (queries, keys), strict=True)]
    return jnp.pad(bias, ((0, 0), (0, 0), (0, extra[0]), (0, extra[1]))) if any(extra) else bias


def block(bias: jax.Array | Bias, heads: jax.Array, query: Side, key: Side, slices: Slices | None = None) -> jax.Array:
    """The bias of one block of scores, broadcastable to [b, n, t, s].

    slices: of the block in an array, None for all of it; a Bias goes by heads and sides.
    """
    if isinstance(bias, Bias):
        return _evaluate(bias.function, bias.tables, heads, query.positions, key.positions)
    return bias if slices is None else jax.lax.dynamic_slice(bias, *_slice(bias.shape, slices))


def depends_on_distance(bias: Bias, heads: jax.Array) -> bool:
    """Whether the function stays the same where query and key move by the same number."""
    return bias_distance.depends_on_distance(bias.function, bias.tables, heads.size)


def zero_gradient(bias: Given, dtype: jnp.dtype) -> Any:
    """Accumulators for `add_gradient`: like the array or the tables, in `dtype`."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), bias.tables if isinstance(bias, Bias) else bias)


def add_gradient(
    gradient: Any,
    bias: Given,
    scores: jax.Array,
    heads: jax.Array,
    query: Side,
    key: Side,
    slices: Slices | None = None,
    consecutive: bool = False,
) -> Any:
    """Adds what one block's gradient of the scores [b, n, t, s] gives for the bias.

    consecutive: positions are known to rise by one from query to query, and from key to key; but for padding, whose
        scores have no gradient.
    """
    if bias is None:
        return None
    if isinstance(bias, Bias):
        of_queries, of_keys = query.positions, key.positions
        if consecutive and depends_on_distance(bias, heads):
            # One query, and the keys at all distances that the block has.
            of_queries = of_queries[:, :1]
            of_keys = of_keys[:, :1] + jnp.arange(1 - query.length, key.length, dtype=of_keys.dtype)
            scores = bias_distance.summed_by_distance(scores)[:, :, None]

        def evaluate(tables: Any) -> jax.Array:
            values = _evaluate(bias.function, tables, heads, of_queries, of_keys)
            return jnp.broadcast_to(values.astype(scores.dtype), scores.shape)

        (tables,) = jax.vjp(evaluate, bias.tables)[1](scores)
        return jax.tree.map(lambda total, one: total + one.astype(total.dtype), gradient, tables)
    summed = scores.sum([axis for axis, size in enumerate(bias.shape) if size == 1], keepdims=True)
    assert slices is not None
    corner, sizes = _slice(bias.shape, slices)
    return jax.lax.dynamic_update_slice(gradient, jax.lax.dynamic_slice(gradient, corner, sizes) + summed, corner)


def _evaluate(function: BiasFunction, tables: Any, heads: jax.Array, queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Of positions of queries [1 or b, t] and keys [1 or b, s]."""
    x = function(tables, heads[None, :, None, None], queries[:, None, :, None], keys[:, None, None])
    wanted = (max(queries.shape[0], keys.shape[0]), heads.shape[0], queries.shape[1], keys.shape[1])
    if x.ndim > 4 or any(a not in (1, b) for a, b in zip(x.shape[::-1], wanted[::-1], strict=False)):
        raise AttentionError(
            f"Bias function gave shape {x.shape}: for this block it must broadcast to {wanted}; "
            "index what belongs to a head by `head`"
        )
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _slice(shape: tuple[int, ...], slices: Slices) -> tuple[tuple[jax.Array, ...], tuple[int, ...]]:
    """Corner, of one type, and sizes of a block in an array bias; dimensions of 1 are taken whole."""
    taken = [(0, 1) if size == 1 else one for size, one in zip(shape, slices, strict=True)]
    return tuple(jnp.int32(start) for start, _ in taken), tuple(size for _, size in taken)
