"""Permuted text: orders are uniform, spans are of whole words and of XLNet's lengths, counts are exact."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.train.data.draws import uniform
from zoo.train.data.permuted_text import PermutedText, PermutedTextData, factorisation, predicted_spans
from zoo.train.experiment import UserError


def test_every_order_is_as_likely() -> None:
    predicted = np.broadcast_to([True, False, True, True, False, True], (24_000, 6))
    order = factorisation(predicted, np.arange(24_000), 7)
    assert (order[:, [1, 4]] == 0).all()
    seen, counts = np.unique(order[:, [0, 2, 3, 5]], axis=0, return_counts=True)
    assert {tuple(each) for each in seen.tolist()} == set(permutations((1, 2, 3, 4)))
    # 23 degrees of freedom: standard deviation 6.8.
    assert ((counts - 1000) ** 2 / 1000).sum() < 55


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=60), st.integers(1, 7), st.integers(1, 5), st.integers(0, 2**40)
)
def test_counts_are_exact(sizes: list[int], context: int, longest: int, seed: int) -> None:
    starts = np.concatenate([[True, *[False] * (size - 1)] for size in sizes])
    count = max(1, len(starts) // context)
    predicted = predicted_spans(starts, count, context, longest, uniform(seed, 2 * len(starts), 1))
    assert predicted.sum() == count


def runs(predicted: np.ndarray) -> list[int]:
    edges = np.flatnonzero(np.diff(np.pad(predicted.astype(int), 1)))
    return (edges[1::2] - edges[::2]).tolist()


def test_spans_are_of_words_with_context() -> None:
    """Of words of 2 tokens: spans of 1 to 5 of them, with probability proportional to 1 / n."""
    starts = np.arange(3000) % 2 == 0
    lengths: list[int] = []
    for row in range(60):
        predicted = predicted_spans(starts, 10_000, 6, 5, uniform(row, 6000, 1))
        # With a count that is out of reach all that spans left goes to single tokens: all are predicted.
        assert predicted.all()
        predicted = predicted_spans(starts, 240, 6, 5, uniform(row, 6000, 1))
        lengths += runs(predicted)
        assert (predicted[::2] == predicted[1::2]).mean() > 0.99  # whole words, but where the count ends
    shares = np.bincount(np.array(lengths), minlength=12)[[2, 4, 6, 8, 10]] / len(lengths)
    expected = 1 / np.arange(1, 6)
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.03)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text("".join(f"Line {i} of {j}, and more.\n" for j in range(40)))
    return str(tmp_path)


def opened(source: str, split: str = "train", seed: int = 3) -> PermutedText:
    return PermutedTextData(source=source, length=30).open(split, batch_size=6, seed=seed)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_batch_depends_on_seed_step_and_row_alone(texts: str, split: str) -> None:
    data = opened(texts, split)
    whole, part = data.batch(2, range(6)), data.batch(2, [4, 1])
    for name in whole:
        np.testing.assert_array_equal(part[name], whole[name][[4, 1]])
    other = opened(texts, split, seed=4).batch(2, range(6))
    assert np.array_equal(other["order"], whole["order"]) == (split == "validation")
    assert data.batch(0, [])["order"].shape == (0, 30)


def test_what_a_batch_holds(texts: str) -> None:
    batch = opened(texts).batch(1, range(6))
    assert batch["places"].shape == (6, 5) and (np.diff(batch["places"]) > 0).all()
    np.testing.assert_array_equal(np.take_along_axis(batch["tokens"], batch["places"], 1), batch["targets"])
    order = np.take_along_axis(batch["order"], batch["places"], 1)
    assert (np.sort(order) == np.arange(1, 6)).all() and (np.count_nonzero(batch["order"], axis=1) == 5).all()
    assert batch["weights"].all()


def test_held_out_text_that_pads_has_no_weight(texts: str) -> None:
    data = opened(texts, "validation")
    batches = [data.batch(step, range(6)) for step in range(data.batches)]
    pads = np.concatenate([batch["token_types"] for batch in batches]) == 0
    weights = np.concatenate([batch["weights"] for batch in batches])
    places = np.concatenate([batch["places"] for batch in batches])
    assert pads.any()
    np.testing.assert_array_equal(weights == 0, np.take_along_axis(pads, places, 1))


def test_refusals(texts: str) -> None:
    with pytest.raises(UserError, match=r"--data.context 0 and --data.longest-span 5: choose both from 1"):
        PermutedTextData(source=texts, context=0).open("train", batch_size=1, seed=0)
