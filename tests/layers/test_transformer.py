import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo import sharding
from zoo.kernels import Mask
from zoo.layers.attention import MultiHeadAttention
from zoo.layers.feedforward import FeedForward
from zoo.layers.linear import LayerError
from zoo.layers.norms import LayerNorm
from zoo.layers.transformer import SAVED_ATTENTION, SAVED_PRODUCTS, Block, LayerScale, Stack, unstacked

INIT = jax.nn.initializers.normal(0.3)
CAUSAL = Mask(causal=True)
X = jax.random.normal(jax.random.key(1), (2, 9, 16))
CONTEXT = jax.random.normal(jax.random.key(2), (2, 5, 16))


def make_block(
    rngs: nnx.Rngs, *, cross: bool = False, norm_first: bool = True, scaled: bool = False, dropout: float = 0.0
) -> Block:
    attention = partial(MultiHeadAttention, 16, 4, rngs=rngs, init=INIT, dropout=dropout)
    return Block(
        attention(),
        FeedForward(16, 32, rngs=rngs, init=INIT, dropout=dropout),
        partial(LayerNorm, 16),
        cross_attention=attention() if cross else None,
        norm_first=norm_first,
        branch_scale=partial(LayerScale, 16, 0.1) if scaled else None,
        dropout=dropout,
    )


@functools.cache
def make_stack(num_layers: int = 4, period: int = 1, remat: str = "none", **kwargs) -> Stack:
    make = partial(make_block, **kwargs)
    return jax.jit(lambda: Stack(make, num_layers, period=period, remat=remat, rngs=nnx.Rngs(0)))()


def layer(stack: Stack, index: int) -> Block:
    return jax.tree.map(lambda x: x[index // stack.period], stack.blocks[index % stack.period])


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_block_is_its_residual_branches(norm_first) -> None:
    block = jax.jit(lambda: make_block(nnx.Rngs(3), cross=True, norm_first=norm_first))()

    @jax.jit
    def branches(block: Block) -> jax.Array:
        def attend(x):
            return block.attention(x, mask=CAUSAL).output

        def attend_across(x):
            return block.cross_attention(x, CONTEXT).output

        x = X
        for norm, f in (
            (block.attention_norm, attend),
            (block.cross_norm, attend_across),
            (block.feedforward_norm, block.feedforward),
        ):
            x = x + f(norm(x)) if norm_first else norm(x + f(x))
        return x

    y = jax.jit(lambda block: block(X, mask=CAUSAL, context=CONTEXT).x)(block)
    np.testing.assert_allclose(y, branches(block), rtol=1e-5, atol=1e-5)


def test_branches_pass_through_their_scales() -> None:
    block = make_block(nnx.Rngs(3), cross=True, scaled=True)
    scales = (block.attention_scale, block.cross_scale, block.feedforward_scale)
    for i, scale in enumerate(scales):
        assert (scale.scale[...] == jnp.float32(0.1)).all()
        scale.scale = scale.scale.replace(jnp.full(16, float(i == 1)).at[3].set(0.5))
    y = block(X, context=CONTEXT).x
    x = X.at[..., 3].add(0.5 * block.attention(block.attention_norm(X)).output[..., 3])
    across = block.cross_attention(block.cross_norm(x), CONTEXT).output
    x = x + across.at[..., 3].multiply(0.5)
    x = x.at[..., 3].add(0.5 * block.feedforward(block.feedforward_norm(x))[..., 3])
    np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("period", [1, 2])
def test_a_stack_is_its_blocks_one_after_the_other(period) -> None:
    stack = make_stack(period=period, cross=True)
    masks = [Mask(causal=True, window=window) for window in (None, 3)][:period]

    @jax.jit
    def one_after_the_other(stack: Stack) -> jax.Array:
        x = X
        for index in range(4):
            x = layer(stack, index)(x, mask=masks[index % period], context=CONTEXT).x
        return x

    y = jax.jit(lambda stack: stack(X, masks=masks, context=CONTEXT).x)(stack)
    np.testing.assert_allclose(y, one_after_the_other(stack), rtol=1e-4, atol=1e-5)
    first, second = layer(stack, 0), layer(stack, 1)
    assert np.abs(first.feedforward.up.kernel[...] - second.feedforward.up.kernel[...]).max() > 0.1


def test_every_parameter_of_a_stack_has_a_layers_axis() -> None:
    stack = make_stack(period=2, cross=True)
    variables = [v for v in jax.tree.leaves(stack, is_leaf=sharding.is_variable) if sharding.is_variable(v)]
    assert len(variables) == 2 * (2 * 8 + 4 + 3 * 2)
    for variable in variables:
        axes = sharding.logical_axes(variable)
        assert axes[0] == "layers" and len(axes) == variable.ndim and variable.shape[0] == 2


def loss(stack: Stack) -> jax.Array:
    return (stack(X, masks=[CAUSAL], key=jax.random.key(5)).x ** 2).mean()


def test_remat_policies_keep_less_and_less() -> None:
    def kept(remat: str) -> int:
        """Elements that the forward pass leaves for the backward pass."""
        pull = jax.eval_shape(lambda stack: jax.vjp(loss, stack)[1], make_stack(remat=remat, dropout=0.1))
        return sum(residual.size for residual in jax.tree.leaves(pull))

    sizes = [kept(remat) for remat in ("none", "products", "attention", "full")]
    assert all(more > less for more, less in itertools.pairwise(sizes))


def test_remat_changes_no_gradient() -> None:
    gradients = [jax.jit(jax.grad(loss))(make_stack(remat=remat, dropout=0.1)) for remat in ("none", "products")]
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_what_the_policies_save_is_named_by_the_layers() -> None:
    text = str(jax.make_jaxpr(loss)(make_stack()))
    for name in (*SAVED_PRODUCTS, *SAVED_ATTENTION):
        assert f"name={name}]" in text


def test_dropout_differs_between_layers_and_is_by_key() -> None:
    stack = make_stack(num_layers=2, dropout=0.5)
    same = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), stack)
    run = jax.jit(lambda key: same(X, key=key).x)
    np.testing.assert_array_equal(run(jax.random.key(0)), run(jax.random.key(0)))
    assert np.abs(run(jax.random.key(0)) - run(jax.random.key(1))).max() > 0.1
    keys = jax.random.split(jax.random.key(0), (2, 1))
    once = jax.jit(lambda block: block(block(X, key=keys[0, 0]).x, key=keys[1, 0]).x)(layer(same, 0))
    np.testing.assert_allclose(run(jax.random.key(0)), once, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_built_or_run_is_refused() -> None:
    with pytest.raises(LayerError, match="where it gets a context, and only there: none was given"):
        make_block(nnx.Rngs(0), cross=True)(X)
    with pytest.raises(LayerError, match="where it gets a context, and only there: one was given"):
        make_block(nnx.Rngs(0))(X, context=CONTEXT)
    with pytest.raises(LayerError, match="num_layers 3 is no multiple of the period 2"):
        make_stack(num_layers=3, period=2)
    with pytest.raises(LayerError, match="remat 'all' is unknown: choose one of none"):
        make_stack(remat="all")


@pytest.mark.parametrize("period", [1, 2])
def test_intermediates_are_what_each_layer_gets_and_weighs(period) -> None:
    stack = make_stack(period=period, cross=True)

    @jax.jit
    def one_by_one(stack: Stack) -> tuple[list, list, list]:
        x, hidden, own, cross = X, [X], [], []
        for index in range(stack.num_layers):
            x, _, a, c = layer(stack, index)(x, mask=CAUSAL, context=CONTEXT, return_weights=True)
            hidden, own, cross = [*hidden, x], [*own, a], [*cross, c]
        return hidden, own, cross

    out = jax.jit(lambda s: s(X, masks=[CAUSAL] * period, context=CONTEXT, return_intermediates=True))(stack)
    for found, wanted in zip(out.intermediates, one_by_one(stack), strict=True):
        np.testing.assert_allclose(found, np.stack(wanted), atol=1e-5)
    assert not np.triu(out.intermediates.attention, 1).any()
    np.testing.assert_allclose(out.intermediates.attention.sum(-1), 1, atol=1e-6)


def test_attention_weights_are_those_of_the_values() -> None:
    block = jax.jit(lambda: make_block(nnx.Rngs(3)))()
    out = jax.jit(lambda a: a(X, mask=CAUSAL, return_weights=True))(block.attention)
    heads = jnp.einsum("bnts,bsnh->btnh", out.weights, block.attention.value(X))
    np.testing.assert_allclose(out.output, block.attention.out(heads), atol=1e-5)


def test_intermediates_cost_nothing_where_they_are_not_asked_for() -> None:
    def largest(**options) -> int:
        jaxpr = jax.make_jaxpr(lambda s: s(X, masks=[CAUSAL], **options))(make_stack())
        return max(output.aval.size for equation in jaxpr.eqns for output in equation.outvars)

    assert largest() == X.size
    assert largest(return_intermediates=True) > X.size


def test_a_context_made_once_is_the_context() -> None:
    for period in (1, 2):
        stack = make_stack(period=period, cross=True)
        given = jax.jit(lambda s: s(X, masks=[CAUSAL] * s.period, context=CONTEXT).x)(stack)
        made = jax.jit(lambda s: s(X, masks=[CAUSAL] * s.period, context=s.keys_and_values(CONTEXT)).x)(stack)
        np.testing.assert_allclose(made, given, atol=1e-5)


@pytest.mark.numbers
@pytest.mark.parametrize("period", [1, 2])
def test_an_unstacked_stack_gives_what_the_stack_gives(period) -> None:
    stack = make_stack(period=period, cross=True, dropout=0.2)
    apart = unstacked(stack)

    @jax.jit
    def run(stack: Stack, key: jax.Array | None) -> tuple:
        masks = (CAUSAL,) * period
        held = stack.keys_and_values(CONTEXT)
        whole = stack(X, masks=masks, context=held, key=key, return_intermediates=True)
        first = stack(X[:, :8], masks=masks, context=held, cache=stack.init_cache(2, 9))
        return whole, stack(X[:, 8:], masks=masks, context=held, cache=first.cache)

    for key in (None, jax.random.key(5)):
        for ours, theirs in zip(*(jax.tree.leaves(run(x, key)) for x in (apart, stack)), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=5e-5)


def test_a_cached_step_of_an_unstacked_stack_copies_no_weights() -> None:
    """A stack's step holds a copy of each weight of a layer, which takes longer than the products of a few tokens."""

    def make(rngs: nnx.Rngs) -> Block:
        return Block(MultiHeadAttention(64, 4, rngs=rngs), FeedForward(64, 2048, rngs=rngs), partial(LayerNorm, 64))

    stack = jax.jit(lambda: Stack(make, 3, rngs=nnx.Rngs(0)))()

    def temporaries(stack: Stack) -> int:
        cache = stack.init_cache(2, 8)
        step = jax.jit(lambda stack, x, cache: stack(x, cache=cache), donate_argnums=2)
        return step.lower(stack, X[:, :1, :1] * jnp.ones(64), cache).compile().memory_analysis().temp_size_in_bytes

    weight = 4 * 64 * 2048
    assert temporaries(unstacked(stack)) < weight / 2 < weight <= temporaries(stack)
