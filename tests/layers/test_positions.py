import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo.layers.linear import LayerError
from zoo.layers.positions import (
    DynamicScaling,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    Rotary,
    YarnScaling,
    sinusoids,
)


def test_sinusoids_follow_the_paper() -> None:
    positions = np.arange(7)
    expected = np.empty((7, 10))
    for i in range(5):
        expected[:, 2 * i] = np.sin(positions / 10000 ** (2 * i / 10))
        expected[:, 2 * i + 1] = np.cos(positions / 10000 ** (2 * i / 10))
    np.testing.assert_allclose(sinusoids(jnp.arange(7), 10), expected, atol=1e-6)
    halves = np.concatenate([expected[:, ::2], expected[:, 1::2]], 1)
    np.testing.assert_allclose(sinusoids(jnp.arange(7), 10, halves=True), halves, atol=1e-6)


def test_sinusoids_of_an_odd_width_are_refused() -> None:
    with pytest.raises(LayerError, match="even width and got 7: choose 8"):
        sinusoids(jnp.arange(3), 7)


def test_learned_positions_are_rows_and_one_outside_is_seen() -> None:
    table = LearnedPositions(6, 4, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(table(jnp.array([[5, 0]]))[0], table.table[...][jnp.array([5, 0])])
    assert np.isnan(table(jnp.array([-1, 6]))).all()


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_products_depend_on_distances_alone(interleaved) -> None:
    rotary = Rotary(interleaved=interleaved)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 5, 3, 16))
    positions = jnp.array([[0, 1, 5, 9, 40]])

    def scores(shift):
        return jnp.einsum("btnh,bsnh->bnts", rotary(q, positions + shift), rotary(k, positions + shift))

    np.testing.assert_allclose(scores(0), scores(1000), atol=2e-3)
    assert np.abs(scores(0) - jnp.einsum("btnh,bsnh->bnts", q, k)).max() > 0.1

    def norms(x):
        return jnp.linalg.norm(x, axis=-1)

    np.testing.assert_allclose(norms(rotary(q, positions)), norms(q), rtol=1e-5)


def test_rotary_turns_pairs_by_the_papers_angles() -> None:
    x = jax.random.normal(jax.random.key(0), (1, 4, 1, 8))
    position = np.arange(4)
    for interleaved in (True, False):
        y = np.asarray(Rotary(longest=100.0, interleaved=interleaved)(x, jnp.arange(4)[None]))[0, :, 0]
        for i in range(4):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + 4)
            angle = position * 100.0 ** (-2 * i / 8)
            turned = (x[0, :, 0, a] + 1j * x[0, :, 0, b]) * np.exp(1j * angle)
            np.testing.assert_allclose(y[:, a], turned.real, atol=1e-6)
            np.testing.assert_allclose(y[:, b], turned.imag, atol=1e-6)


def test_a_fraction_leaves_the_rest_as_it_is() -> None:
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
    positions = jnp.arange(4)[None]
    y = Rotary(fraction=0.5)(x, positions)
    np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
    np.testing.assert_allclose(y[..., :4], Rotary()(x[..., :4], positions), atol=1e-6)


def test_scalings_slow_pairs_by_their_wavelength() -> None:
    plain = Rotary(longest=1000.0).frequencies(16)
    np.testing.assert_allclose(Rotary(1000.0, scaling=LinearScaling(4.0)).frequencies(16), plain / 4, rtol=1e-6)
    scaling = Llama3Scaling(4.0, slow=1.0, fast=8.0, original_length=100)
    scaled = Rotary(1000.0, scaling=scaling).frequencies(16)
    turns = 100 * plain / (2 * np.pi)
    np.testing.assert_array_equal(scaled[turns > 8], plain[turns > 8])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 4, rtol=1e-6)
    between = (turns > 1) & (turns < 8)
    share = (turns[between] - 1) / 7
    np.testing.assert_allclose(scaled[between], plain[between] * ((1 - share) / 4 + share), rtol=1e-5)
    assert between.sum() == 3 and (turns > 8).sum() == 1


def test_yarn_slows_pairs_by_their_turns_and_makes_features_grow() -> None:
    plain = Rotary(longest=1000.0).frequencies(16)
    np.testing.assert_array_equal(Rotary(1000.0, scaling=DynamicScaling(4.0)).frequencies(16), plain)
    scaling = YarnScaling(4.0, slow=1.0, fast=8.0, original_length=100, whole_pairs=False)
    scaled = Rotary(1000.0, scaling=scaling).frequencies(16)
    turns = 100 * plain / (2 * np.pi)
    # Turns fall by the same ratio from pair to pair, so that the ramp is linear in their logarithm.
    share = np.clip((np.log(8) - np.log(turns)) / np.log(8), 0, 1)
    np.testing.assert_allclose(scaled, plain * (share / 4 + 1 - share), rtol=1e-5)
    assert ((share > 0) & (share < 1)).sum() > 1
    x, positions = jax.random.normal(jax.random.key(0), (1, 4, 1, 16)), jnp.arange(4)[None]
    for growth, expected in ((None, 0.1 * np.log(4) + 1), (1.5, 1.5)):
        y = Rotary(1000.0, fraction=0.5, scaling=YarnScaling(4.0, original_length=100, growth=growth))(x, positions)
        ratio = jnp.linalg.norm(y[..., :8], axis=-1) / jnp.linalg.norm(x[..., :8], axis=-1)
        np.testing.assert_allclose(ratio, expected, rtol=1e-5)
        np.testing.assert_array_equal(y[..., 8:], x[..., 8:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rotary(longest=0.0), "longest 0.0 of rotary positions is no finite number above 0"),
        (lambda: LinearScaling(-1.0), "factor -1.0"),
        (lambda: Llama3Scaling(8.0, slow=4.0, fast=1.0), "fast 1.0 is not above slow 4.0"),
    ],
)
def test_rotary_positions_that_cannot_turn_are_refused(make, message) -> None:
    with pytest.raises(LayerError, match=message):
        make()
