import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo.layers.feedforward import ACTIVATIONS, FeedForward
from zoo.layers.linear import LayerError

X = jax.random.normal(jax.random.key(9), (2, 5, 8))


def wide(gated: bool, activation: str = "gelu_tanh", dropout: float = 0.0) -> FeedForward:
    init = jax.nn.initializers.normal(0.5)
    return FeedForward(8, 24, rngs=nnx.Rngs(0), gated=gated, activation=activation, dropout=dropout, init=init)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("gated", [True, False])
def test_values_and_gradients_follow_the_formula(activation, gated) -> None:
    model = wide(gated, activation)

    def plain(kernels, x):
        f = ACTIVATIONS[activation]
        up = x @ kernels["up"]
        return (f(x @ kernels["gate"]) * up if gated else f(up)) @ kernels["down"]

    kernels = {name: getattr(model, name).kernel[...] for name in ("up", "gate", "down") if getattr(model, name)}
    np.testing.assert_allclose(model(X), plain(kernels, X), rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda model: (model(X) ** 2).sum())(model)
    expected = jax.grad(lambda kernels: (plain(kernels, X) ** 2).sum())(kernels)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(gradient, name).kernel[...], value, rtol=1e-4, atol=1e-4)


def test_gelu_tanh_and_its_slopes_are_those_of_jax() -> None:
    x = jnp.linspace(-12, 12, 97)
    ours, theirs = ACTIVATIONS["gelu_tanh"], jax.nn.gelu
    for _ in range(3):
        np.testing.assert_allclose(jax.vmap(ours)(x), jax.vmap(theirs)(x), rtol=1e-5, atol=2e-6)
        ours, theirs = jax.grad(ours), jax.grad(theirs)


def test_the_backward_pass_keeps_each_wide_array_once() -> None:
    for gated, kept in ((False, 1), (True, 2)):
        _, pull = jax.vjp(lambda model: model(X), wide(gated))
        assert sum(residual.shape == (2, 5, 24) for residual in jax.tree.leaves(pull)) == kept


def test_dropout_is_of_the_hidden_features_and_by_key() -> None:
    model = wide(False, dropout=0.5)
    a, b = model(X, key=jax.random.key(0)), model(X, key=jax.random.key(0))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - model(X, key=jax.random.key(1))).max() > 1e-3
    many = jax.vmap(lambda key: model(X, key=key))(jax.random.split(jax.random.key(2), 4000)).mean(0)
    np.testing.assert_allclose(many, model(X), atol=0.1 * float(jnp.abs(model(X)).max()))


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(LayerError, match="'gellu' is unknown: choose one of gelu"):
        wide(False, "gellu")
