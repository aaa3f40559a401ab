"""`zoo doctor`: what this machine has, what JAX sees of it, and what is missing."""

import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from zoo import __version__
from zoo.commands.flags import parse_none
from zoo.train import launch

DESCRIPTION = "Checks this machine: python, versions, devices, accelerator extras, disk. Exits with 1 on a problem."
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")
WRITTEN = 8 * 2**20
LITTLE_SPACE = 2 * 2**30


class Finding(NamedTuple):
    """One line; a problem says how to mend it."""

    what: str
    answer: str
    problem: bool = False


def main(arguments: Sequence[str]) -> int:
    parse_none(arguments, prog="zoo doctor", description=DESCRIPTION)
    found = [*interpreter(), *devices(), *disk(Path.cwd())]
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    for finding in found:
        # As Text, because a string's [brackets] would be taken for markup.
        table.add_row(finding.what, Text(finding.answer), style="bold red" if finding.problem else "")
    console = Console()
    console.print(table)
    problems = sum(finding.problem for finding in found)
    console.print(f"\n{problems} problem{'s' if problems > 1 else ''} found" if problems else "\nno problems found")
    return 1 if problems else 0


def interpreter() -> Iterator[Finding]:
    yield Finding("flaxzoo", __version__)
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in PACKAGES:
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "not installed: pip install flaxzoo", problem=True)


def devices() -> Iterator[Finding]:
    yield Finding("cpu cores", str(os.cpu_count()))
    try:
        seen = jax.devices()
    except RuntimeError as error:
        yield Finding("devices", f"JAX finds none: {str(error).splitlines()[0]}", problem=True)
        return
    yield Finding("devices", f"{len(seen)} x {seen[0].device_kind} ({jax.default_backend()})")
    memory = (seen[0].memory_stats() or {}).get("bytes_limit")
    if memory:
        yield Finding("device memory", f"{memory / 2**30:.1f} GiB each")
    backend = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    hardware = launch.accelerators()
    for extra, name in hardware.items():
        if extra != backend:
            mend = f"{name} is in this machine and JAX does not use it: pip install 'flaxzoo[{extra}]'"
            forced = os.environ.get("JAX_PLATFORMS")
            yield Finding(extra, f"{mend}, JAX_PLATFORMS is {forced!r}" if forced else mend, problem=not forced)
    if not hardware and backend == "cpu":
        yield Finding("accelerators", "none in this machine; nothing is missing")


def disk(folder: Path) -> Iterator[Finding]:
    """Space and a write test in `folder`, and the compile cache."""
    free = shutil.disk_usage(folder).free
    yield Finding("disk", f"{free / 2**30:.1f} GiB free at {folder}", problem=free < LITTLE_SPACE)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            file.write(os.urandom(WRITTEN))
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - start
        yield Finding("write test", f"{WRITTEN / 2**20 / seconds:.0f} MiB/s")
    except OSError as error:
        yield Finding("write test", f"cannot write at {folder}: {error.strerror}", problem=True)
    yield Finding("compile cache", str(launch.compile_cache()))
