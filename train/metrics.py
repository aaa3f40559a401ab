"""What a run writes down: records by step, and the meter that says how fast it goes and where its time went."""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from zoo.train.experiment import UserError

Record = Mapping[str, Any]


class Tracker(Protocol):
    """Where records go; one that sends them elsewhere needs these two methods."""

    def log(self, record: Record) -> None:
        """`record` has "step" (steps done), "kind" ("train", "validation" ...) and figures by name."""
        ...

    def close(self) -> None: ...


class Jsonl:
    """One JSON object a line, on disk when `log` returns. Opening cuts back to the records of `step` and before.

    What is not finite is written as null, which JSON has no other word for.
    """

    def __init__(self, path: Path, step: int = 0):
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in kept))
            partial.replace(path)
        self._file = path.open("a")

    def log(self, record: Record) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    """The step of a record; infinity for a line that a killed run left unfinished."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, without a last line that is not finished yet."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if _step_of(line) < math.inf]


class TensorBoard:
    """Figures as TensorBoard scalars named kind/figure; what lies past `step` in the folder is hidden."""

    def __init__(self, folder: Path, step: int = 0):
        try:
            from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError("--tensorboard needs a package that is missing: pip install tensorboardX") from None
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, record: Record) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def close(self) -> None:
        self._writer.close()


# Dense bfloat16 peak of one device as JAX counts them, FLOP/s, by the beginning of its device_kind. TPU: the system
# architecture pages of Google Cloud (v2 and v3 by the core, of which a chip has two). NVIDIA: the data sheets.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
}


def peak_flops(device_kind: str) -> float | None:
    """The bfloat16 peak of a device, or None where it is not known."""
    known = [name for name in PEAK_FLOPS if device_kind == name or device_kind.startswith((f"{name} ", f"{name}-"))]
    return PEAK_FLOPS[max(known, key=len)] if known else None


LOST = ("startup", "compile", "input", "evaluation", "checkpoint")


class Meter:
    """Throughput of intervals of steps, and the wall-clock seconds that went elsewhere.

    Model FLOPs are three forward passes an example (the backward pass counts twice, recomputation not at all; matrix
    products and convolutions alone, causal attention as half). MFU is their rate over all devices' bfloat16 peak
    (Chowdhery et al. 2022, appendix B).
    """

    def __init__(self, *, units: int, unit: str, forward_flops: float, batch_size: int, device_kinds: Sequence[str]):
        """units: tokens or images (`unit`) of a step.  forward_flops: of one example."""
        self._units, self._unit = units, unit
        self._flops = 3 * forward_flops * batch_size
        peaks = [peak_flops(kind) for kind in device_kinds]
        self._peak = None if None in peaks else sum(peak for peak in peaks if peak is not None)
        self.lost: dict[str, float] = dict.fromkeys(LOST, 0.0)
        self.started = self._last = time.perf_counter()
        self._lost_before = 0.0

    def begin(self) -> None:
        """The first interval begins now."""
        self._last, self._lost_before = time.perf_counter(), self._paused()

    @contextlib.contextmanager
    def losing(self, to: str) -> Iterator[None]:
        """Counts the seconds inside as lost `to` one of LOST; what is lost at the same time counts twice."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.lost[to] += time.perf_counter() - begin

    def interval(self, steps: int, end: float) -> dict[str, float]:
        """Figures of the `steps` steps from the last `end` to this one, in seconds of time.perf_counter.

        What is lost, but for the wait for input, is no part of their time.
        """
        paused = self._paused()
        seconds = max(end - self._last - (paused - self._lost_before), 1e-9)
        self._last, self._lost_before = end, paused
        flops = steps * self._flops / seconds
        figures = {
            f"{self._unit}_per_second": steps * self._units / seconds,
            "step_seconds": seconds / steps,
            "model_tflops_per_second": flops / 1e12,
        }
        return figures if self._peak is None else figures | {"mfu": flops / self._peak}

    def _paused(self) -> float:
        return sum(seconds for to, seconds in self.lost.items() if to != "input")

    def seconds(self) -> float:
        """Since the meter was made."""
        return time.perf_counter() - self.started


class Interval(NamedTuple):
    """Steps whose figures have arrived: of each, in order; the number of the last; when it was done (perf_counter)."""

    figures: list[Any]
    last: int
    end: float


class Reader:
    """Brings the figures of steps from the devices, without holding up those to come.

    A thread waits for them, so that it knows the time at which they were done. `cut` waits for the interval before the
    one that it ends: the devices have one interval of work queued, and no more.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._current: list[Any] = []
        self._waiting: list[Future[Interval]] = []

    def add(self, figures: Any) -> None:
        """Takes a step's figures, a pytree of device arrays."""
        self._current.append(figures)

    def cut(self, step: int, *, keep: int = 1) -> list[Interval]:
        """Ends an interval with `step`; returns those that are done, all but the newest `keep`."""
        if self._current:
            self._waiting.append(self._pool.submit(self._fetch, self._current, step))
            self._current = []
        ready = [self._waiting.pop(0) for _ in range(len(self._waiting) - keep)]
        return [interval.result() for interval in ready]

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    @staticmethod
    def _fetch(figures: list[Any], last: int) -> Interval:
        figures = jax.device_get(figures)
        return Interval(figures, last, time.perf_counter())
