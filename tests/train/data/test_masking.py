"""Masked words: how many, which, by what; whole words; and that a batch depends on seed, step and row alone."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.train.data.masked_text import MaskedText, MaskedTextData
from zoo.train.data.masking import Masking, choose
from zoo.train.experiment import UserError

MASK, VOCABULARY = 999, 1000


def masked(
    rows: int, length: int, seed: int = 0, predictions: int = 20
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens before and after, places and weights; the first token of each row is special."""
    tokens = np.random.default_rng(1).integers(0, 900, (rows, length)).astype(np.int32)
    words = np.broadcast_to(np.arange(length), tokens.shape).copy()
    words[:, 0] = -1
    return tokens, *Masking(MASK, VOCABULARY, predictions)(tokens, words, np.arange(rows), seed)


def test_eighty_ten_ten_of_fifteen_percent() -> None:
    tokens, seen, places, weights = masked(2000, 101)
    assert (weights.sum(axis=1) == 15).all() and (places[weights == 0] == 0).all()
    rows = np.arange(len(tokens))[:, None]
    was, now = tokens[rows, places][weights > 0], seen[rows, places][weights > 0]
    # 30,000 tokens: standard errors 0.0023 and 0.0017. One of a thousand replacements is by the token itself or a mask.
    assert np.mean(now == MASK) == pytest.approx(0.8, abs=0.01)
    assert np.mean(now == was) == pytest.approx(0.1, abs=0.008)
    others = now[(now != MASK) & (now != was)]
    assert len(others) / len(now) == pytest.approx(0.1, abs=0.008)
    assert abs(others.mean() - 499.5) < 30 and len(np.unique(others)) > 800
    untouched = np.ones(tokens.shape, bool)
    untouched[np.broadcast_to(rows, places.shape)[weights > 0], places[weights > 0]] = False
    np.testing.assert_array_equal(seen[untouched], tokens[untouched])
    # Every place but the special one as often: 100 cells, 99 degrees of freedom.
    counts = np.bincount(places[weights > 0], minlength=101)
    assert counts[0] == 0 and ((counts[1:] - 300) ** 2 / 300).sum() < 160


@pytest.mark.parametrize(("length", "predictions", "expected"), [(101, 7, 7), (3, 7, 1), (41, 20, 6)])
def test_how_many_are_predicted(length: int, predictions: int, expected: int) -> None:
    *_, places, weights = masked(4, length, predictions=predictions)
    assert places.shape == (4, predictions) and (weights.sum(axis=1) == expected).all()
    assert (np.diff(places[:, :expected]) > 0).all()


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 40), st.integers(0, 2**32))
def test_words_are_chosen_whole(sizes: list[int], count: int, seed: int) -> None:
    words = np.repeat(np.arange(len(sizes)), sizes)
    words[words % 3 == 2] = -1
    chosen = choose(words, np.random.default_rng(seed).random(len(words)), count)
    assert len(chosen) <= count and (words[chosen] >= 0).all() and (np.diff(chosen) > 0).all()
    for word in np.unique(words[chosen]):
        assert np.isin(np.flatnonzero(words == word), chosen).all()
    left = [sizes[word] for word in np.unique(words[words >= 0]) if word not in words[chosen]]
    assert all(size > count - len(chosen) for size in left)


TEXT = "".join(f"Sentence {i} of many words, and of {'longer ' * (i % 4)}ones.\n" for i in range(300))


@pytest.fixture
def texts(tmp_path: Path) -> str:
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(TEXT[300 * i :])
    return str(tmp_path)


def opened(source: str, seed: int = 0, split: str = "train", **options) -> MaskedText:
    return MaskedTextData(source=source, length=48, validation_fraction=0.4, **options).open(
        split, batch_size=6, seed=seed
    )


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_batch_depends_on_seed_step_and_row_alone(texts: str, pairs: bool, split: str) -> None:
    data = opened(texts, 3, split, pairs=pairs)
    whole, part = data.batch(5, range(6)), data.batch(5, [4, 1])
    for name in whole:
        np.testing.assert_array_equal(part[name], whole[name][[4, 1]])
    other = opened(texts, 4, split, pairs=pairs).batch(5, range(6))
    assert np.array_equal(other["tokens"], whole["tokens"]) == (split == "validation")
    another = data.batch(6, range(6))
    assert not np.array_equal(another["places"], whole["places"])
    again = data.batch(5 + data.batches, range(6))
    assert not np.array_equal(again["places"], whole["places"])
    assert data.batch(0, []).keys() == whole.keys()


@pytest.mark.parametrize("pairs", [True, False])
def test_what_a_batch_holds(texts: str, pairs: bool) -> None:
    data = opened(texts, pairs=pairs, whole_words=True, kept=0.0, replaced=0.0)
    roles, special = data.vocabulary.roles, data.vocabulary.is_special()
    batch = data.batch(2, range(6))
    rows, real = np.arange(6)[:, None], batch["weights"] > 0
    clean = batch["tokens"].copy()
    clean[np.broadcast_to(rows, real.shape)[real], batch["places"][real]] = batch["targets"][real]
    assert (batch["tokens"][rows, batch["places"]][real] == roles["mask"]).all()
    assert not special[batch["targets"][real]].any() and roles["mask"] not in clean
    starts = data.boundaries.word_starts(clean)
    hidden = batch["tokens"] == roles["mask"]
    # Whoever goes on with a word is hidden where its beginning is.
    assert (hidden[:, 1:] == hidden[:, :-1])[~starts[:, 1:]].all()
    if pairs:
        assert (clean[:, 0] == roles["classify"]).all() and ((clean == roles["separate"]).sum(axis=1) == 2).all()
        second = np.cumsum(clean == roles["separate"], axis=1) - (clean == roles["separate"]) == 1
        np.testing.assert_array_equal(batch["token_types"] == 1, second)
        np.testing.assert_array_equal(batch["segments"] == 0, clean == roles["pad"])


def test_held_out_text_is_walked_once(texts: str) -> None:
    data = opened(texts, split="validation", pairs=False)
    weights = np.concatenate([data.batch(step, range(6))["weights"] for step in range(data.batches)])
    assert np.count_nonzero(weights.any(axis=1)) == data.source.cuts.sequences
    with_pairs = opened(texts, split="validation")
    weights = np.concatenate([with_pairs.batch(step, range(6))["weights"] for step in range(with_pairs.batches)])
    assert np.count_nonzero(weights.any(axis=1)) == with_pairs.source.cuts.sequences


def test_refusals(texts: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data.masked 1.5 is no share"):
        opened(texts, masked=1.5)
    with pytest.raises(UserError, match=r"--data.kept 0.6 and --data.replaced 0.5 are more than 1"):
        opened(texts, kept=0.6, replaced=0.5)
    alone = tmp_path / "alone.jsonl"
    alone.write_text('{"text": "' + "word " * 300 + '"}')
    with pytest.raises(UserError, match=r"is one document, and pairs need another: give --data.no-pairs"):
        opened(str(alone))
    assert opened(str(alone), pairs=False).batch(0, [0])["tokens"].shape == (1, 48)
