"""Noisy text: spans of Poisson lengths, one mask for each, sentences in another order, and the text as the target."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.train.data.denoising import NoisyText, NoisyTextData, infilled, permuted, span_lengths
from zoo.train.data.draws import uniform
from zoo.train.experiment import UserError

MASK = 999


def test_lengths_are_poisson() -> None:
    lengths = span_lengths(60_000, 3.0, uniform(0, 50_000, 1))
    assert lengths.sum() == 60_000
    expected = len(lengths) * np.array([math.exp(-3) * 3**k / math.factorial(k) for k in range(9)])
    # 8 degrees of freedom.
    assert ((np.bincount(lengths)[:9] - expected) ** 2 / expected).sum() < 30


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 80), st.floats(0.02, 0.5), st.floats(1, 6), st.integers(0, 2**40))
def test_what_stays_is_in_order_and_what_is_missing_has_masks(
    length: int, share: float, mean: float, seed: int
) -> None:
    budget = max(1, round(share * length) if share < 0.5 else length // 2)
    lengths = span_lengths(budget, mean, uniform(seed, 8 * length, 1))
    assert lengths.sum() == budget and len(lengths) <= budget
    noisy = infilled(np.arange(length), lengths, MASK, uniform(seed, length + 1, 2))
    kept = noisy[noisy != MASK]
    assert len(kept) == length - budget and (np.diff(kept) > 0).all()
    assert (noisy == MASK).sum() == len(lengths)
    masks = np.flatnonzero(noisy == MASK)
    assert (np.diff(masks) > 1).all()
    # Each mask stands for what is missing between its neighbours.
    around = np.concatenate([[-1], kept, [length]])
    missing = (np.diff(around) - 1)[masks - np.arange(len(masks))]
    np.testing.assert_array_equal(missing, lengths)


def test_spans_fall_anywhere() -> None:
    firsts = [
        int(np.flatnonzero(infilled(np.arange(9), np.array([2]), MASK, uniform(i, 10, 2)) == MASK)[0])
        for i in range(8000)
    ]
    # 8 gaps between 7 tokens: 7 degrees of freedom.
    assert ((np.bincount(firsts, minlength=8) - 1000) ** 2 / 1000).sum() < 27


def test_every_order_of_sentences_is_as_likely() -> None:
    tokens, starts = np.arange(6), np.array([True, False, True, True, False, False])
    seen, counts = np.unique(
        [permuted(tokens, starts, uniform(i, 6, 1)) for i in range(6000)], axis=0, return_counts=True
    )
    assert len(seen) == 6 and ((counts - 1000) ** 2 / 1000).sum() < 22  # 5 degrees of freedom
    sentences = {(0, 1), (2,), (3, 4, 5)}
    for order in seen.tolist():
        text = tuple(order)
        assert all(any(text[i : i + len(s)] == s for i in range(6)) for s in sentences)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text("".join(f"Line {i} of {j}, and more.\n" for j in range(40)))
    return str(tmp_path)


def opened(source: str, split: str = "train", seed: int = 3, **options) -> NoisyText:
    return NoisyTextData(source=source, length=64, **options).open(split, batch_size=6, seed=seed)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_batch_depends_on_seed_step_and_row_alone(texts: str, split: str) -> None:
    data = opened(texts, split)
    whole, part = data.batch(2, range(6)), data.batch(2, [4, 1])
    for name in whole:
        np.testing.assert_array_equal(part[name], whole[name][[4, 1]])
    other = opened(texts, split, seed=4).batch(2, range(6))
    assert np.array_equal(other["sources"], whole["sources"]) == (split == "validation")
    assert data.batch(0, [])["sources"].shape == (0, 64)


def test_what_a_batch_holds(texts: str) -> None:
    data = opened(texts)
    batch, roles = data.batch(1, range(6)), data.vocabulary.roles
    assert (batch["targets"][:, 0] == roles["begin"]).all() and (batch["targets"][:, -1] == roles["end"]).all()
    assert (batch["tokens"][:, 0] == roles["end"]).all() and batch["weights"].all()
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    np.testing.assert_array_equal(batch["source_segments"] == 0, batch["sources"] == roles["pad"])
    text = ~data.vocabulary.is_special()[batch["sources"]] | (batch["sources"] == data.vocabulary.end_of_text)
    assert (text.sum(axis=1) == 62 - round(0.3 * 62)).all()
    for source, target in zip(batch["sources"], batch["targets"], strict=True):
        ends = np.flatnonzero(source == roles["end"])
        assert len(ends) == 1 and (source[ends[0] + 1 :] == roles["pad"]).all() and source[0] == roles["begin"]
        assert np.isin(source[source < 257], target).all()


def test_without_noise_the_source_is_the_text(texts: str) -> None:
    batch = opened(texts, masked=0.0, permute=False).batch(0, range(6))
    np.testing.assert_array_equal(batch["sources"], batch["targets"])
    moved = opened(texts, masked=0.0).batch(0, range(6))
    np.testing.assert_array_equal(np.sort(moved["sources"]), np.sort(moved["targets"]))
    assert not np.array_equal(moved["sources"], moved["targets"])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"masked": 0.6}, r"--data.masked 0.6 and"), ({"length": 7}, r"--data.length needs at least 8")],
)
def test_refusals(texts: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        NoisyTextData(**{"source": texts, "length": 64} | options).open("train", batch_size=1, seed=0)
