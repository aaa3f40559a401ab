"""Pairs of texts: that the next one is next and the other is of another document, half and half, and how long."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.train.data.sentence_pairs import NEXT, OTHER, SentencePairs, joined, truncated
from zoo.train.data.words import Boundaries

DOCUMENT, SENTENCE, ROOM = 400, 7, 61


def numbered(documents: int = 20, seed: int | None = 0, short: float = 0.1, size: int = DOCUMENT) -> SentencePairs:
    """A stream whose tokens are their own positions, of documents of `size` and sentences of 7 tokens."""
    stream = np.arange(documents * size)
    within = stream % size - 1
    none = np.zeros(len(stream), bool)
    boundaries = Boundaries(inner=none, open=none, line=within % SENTENCE == SENTENCE - 1, stop=none)
    return SentencePairs(stream, np.arange(0, len(stream), size), boundaries, ROOM, 8, seed, short)


def test_the_next_is_next_and_the_other_is_of_another_document() -> None:
    data = numbered()
    pairs = data.pairs(np.arange(2000))
    kinds = np.array([kind for *_, kind in pairs])
    # Half but for the end of a document, whose last sentence has none that follows it: one chunk of 50 or so.
    assert np.mean(kinds == OTHER) == pytest.approx(0.52, abs=0.04)
    for a, b, kind in pairs:
        assert len(a) and len(b) and (np.diff(a) == 1).all() and (np.diff(b) == 1).all()
        assert (a[0] // DOCUMENT == b[0] // DOCUMENT) == (kind == NEXT)
        assert not np.isin(np.concatenate([a, b]), data.documents).any()
        for text in (a, b):
            assert text[0] // DOCUMENT == text[-1] // DOCUMENT
        if kind == NEXT:
            # What truncation took off the end of the first and the beginning of the second.
            assert 1 <= b[0] - a[-1] <= SENTENCE
        if len(a) + len(b) < ROOM:
            assert (a[0] % DOCUMENT - 1) % SENTENCE == (b[0] % DOCUMENT - 1) % SENTENCE == 0


def test_others_are_of_every_document_and_begin_anywhere() -> None:
    data = numbered(documents=5)
    others = np.array([b[0] for _, b, kind in data.pairs(np.arange(4000)) if kind == OTHER])
    counts = np.bincount(others // DOCUMENT, minlength=5)
    assert (abs(counts - len(others) / 5) < 5 * np.sqrt(len(others) / 5)).all()
    assert len(np.unique((others % DOCUMENT - 1) // SENTENCE)) > 50


def test_pairs_fill_their_room_but_for_short_ones() -> None:
    def full(short: float) -> float:
        pairs = numbered(short=short, size=10_000).pairs(np.arange(1000))
        return float(np.mean([len(a) + len(b) == ROOM for a, b, _ in pairs]))

    assert full(0.0) > 0.97
    # Short ones are of 2 to ROOM tokens, to the end of a sentence.
    assert full(0.5) == pytest.approx(0.53, abs=0.07)


def test_where_the_first_text_ends_differs() -> None:
    firsts = [len(a) for a, _, kind in numbered(size=10_000, short=0.0).pairs(np.arange(800)) if kind == NEXT]
    counts, _ = np.histogram(firsts, bins=4, range=(0, ROOM))
    assert counts.min() > 0.15 * len(firsts)


@pytest.mark.parametrize("documents", [2, 3])
def test_documents_of_one_token(documents: int) -> None:
    data = numbered(documents=documents, size=2, seed=None)
    for a, b, kind in data.pairs(np.arange(documents)):
        assert len(a) == len(b) == 1 and kind == OTHER and a[0] != b[0]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(2, 90), st.integers(0, 2**40))
def test_truncation_takes_from_the_longer(one: int, two: int, room: int, index: int) -> None:
    a, b = truncated((100, 100 + one), (500, 500 + two), room, index, 3)
    kept = (a[1] - a[0], b[1] - b[0])
    assert sum(kept) == min(one + two, room) and min(kept) >= min(one, two, room // 2)
    assert 100 <= a[0] <= a[1] <= 100 + one and 500 <= b[0] <= b[1] <= 500 + two
    if one + two > room and one != two:
        shorter, was = (kept[0], one) if one < two else (kept[1], two)
        assert shorter == was or abs(kept[0] - kept[1]) <= 1


def test_truncation_takes_from_both_ends() -> None:
    fronts = [truncated((0, 60), (0, 10), 30, index, 0)[0][0] for index in range(400)]
    # Of 40 tokens half, standard deviation 3.2.
    assert np.mean(fronts) == pytest.approx(20, abs=0.8) and np.std(fronts) == pytest.approx(3.2, abs=0.5)


def test_a_joined_row() -> None:
    pair = (np.array([5, 6]), np.array([7]), NEXT)
    tokens, types, lengths = joined([pair], 9, classify=1, separate=2, pad=0)
    assert tokens.tolist() == [[1, 5, 6, 2, 7, 2, 0, 0, 0]]
    assert types.tolist() == [[0, 0, 0, 0, 1, 1, 0, 0, 0]] and lengths.tolist() == [6]
