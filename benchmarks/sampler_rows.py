"""Rows of samplers: every published class of scheduler, over the golden trajectories that it has."""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.family_cells import GOLDEN, difference
from benchmarks.family_table import Table
from zoo.diffusion import published_schedulers, schedules
from zoo.diffusion.samplers import DDIM, Euler
from zoo.diffusion.sampling import walk
from zoo.diffusion.schedules import Discrete

COLUMNS = {"published class": False, "`zoo.diffusion.samplers`": False, "cases": True, "steps": True, "parity": True}
FOLDER = GOLDEN / "schedulers"


def cases() -> dict[str, Any]:
    return json.loads((FOLDER / "cases.json").read_text())


def network(x: jax.Array, times: jax.Array) -> jax.Array:
    """What stands for a network in the golden files; what it says of the variance stands behind."""
    return jnp.concatenate([0.7 * jnp.sin(x) + 0.2 * jnp.cos(times / 150)[:, None, None, None], jnp.sin(3 * x)], -1)


def worst(case: dict[str, Any], expected: np.ndarray, noise: np.ndarray, fresh: np.ndarray) -> float:
    """The largest difference of any step of a trajectory, on whose way nothing is set right."""
    noising, sampler = published_schedulers.from_published(case["config"])
    sampler = replace(sampler, eta=case["eta"]) if isinstance(sampler, DDIM) else sampler
    schedule = schedules.make(noising)
    table, found, drawn = sampler.table(schedule, case["steps"]), {}, jnp.asarray(fresh)
    start = table.path.first[1] * noise
    walk(
        network,
        table,
        start,
        lambda step: drawn[step],
        callback=lambda step, x: found.update({int(step): np.asarray(x)}),
    )
    jax.effects_barrier()
    # Hugging Face's Euler keeps x over signal.
    over = table.path.end.signal if isinstance(sampler, Euler) and isinstance(schedule, Discrete) else None
    steps = ((found[step] if over is None else found[step] / over[step], x) for step, x in enumerate(expected))
    return max(difference(x, y) for x, y in steps)


def table() -> Table:
    classes = sorted({case["config"]["_class_name"] for case in cases().values()})

    def cells(name: str) -> tuple[str, ...]:
        golden = dict(np.load(FOLDER / "golden.npz"))
        mine = {key: case for key, case in cases().items() if case["config"]["_class_name"] == name.strip("`")}
        errors = [worst(case, golden[f"{key}_x"], golden["noise"], golden["fresh"]) for key, case in mine.items()]
        schedulers = [published_schedulers.from_published(case["config"]) for case in mine.values()]
        samplers = {type(scheduler.sampler).__name__ for scheduler in schedulers}
        steps = sorted({case["steps"] for case in mine.values()})
        return ", ".join(sorted(samplers)), str(len(mine)), ", ".join(map(str, steps)), f"{max(errors):.0e}"

    return Table(COLUMNS, {f"`{name}`": name for name in classes}, cells)
