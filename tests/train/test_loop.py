"""The loop: what a run leaves behind, that a resumed run is the uninterrupted one, and how it stops."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zoo.train import loop, run_folder
from zoo.train.checkpoints import load_arrays, steps
from zoo.train.ending import flags
from zoo.train.evaluate import evaluator
from zoo.train.experiment import Experiment, Optimizer, Placement, UserError
from zoo.train.interruption import Interruption
from zoo.train.metrics import read_records
from zoo.train.progress import Lines, duration
from zoo.train.recipes import RECIPES
from zoo.train.session import start, trained_model


def train(experiment: Experiment, folder: Path, **placement: Any) -> Any:
    return loop.run(experiment, Placement(run=folder, mesh="data=8", **placement))


def curve(folder: Path) -> dict[tuple[str, int], tuple[float, float]]:
    records = read_records(folder / run_folder.METRICS)
    return {(r["kind"], r["step"]): (r["loss"], r.get("grad_norm", 0.0)) for r in records}


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return load_arrays(folder / run_folder.CHECKPOINTS).state


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch):
    """Sends this process a SIGTERM in the given step."""
    asked = Interruption.requested

    def set_step(number: int) -> None:
        def requested(self: Interruption, step: int) -> bool:
            if step == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return asked(self, step)

        monkeypatch.setattr(Interruption, "requested", requested)

    return set_step


def test_a_run_and_what_it_leaves(tiny: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "run"
    state = train(tiny, folder)
    assert int(state.step) == 12
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "checkpoints", "curves.png", "report.html"}
    assert steps(folder / "checkpoints") == [8, 12]
    records = read_records(folder / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == [2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in records if r["kind"] == "validation"] == [6, 12]
    assert {
        "loss",
        "perplexity",
        "bits_per_byte",
        "accuracy",
        "grad_norm",
        "learning_rate",
        "tokens_per_second",
    } <= set(records[0])
    printed = capsys.readouterr().out
    for text in (
        "platform  cpu",
        "devices: 8, mesh data=8",
        "2,624 parameters",
        "SHA-256   000",
        "step 12/12",
        "a sample",
    ):
        assert text in printed
    assert f"run folder  {folder}" in printed


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    tiny: Experiment, tmp_path: Path, interrupted_at: Any, capsys: pytest.CaptureFixture
):
    """Bit for bit: parameters, moments, losses. Between checkpoints, with dropout, an average and accumulation."""
    model = dataclasses.replace(tiny.model, dropout=0.3)
    experiment = dataclasses.replace(tiny, model=model, ema=0.9, accumulate=2)
    train(experiment, tmp_path / "whole")
    interrupted_at(6)
    with pytest.raises(KeyboardInterrupt):
        train(experiment, tmp_path / "parts")
    assert "stopped   after step 6, which is saved" in capsys.readouterr().out
    assert steps(tmp_path / "parts" / "checkpoints") == [4, 6]
    interrupted_at(0)
    train(experiment, tmp_path / "parts")
    assert "resumed   from step 6" in capsys.readouterr().out
    whole, parts = arrays(tmp_path / "whole"), arrays(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")


def test_a_lost_checkpoint_costs_steps_not_the_run(tiny: Experiment, tmp_path: Path):
    """Resumed from the checkpoint before, the metrics are cut back to it, and written again the same."""
    train(tiny, tmp_path / "run")
    before, last = curve(tmp_path / "run"), arrays(tmp_path / "run")
    (manifest,) = (tmp_path / "run" / "checkpoints").glob("step_*12/manifest.json")
    manifest.unlink()
    train(tiny, tmp_path / "run")
    assert curve(tmp_path / "run") == before
    assert all(np.array_equal(last[name], value) for name, value in arrays(tmp_path / "run").items())


def test_a_finished_run_shows_its_results_again(tiny: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture):
    train(tiny, tmp_path / "run")
    records = (tmp_path / "run" / "metrics.jsonl").read_text()
    capsys.readouterr()
    train(tiny, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "resumed   from step 12" in printed and "held out    loss" in printed
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == records


def test_steps_that_are_not_finite_stop_the_run(tiny: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture):
    """So high a learning rate makes every loss after the first infinite."""
    experiment = dataclasses.replace(tiny, optimizer=Optimizer(learning_rate=3e38, warmup_steps=0), max_bad_steps=3)
    with pytest.raises(UserError, match=r"^3 steps in a row, to step 4, .* lower --optimizer.learning-rate 3e\+38"):
        train(experiment, tmp_path / "run")
    assert "step 2 skipped: its loss or gradient is not finite" in capsys.readouterr().out
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert records[-1]["loss"] is None and records[-1]["skipped"] == 3


def test_another_experiment_does_not_take_the_folder(tiny: Experiment, tmp_path: Path):
    train(dataclasses.replace(tiny, steps=2), tmp_path / "run")
    with pytest.raises(UserError, match=r"steps: 2 -> 12"):
        train(tiny, tmp_path / "run")


def test_held_out_figures_do_not_depend_on_batches(tiny: Experiment, tmp_path: Path):
    """The last checkpoint, evaluated again, on one device and with micro-batches, has the figures of the run."""
    train(tiny, tmp_path / "run")
    recorded = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "validation"][-1]
    session = start(tiny, Placement(mesh="fsdp=4,tensor=2"))
    model, step = trained_model(tmp_path / "run", session)
    figures = evaluator(session, session.dataset("validation"))(model)
    assert step == 12
    for name, value in figures.items():
        assert value == pytest.approx(recorded[name], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"steps": 5, "ema": 0.5}, ["--steps", "5", "--ema", "0.5"]),
        ({"optimizer": Optimizer(clip_norm=None)}, None),
    ],
)
def test_commands_carry_what_was_changed(change: dict[str, Any], expected: list[str] | None):
    default = RECIPES["gpt-nano"]()
    changed = dataclasses.replace(default, **change)
    found = flags(changed, default)
    if expected is None:
        assert found[-2:] == ["--optimizer.clip-norm", "None"]
    else:
        assert found == expected


def test_plain_lines(capsys: pytest.CaptureFixture):
    Lines(100, "tokens").update(40, {"loss": 1.23456, "tokens_per_second": 12345.6, "step_seconds": 2.0})
    assert capsys.readouterr().out == "step 40/100  loss 1.2346  12,346 tokens/s  2:00 left\n"
    assert duration(3723.2) == "1:02:03" and duration(0.4) == "0:00"


def test_the_second_signal_is_not_held_back():
    before = signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        assert not interruption.requested(1)
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.requested(2)
        assert signal.getsignal(signal.SIGINT) is before
