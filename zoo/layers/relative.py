"""Attention by distance, with memories of what came before and a second stream of queries that see no own content.

Dai et al. 2019, "Transformer-XL" (arXiv 1901.02860, section 3.3), Yang et al. 2019, "XLNet" (arXiv 1906.08237, sections
2.3 to 2.5), and XLNet's released code.

The two streams of XLNet are one array here, [B, T + P, D]: the contents of T tokens, and behind them P queries, each of
which stands for a place whose token it may not see. They share every weight, and both attend to the contents alone: one
projection, one call of attention and one feed-forward serve them together. Keys are S = M + T, the M of a memory first.
"""

import functools
import operator
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zoo.kernels import Mask, attention, attention_weights
from zoo.kernels.memory import saved
from zoo.layers.dropout import dropout, split
from zoo.layers.feedforward import FeedForward
from zoo.layers.linear import Initializer, LayerError, Linear, Precision, normal
from zoo.layers.transformer import REMAT_POLICIES, SAVED_BLOCK, Intermediates, Stack
from zoo.sharding import constrain

_BEFORE_ALL = jnp.iinfo(jnp.int32).min


def distance_vectors(distances: jax.Array, width: int, *, longest: float = 10000.0) -> jax.Array:
    """distances [R] to [R, D] float32: D / 2 sines, then as many cosines (Transformer-XL's order of sinusoids)."""
    if width % 2:
        raise LayerError(f"sinusoids need an even width and got {width}: choose {width + 1}")
    # A constant made on the host: an accelerator's power is off by more than the last digit.
    frequencies = (1 / longest ** (np.arange(0, width, 2) / width)).astype(np.float32)
    angles = distances.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def shifted(scores: jax.Array, keys: int) -> jax.Array:
    """Scores of distances [..., T, R], which fall from S, to scores of keys [..., T, S]; query t stands at S - T + t.

    Entry j of query t is that of the distance S - T + t - j, column T - t + j: as the rows lie one behind the other,
    each begins one column earlier than the one above. R is above S; where it is less than S + T, keys farther ahead
    than the distances reach get what belongs to others, and are to be hidden (Transformer-XL, appendix B).
    """
    *leading, queries, distances = scores.shape
    flat = scores.reshape(*leading, queries * distances)[..., queries:]
    return flat.reshape(*leading, queries, distances - 1)[..., :keys]


def shifted_to(scores: jax.Array, places: jax.Array, tokens: int, keys: int) -> jax.Array:
    """`shifted` for queries anywhere: scores [B, N, P, R], query p of row b at place places[b, p] among the T tokens.

    Row by row moves by the binary digits of T - place, so that neither this nor its gradient gathers or scatters.
    """
    digits, moves = tokens.bit_length(), (tokens - places)[:, None, :, None]
    scores = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (0, keys + 2**digits - 1 - scores.shape[-1])))
    for digit in reversed(range(digits)):
        step = 2**digit
        width = keys + step - 1
        scores = jnp.where(moves & step, scores[..., step : step + width], scores[..., :width])
    return scores


class Pairs(NamedTuple):
    """What a call knows of its queries and keys, the same in every layer.

    vectors: [R, D], of the distances S, S - 1 and so on, down to 1 - T or where the last key that is not hidden is.
    targets: [B, P] int32, the places among the T tokens that the queries of the second stream stand for, or None.
    differs: bool, broadcasts to [B, T + P, S]: whether query and key are of two segments; None does without segments.
    hidden: bool, broadcasts to [B, T + P, S]: whether the query may not attend to the key, besides what a mask says.
    places: [B, T + P], where a memory has slots for all of a row: the T contents are written into those from the first
        place on, one behind the other, and keys are the slots alone, S = M; distances are S to 1 - S.
    """

    vectors: jax.Array
    targets: jax.Array | None = None
    differs: jax.Array | None = None
    hidden: jax.Array | None = None
    places: jax.Array | None = None

    @property
    def queries(self) -> int:
        """P."""
        return 0 if self.targets is None else self.targets.shape[1]

    def appended(self, memory: jax.Array, states: jax.Array) -> jax.Array:
        """What contents attend to: a layer's memory [B, M, D], and the states [B, T, D] of the contents."""
        states = states.astype(memory.dtype)
        if self.places is None:
            return jnp.concatenate([memory, states], 1)
        write = jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice(row, new, (start, 0)))
        return constrain(write(memory, states, self.places[:, 0]), "act_batch", None, "act_embed")


def _with_targets(rows: jax.Array, targets: jax.Array | None) -> jax.Array:
    """rows [B, T, ...], of each token, and behind them those of the targets [B, P]: [B, T + P, ...]."""
    if targets is None:
        return rows
    rows = jnp.broadcast_to(rows, (targets.shape[0], *rows.shape[1:]))
    index = targets.reshape(*targets.shape, *(1,) * (rows.ndim - 2))
    return jnp.concatenate([rows, jnp.take_along_axis(rows, index, axis=1)], 1)


def in_order(order: jax.Array, targets: jax.Array | None, remembered: int) -> Mask:
    """What `order` [B, T] lets attend: contents to what is known before and with them, targets to what is before."""
    tokens = order.shape[1]
    queries = _with_targets(order, targets)
    queries = queries - (jnp.arange(queries.shape[1]) >= tokens)
    keys = jnp.pad(order, ((0, 0), (remembered, 0)), constant_values=_BEFORE_ALL)
    return Mask(causal=True, positions=(queries, keys))


def segments_differ(token_types: jax.Array, targets: jax.Array | None, remembered: int) -> jax.Array:
    """Whether query and key are of different token_types [B, T], those of a memory 0: [B, T + P, S]."""
    keys = jnp.pad(token_types, ((0, 0), (remembered, 0)))
    return _with_targets(token_types, targets)[:, :, None] != keys[:, None]


def hidden_pairs(
    length: int,
    remembered: int,
    targets: jax.Array | None,
    *,
    real: jax.Array | None,
    perm_mask: jax.Array | None,
    causal: bool,
) -> jax.Array | None:
    """Pairs [B or 1, T + P, S] that may not attend, None where there are none; a memory's keys are seen by all.

    real: [B, T], 0 where a token is a key for none.  perm_mask: [B, T, T], not 0 where a token does not attend to
    another.  causal: whether those behind a token are hidden. Contents see themselves whatever these say.
    """
    places = jnp.arange(length)
    conditions = [(places > places[:, None])[None]] if causal else []
    conditions += [] if real is None else [(real == 0)[:, None]]
    conditions += [] if perm_mask is None else [perm_mask != 0]
    if not conditions:
        return None
    hidden = functools.reduce(operator.or_, conditions)
    rows = _with_targets(jnp.broadcast_to(hidden, (hidden.shape[0], length, length)), targets)
    own = jnp.arange(rows.shape[1])[:, None] == places
    return jnp.pad(rows & ~own, ((0, 0), (0, 0), (remembered, 0)))


class HeadBias(nnx.Module):
    """A learned vector [N, H] that is added to every query."""

    def __init__(
        self, num_heads: int, head_dim: int, *, rngs: nnx.Rngs, precision: Precision, init: Initializer = normal(0.02)
    ):
        vectors = init(rngs.params(), (num_heads, head_dim), jnp.dtype(precision.parameters))
        self.bias = nnx.Param(vectors, axes=("heads", "head_dim"))

    def __call__(self, q: jax.Array) -> jax.Array:
        """q [B, T, N, H], in its dtype."""
        return (q + self.bias[...]).astype(q.dtype)


class RelativeAttention(nnx.Module):
    """softmax(((q + u) k + (q + v) r + (q + s) g) / sqrt(H)) value, r of the distance and g of whether segments differ.

    Transformer-XL's section 3.3, and of the segments XLNet's section 2.5; u, v and s are learned for each head of each
    layer. The products of q + v with r and of q + s with g are an array [B, N, T + P, S]: quadratic in length.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_dim: int,
        *,
        rngs: nnx.Rngs,
        dropout: float = 0.0,
        precision: Precision = Precision(),
        init: Initializer = normal(0.02),
    ):
        self.dropout, self.precision, self.scale = dropout, precision, head_dim**-0.5
        common = {"rngs": rngs, "precision": precision, "init": init}
        heads = (num_heads, head_dim)
        into = partial(Linear, width, heads, bias=False, **common)
        self.query = into(axes=("embed", "heads", "head_dim"))
        self.key = into(axes=("embed", "kv_heads", "head_dim"))
        self.value = into(axes=("embed", "kv_heads", "head_dim"))
        self.position = into(axes=("embed", "heads", "head_dim"))
        segments = init(rngs.params(), (2, *heads), jnp.dtype(precision.parameters))
        self.segments = nnx.Param(segments, axes=("classes", "heads", "head_dim"))
        self.out = Linear(heads, width, axes=("heads", "head_dim", "embed"), bias=False, **common)
        self.to_content, self.to_position, self.to_segment = (HeadBias(*heads, **common) for _ in range(3))

    def __call__(
        self,
        x: jax.Array,
        pairs: Pairs,
        *,
        memory: jax.Array | None = None,
        mask: Mask = Mask(),
        key: jax.Array | None = None,
        return_weights: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        """x [B, T + P, D] to [B, T + P, D], and weights [B, N, T + P, S] float32 before dropout, where asked for.

        memory: [B, M, D], states of this layer's input that stand before those of x.
        mask: of T + P queries and S keys.  key: for dropout of attention weights; None drops nothing.
        """
        contents = x[:, : x.shape[1] - pairs.queries]
        contents = contents if memory is None else pairs.appended(memory, contents).astype(x.dtype)
        q = constrain(self.query(x), "act_batch", "act_length", "act_heads", "act_head_dim")
        k, v = (
            constrain(part(contents), "act_batch", "act_length", "act_kv_heads", "act_head_dim")
            for part in (self.key, self.value)
        )
        scored = {"bias": self._bias(q, pairs, k.shape[1]), "scale": self.scale}
        rate, q = 0.0 if key is None else self.dropout, self.to_content(q)
        y = attention(q, k, v, mask, dropout=rate, dropout_key=key, **scored)
        weights = attention_weights(q, k, mask, **scored) if return_weights else None
        return constrain(self.out(y), "act_batch", "act_length", "act_embed"), weights

    def _bias(self, q: jax.Array, pairs: Pairs, keys: int) -> jax.Array:
        """Scores of distances and of segments, -inf where a key is hidden: [B, N, T + P, S] float32."""
        tokens = q.shape[1] - pairs.queries
        of_distances = self._product(
            "btnh,rnh->bntr", self.to_position(q), self.position(pairs.vectors.astype(self.precision.compute))
        )
        if pairs.places is not None:
            bias = shifted_to(of_distances, pairs.places, keys, keys)
        else:
            bias = shifted(of_distances[:, :, :tokens], keys)
            if pairs.targets is not None:
                of_targets = shifted_to(of_distances[:, :, tokens:], pairs.targets, tokens, keys)
                bias = jnp.concatenate([bias, of_targets], 2)
        if pairs.differs is not None:
            same, differing = self._product("btnh,gnh->gbnt", self.to_segment(q), self.segments[...])[..., None]
            bias = bias + jnp.where(pairs.differs[:, None], differing, same)
        bias = self.scale * bias
        if pairs.hidden is not None:
            bias = jnp.where(pairs.hidden[:, None], -jnp.inf, bias)
        return constrain(bias, "act_batch", "act_heads", "act_length", None)

    def _product(self, equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(
            equation,
            a,
            b.astype(a.dtype),
            precision=self.precision.products,
            preferred_element_type=jnp.float32,
        )


class RelativeBlock(nnx.Module):
    """Relative attention and feed-forward, each norm(x + dropout(f(x))); both streams go through it side by side."""

    def __init__(
        self,
        attention: RelativeAttention,
        feedforward: FeedForward,
        norm: Callable[[], nnx.Module],
        *,
        dropout: float = 0.0,
    ):
        self.dropout = dropout
        self.attention_norm, self.attention = norm(), attention
        self.feedforward_norm, self.feedforward = norm(), feedforward

    def __call__(
        self, x: jax.Array, pairs: Pairs, *, key: jax.Array | None = None, **arguments
    ) -> tuple[jax.Array, jax.Array | None]:
        """x [B, T + P, D] to the same, and attention weights where asked for: arguments as of RelativeAttention."""
        attention_key, mlp_key, *branch_keys = split(key, 4)
        y, weights = self.attention(x, pairs, key=attention_key, **arguments)
        x = self._after(self.attention_norm, x, y, branch_keys[0])
        x = self._after(self.feedforward_norm, x, self.feedforward(x, key=mlp_key), branch_keys[1])
        return x, weights

    def _after(self, norm: nnx.Module, x: jax.Array, y: jax.Array, key: jax.Array | None) -> jax.Array:
        return constrain(norm(x + dropout(y, self.dropout, key)), "act_batch", "act_length", "act_embed")


class RelativeOutput(NamedTuple):
    """x: [B, T + P, D].  memories: the new ones, [L, B, M', D], where some were given.

    intermediates: of both streams, with T + P for T, where they were asked for.
    """

    x: jax.Array
    memories: jax.Array | None
    intermediates: Intermediates | None


def run_relative(
    stack: Stack,
    x: jax.Array,
    pairs: Pairs,
    *,
    memories: jax.Array | None = None,
    remember: Callable[[jax.Array, jax.Array], jax.Array],
    mask: Mask = Mask(),
    key: jax.Array | None = None,
    return_intermediates: bool = False,
) -> RelativeOutput:
    """x [B, T + P, D] through a stack of RelativeBlocks, as one scan.

    memories: [L, B, M, D], of each layer.  remember: makes a layer's new memory from its old one and the T states that
        enter it, [B, M, D] and [B, T, D].
    """
    keys = None if key is None else jax.random.split(key, stack.num_layers)
    tokens = x.shape[1] - pairs.queries

    def run_layer(x: jax.Array, blocks: nnx.List, of_layer: tuple) -> tuple[jax.Array, tuple]:
        (block,), (memory, key) = blocks, of_layer
        x = entering = saved(x, SAVED_BLOCK)
        x, weights = block(x, pairs, memory=memory, mask=mask, key=key, return_weights=return_intermediates)
        memory = None if memory is None else remember(memory, entering[:, :tokens])
        return x, (memory, entering if return_intermediates else None, weights)

    if stack.remat != "none":
        run_layer = jax.checkpoint(run_layer, policy=REMAT_POLICIES[stack.remat], prevent_cse=False)
    x, (memories, entering, weights) = stack.scan(run_layer, x, (memories, keys))
    if not return_intermediates:
        return RelativeOutput(x, memories, None)
    return RelativeOutput(x, memories, Intermediates(jnp.concatenate([entering, x[None]]), weights, None))
