from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo.layers.attention import MultiHeadAttention
from zoo.layers.feedforward import FeedForward
from zoo.layers.linear import LayerError
from zoo.layers.modulation import Modulation, modulated
from zoo.layers.norms import LayerNorm
from zoo.layers.transformer import Block, Stack, unstacked

X = jax.random.normal(jax.random.key(0), (2, 5, 8))
CONDITION = jax.random.normal(jax.random.key(1), (2, 6))


def block(rngs: nnx.Rngs) -> Block:
    return Block(
        MultiHeadAttention(8, 2, rngs=rngs),
        FeedForward(8, 16, rngs=rngs),
        partial(LayerNorm, 8, scale=False, bias=False),
        modulation=partial(Modulation, 6, 8, 6, rngs=rngs),
    )


def opened(stack: Stack) -> Stack:
    """With gates that let something through."""
    kernel = stack.blocks[0].modulation.linear.kernel
    stack.blocks[0].modulation.linear.kernel = kernel.replace(jax.random.normal(jax.random.key(2), kernel.shape))
    return stack


def test_a_modulated_block_is_the_papers_equation() -> None:
    stack = opened(Stack(block, 1, rngs=nnx.Rngs(0)))
    one = stack.first_block()
    shift, scale, gate, *feedforward = one.modulation(CONDITION)
    assert shift.shape == (2, 1, 8)
    x = X + gate * one.attention(one.attention_norm(X) * (1 + scale) + shift).output
    shift, scale, gate = feedforward
    x = x + gate * one.feedforward(one.feedforward_norm(x) * (1 + scale) + shift)
    np.testing.assert_allclose(stack(X, condition=CONDITION).x, x, atol=1e-5)


def test_layers_apart_are_the_same_layers() -> None:
    stack = opened(Stack(block, 3, rngs=nnx.Rngs(0)))
    apart = unstacked(stack)
    assert apart.unstacked
    np.testing.assert_allclose(apart(X, condition=CONDITION).x, stack(X, condition=CONDITION).x, atol=1e-5)
    kernels = [s.first_block().modulation.linear.kernel[...] for s in (apart, stack)]
    np.testing.assert_array_equal(*kernels)


def test_what_is_not_modulated_stays_in_its_dtype() -> None:
    zero = jnp.zeros((2, 1, 8), jnp.bfloat16)
    np.testing.assert_array_equal(modulated(X.astype(jnp.bfloat16), zero, zero), X.astype(jnp.bfloat16))


def test_a_condition_goes_with_a_modulation() -> None:
    with pytest.raises(LayerError, match="a block is modulated where it gets a condition, and only there: none was"):
        block(nnx.Rngs(0))(X)
    plain = Block(
        MultiHeadAttention(8, 2, rngs=nnx.Rngs(0)), FeedForward(8, 16, rngs=nnx.Rngs(0)), partial(LayerNorm, 8)
    )
    with pytest.raises(LayerError, match="only there: one was given"):
        plain(X, condition=CONDITION)
