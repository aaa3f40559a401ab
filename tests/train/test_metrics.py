"""Metrics: records that survive kills and resumes, throughput without pauses, figures that arrive late and in order."""

import json
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from zoo.train.experiment import UserError
from zoo.train.metrics import Jsonl, Meter, Reader, TensorBoard, peak_flops, read_records


def write(path: Path, steps: list[int]) -> None:
    tracker = Jsonl(path)
    for step in steps:
        tracker.log({"step": step, "kind": "train", "loss": 1 / step})
    tracker.close()


def test_opening_cuts_back(tmp_path: Path):
    """To the step resumed from; a line that a kill left unfinished goes too."""
    path = tmp_path / "metrics.jsonl"
    write(path, [10, 20, 30, 40])
    with path.open("a") as file:
        file.write('{"step": 45, "ki')
    assert [record["step"] for record in read_records(path)] == [10, 20, 30, 40]
    tracker = Jsonl(path, 30)
    tracker.log({"step": 35, "kind": "train", "loss": 2.0})
    tracker.close()
    assert [record["step"] for record in read_records(path)] == [10, 20, 30, 35]
    assert list(tmp_path.iterdir()) == [path]


def test_each_record_is_on_disk_at_once_and_is_json(tmp_path: Path):
    tracker = Jsonl(tmp_path / "m.jsonl")
    tracker.log({"step": 1, "kind": "train", "loss": float("nan")})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "kind": "train", "loss": None}
    tracker.close()


def test_tensorboard_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match="--tensorboard needs a package that is missing: pip install tensorboardX"):
        TensorBoard(tmp_path)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", None),
        ("cpu", None),
    ],
)
def test_peaks(kind: str, peak: float | None):
    assert peak_flops(kind) == peak


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the meter reads; a test moves them on."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_throughput_leaves_out_pauses(clock: list[float]):
    meter = Meter(units=512, unit="tokens", forward_flops=1e12, batch_size=2, device_kinds=["TPU v4", "TPU v4"])
    with meter.losing("compile"):
        clock[0] += 30
    clock[0] += 4
    first = meter.interval(8, clock[0])
    assert first["tokens_per_second"] == pytest.approx(8 * 512 / 4)
    assert first["step_seconds"] == pytest.approx(0.5)
    # Three forward passes of 1 TFLOP, two examples, 2 steps a second, on two chips of 275 TFLOP/s.
    assert first["model_tflops_per_second"] == pytest.approx(12)
    assert first["mfu"] == pytest.approx(12 / 550)
    with meter.losing("evaluation"):
        clock[0] += 7
    with meter.losing("input"):
        clock[0] += 1
    clock[0] += 1
    assert meter.interval(2, clock[0])["step_seconds"] == pytest.approx(1.0)
    assert meter.lost == {"startup": 0, "compile": 30, "input": 1, "evaluation": 7, "checkpoint": 0}


def test_no_mfu_where_the_peak_is_not_known():
    meter = Meter(units=1, unit="images", forward_flops=1.0, batch_size=1, device_kinds=["cpu"])
    figures = meter.interval(1, time.perf_counter())
    assert "mfu" not in figures and "images_per_second" in figures


def test_figures_come_one_interval_late():
    reader = Reader()
    for step in range(4):
        reader.add({"loss": jnp.float32(step)})
    assert reader.cut(4) == []
    reader.add({"loss": jnp.float32(4)})
    (interval,) = reader.cut(5)
    assert interval.last == 4 and [float(f["loss"]) for f in interval.figures] == [0, 1, 2, 3]
    (interval,) = reader.cut(5, keep=0)
    assert interval.last == 5 and len(interval.figures) == 1
    assert reader.cut(5, keep=0) == []
