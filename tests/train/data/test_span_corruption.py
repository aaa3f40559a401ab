"""Corrupted spans: how many, how long, that inputs and targets together are the text, and T5's lengths."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.train.data.span_corruption import (
    CorruptedSpans,
    SpanCorruptionData,
    Spans,
    fitting,
    noise_mask,
    segmentation,
    with_sentinels,
)
from zoo.train.experiment import UserError


def test_t5s_lengths() -> None:
    """512 inputs: 568 tokens, 85 of them noise in 28 spans, 114 targets (compute_input_and_target_lengths)."""
    spans = fitting(512, 0.15, 3.0)
    assert spans == (568, 85, 28) and (spans.inputs, spans.targets) == (512, 114)


@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.5, 3.0), (0.15, 8.0), (0.9, 1.0)])
def test_lengths_fit(density: float, mean: float) -> None:
    for inputs in (12, 64, 200):
        spans = fitting(inputs, density, mean)
        assert spans.inputs <= inputs and 0 < spans.spans <= min(spans.noise, spans.length - spans.noise)
        assert Spans.of(spans.length + (2 if density == 0.5 else 1), density, mean).inputs > inputs
        if density == 0.5:
            assert spans.targets <= spans.inputs


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 120), st.floats(0.05, 0.9), st.floats(1, 9), st.integers(0, 2**40))
def test_number_and_mean_length_of_spans(length: int, density: float, mean: float, seed: int) -> None:
    spans = Spans.of(length, density, mean)
    noise = noise_mask(spans, np.arange(5), seed)
    assert noise.shape == (5, length) and (noise.sum(axis=1) == spans.noise).all()
    begins = noise & ~np.pad(noise, ((0, 0), (1, 0)))[:, :-1]
    assert (begins.sum(axis=1) == spans.spans).all()
    assert not noise[:, 0].any() and noise[:, -1].all()  # as released: text first, noise last


def test_every_cut_is_as_likely() -> None:
    sizes = segmentation(6, 3, np.arange(20_000), 1, 2)
    assert (sizes.sum(axis=1) == 6).all() and sizes.min() == 1
    _, counts = np.unique(sizes, axis=0, return_counts=True)
    # 10 ways to cut 6 into 3: 9 degrees of freedom.
    assert len(counts) == 10 and ((counts - 2000) ** 2 / 2000).sum() < 30


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 60), st.floats(0.1, 0.8), st.floats(1, 6), st.integers(0, 2**40))
def test_inputs_and_targets_are_the_text(length: int, density: float, mean: float, seed: int) -> None:
    spans = Spans.of(length, density, mean)
    text = np.random.default_rng(seed).integers(0, 50, (3, length))
    noise = noise_mask(spans, np.arange(3), seed)
    sentinels, end = 200 - np.arange(spans.spans), 99
    inputs = with_sentinels(text, noise, sentinels, end, spans.inputs)
    targets = with_sentinels(text, ~noise, sentinels, end, spans.targets)
    for row in range(3):
        assert inputs[row, -1] == targets[row, -1] == end and targets[row, 0] == sentinels[0]
        spoken: dict[int, list[int]] = {}
        for token in targets[row, :-1].tolist():
            if token in sentinels:
                spoken[token] = []
            else:
                spoken[list(spoken)[-1]].append(token)
        assert list(spoken) == sentinels.tolist()
        filled = [part for token in inputs[row, :-1].tolist() for part in spoken.get(token, [token])]
        assert filled == text[row].tolist()


@pytest.fixture
def texts(tmp_path: Path) -> str:
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text("".join(f"Line {i} of {j}, and more.\n" for j in range(40)))
    return str(tmp_path)


def opened(source: str, split: str = "train", seed: int = 3) -> CorruptedSpans:
    return SpanCorruptionData(source=source, length=32).open(split, batch_size=6, seed=seed)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_batch_depends_on_seed_step_and_row_alone(texts: str, split: str) -> None:
    data = opened(texts, split)
    whole, part = data.batch(2, range(6)), data.batch(2, [4, 1])
    for name in whole:
        np.testing.assert_array_equal(part[name], whole[name][[4, 1]])
    other = opened(texts, split, seed=4).batch(2, range(6))
    assert np.array_equal(other["sources"], whole["sources"]) == (split == "validation")
    assert {name: array.shape for name, array in data.batch(0, []).items()} == {
        name: (0, *array.shape[1:]) for name, array in whole.items()
    }


def test_what_a_batch_holds(texts: str) -> None:
    data = opened(texts)
    batch, roles = data.batch(0, range(6)), data.vocabulary.roles
    assert batch["sources"].shape == (6, data.spans.inputs) and (batch["sources"][:, -1] == roles["end"]).all()
    assert (batch["tokens"][:, 0] == roles["pad"]).all() and batch["weights"].all()
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    # Sentinels stand at the end of the vocabulary, the first of them last.
    assert (batch["targets"][:, 0] == data.vocabulary.size - 1).all()


def test_held_out_text_is_walked_once(texts: str) -> None:
    data = opened(texts, "validation")
    weights = np.concatenate([data.batch(step, range(6))["weights"] for step in range(data.batches)])
    assert weights.any(axis=1).sum() == weights.all(axis=1).sum() == len(data.packed.tokens) // data.spans.length


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sentinels": 1, "length": 64}, r"need as many sentinels: raise --data.sentinels 1"),
        ({"noise_density": 1.0}, r"--data.noise-density 1.0 and --data.mean-span 3.0: choose"),
        ({"length": 4}, r"--data.length needs at least 5"),
    ],
)
def test_refusals(texts: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SpanCorruptionData(source=texts, **options).open("train", batch_size=1, seed=0)
