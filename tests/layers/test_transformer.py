import functools
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
from zoo.layers.transformer import REMAT_POLICIES, SAVED_ATTENTION, SAVED_PRODUCTS, Block, Stack

INIT = jax.nn.initializers.normal(0.3)
CAUSAL = Mask(causal=True)
X = jax.random.normal(jax.random.key(1), (2, 9, 16))
CONTEXT = jax.random.normal(jax.random.key(2), (2, 5, 16))


def make_block(rngs: nnx.Rngs, *, cross: bool = False, norm_first: bool = True, dropout: float = 0.0) -> Block:
    attention = partial(MultiHeadAttention, 16, 4, rngs=rngs, init=INIT, dropout=dropout)
    return Block(
        attention(),
        FeedForward(16, 32, rngs=rngs, init=INIT, dropout=dropout),
        partial(LayerNorm, 16),
        cross_attention=attention() if cross else None,
        norm_first=norm_first,
        dropout=dropout,
    )


def make_stack(num_layers: int = 4, period: int = 1, remat: str = "none", **kwargs) -> Stack:
    return Stack(partial(make_block, **kwargs), num_layers, period=period, remat=remat, rngs=nnx.Rngs(0))


def layer(stack: Stack, index: int) -> Block:
    return jax.tree.map(lambda x: x[index // stack.period], stack.blocks[index % stack.period])


def test_a_block_is_its_residual_branches() -> None:
    for norm_first in (True, False):
        block = make_block(nnx.Rngs(3), cross=True, norm_first=norm_first)
        x = X
        for norm, f in (
            (block.attention_norm, lambda x: block.attention(x, mask=CAUSAL).output),  # noqa: B023
            (block.cross_norm, lambda x: block.cross_attention(x, CONTEXT).output),  # noqa: B023
            (block.feedforward_norm, block.feedforward),
        ):
            x = x + f(norm(x)) if norm_first else norm(x + f(x))
        y = block(X, mask=CAUSAL, context=CONTEXT).x
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("period", [1, 2])
def test_a_stack_is_its_blocks_one_after_the_other(period) -> None:
    stack = make_stack(period=period, cross=True)
    masks = [Mask(causal=True, window=window) for window in (None, 3)][:period]
    x = X
    for index in range(4):
        x = layer(stack, index)(x, mask=masks[index % period], context=CONTEXT).x
    y = jax.jit(lambda stack: stack(X, masks=masks, context=CONTEXT).x)(stack)
    np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-5)
    first, second = layer(stack, 0), layer(stack, 1)
    assert np.abs(first.feedforward.up.kernel[...] - second.feedforward.up.kernel[...]).max() > 0.1


def test_every_parameter_of_a_stack_has_a_layers_axis() -> None:
    stack = make_stack(period=2)
    variables = [v for v in jax.tree.leaves(stack, is_leaf=sharding.is_variable) if sharding.is_variable(v)]
    assert len(variables) == 2 * 16
    for variable in variables:
        axes = sharding.logical_axes(variable)
        assert axes[0] == "layers" and len(axes) == variable.ndim and variable.shape[0] == 2


@functools.cache
def gradient_and_memory(remat: str) -> tuple[list[jax.Array], int]:
    stack = make_stack(num_layers=8, remat=remat, dropout=0.1)
    x = jnp.tile(X, (4, 8, 1))

    def loss(stack):
        return (stack(x, masks=[CAUSAL], key=jax.random.key(5)).x ** 2).mean()

    compiled = jax.jit(jax.grad(loss)).lower(stack).compile()
    return jax.tree.leaves(compiled(stack)), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name != "none"])
def test_remat_changes_no_gradient_and_lowers_memory(remat) -> None:
    (plain, most), (saving, less) = gradient_and_memory("none"), gradient_and_memory(remat)
    for a, b in zip(saving, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert less < 0.9 * most


def test_what_the_policies_save_is_named_by_the_layers() -> None:
    text = str(jax.make_jaxpr(lambda stack: stack(X, masks=[CAUSAL]).x)(make_stack()))
    for name in (*SAVED_PRODUCTS, *SAVED_ATTENTION):
        assert f"name={name}]" in text


def test_dropout_differs_between_layers_and_is_by_key() -> None:
    stack = make_stack(num_layers=2, dropout=0.5)
    same = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), stack)
    run = jax.jit(lambda key: same(X, key=key).x)
    np.testing.assert_array_equal(run(jax.random.key(0)), run(jax.random.key(0)))
    assert np.abs(run(jax.random.key(0)) - run(jax.random.key(1))).max() > 0.1
    keys = jax.random.split(jax.random.key(0), (2, 1))
    block = layer(same, 0)
    once = block(block(X, key=keys[0, 0]).x, key=keys[1, 0]).x
    np.testing.assert_allclose(run(jax.random.key(0)), once, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(LayerError, match="num_layers 3 is no multiple of the period 2"):
        make_stack(num_layers=3, period=2)
    with pytest.raises(LayerError, match="remat 'all' is unknown: choose one of none"):
        make_stack(remat="all")
