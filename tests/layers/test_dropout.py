import jax
import jax.numpy as jnp
import numpy as np

from zoo.layers.dropout import dropout, split


def test_a_key_drops_that_share_and_keeps_the_mean() -> None:
    x = jnp.ones((200, 500))
    y = dropout(x, 0.3, jax.random.key(0))
    assert abs(float((y == 0).mean()) - 0.3) < 0.01
    np.testing.assert_allclose(y[y != 0], 1 / 0.7, rtol=1e-6)
    np.testing.assert_array_equal(y, dropout(x, 0.3, jax.random.key(0)))


def test_without_a_key_or_a_rate_nothing_drops() -> None:
    x = jnp.arange(6.0)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


def test_split_gives_as_many_keys_or_none() -> None:
    assert split(None, 2) == (None, None)
    a, b = split(jax.random.key(0), 2)
    assert (jax.random.key_data(a) != jax.random.key_data(b)).any()
