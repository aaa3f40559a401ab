"""Timing programs against each other, and what machine and versions a figure belongs to."""

import importlib.metadata
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Times(NamedTuple):
    """Medians, in seconds: of the wall clock, and of the processor over all cores."""

    wall: float
    cpu: float


def interleaved(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Times]:
    """Times of each run, in turns, so that whatever else the machine does falls on all.

    The first turn warms. A run just after one that frees 2 GiB took up to 0.1 s longer: each is made once unseen
    before it is timed, and every turn has an order of its own.
    """
    generator = random.Random(0)
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in generator.sample(list(runs.items()), len(runs)):
            jax.block_until_ready(run())
            start, used = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            if turn:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - used)
    return {name: Times(statistics.median(wall[name]), statistics.median(cpu[name])) for name in runs}


def memory(program: Any) -> tuple[int | None, int | None]:
    """Bytes of a compiled program: of its temporaries, and with arguments and results; None where it does not say."""
    found = program.memory_analysis()
    if found is None:
        return None, None
    temporaries = found.temp_size_in_bytes
    return temporaries, found.argument_size_in_bytes + found.output_size_in_bytes + temporaries


def product_peak(dtype: str, size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of a plain product of two [size, size] matrices, summed in float32."""
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    return 2.0 * size**3 / interleaved({"product": lambda: product(x, x)}, repeats)["product"].wall


def setting() -> dict[str, Any]:
    """Device, machine, versions and commit."""
    device = jax.devices()[0]
    devices = {"platform": device.platform, "device": device.device_kind, "devices": jax.device_count()}
    return devices | origin()


def origin() -> dict[str, Any]:
    """Machine, versions, commit and date."""
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flaxzoo": importlib.metadata.version("flaxzoo"),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def commit() -> str | None:
    """The commit of this checkout, "+" behind it where files differ from it; None outside of git."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or None
