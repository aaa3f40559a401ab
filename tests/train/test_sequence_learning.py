"""Models of sequences to sequences learn what their objectives ask for: real text, from its source."""

import ast
import json.encoder
import pydoc_data.topics
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from zoo import sharding
from zoo.models.t5 import T5Config
from zoo.models.transformer import TransformerConfig
from zoo.train.data import python_trees
from zoo.train.data.denoising import NoisyTextData
from zoo.train.data.pairs import PairData
from zoo.train.data.span_corruption import SpanCorruptionData
from zoo.train.experiment import Experiment, Optimizer
from zoo.train.objectives import SequenceToSequence
from zoo.train.samplers import TargetSampler
from zoo.train.step import eval_step, init_state, train_step

LENGTH, ROWS, STEPS = 24, 32, 80
SIZES: dict[str, Any] = {"num_layers": 1, "width": 64, "num_heads": 2, "mlp_width": 128, "dropout": 0.0}
CASES = {
    "noise": (TransformerConfig(positions="learned", max_length=LENGTH, **SIZES), NoisyTextData),
    "spans": (T5Config(head_dim=32, gated=True, **SIZES), SpanCorruptionData),
}


@pytest.mark.parametrize("case", CASES)
def test_targets_are_learned_from_their_sources_alone(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources of other rows, drawn anew at each step, leave what text follows which to chance: log(32) nats a row."""
    monkeypatch.setenv("FLAXZOO_CACHE", str(tmp_path / "cache"))
    for name in ("for", "if", "while", "try"):
        (tmp_path / f"{name}.txt").write_text(pydoc_data.topics.topics[name][:1200])
    model, data = CASES[case]
    data = data(source=str(tmp_path), length=LENGTH, validation_fraction=0.25)
    optimizer = Optimizer("muon", learning_rate=1e-2, warmup_steps=10, weight_decay=0.0)
    experiment = Experiment(
        "tiny", data.fit(model), data, SequenceToSequence(), TargetSampler(), optimizer, steps=STEPS, batch_size=ROWS
    )
    batch = data.open("train", batch_size=ROWS, seed=0).batch(0, range(ROWS))
    mesh = sharding.make_mesh("", jax.devices()[:1])
    with sharding.use(mesh):
        step, evaluate, rng = train_step(experiment, mesh), eval_step(experiment, mesh), np.random.default_rng(0)

        def loss(own_sources: bool) -> float:
            state = init_state(experiment, mesh)
            for _ in range(STEPS):
                order = np.arange(ROWS) if own_sources else rng.permutation(ROWS)
                given = batch | {name: batch[name][order] for name in batch if name.startswith("source")}
                state, _ = step(state, given)
            total, weight, _ = evaluate(state.model, batch)
            return float(total / weight)

        learned, ablated = loss(True), loss(False)
    assert learned < 0.08 and ablated > 0.3, (learned, ablated)


def test_trees_are_learned_from_statements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but by heart; a decoder that ignored its sources would not mind those of other rows."""
    monkeypatch.setenv("FLAXZOO_CACHE", str(tmp_path / "cache"))
    text = Path(json.encoder.__file__).read_text()
    pairs = {source: python_trees.tree(node) for source, node in python_trees.statements(text, ast.parse(text))}
    (tmp_path / "pairs.tsv").write_text("".join(f"{source}\t{tree}\n" for source, tree in pairs.items()))
    data = PairData(str(tmp_path), length=40, target_length=32, train_bpe=320)
    optimizer = Optimizer("muon", learning_rate=1e-2, warmup_steps=10, weight_decay=0.0)
    experiment = Experiment(
        "tiny",
        data.fit(TransformerConfig(**SIZES)),
        data,
        SequenceToSequence(),
        TargetSampler(),
        optimizer,
        STEPS,
        ROWS,
    )
    batch = data.open("train", batch_size=ROWS, seed=0).batch(0, range(ROWS))
    other = batch | {name: np.roll(batch[name], 1, axis=0) for name in ("sources", "source_segments")}
    mesh = sharding.make_mesh("", jax.devices()[:1])
    with sharding.use(mesh):
        step, evaluate, state = train_step(experiment, mesh), eval_step(experiment, mesh), init_state(experiment, mesh)
        for _ in range(STEPS):
            state, _ = step(state, batch)
        own, others = (float(total / weight) for total, weight, _ in (evaluate(state.model, b) for b in (batch, other)))
    assert own < 0.05 and others > 1, (own, others)
