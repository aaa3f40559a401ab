import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.layers.linear import Precision
from zoo.layers.norms import LayerNorm, RMSNorm


def plain_layer_norm(x, scale, bias, epsilon):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + epsilon) * scale + bias


def plain_rms_norm(x, scale, epsilon):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


@pytest.mark.parametrize("epsilon", [1e-5, 0.3])
def test_layer_norm_and_its_gradients(epsilon) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    x, scale, bias, cotangent = (
        jax.random.normal(k, s) for k, s in zip(keys, [(3, 5, 8), 8, 8, (3, 5, 8)], strict=True)
    )
    norm = LayerNorm(8, epsilon=epsilon)
    norm.scale, norm.bias = norm.scale.replace(scale), norm.bias.replace(bias)
    expected, pull = jax.vjp(lambda *a: plain_layer_norm(*a, epsilon), x, scale, bias)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-6)
    dnorm, dx = jax.grad(lambda norm, x: (norm(x) * cotangent).sum(), argnums=(0, 1))(norm, x)
    for a, b in zip((dx, dnorm.scale[...], dnorm.bias[...]), pull(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_rms_norm_and_its_gradients() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x, scale, cotangent = (jax.random.normal(k, s) for k, s in zip(keys, [(3, 5, 8), 8, (3, 5, 8)], strict=True))
    norm = RMSNorm(8, epsilon=0.1)
    norm.scale = norm.scale.replace(scale)
    expected, pull = jax.vjp(lambda *a: plain_rms_norm(*a, 0.1), x, scale)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-6)
    dnorm, dx = jax.grad(lambda norm, x: (norm(x) * cotangent).sum(), argnums=(0, 1))(norm, x)
    for a, b in zip((dx, dnorm.scale[...]), pull(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_statistics_are_float32_whatever_is_computed_in(kind) -> None:
    # 4096 values near 8: a bfloat16 sum of them would stop growing long before the end.
    x = (8 + jax.random.normal(jax.random.key(0), (2, 4096))).astype(jnp.bfloat16)
    exact = kind(4096)(x.astype(jnp.float32))
    y = kind(4096, precision=Precision(compute="bfloat16"))(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def test_without_a_bias_there_is_no_parameter_for_it() -> None:
    assert len(jax.tree.leaves(LayerNorm(8, bias=False))) == 1
