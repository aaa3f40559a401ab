"""What can be known of attention on hardware that is not there: `python -m benchmarks.attention --compile-for v5e`.

Of every case: whether it compiles, what it holds, and what share of one device's memory that is. Of Pallas kernels on
a TPU the static schedule, and of `tpu_flash` the modelled bound of the whole call (`tpu_bound`). Nothing is run.
"""

import contextlib
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax

from benchmarks import cuda, tpu, tpu_bound
from benchmarks.attention import CANNOT, implementation, key, stage
from benchmarks.attention_cases import Case, shapes
from benchmarks.measure import origin
from benchmarks.tpu import Program
from benchmarks.tpu_walks import flash_parts

UNIT = 512 * 512


def target(name: str) -> str:
    """The chip of `v5e`, `v5e:2x2`, `tpu7x`, `h100`. ValueError: it is unknown."""
    chip = {"tpu7x": "v7x"}.get(name.partition(":")[0], name.partition(":")[0])
    if chip not in (*tpu.TOPOLOGIES, *cuda.TARGETS):
        raise ValueError(f"{name!r} is unknown: choose {', '.join((*tpu.TOPOLOGIES, *cuda.TARGETS))}")
    return chip


def device_memory(chip: str) -> int:
    """Bytes of one device: a GPU, a TPU chip, a core of v7x."""
    if chip in cuda.TARGETS:
        (size,) = re.findall(r"device_memory_size: (\d+)", cuda.TARGETS[chip].read_text())
        return int(size)
    return tpu_bound.Core.of(chip).memory * (2 if chip in ("v4", "v5p") else 1)


def rows(cases: Sequence[tuple[Case, str, str]], implementations: Sequence[str], chip: str) -> Iterator[dict[str, Any]]:
    """One for each of the cases, which come with dtype and mode, and each implementation."""
    where = {"target": chip} | origin()
    todo = [(*case, name, chip) for case in cases for name in implementations]
    for (case, dtype, mode, name, _), found in tpu.in_processes(compile_case, todo, share=1).items():
        yield where | key(case, mode, dtype, name) | found


def compile_case(case: Case, dtype: str, mode: str, name: str, chip: str) -> dict[str, Any]:
    """The figures of a row, or why there are none in `refused`; in a process that has compiled for no TPU yet."""
    arrays = shapes(case, dtype)
    with tempfile.TemporaryDirectory() as folder:
        if chip in tpu.TOPOLOGIES:
            tpu.prepare(Path(folder))
        try:
            with _meant(chip):
                function, arguments = stage(implementation(name)(case), mode, arrays, jax.eval_shape)
            start = time.perf_counter()
            compiled = (tpu if chip in tpu.TOPOLOGIES else cuda).compile_for(chip, function, *arguments)
        except CANNOT as problem:
            return {"refused": str(problem).strip().splitlines()[0]}
        seconds = time.perf_counter() - start
        programs = tpu.programs(Path(folder))
    found = compiled.memory_analysis()
    memory = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    row = {"compile_seconds": seconds, "temporaries": found.temp_size_in_bytes, "memory": memory}
    row["of_memory"] = memory / device_memory(chip)
    if any("flash_" in one.name for one in programs):
        row |= _of_flash(case, dtype, mode, chip, programs, compiled.as_text())
    return row


def _of_flash(case: Case, dtype: str, mode: str, chip: str, programs: list[Program], text: str) -> dict[str, float]:
    """Nothing, or no bound, where the walk does not know what was compiled.

    bundles, spills: of the kernels, per 512 x 512 scores of an interior block. matrix_unit: share of its slots.
    """
    try:
        parts = flash_parts(case, dtype, chip, mode)
    except ValueError:
        return {}
    inner = [(part.program(programs).inner, UNIT / part.area) for part in parts]
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
