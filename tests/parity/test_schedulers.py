"""Samplers against Hugging Face's schedulers, step by step, from the golden files that make_schedulers.py wrote."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close

from zoo.diffusion import published_schedulers, schedules
from zoo.diffusion.samplers import DDIM, Euler
from zoo.diffusion.sampling import walk
from zoo.diffusion.schedules import Discrete
from zoo.diffusion.variance import share, variances

FOLDER = Path(__file__).parent / "schedulers"
CASES = json.loads((FOLDER / "cases.json").read_text())
GOLDEN = dict(np.load(FOLDER / "golden.npz"))


def network(x: jax.Array, times: jax.Array) -> jax.Array:
    """What it says of the variance stands behind, in every case: samplers without a learned one leave it alone."""
    return jnp.concatenate([0.7 * jnp.sin(x) + 0.2 * jnp.cos(times / 150)[:, None, None, None], jnp.sin(3 * x)], -1)


@pytest.mark.parametrize("case", CASES)
def test_every_step_of_a_trajectory_agrees(case) -> None:
    """To 2e-5 at each step, although nothing is set right on the way. The layout of pixels does not matter here."""
    noising, sampler = published_schedulers.from_published(CASES[case]["config"])
    sampler = replace(sampler, eta=CASES[case]["eta"]) if isinstance(sampler, DDIM) else sampler
    schedule = schedules.make(noising)
    table = sampler.table(schedule, CASES[case]["steps"])
    assert_close(table.path.times, GOLDEN[f"{case}_times"], case)
    fresh, found = jnp.asarray(GOLDEN["fresh"]), {}
    walk(
        network,
        table,
        table.path.first[1] * GOLDEN["noise"],
        lambda step: fresh[step],
        callback=lambda step, x: found.update({int(step): np.asarray(x)}),
    )
    jax.effects_barrier()
    for step, expected in enumerate(GOLDEN[f"{case}_x"]):
        x = found[step]
        if isinstance(sampler, Euler) and isinstance(schedule, Discrete):
            # Hugging Face's Euler keeps x over signal.
            x = x / table.path.end.signal[step]
        assert_close(x, expected, f"{case}, step {step}")


def test_the_range_of_a_learned_variance() -> None:
    """Of the published scheduler's own tables, which are in float32."""
    noising, sampler = published_schedulers.from_published(CASES["ddpm_learned"]["config"])
    log_small, span = variances(sampler.path(schedules.make(noising), CASES["ddpm_learned"]["steps"]))
    found = log_small[:-1, None] + share(GOLDEN["said"]) * span[:-1, None]
    np.testing.assert_allclose(found, GOLDEN["log_variances"], atol=2e-4)


@pytest.mark.parametrize("case", CASES)
def test_configs_come_back_as_they_were(case) -> None:
    config = CASES[case]["config"]
    assert published_schedulers.to_published(*published_schedulers.from_published(config)) == config
