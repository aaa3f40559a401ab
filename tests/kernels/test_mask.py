"""Masks: how they combine, which blocks they call empty or whole, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.kernels import AttentionError, Mask
from zoo.kernels.mask import allowed, block_kinds, resolve

B, L = 2, 12


def table(mask: Mask, queries: int = L, keys: int = L) -> np.ndarray:
    """Who may attend to whom: bool [B, T, S]."""
    resolved = resolve(mask, B, queries, keys)
    return np.broadcast_to(allowed(resolved, resolved.query, resolved.key)[:, 0], (B, queries, keys))


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    causal = draw(st.booleans())
    return Mask(
        causal=causal,
        window=draw(st.sampled_from([None, 1, 5, (2, 2), (None, -1), (3, None), (None, 4)])),
        prefix=rng.integers(0, L, size=B) if causal and draw(st.booleans()) else None,
        lengths=draw(st.sampled_from([None, rng.integers(0, L + 1, size=B)])),
        where=draw(st.sampled_from([None, lambda q, k: (q * k) % 3 == 0])),
    )


@settings(max_examples=30, deadline=None)
@given(masks(), masks())
def test_and_is_both_conditions(a: Mask, b: Mask) -> None:
    np.testing.assert_array_equal(table(a & b), table(a) & table(b))


@settings(max_examples=30, deadline=None)
@given(masks(), st.data())
def test_blocks_called_empty_are_and_blocks_called_whole_are(mask: Mask, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))

    def draw(high):
        return tuple(rng.integers(0, high, size=(B, L)) for _ in range(2))

    segments = data.draw(st.sampled_from([None, tuple(np.sort(x, 1) for x in draw(3)), draw(2)]))
    mask = mask & Mask(segments=segments, positions=data.draw(st.sampled_from([None, draw(30)])))
    t, s = data.draw(st.sampled_from([(1, 1), (3, 4), (4, 2), (12, 12)]))
    kinds = block_kinds(resolve(mask, B, L, L), t, s)
    blocks = table(mask).reshape(B, L // t, t, L // s, s)
    assert np.all(~blocks.any((2, 4)) | kinds.needed)
    assert np.all(blocks.all((2, 4)) | ~np.asarray(kinds.whole))


def test_causal_blocks_above_the_diagonal_are_empty_and_those_below_are_whole() -> None:
    kinds = block_kinds(resolve(Mask(causal=True), B, L, L), 3, 3)
    np.testing.assert_array_equal(kinds.needed[0], np.tri(4, dtype=bool))
    np.testing.assert_array_equal(kinds.whole[0], np.tri(4, k=-1, dtype=bool))


def test_packed_documents_need_their_own_blocks_only() -> None:
    segments = jnp.repeat(jnp.array([[1, 2, 3, 0]]), 3, axis=1)
    kinds = block_kinds(resolve(Mask(segments=segments), B, L, L), 3, 3)
    np.testing.assert_array_equal(kinds.needed[0], np.diag([True, True, True, False]))


def test_int_window_is_causal() -> None:
    q, k = np.arange(L)[:, None], np.arange(L)
    for width in (3, np.int64(3)):
        np.testing.assert_array_equal(table(Mask(window=width))[0], (q - k >= 0) & (q - k < 3))


def test_a_mask_passes_through_jit_and_equal_ones_share_a_compilation() -> None:
    def even(q, k):
        return (q + k) % 2 == 0

    def near(q, k):
        return abs(q - k) < 4

    traces = []

    @jax.jit
    def count(mask: Mask) -> jax.Array:
        traces.append(mask)
        resolved = resolve(mask, B, L, L)
        return allowed(resolved, resolved.query, resolved.key).sum()

    first = Mask(causal=True, lengths=jnp.array([3, 5]), where=even) & Mask(where=near)
    second = Mask(causal=True, lengths=jnp.array([9, 12]), where=even) & Mask(where=near)
    assert (int(count(first)), int(count(second))) == (table(first).sum(), table(second).sum())
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mask(window=0), "window=0"),
        (lambda: Mask(window=(1, 2, 3)), r"window=\(1, 2, 3\): give one int, or a pair"),
        (lambda: Mask(prefix=3), "causal=True"),
        (
            lambda: Mask(segments=np.zeros((B, L), int)) & Mask(segments=np.ones((B, L), int)),
            "both masks name segments",
        ),
        (lambda: table(Mask(segments=np.zeros((B, L), int)), L, L + 1), r"give a \(query, key\) pair"),
        (lambda: table(Mask(segments=np.zeros((B, L + 1), int))), r"query segments have shape \(2, 13\)"),
        (lambda: table(Mask(positions=(np.zeros(L, int), np.zeros(L)))), "key positions are float"),
        (lambda: table(Mask(lengths=np.zeros(B + 1, int))), r"lengths has shape \(3,\)"),
        (lambda: table(Mask(where=lambda q, k: q - k)), "where= must give bool .* gave int32"),
    ],
)
def test_errors_name_the_thing(make, message: str) -> None:
    with pytest.raises(AttentionError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
