"""What can be known of attention on hardware that is not there: `python -m benchmarks.attention --compile-for v5e`.

Of every case: whether it compiles, what it holds, and what share of one device's memory that is. Of Pallas kernels on
a TPU the static schedule, and of `tpu_flash` the modelled bound of the whole call (`tpu_bound`). Nothing is run.
"""

import contextlib
import importlib.util
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax

from benchmarks import cuda, tpu, tpu_bound
from benchmarks.attention import implementation, label, stage
from benchmarks.attention_cases import Case, Refused, reason, shapes
from benchmarks.attention_torch import TorchAttention
from benchmarks.measure import memory, origin
from benchmarks.schedule import UNIT
from benchmarks.tpu import Program
from benchmarks.tpu_walks import flash_parts

NAMES = {name: chip for chip, topology in tpu.TOPOLOGIES.items() for name in (chip, topology)}
NAMES |= {"tpu7x": "v7x"} | {name: name for name in cuda.TARGETS}

NEEDED = {"tpu": ("libtpu", "aot"), "gpu": ("jax_cuda12_plugin", "aot-cuda")}
"""By platform: what compiles for it, and the extra that brings it."""


def target(name: str) -> str:
    """The chip of `v5e`, `v5e:2x2`, `tpu7x`, `h100`. ValueError: it is unknown, or its compiler is not installed."""
    if name not in NAMES:
        raise ValueError(f"{name!r} is unknown: choose {', '.join((*tpu.TOPOLOGIES, *cuda.TARGETS))}")
    chip = NAMES[name]
    package, extra = NEEDED[platform(chip)]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{name} needs {package}: pip install -e '.[{extra}]'")
    return chip


def platform(chip: str) -> str:
    return "tpu" if chip in tpu.TOPOLOGIES else "gpu"


def device_memory(chip: str) -> int:
    """Bytes of one device: a GPU, a TPU chip (of v4 and v5p two cores), a core of v7x."""
    if chip in cuda.TARGETS:
        (size,) = re.findall(r"device_memory_size: (\d+)", cuda.TARGETS[chip].read_text())
        return int(size)
    return tpu_bound.Core.of(chip).memory * (2 if chip in ("v4", "v5p") else 1)


def rows(cases: Sequence[tuple[Case, str, str]], implementations: Sequence[str], chip: str) -> Iterator[dict[str, Any]]:
    """One for each of the cases, which come with dtype and mode, and each implementation."""
    where = {"target": chip} | origin()
    todo = [(*case, name, chip) for case in cases for name in implementations]
    for (case, dtype, mode, name, _), found in tpu.in_processes(compile_case, todo, share=1).items():
        yield where | label(case, mode, dtype, name) | found


def compile_case(case: Case, dtype: str, mode: str, name: str, chip: str) -> dict[str, Any]:
    """The figures of a row, or why there are none in `refused`; in a process that has compiled for no TPU yet."""
    with tempfile.TemporaryDirectory() as folder:
        if platform(chip) == "tpu":
            tpu.prepare(Path(folder))
        try:
            return _figures(case, dtype, mode, name, chip, Path(folder))
        except Exception as problem:  # Whatever an implementation or a compiler raises is the answer.
            return {"refused": reason(problem)}


def _figures(case: Case, dtype: str, mode: str, name: str, chip: str, folder: Path) -> dict[str, Any]:
    with _meant(chip):
        attend = implementation(name)(case)
        if isinstance(attend, TorchAttention):
            raise Refused("it runs here alone")
        function, arguments = stage(attend, mode, shapes(case, dtype), jax.eval_shape)
    start = time.perf_counter()
    compiled = (tpu if platform(chip) == "tpu" else cuda).compile_for(chip, function, *arguments)
    seconds = time.perf_counter() - start
    temporaries, whole = memory(compiled)
    row: dict[str, Any] = {"compile_seconds": seconds, "temporaries": temporaries, "memory": whole}
    row["of_memory"] = None if whole is None else whole / device_memory(chip)
    programs = tpu.programs(folder, "flash_") if name in ("auto", "tpu_flash") else []
    if programs:
        row |= _of_flash(case, dtype, mode, chip, programs, compiled.as_text())
    return row


def _of_flash(case: Case, dtype: str, mode: str, chip: str, programs: list[Program], text: str) -> dict[str, float]:
    """No bound where the program has regions that the walk does not know.

    bundles, spills: of both passes, per 512 x 512 scores of an interior block. matrix_unit: share of its slots.
    """
    parts = flash_parts(case, dtype, chip, mode)
    passes = {part.name: part for part in parts}.values()
    inner = [(part.program(programs).inner, UNIT / part.area) for part in passes]
    row = {
        "bundles": sum(region.own * share for region, share in inner),
        "spills": sum(region.spills * share for region, share in inner),
        "matrix_unit": sum(region.matmuls for region, _ in inner) / sum(region.slots for region, _ in inner),
    }
    with contextlib.suppress(ValueError):
        row["bound"] = tpu_bound.bound(parts, programs, text, chip).total
    return row


def _meant(chip: str) -> AbstractContextManager:
    return jax.set_mesh(cuda.mesh_of(chip)) if chip in cuda.TARGETS else tpu.meant(chip)
