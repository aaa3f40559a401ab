"""Multi-head attention with grouped queries, for self- and cross-attention, and its cache of keys and values."""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from zoo.kernels import Bias, Mask, attention, attention_weights
from zoo.layers.linear import Initializer, LayerError, Linear, Precision, joined, normal
from zoo.layers.positions import Rotary
from zoo.sharding import constrain

_HEADS = ("act_batch", "act_length", "act_heads", "act_head_dim")
_KV_HEADS = ("act_batch", "act_length", "act_kv_heads", "act_head_dim")
_SLOTS = ("act_batch", "act_kv_heads", None, "act_head_dim")

_APPEND = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(1, 2, 3),
    inserted_window_dims=(0,),
    scatter_dims_to_operand_dims=(0, 3),
    operand_batching_dims=(1,),
    scatter_indices_batching_dims=(0,),
)
"""Windows [K, T, H] of each row written to [L, B, K, S, H], their corners given as (layer, slot), [B, 2]."""


@partial(jax.tree_util.register_dataclass, data_fields=("keys", "values", "lengths", "layer"), meta_fields=())
@dataclass(frozen=True)
class KVCache:
    """Keys and values seen so far. Row b holds `lengths[b]` of them, in its first slots; the others are not read.

    keys, values: [B, K, S, H], by head, as the products of a short step read them: any other order would be turned at
        every step.  lengths: [B] int32.  In the cache of a stack, each has a leading axis of layers.
    layer: of such a cache, which one an attention appends to and reads, int32; None for the cache of one attention.
    """

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array
    layer: jax.Array | None = None

    def appended(self, keys: jax.Array, values: jax.Array) -> "KVCache":
        """With keys and values [B, T, K, H] in the T slots after each row's length. There must be that many left.

        In the cache of a stack those slots alone are written, in place, where cutting the layer out and putting it back
        would move all of it.
        """
        if self.layer is None:
            stacked = KVCache(self.keys[None], self.values[None], self.lengths[None], jnp.int32(0))
            return stacked.appended(keys, values).of_layer()
        starts, added = self.lengths[self.layer], keys.shape[1]
        corners = jnp.stack([jnp.broadcast_to(self.layer, starts.shape), starts], axis=-1)

        def write(slots: jax.Array, new: jax.Array) -> jax.Array:
            slots = jax.lax.scatter(
                slots,
                corners,
                new.astype(slots.dtype).swapaxes(1, 2),
                _APPEND,
                unique_indices=True,
                mode=jax.lax.GatherScatterMode.CLIP,
            )
            return constrain(slots, None, *_SLOTS)

        lengths = self.lengths.at[self.layer].add(added)
        return dataclasses.replace(
            self, keys=write(self.keys, keys), values=write(self.values, values), lengths=lengths
        )

    def of_layer(self, layer: jax.Array | None = None) -> "KVCache":
        """The cache of one layer of a stack's, of `self.layer` unless given."""
        index = self.layer if layer is None else layer
        if index is None:
            return self
        keys, values, lengths = (
            jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for x in (self.keys, self.values, self.lengths)
        )
        return KVCache(keys, values, lengths)

    def by_slot(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the cache of one attention as `zoo.kernels.attention` takes them, [B, S, K, H]."""
        return self.keys.swapaxes(1, 2), self.values.swapaxes(1, 2)

    def cut(self, lengths: jax.Array) -> "KVCache":
        """With the first lengths [B] entries of each row alone: forgets padding that was appended after a prompt."""
        return dataclasses.replace(self, lengths=jnp.broadcast_to(lengths, self.lengths.shape))

    def repeated(self, count: int) -> "KVCache":
        """With `count` copies of each row, one after another."""
        return self.rows(jnp.repeat(jnp.arange(self.lengths.shape[-1]), count))

    def rows(self, rows: jax.Array) -> "KVCache":
        """A cache whose row r is row rows[r] of this one; rows is int32 of any length, and may repeat."""
        keys, values = (jnp.take(x, rows, axis=-4) for x in (self.keys, self.values))
        return KVCache(keys, values, jnp.take(self.lengths, rows, axis=-1))


class AttentionOutput(NamedTuple):
    """output: [B, T, D].  cache: the one given, with what this call appended.

    weights: [B, N, T, S] float32, where they were asked for.
    """

    output: jax.Array
    cache: KVCache | None
    weights: jax.Array | None


class MultiHeadAttention(nnx.Module):
    """softmax(q k^T / sqrt(H)) v with N query heads over K key/value heads (Vaswani et al. 2017; Ainslie et al. 2023).

    kv_width: width of what keys and values are made from, where it is not the queries' (cross-attention).
    out_bias: whether the projection that ends it has a bias; as `bias` where None.
    head_norm: makes, from H, a normalisation of each head's queries and one of its keys, before rotary positions
        (Henry et al. 2020; Qwen 3).
    scale: factor of the scores, 1 / sqrt(H) where None.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        rngs: nnx.Rngs,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kv_width: int | None = None,
        rotary: Rotary | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        head_norm: Callable[[int], nnx.Module] | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        precision: Precision = Precision(),
        init: Initializer = normal(0.02),
        query_init: Initializer | None = None,
        out_init: Initializer | None = None,
    ):
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise LayerError(f"num_heads {num_heads} is no multiple of num_kv_heads {num_kv_heads}: choose a divisor")
        if head_dim is None and width % num_heads:
            raise LayerError(f"width {width} is no multiple of num_heads {num_heads}: choose another or give head_dim")
        head_dim = head_dim or width // num_heads
        self.num_kv_heads, self.head_dim, self.rotary, self.dropout = num_kv_heads, head_dim, rotary, dropout
        self.compute, self.scale = precision.compute, scale
        linear = partial(Linear, rngs=rngs, precision=precision)
        kv_shape, kv_axes = (num_kv_heads, head_dim), ("embed", "kv_heads", "head_dim")
        out_axes, out_init = ("heads", "head_dim", "embed"), out_init or init
        out_bias = bias if out_bias is None else out_bias
        self.query = linear(
            width, (num_heads, head_dim), axes=("embed", "heads", "head_dim"), bias=bias, init=query_init or init
        )
        self.key = linear(kv_width or width, kv_shape, axes=kv_axes, bias=bias, init=init)
        self.value = linear(kv_width or width, kv_shape, axes=kv_axes, bias=bias, init=init)
        self.out = linear((num_heads, head_dim), width, axes=out_axes, bias=out_bias, init=out_init)
        self.query_norm = None if head_norm is None else head_norm(head_dim)
        self.key_norm = None if head_norm is None else head_norm(head_dim)

    def __call__(
        self,
        x: jax.Array,
        kv: jax.Array | KVCache | None = None,
        *,
        mask: Mask = Mask(),
        bias: Bias | jax.Array | None = None,
        cache: KVCache | None = None,
        positions: jax.Array | None = None,
        key: jax.Array | None = None,
        return_weights: bool = False,
    ) -> AttentionOutput:
        """x [B, T, D] attends to itself, or to `kv`: [B, S, E], or what `keys_and_values` made of it once.

        kv may have B / G rows, each for G rows of x that follow one another; `mask` then takes their queries as those
        of one row, [B / G, G T].
        bias: added to the scores, as `zoo.kernels.attention` takes it.
        cache: keys and values of earlier calls; those of x are appended, and x attends to all. Masks then compare
            slots: query t of row b stands at slot lengths[b] + t.
        positions: [B, T], for rotary positions; counted from 0, or from the cache's lengths, unless given.
        key: for dropout of attention weights; None drops nothing.
        return_weights: also give the attention weights, before dropout: computed apart, in memory quadratic in length.
        """
        if kv is not None and cache is not None:
            raise LayerError("kv given with a cache, which is of self-attention: give keys_and_values(kv) as kv")
        if kv is None:
            q, k, v = self._queries_keys_values(x)
            start = 0 if cache is None else cache.of_layer().lengths[:, None]
            slots = start + jnp.arange(x.shape[1])[None]
            if self.rotary is not None:
                positions = slots if positions is None else positions
                q, k = self.rotary(q, positions), self.rotary(k, positions)
            if cache is not None:
                cache = cache.appended(k, v)
                held = cache.of_layer()
                k, v = held.by_slot()
                mask = mask & Mask(positions=(slots, jnp.arange(k.shape[1])[None]), lengths=held.lengths)
        else:
            q = self._queries(self.query(x))
            held = kv if isinstance(kv, KVCache) else self.keys_and_values(kv)
            k, v = held.by_slot()
            if isinstance(kv, KVCache):
                mask = mask & Mask(lengths=held.lengths)
            if len(q) % len(k):
                raise LayerError(
                    f"kv has {len(k)} rows and x {len(q)}, no multiple: give as many, or a divisor of them"
                )
            q = q.reshape(len(k), -1, *q.shape[2:])
        dropout = 0.0 if key is None else self.dropout
        k, v, scored = k.astype(q.dtype), v.astype(q.dtype), {"bias": bias, "scale": self.scale}
        y = attention(q, k, v, mask, dropout=dropout, dropout_key=key, **scored)
        y = constrain(y.reshape(*x.shape[:2], *y.shape[2:]), *_HEADS)
        weights = attention_weights(q, k, mask, **scored) if return_weights else None
        if weights is not None:
            weights = rearrange(weights, "b n (g t) s -> (b g) n t s", t=x.shape[1])
        return AttentionOutput(constrain(self.out(y), "act_batch", "act_length", "act_embed"), cache, weights)

    def keys_and_values(self, kv: jax.Array, lengths: jax.Array | None = None) -> KVCache:
        """The keys and values of kv [B, S, E], of which the first lengths [B] of each row are real (default: all)."""
        k, v = self._keys(self.key(kv)), self._values(self.value(kv))
        lengths = jnp.full(kv.shape[0], kv.shape[1], jnp.int32) if lengths is None else lengths
        return KVCache(k.swapaxes(1, 2), v.swapaxes(1, 2), lengths)

    def init_cache(self, batch_size: int, slots: int) -> KVCache:
        """An empty cache with room for `slots` keys and values a row, in the compute dtype."""
        slots_shape = (batch_size, self.num_kv_heads, slots, self.head_dim)
        # Two arrays, so that the cache can be donated.
        keys, values = (constrain(jnp.zeros(slots_shape, jnp.dtype(self.compute)), *_SLOTS) for _ in range(2))
        return KVCache(keys, values, jnp.zeros(batch_size, jnp.int32))

    def merged(self) -> "MultiHeadAttention":
        """This self-attention with one product for queries, keys and values, which are three kernels side by side.

        Of a few tokens on a CPU, a product of this size takes as long to start as to read its kernel.
        """
        if self.key is None:
            return self
        merged = copy.copy(self)
        merged.query, merged.key, merged.value = joined(self.query, self.key, self.value), None, None
        return merged

    def _queries_keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        if self.key is None:
            made = self.query(x)
            values = made.shape[-2] - self.num_kv_heads
            q, k, v = jnp.split(made, (values - self.num_kv_heads, values), axis=-2)
        else:
            q, k, v = self.query(x), self.key(x), self.value(x)
        return self._queries(q), self._keys(k), self._values(v)

    def _queries(self, q: jax.Array) -> jax.Array:
        return constrain(_normalised(q, self.query_norm), *_HEADS)

    def _keys(self, k: jax.Array) -> jax.Array:
        return constrain(_normalised(k, self.key_norm), *_KV_HEADS)

    def _values(self, v: jax.Array) -> jax.Array:
        return constrain(v, *_KV_HEADS)


def _normalised(x: jax.Array, norm: nnx.Module | None) -> jax.Array:
    return x if norm is None else norm(x)
