"""Compiling for TPUs that are not there, and the static schedule of the kernels in what comes out.

Needs the extra `aot` (libtpu 0.0.52, which is meant throughout) and no TPU. The compiler writes the program of each
Pallas call as bundles: what the units of a core do in one cycle if nothing stalls. Schedules rank kernels on one chip;
they are not times, for neither copies nor stalls are in them.
"""

import glob
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import Progress

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}

QUIET = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def prepare(dump: Path | None = None) -> None:
    """Sets the environment that libtpu reads when it is loaded; with a dump, jax must not be imported yet."""
    if "jax" in sys.modules and dump is not None:
        raise RuntimeError("jax is imported already: its compiler would not write schedules")
    os.environ.update(QUIET)
    if dump is not None:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"


def in_processes(function: Callable[..., Any], cases: Sequence[tuple], share: int) -> dict[tuple, Any]:
    """function(*case) of every case, two at a time behind a progress bar; a process has `share` of them, then ends.

    Each process starts without jax, so that `prepare` can be called in it.
    """
    done = {}
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=share) as pool, Progress(transient=True) as bar:
        jobs = {case: pool.apply_async(function, case) for case in cases}
        for case, job in bar.track(jobs.items(), total=len(jobs), description="compiling"):
            done[case] = job.get()
    return done


def compile_for(chip: str, function: Callable[..., Any], *shapes: Any) -> Any:
    """The compiled program of one chip for arguments of these shapes."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    mesh = Mesh(np.array(devices[:1]), ("one",), axis_types=(jax.sharding.AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*placed).compile()


class Piece(NamedTuple):
    """A run of bundles between branches, and what its units do in all.

    matmul: share of the matrix units' issue slots taken; spills: registers stored to memory for want of room.
    """

    bundles: int
    matmuls: int
    matmul: float
    spills: int


class Schedule(NamedTuple):
    """name: of the Pallas call."""

    name: str
    pieces: list[Piece]

    @property
    def inner(self) -> Piece:
        """The piece with the most matrix products: an interior block's."""
        return max(self.pieces, key=lambda piece: piece.matmuls)


def schedules(dump: Path) -> list[Schedule]:
    """Of every Pallas call that was compiled with this dump."""
    found = []
    for bundles in sorted(dump.glob("*-final_bundles.txt")):
        if "schedule-analysis" in bundles.name:
            continue
        stem = re.sub(r"-\d+-final_bundles\.txt$", "", bundles.name)
        rows = next(dump.glob(f"{glob.escape(stem)}-*final_hlo-static-per-bundle-utilization.txt"), None)
        if rows is not None:
            found.append(Schedule(stem.split("-", 1)[1], _pieces(bundles.read_text(), rows.read_text())))
    return found


_BUNDLE = re.compile(r"^ *(?:0x)?[0-9a-f]+ +(?P<label>LB|PF|PB|LH|LE|CT)?: +[> ]*\{")


def _pieces(bundles: str, utilization: str) -> list[Piece]:
    """The program cut at branches, and where branches arrive."""
    head, body = utilization.split("== UTILIZATION:\n")
    names = [name.strip() for name in head.splitlines()[-2].split(",")]
    capacity = dict(zip(names, map(int, head.splitlines()[-1].split()), strict=True))
    rows = [dict(zip(names, map(int, line.split()), strict=True)) for line in body.splitlines() if line.strip()]
    starts, branch, count = [0], False, 0
    for line in bundles.splitlines():
        found = _BUNDLE.match(line)
        if found:
            if count and (branch or found["label"]):
                starts.append(count)
            branch, count = False, count + 1
        branch |= "sbr.rel" in line
    if count != len(rows):
        raise ValueError(f"{count} bundles and {len(rows)} rows of utilization: this libtpu writes them otherwise")
    pieces = []
    for start, end in zip(starts, [*starts[1:], count], strict=True):
        part = rows[start:end]
        matmuls = sum(row["MATMUL"] for row in part)
        share = matmuls / (capacity["MATMUL"] * len(part))
        pieces.append(Piece(len(part), matmuls, share, sum(row["VSTORE:SPILL"] for row in part)))
    return pieces
