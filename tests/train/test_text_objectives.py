"""Each objective on text with its data and its model: a training step is the same on one device and on eight."""

from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx

from zoo import sharding
from zoo.models.bert import BertConfig
from zoo.models.t5 import T5Config
from zoo.models.transformer import TransformerConfig
from zoo.models.xlnet import XLNetConfig
from zoo.train.data.denoising import NoisyTextData
from zoo.train.data.masked_text import MaskedTextData
from zoo.train.data.pairs import PairData
from zoo.train.data.permuted_text import PermutedTextData
from zoo.train.data.span_corruption import SpanCorruptionData
from zoo.train.experiment import Experiment
from zoo.train.objectives import MaskedLM, PermutationLM, SequenceToSequence
from zoo.train.samplers import MaskSampler, TargetSampler, TextSampler
from zoo.train.step import init_state, train_step

SIZES: dict[str, Any] = {"num_layers": 1, "width": 16, "num_heads": 2, "mlp_width": 32, "dropout": 0.0}
LENGTH = 32
CASES = {
    "masked": (
        BertConfig(head="pretraining", max_length=LENGTH, attention_dropout=0.0, **SIZES),
        MaskedTextData,
        MaskedLM(),
        MaskSampler(),
    ),
    "spans": (T5Config(head_dim=8, **SIZES), SpanCorruptionData, SequenceToSequence(0.1, 1e-4), TargetSampler()),
    "noise": (
        TransformerConfig(positions="learned", max_length=LENGTH, **SIZES),
        NoisyTextData,
        SequenceToSequence(),
        TargetSampler(),
    ),
    "pairs": (TransformerConfig(**SIZES), PairData, SequenceToSequence(0.1), TargetSampler()),
    "orders": (XLNetConfig(head="lm", **SIZES), PermutedTextData, PermutationLM(), TextSampler(tokens=4)),
}


@pytest.fixture
def experiment(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.setenv("FLAXZOO_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text("".join(f"Line {i} of {j}, and more.\n" for j in range(40)))
    (folder / "pairs.tsv").write_text("".join(f"{i} and {i + 1}\t{2 * i + 1}\n" for i in range(40)))
    model, data, objective, sampler = CASES[request.param]
    data = data(source=str(folder), length=LENGTH, validation_fraction=0.4)
    return Experiment("tiny", data.fit(model), data, objective, sampler, steps=3, batch_size=8, accumulate=2)


@pytest.mark.parametrize("experiment", CASES, indirect=True)
def test_a_step_does_not_depend_on_the_mesh(experiment: Experiment) -> None:
    data = experiment.data.open("train", batch_size=8, seed=0)

    def figures(axes: str) -> dict[str, float]:
        mesh = sharding.make_mesh(axes, jax.devices()[: 8 if axes else 1])
        with sharding.use(mesh):
            batch = jax.device_put(data.batch(0, range(8)), sharding.batch_sharding(mesh))
            _, metrics = train_step(experiment, mesh)(init_state(experiment, mesh), batch)
        sums = {name: float(each) for name, each in metrics.loss.metrics.items()}
        loss = experiment.objective.summary(float(metrics.loss.total), float(metrics.loss.weight), sums)
        return loss | {"grad_norm": float(metrics.grad_norm)}

    one = figures("")
    assert 4 < one["loss"] < 8 and one["grad_norm"] > 0
    assert figures("data=2,fsdp=2,tensor=2") == pytest.approx(one, rel=2e-5)


@pytest.mark.parametrize("experiment", CASES, indirect=True)
def test_what_it_shows(experiment: Experiment, tmp_path: Path) -> None:
    experiment.sampler.check(experiment.model, experiment.data)
    model = experiment.model.build(nnx.Rngs(0))
    shown = experiment.sampler.sample(model, experiment.data, jax.random.key(0), tmp_path)
    if not isinstance(experiment.sampler, TextSampler):
        first = [line.split()[0] for line in shown.splitlines()[:3]]
        assert first in (["seen", "filled", "text"], ["source", "made", "target"])
