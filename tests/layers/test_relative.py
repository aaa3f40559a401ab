import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.kernels.mask import allowed, resolve
from zoo.layers.linear import LayerError
from zoo.layers.relative import distance_vectors, hidden_pairs, in_order, segments_differ, shifted, shifted_to

TARGETS = jnp.array([[3, 0], [4, 4]])


def test_vectors_of_distances_follow_the_paper() -> None:
    distances = np.array([3.0, -2.0, 70.0])
    angles = distances[:, None] / 10000 ** (np.arange(0, 10, 2) / 10)
    expected = np.concatenate([np.sin(angles), np.cos(angles)], 1)
    np.testing.assert_allclose(distance_vectors(jnp.array(distances), 10), expected, atol=1e-5)
    with pytest.raises(LayerError, match="even width and got 7: choose 8"):
        distance_vectors(jnp.arange(3), 7)


@pytest.mark.parametrize(("tokens", "remembered"), [(5, 0), (5, 3), (8, 1), (1, 4), (1, 0)])
def test_a_shift_gives_each_key_the_score_of_its_distance(tokens, remembered) -> None:
    keys = tokens + remembered
    queries, places = jnp.arange(tokens), jnp.array([[0, tokens - 1, tokens // 2], [tokens // 3, 0, 0]])
    # A score that says of which query and which distance it is.
    distances = jnp.arange(keys, -tokens, -1)
    expected = 100.0 * queries[:, None] + remembered + queries[:, None] - jnp.arange(keys)
    scores = jnp.broadcast_to(100.0 * queries[:, None] + distances, (2, 1, tokens, keys + tokens))
    np.testing.assert_array_equal(shifted(scores, keys)[1, 0], expected)
    scores = 100.0 * places[:, None, :, None] + distances
    np.testing.assert_array_equal(shifted_to(scores, places, tokens, keys)[:, 0], expected[places])


def test_a_shift_of_what_reaches_no_key_ahead_is_right_behind() -> None:
    distances = jnp.arange(7, -1, -1)  # Of 5 tokens after a memory of 2: no key ahead of its query.
    behind = jnp.arange(7) <= 2 + jnp.arange(5)[:, None]
    expected = 2 + jnp.arange(5)[:, None] - jnp.arange(7)
    scores = jnp.broadcast_to(distances, (1, 1, 5, 8))
    np.testing.assert_array_equal(shifted(scores, 7)[0, 0][behind], expected[behind])
    np.testing.assert_array_equal(shifted_to(scores, jnp.arange(5)[None], 5, 7)[0, 0][behind], expected[behind])


def test_an_order_hides_what_becomes_known_later_and_from_targets_themselves() -> None:
    order = jnp.array([[0, 2, 0, 1, 3], [1, 0, 0, 2, 2]])
    mask = resolve(in_order(order, TARGETS, 2), 2, 7, 7)
    seen = np.asarray(allowed(mask, mask.query, mask.key))[:, 0]
    assert seen[:, :, :2].all()
    np.testing.assert_array_equal(seen[:, :5, 2:], order[:, :, None] >= order[:, None])
    of_targets = jnp.take_along_axis(order, TARGETS, 1)
    np.testing.assert_array_equal(seen[:, 5:, 2:], of_targets[:, :, None] > order[:, None])


def test_pairs_are_hidden_by_padding_by_pattern_and_ahead_but_contents_see_themselves() -> None:
    real = jnp.array([[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    pattern = jax.random.bernoulli(jax.random.key(0), 0.5, (2, 5, 5))
    assert hidden_pairs(5, 2, TARGETS, real=None, perm_mask=None, causal=False) is None
    hidden = hidden_pairs(5, 2, TARGETS, real=real, perm_mask=pattern, causal=True)
    assert hidden is not None and not hidden[:, :, :2].any()
    ahead = jnp.arange(5) > jnp.arange(5)[:, None]
    expected = pattern | (real == 0)[:, None] | ahead
    np.testing.assert_array_equal(hidden[:, :5, 2:], expected & ~jnp.eye(5, dtype=bool))
    np.testing.assert_array_equal(hidden[:, 5:, 2:], jnp.take_along_axis(expected, TARGETS[..., None], 1))


def test_segments_differ_between_unequal_types_and_a_memory_has_type_0() -> None:
    types = jnp.array([[0, 1, 0, 2, 2]])
    differs = segments_differ(types, TARGETS[:1], 1)
    rows = jnp.concatenate([types, jnp.take_along_axis(types, TARGETS[:1], 1)], 1)
    np.testing.assert_array_equal(differs, rows[..., None] != jnp.array([[[0, 0, 1, 0, 2, 2]]]))


@pytest.mark.parametrize("moved", [lambda scores: shifted(scores, 7), lambda scores: shifted_to(scores, TARGETS, 5, 7)])
def test_neither_shift_nor_its_gradient_gathers_or_scatters(moved) -> None:
    program = str(jax.make_jaxpr(jax.grad(lambda scores: jnp.sin(moved(scores)).sum()))(jnp.ones((2, 3, 2, 12))))
    assert "gather" not in program and "scatter" not in program and "sin" in program
