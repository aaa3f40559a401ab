"""Compiling for TPUs that are not there, and the static schedule of the kernels in what comes out.

Needs the extra `aot` (libtpu 0.0.52, which is meant throughout) and no TPU. The compiler writes the program of each
Pallas call as bundles: what the units of a core do in one cycle if nothing stalls. Schedules rank kernels on one chip;
they are not times, for neither copies nor stalls are in them.
"""

import glob
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import Progress

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}

OPTIONS = {"v7x": {"xla_tpu_enable_offloading_copy_to_sparsecore": "false"}}
"""Of the compiler, by chip. Copies by a SparseCore come back in a form that jaxlib 0.10.2 cannot read."""

QUIET = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


_loaded = False
"""Whether this process has libtpu, which reads its environment once."""


def prepare(dump: Path | None = None) -> None:
    """Sets the environment that libtpu reads when it is loaded; with a dump, nothing may be compiled for a TPU yet."""
    if _loaded and dump is not None:
        raise RuntimeError("this process has compiled for a TPU: its compiler would not write schedules")
    os.environ.update(QUIET)
    if dump is not None:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"


def in_processes(function: Callable[..., Any], cases: Sequence[tuple], share: int) -> dict[tuple, Any]:
    """function(*case) of every case, two at a time behind a progress bar; a process has `share` of them, then ends.

    Each process starts without libtpu, so that `prepare` can be called in it.
    """
    done: dict[tuple, Any] = {}
    prepare()
    spawn = multiprocessing.get_context("spawn")
    # One task each: after more of them processes may end unreplaced (https://github.com/python/cpython/issues/115634).
    pool = ProcessPoolExecutor(2, mp_context=spawn, max_tasks_per_child=1)
    with pool, Progress(transient=True) as bar:
        parts = [cases[i : i + share] for i in range(0, len(cases), share)]
        jobs = [(part, pool.submit(_one_by_one, function, part)) for part in parts]
        for part, job in bar.track(jobs, description="compiling"):
            try:
                done |= zip(part, job.result(), strict=True)
            except BrokenProcessPool:
                raise SystemExit(f"the compiler ended its process, at {part[0]} or a case beside it") from None
    return done


def _one_by_one(function: Callable[..., Any], cases: Sequence[tuple]) -> list[Any]:
    return [function(*case) for case in cases]


@contextmanager
def meant(chip: str) -> Iterator[Any]:
    """The mesh of one such chip, as the one that is compiled for."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    global _loaded
    _loaded = True
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("one",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        yield mesh


def compile_for(chip: str, function: Callable[..., Any], *shapes: Any, row_major: bool = False) -> Any:
    """The compiled program of one chip for arguments of these shapes.

    row_major: whether arguments and results lie so, where else the compiler says how.
    """
    import jax
    from jax.experimental.layout import Format, Layout

    def where(x: Any) -> Any:
        return Format(Layout(tuple(range(x.ndim))), place) if row_major else place

    with meant(chip) as mesh:
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(x)), shapes)
        out = jax.tree.map(where, jax.eval_shape(function, *shapes)) if row_major else None
        return jax.jit(function, out_shardings=out).lower(*placed).compile(OPTIONS.get(chip))


class Region(NamedTuple):
    """A run of bundles: the whole program, the body of a loop, or what a branch skips; and the regions within it.

    matmuls: products that its bundles issue; slots: how many they could; spills: registers stored for want of room.
    """

    start: int
    end: int
    loop: bool
    matmuls: int
    slots: int
    spills: int
    parts: tuple["Region", ...] = ()

    @property
    def own(self) -> int:
        """Bundles outside of its parts."""
        return self.end - self.start - sum(part.end - part.start for part in self.parts)

    @property
    def matmul(self) -> float:
        """Share of the matrix units' issue slots that is taken."""
        return self.matmuls / self.slots

    def bundles(self, counts: Sequence[int] | None = None) -> int:
        """Of one run. counts: how often it and each region in it runs, in the order of `all`; once, if not given."""
        if counts is None:
            return self.end - self.start
        return sum(count * region.own for count, region in zip(counts, self.all(), strict=True))

    def all(self) -> Iterator["Region"]:
        """Itself, and what is in it, by where it starts."""
        yield self
        for part in self.parts:
            yield from part.all()


class Program(NamedTuple):
    """name: of the Pallas call, or of XLA's kernel; body: its bundles."""

    name: str
    body: Region

    @property
    def inner(self) -> Region:
        """The first innermost region that has about the most matrix products: an interior block's, unmasked."""
        leaves = [x for x in self.body.all() if not any(part.matmuls for part in x.parts)]
        most = max(x.matmuls for x in leaves)
        return next(x for x in leaves if x.matmuls >= 0.9 * most)


def programs(dump: Path, name: str = "") -> list[Program]:
    """Of everything that was compiled with this dump and whose name has `name` in it."""
    found = []
    for bundles in sorted(dump.glob("*-final_bundles.txt")):
        if "schedule-analysis" in bundles.name:
            continue
        stem = re.sub(r"-\d+-final_bundles\.txt$", "", bundles.name)
        rows = next(dump.glob(f"{glob.escape(stem)}-*final_hlo-static-per-bundle-utilization.txt"), None)
        if rows is not None and name in stem:
            found.append(Program(stem.split("-", 1)[1], _body(bundles.read_text(), rows.read_text())))
    return found


_BUNDLE = re.compile(r"^ *(?:0x)?[0-9a-f]+ +(?:LB|PF|PB|LH|LE|CT)?: +[> ]*\{", re.MULTILINE)
_BRANCH = re.compile(r"sbr\.rel \([^)]*\) target = \$region(\d+)")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")


def _body(bundles: str, utilization: str) -> Region:
    """The program as regions: a branch forwards skips one, a branch backwards ends a loop."""
    head, body = utilization.split("== UTILIZATION:\n")
    names = [name.strip() for name in head.splitlines()[-2].split(",")]
    capacity = dict(zip(names, map(int, head.splitlines()[-1].split()), strict=True))
    rows = [dict(zip(names, map(int, line.split()), strict=True)) for line in body.splitlines() if line.strip()]
    starts = [found.start() for found in _BUNDLE.finditer(bundles)]
    if len(starts) != len(rows):
        raise ValueError(
            f"{len(starts)} bundles and {len(rows)} rows of utilization: this libtpu writes them otherwise"
        )
    texts = [bundles[start:end] for start, end in zip(starts, [*starts[1:], len(bundles)], strict=True)]
    places: dict[str, int] = {}
    for i, text in enumerate(texts):
        for region in _REGION.findall(text):
            places.setdefault(region, i)
    # Some branches, as past the grid where it is empty, lead to a place without a name.
    branches = [(i, places[x]) for i, text in enumerate(texts) for x in _BRANCH.findall(text) if x in places]
    spans = [(i + 1, to, False) if to > i else (to, i + 1, True) for i, to in branches]
    slots = [row["MATMUL"] for row in rows], capacity["MATMUL"], [row["VSTORE:SPILL"] for row in rows]
    return _nested(0, len(texts), False, sorted(spans, key=lambda span: (span[0], -span[1])), *slots)


def _nested(
    start: int,
    end: int,
    loop: bool,
    spans: list[tuple[int, int, bool]],
    matmuls: list[int],
    slots: int,
    spills: list[int],
) -> Region:
    """spans: what lies within, by start, the wider first."""
    parts, at = [], start
    for i, (first, last, is_loop) in enumerate(spans):
        if first >= at and last > first:
            within = [span for span in spans[i + 1 :] if span[1] <= last]
            parts.append(_nested(first, last, is_loop, within, matmuls, slots, spills))
            at = last
    span = slice(start, end)
    return Region(start, end, loop, sum(matmuls[span]), slots * (end - start), sum(spills[span]), tuple(parts))
