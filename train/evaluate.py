"""Held-out figures of a model, in training and of a finished run."""

import dataclasses
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zoo import sharding
from zoo.train import run_folder
from zoo.train import session as sessions
from zoo.train.data.loader import batches
from zoo.train.experiment import Dataset, Loss, Placement, UserError
from zoo.train.objectives import Denoising
from zoo.train.processes import on_first
from zoo.train.session import Session
from zoo.train.step import eval_step

_AHEAD = 4  # batches


def evaluator(session: Session, dataset: Dataset) -> Callable[[Any], dict[str, float]]:
    """A function from a model to the objective's summary over one pass of `dataset`; it compiles at its first call."""
    experiment, mesh = session.experiment, session.mesh
    rows = experiment.batch_size // experiment.accumulate
    compiled = eval_step(experiment, mesh)

    def evaluate(model: Any) -> dict[str, float]:
        with sharding.use(mesh), closing(batches(dataset, mesh, rows, 0, dataset.batches)) as source:
            losses: list[Loss] = []
            for batch in source:
                losses.append(compiled(model, batch))
                # Batches that wait their turn take memory: no more than a few of them.
                jax.block_until_ready(losses[-_AHEAD:][0])
        sums = jax.device_get(losses)
        total, weight, metrics = jax.tree.map(lambda *each: float(np.sum(each, dtype=np.float64)), *sums)
        return experiment.objective.summary(total, weight, metrics)

    return evaluate


def evaluate_run(
    folder: Path, placement: Placement, *, bits_per_dimension: bool = False
) -> tuple[dict[str, float], int]:
    """The held-out figures of a run's newest checkpoint, and its step.

    bits_per_dimension: one figure more, of the objective Denoising; raises UserError for a run of another.
    """
    session = sessions.reopen(folder, placement)
    experiment = session.experiment
    if bits_per_dimension:
        objective = experiment.objective
        if not isinstance(objective, Denoising):
            raise UserError(
                f"--bits-per-dimension is of runs of Denoising, not {type(objective).__name__}: leave it out"
            )
        experiment = dataclasses.replace(experiment, objective=dataclasses.replace(objective, bits_per_dimension=True))
    sessions.prepare(experiment.data)
    on_first(lambda: run_folder.check_data(folder, session.dataset("train").info))
    # Micro-batches, lengthened where this mesh has more parts than they have rows.
    rows, ways = experiment.batch_size // experiment.accumulate, sharding.batch_ways(session.mesh)
    fitted = dataclasses.replace(experiment, batch_size=-(-rows // ways) * ways, accumulate=1)
    session = Session(fitted, session.mesh)
    model, step = sessions.trained_model(folder, session)
    return evaluator(session, session.dataset("validation"))(model), step
