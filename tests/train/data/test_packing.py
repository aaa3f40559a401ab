"""Packing against a plain loop over documents, and the order of sequences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.train.data.packing import PackedText
from zoo.train.experiment import DataInfo

END = 99
INFO = DataInfo("test", "", 0, 0)


def packed(documents: list[list[int]], length: int, batch_size: int, seed: int | None) -> PackedText:
    stream = np.concatenate([[END, *document] for document in documents]).astype(np.uint16)
    lengths = np.ones(END + 1, np.int32)
    lengths[END] = 0
    return PackedText(INFO, stream, lengths, END, length, batch_size, seed)


def expected_pairs(documents: list[list[int]]) -> list[tuple[int, int]]:
    return [pair for d in documents for pair in zip([END, *d], [*d, END], strict=True)]


documents_strategy = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=12), min_size=1, max_size=12)


def rows_of(data: PackedText, steps: int) -> dict[str, np.ndarray]:
    batches = [data.batch(step, range(data.batch_size)) for step in range(steps)]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


@settings(deadline=None, max_examples=60)
@given(documents_strategy, st.integers(2, 9), st.integers(1, 5))
def test_validation_walks_every_target_once_in_order(documents, length, batch_size):
    data = packed(documents, length, batch_size, None)
    got = rows_of(data, data.batches)
    real = got["weights"].reshape(-1) > 0
    pairs = list(zip(got["tokens"].reshape(-1)[real], got["targets"].reshape(-1)[real], strict=True))
    assert pairs == expected_pairs(documents)
    assert got["bytes"].sum() == sum(map(len, documents))
    for name in ("segments", "positions", "bytes"):
        assert not got[name][got["weights"] == 0].any()


@settings(deadline=None, max_examples=60)
@given(documents_strategy, st.integers(2, 9), st.integers(0, 2**40), st.integers(0, 3))
def test_a_training_pass_takes_distinct_stretches_of_documents(documents, length, seed, epoch):
    size = sum(len(document) + 1 for document in documents)
    length = min(length, size)
    data = packed(documents, length, 1, seed)
    count = data.sequences
    rows = [data.batch(epoch * count + i, [0]) for i in range(count)]
    # Number the stream's positions in place of tokens: each is taken at most once, fewer than `length` are left out.
    numbered = PackedText(INFO, np.arange(size), np.zeros(size, np.int32), END, length, 1, seed)
    taken = np.concatenate([numbered.batch(epoch * count + i, [0])["tokens"][0] for i in range(count)])
    assert len(set(taken.tolist())) == len(taken) == count * length > size - length
    for row in rows:
        tokens, targets, segments, positions = (row[n][0] for n in ("tokens", "targets", "segments", "positions"))
        assert row["weights"].all()
        assert segments[0] == 1 and positions[0] == 0
        for i in range(1, length):
            begins = tokens[i] == END
            assert segments[i] == segments[i - 1] + begins
            assert positions[i] == (0 if begins else positions[i - 1] + 1)
            assert targets[i - 1] == tokens[i]


def test_a_batch_depends_on_seed_step_and_row_alone():
    documents = [[*range(i % 40), 1] for i in range(200)]
    data = packed(documents, 16, 8, seed=3)
    whole = data.batch(5, range(8))
    part = data.batch(5, [6, 1])
    for name in whole:
        np.testing.assert_array_equal(part[name], whole[name][[6, 1]])
    again = packed(documents, 16, 8, seed=3).batch(5, range(8))
    np.testing.assert_array_equal(again["tokens"], whole["tokens"])
    assert not np.array_equal(packed(documents, 16, 8, seed=4).batch(5, range(8))["tokens"], whole["tokens"])


def test_a_batch_may_span_passes():
    data = packed([[1, 2, 3], [4, 5, 6, 7]], 4, batch_size=7, seed=0)
    assert data.sequences == 2 and data.batches == 1
    assert data.batch(0, range(7))["tokens"].shape == (7, 4)


def test_the_cut_differs_between_passes():
    size = 1000
    data = PackedText(INFO, np.arange(size), np.zeros(size, np.int32), END, 64, 1, seed=0)
    cuts = set()
    for epoch in range(4):
        firsts = [int(data.batch(epoch * data.sequences + i, [0])["tokens"][0, 0]) for i in range(data.sequences)]
        cuts.add(tuple(sorted(first % 64 for first in firsts)))
    assert len(cuts) == 4


@pytest.mark.parametrize("rows", [[], [0]])
def test_shapes_and_types(rows):
    data = packed([[1] * 30], 8, 4, seed=0)
    batch = data.batch(0, rows)
    for name, array in batch.items():
        assert array.shape == (len(rows), 8)
        assert array.dtype == (np.float32 if name == "weights" else np.int32)
