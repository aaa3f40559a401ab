import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo import sharding
from zoo.layers.linear import Embed, Linear, Precision

BF16 = Precision(compute="bfloat16")


def random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
    ("in_shape", "out_shape", "equation"),
    [(6, 10, "bti,io->bto"), (6, (2, 5), "bti,inh->btnh"), ((2, 3), 10, "btnh,nho->bto")],
)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_einsum(in_shape, out_shape, equation, bias) -> None:
    axes = (None,) * len(np.atleast_1d(in_shape)) + (None,) * len(np.atleast_1d(out_shape))
    layer = Linear(in_shape, out_shape, axes=axes, rngs=nnx.Rngs(0), bias=bias, init=jax.nn.initializers.normal(1.0))
    x = random(1, 2, 4, *np.atleast_1d(in_shape))
    shift = random(2, *np.atleast_1d(out_shape)) if bias else 0.0
    if bias:
        layer.bias = layer.bias.replace(shift)
    y = layer(x)
    cotangent = random(3, *y.shape)

    def reference(x, kernel, shift):
        return jnp.einsum(equation, x, kernel) + shift

    expected, pull = jax.vjp(reference, x, layer.kernel[...], shift)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    dlayer, dx = jax.jit(jax.grad(lambda layer, x: (layer(x) * cotangent).sum(), argnums=(0, 1)))(layer, x)
    dx_expected, dkernel, dshift = pull(cotangent)
    np.testing.assert_allclose(dx, dx_expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dlayer.kernel[...], dkernel, rtol=1e-5, atol=1e-5)
    if bias:
        np.testing.assert_allclose(dlayer.bias[...], dshift, rtol=1e-5, atol=1e-5)


def test_bfloat16_products_have_bfloat16_operands_and_float32_sums_in_both_directions() -> None:
    layer = Linear(16, 8, axes=("embed", "mlp"), rngs=nnx.Rngs(0), precision=BF16)
    embed = Embed(100, 8, rngs=nnx.Rngs(1), precision=BF16)
    x = random(2, 2, 3, 16).astype(jnp.bfloat16)

    def loss(layer, embed, x):
        return embed.attend(layer(x))[..., :100].sum()

    lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(layer, embed, x).as_text()
    dots = [line for line in lowered.splitlines() if "stablehlo.dot_general" in line]
    assert len(dots) == 6
    for line in dots:
        operands, result = line.rsplit(" : ", 1)[1].split(" -> ")
        assert operands.count("bf16>") == 2 and result.endswith("f32>")


def test_bfloat16_is_close_to_float32_and_its_gradients_are_float32() -> None:
    def make(precision):
        return Linear(64, 32, axes=("embed", "mlp"), rngs=nnx.Rngs(0), precision=precision)

    x = random(1, 2, 8, 64)

    def loss(layer):
        return (layer(x).astype(jnp.float32) ** 2).sum()

    y, exact = make(BF16)(x), make(Precision())(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.02 * float(jnp.abs(exact).max()))
    gradient, expected = (
        jax.jit(jax.grad(loss))(make(BF16)).kernel[...],
        jax.jit(jax.grad(loss))(make(Precision())).kernel[...],
    )
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, expected, atol=0.02 * float(jnp.abs(expected).max()))


def test_a_vocabulary_is_padded_masked_and_not_counted() -> None:
    embed = Embed(130, 8, rngs=nnx.Rngs(0))
    assert embed.table.shape == (256, 8)
    assert sharding.parameter_count(embed) == 130 * 8
    logits = embed.attend(random(1, 2, 3, 8))
    assert logits.shape == (2, 3, 256)
    assert np.isneginf(logits[..., 130:]).all() and np.isfinite(logits[..., :130]).all()

    def loss(embed):
        return jax.nn.logsumexp(embed.attend(random(1, 2, 3, 8)), axis=-1).sum()

    gradient = jax.grad(loss)(embed).table[...]
    assert np.isfinite(gradient).all() and not gradient[130:].any() and gradient[:130].any()


def test_an_embedding_is_its_row_and_the_head_its_transpose() -> None:
    embed = Embed(20, 8, rngs=nnx.Rngs(0))
    tokens = jnp.array([[3, 19], [0, 3]])
    np.testing.assert_array_equal(embed(tokens), embed.table[...][tokens])
    x = random(1, 2, 8)
    np.testing.assert_allclose(embed.attend(x)[:, :20], x @ embed.table[...][:20].T, rtol=1e-5, atol=1e-6)


def test_a_token_outside_the_table_is_seen() -> None:
    assert np.isnan(Embed(128, 4, rngs=nnx.Rngs(0))(jnp.array([-1, 128]))).all()
