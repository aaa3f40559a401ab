"""Transformer blocks, and stacks of them that compile as one block whatever their depth."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.kernels import Bias, Mask
from zoo.kernels.memory import platform, saved
from zoo.layers.attention import KVCache, MultiHeadAttention
from zoo.layers.dropout import dropout, split
from zoo.layers.feedforward import FeedForward
from zoo.layers.linear import LayerError, Precision
from zoo.layers.modulation import modulated
from zoo.sharding import constrain, is_variable, logical_axes

Tree = TypeVar("Tree")

UNSTACKED_BYTES = 2**31
"""Weights that `unstacked` holds twice, at most."""

SAVED_BLOCK = "block"
SAVED_PRODUCTS = ("product",)
SAVED_ATTENTION = ("attention_out", "attention_lse")

REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "products": jax.checkpoint_policies.save_only_these_names(SAVED_BLOCK, *SAVED_PRODUCTS, *SAVED_ATTENTION),
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED_BLOCK, *SAVED_ATTENTION),
    "full": jax.checkpoint_policies.save_only_these_names(SAVED_BLOCK),
}
"""What the backward pass finds saved: everything, matrix products and attention, attention alone, blocks' inputs."""


class Intermediates(NamedTuple):
    """What happens inside a stack of L blocks, for a person to look at or a probe to learn from.

    hidden: [L + 1, B, T, D], the states that enter each block, and behind them those that leave the stack, after its
        last normalisation where a model has one there.
    attention: [L, B, N, T, S] float32, the weights of self-attention, before dropout.
    cross_attention: [L, B, N, T, S], those of cross-attention, where there is any.
    """

    hidden: jax.Array
    attention: jax.Array
    cross_attention: jax.Array | None

    def with_last(self, x: jax.Array) -> "Intermediates":
        """These, with x [B, T, D] as what leaves the stack."""
        return self._replace(hidden=self.hidden.at[-1].set(x))


class BlockOutput(NamedTuple):
    """x: [B, T, D].  cache: the one given, with what this call appended.

    attention, cross_attention: weights [B, N, T, S] float32, where they were asked for.
    """

    x: jax.Array
    cache: KVCache | None
    attention: jax.Array | None = None
    cross_attention: jax.Array | None = None


class StackOutput(NamedTuple):
    """x: [B, T, D].  cache: the one given, with what this call appended.  intermediates: where they were asked for."""

    x: jax.Array
    cache: KVCache | None
    intermediates: Intermediates | None


class LayerScale(nnx.Module):
    """A learned factor for each feature of a residual branch x [..., D] (Touvron et al. 2021), all `value` at first."""

    def __init__(self, width: int, value: float, *, precision: Precision = Precision()):
        self.scale = nnx.Param(jnp.full(width, value, jnp.dtype(precision.parameters)), axes=("norm",))

    def __call__(self, x: jax.Array) -> jax.Array:
        return (x * self.scale[...]).astype(x.dtype)


class Block(nnx.Module):
    """Self-attention, optional cross-attention and feed-forward, each a residual branch with dropout.

    norm makes a normalisation for each branch. It stands before the branch (norm_first: x + f(norm(x)), GPT-2) or after
    the sum (norm(x + f(x)), Vaswani et al. 2017). branch_scale makes what a branch passes through before it is added.
    modulation makes what turns a condition into shift, scale and gate [B, 1, D] of self-attention, and those of the
    feed-forward network: x + gate * f(norm(x) * (1 + scale) + shift).
    """

    def __init__(
        self,
        attention: MultiHeadAttention,
        feedforward: FeedForward,
        norm: Callable[[], nnx.Module],
        *,
        cross_attention: MultiHeadAttention | None = None,
        norm_first: bool = True,
        branch_scale: Callable[[], LayerScale] | None = None,
        modulation: Callable[[], nnx.Module] | None = None,
        dropout: float = 0.0,
    ):
        self.norm_first, self.dropout = norm_first, dropout
        self.modulation = None if modulation is None else modulation()
        scale = branch_scale or (lambda: None)
        self.attention_norm, self.attention, self.attention_scale = norm(), attention, scale()
        self.cross_norm, self.cross_scale = (None, None) if cross_attention is None else (norm(), scale())
        self.cross_attention = cross_attention
        self.feedforward_norm, self.feedforward, self.feedforward_scale = norm(), feedforward, scale()

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: Mask = Mask(),
        bias: Bias | jax.Array | None = None,
        context: jax.Array | KVCache | None = None,
        context_mask: Mask = Mask(),
        cache: KVCache | None = None,
        positions: jax.Array | None = None,
        condition: Any = None,
        key: jax.Array | None = None,
        return_weights: bool = False,
    ) -> BlockOutput:
        """x [B, T, D]; context: what cross-attention attends to, [B, S, E] or what `keys_and_values` made of it.

        bias: of the scores of self-attention.  condition: what the block's modulation takes. The rest is as in
        MultiHeadAttention.
        """
        if (context is None) != (self.cross_attention is None):
            given = "none" if context is None else "one"
            raise LayerError(f"a block has cross-attention where it gets a context, and only there: {given} was given")
        if (condition is None) != (self.modulation is None):
            given = "none" if condition is None else "one"
            raise LayerError(f"a block is modulated where it gets a condition, and only there: {given} was given")
        of_attention = of_feedforward = None
        if self.modulation is not None:
            vectors = self.modulation(condition)
            of_attention, of_feedforward = vectors[:3], vectors[3:]
        self_key, cross_key, mlp_key, *branch_keys = split(key, 6)
        weights = cross_weights = None

        def self_attention(x: jax.Array) -> jax.Array:
            nonlocal cache, weights
            y, cache, weights = self.attention(
                x,
                mask=mask,
                bias=bias,
                cache=cache,
                positions=positions,
                key=self_key,
                return_weights=return_weights,
            )
            return y

        def cross_attention(x: jax.Array) -> jax.Array:
            nonlocal cross_weights
            assert self.cross_attention is not None
            y, _, cross_weights = self.cross_attention(
                x, context, mask=context_mask, key=cross_key, return_weights=return_weights
            )
            return y

        def feedforward(x: jax.Array) -> jax.Array:
            return self.feedforward(x, key=mlp_key)

        x = self._branch(x, self.attention_norm, self_attention, self.attention_scale, branch_keys[0], of_attention)
        if self.cross_norm is not None:
            x = self._branch(x, self.cross_norm, cross_attention, self.cross_scale, branch_keys[1])
        x = self._branch(x, self.feedforward_norm, feedforward, self.feedforward_scale, branch_keys[2], of_feedforward)
        return BlockOutput(x, cache, weights, cross_weights)

    def with_merged_attention(self) -> "Block":
        block = copy.copy(self)
        block.attention = self.attention.merged()
        return block

    def _branch(
        self,
        x: jax.Array,
        norm: nnx.Module,
        f: Callable[[jax.Array], jax.Array],
        scale: LayerScale | None,
        key: jax.Array | None,
        modulation: tuple[jax.Array, ...] | None = None,
    ) -> jax.Array:
        y = norm(x) if self.norm_first else x
        if modulation is None:
            y = f(y)
        else:
            shift, spread, gate = modulation
            y = gate * f(modulated(y, shift, spread))
        x = x + dropout(y if scale is None else scale(y), self.dropout, key)
        x = x if self.norm_first else norm(x)
        return constrain(x, "act_batch", "act_length", "act_embed")


class Stack(nnx.Module):
    """`num_layers` blocks as one scan over periods of `period` blocks, so that compile time does not grow with depth.

    make builds one block. Its parameters gain a leading axis "layers" of num_layers / period; block j of period i is
    layer i * period + j. remat names what the backward pass keeps, see REMAT_POLICIES.
    """

    def __init__(
        self,
        make: Callable[[nnx.Rngs], nnx.Module],
        num_layers: int,
        *,
        rngs: nnx.Rngs,
        period: int = 1,
        remat: str = "none",
    ):
        if num_layers % period:
            raise LayerError(f"num_layers {num_layers} is no multiple of the period {period}: choose a multiple of it")
        if remat not in REMAT_POLICIES:
            raise LayerError(f"remat {remat!r} is unknown: choose one of {', '.join(REMAT_POLICIES)}")
        self.num_layers, self.period, self.remat = num_layers, period, remat

        def make_period(key: jax.Array) -> nnx.List:
            block_rngs = nnx.Rngs(key)
            return nnx.List([make(block_rngs) for _ in range(period)])

        keys = jax.random.split(rngs.params(), num_layers // period)
        self.blocks, self.unstacked = with_layers_axis(jax.vmap(make_period)(keys)), False

    def __call__(
        self,
        x: jax.Array,
        *,
        masks: Sequence[Mask] = (Mask(),),
        bias: Bias | jax.Array | None = None,
        context: jax.Array | KVCache | None = None,
        context_mask: Mask = Mask(),
        cache: KVCache | None = None,
        positions: jax.Array | None = None,
        condition: Any = None,
        key: jax.Array | None = None,
        return_intermediates: bool = False,
    ) -> StackOutput:
        """x [B, T, D] through all blocks; masks holds one Mask for each block of the period.

        bias: of every block's self-attention.  context: [B, S, E], or what `keys_and_values` made of it.
        condition: what the modulation of every block takes, where they have one.
        cache: of init_cache.  return_intermediates: whether the states and weights of every block are kept.
        """
        keys = None if key is None else jax.random.split(key, (self.num_layers // self.period, self.period))
        modulating = {} if condition is None else {"condition": condition}  # Blocks of other kinds know none.

        def run_period(carry: tuple, blocks: nnx.List, each: tuple) -> tuple[tuple, list[tuple]]:
            (x, cache), (index, keys) = carry, each
            x, seen = saved(x, SAVED_BLOCK), []
            for j, (block, mask) in enumerate(zip(blocks, masks, strict=True)):
                layer = index * self.period + j
                entering = x
                # The cache is carried, not scanned over: a scan would hold both the old and the new one whole.
                x, cache, *weights = block(
                    x,
                    mask=mask,
                    bias=bias,
                    context=context.of_layer(layer) if isinstance(context, KVCache) else context,
                    context_mask=context_mask,
                    cache=None if cache is None else dataclasses.replace(cache, layer=layer),
                    positions=positions,
                    key=None if keys is None else keys[j],
                    return_weights=return_intermediates,
                    **modulating,
                )
                cache = None if cache is None else dataclasses.replace(cache, layer=None)
                seen += [(entering, *weights)] if return_intermediates else []
            return (x, cache), seen

        if self.remat != "none":
            run_period = jax.checkpoint(run_period, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        indices = jnp.arange(self.num_layers // self.period)
        (x, cache), seen = self.scan(run_period, (x, cache), (indices, keys))
        if not return_intermediates:
            return StackOutput(x, cache, None)
        hidden, attention, cross_attention = jax.tree.map(self._in_order, *seen)
        return StackOutput(x, cache, Intermediates(jnp.concatenate([hidden, x[None]]), attention, cross_attention))

    def scan(self, step: Callable[[Any, nnx.List, Any], tuple[Any, Any]], carry: Any, each: Any) -> tuple[Any, Any]:
        """jax.lax.scan of step(carry, a period's blocks, its slice of each) over the periods."""
        if not self.unstacked:
            return jax.lax.scan(lambda carry, x: step(carry, *x), carry, (self.blocks, each))
        made = []
        for i, blocks in enumerate(self.blocks):
            carry, y = step(carry, blocks, _at(each, i))
            made.append(y)
        return carry, jax.tree.map(lambda *ys: jnp.stack(ys), *made)

    def with_unstacked(self) -> "Stack":
        """The stack with arrays of its own for each period: blocks[i][j] is layer i * period + j."""
        if self.unstacked:
            return self
        stack, periods = copy.copy(self), self.num_layers // self.period
        stack.blocks, stack.unstacked = nnx.List([_at(self.blocks, i) for i in range(periods)]), True
        return stack

    def first_block(self) -> Any:
        """Layer 0, with arrays of its own."""
        return self.blocks[0][0] if self.unstacked else _at(self.blocks, 0)[0]

    def keys_and_values(self, context: jax.Array) -> KVCache:
        """What the blocks' cross-attention makes of context [B, S, E], once for many calls, [L, B, K, S, H]."""

        def of_period(_: None, blocks: nnx.List, __: None) -> tuple[None, tuple[KVCache, ...]]:
            return None, tuple(block.cross_attention.keys_and_values(context) for block in blocks)

        _, made = self.scan(of_period, None, None)
        return jax.tree.map(self._in_order, *made)

    def _in_order(self, *of_the_period: jax.Array) -> jax.Array:
        """One array [L / period, ...] for each block of the period to [L, ...]."""
        return jnp.stack(of_the_period, 1).reshape(self.num_layers, *of_the_period[0].shape[1:])

    def init_cache(self, batch_size: int, slots: int) -> KVCache:
        """An empty cache of all layers, [L, B, K, slots, H]."""
        block = self.blocks[0][0] if self.unstacked else self.blocks[0]
        one = block.attention.init_cache(batch_size, slots)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.num_layers, *x.shape)), one)


def with_layers_axis(stacked: Tree) -> Tree:
    """`stacked`, made by jax.vmap, with "layers" in front of the logical axes of every parameter."""

    def one(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(axes=("layers", *logical_axes(variable)))

    return jax.tree.map(one, stacked, is_leaf=is_variable)


def _at(tree: Tree, i: int) -> Tree:
    return jax.tree.map(lambda x: x[i], tree)


def unstacked(model: Tree) -> Tree:
    """A model to run many short steps with: where it runs on CPUs, each layer has arrays of its own.

    XLA's CPU compiler copies a layer's weights out of a stack's before it reads them, which costs a step of a few
    tokens more than its products. Self-attention makes queries, keys and values in one product. Weights beyond
    UNSTACKED_BYTES stay as they are: those of stacks would be held twice.
    """
    if platform() != "cpu" or sum(x.nbytes for x in jax.tree.leaves(model)) > UNSTACKED_BYTES:
        return model

    def one(module: Any) -> Any:
        return _unstacked(module) if isinstance(module, Stack) else module

    return jax.tree.map(one, model, is_leaf=lambda module: isinstance(module, Stack))


@jax.jit
def _unstacked(stack: Stack) -> Stack:
    def one(module: Any) -> Any:
        return module.with_merged_attention() if isinstance(module, Block) else module

    return jax.tree.map(one, stack.with_unstacked(), is_leaf=lambda module: isinstance(module, Block))
