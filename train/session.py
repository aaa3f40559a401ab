"""An experiment on devices: mesh made, model fitted to mesh and data. What training and using a run share."""

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from zoo import sharding
from zoo.layers.linear import Precision
from zoo.train import checkpoints, run_folder
from zoo.train.experiment import DataConfig, DataInfo, Dataset, Placement, UserError
from zoo.train.processes import on_first
from zoo.train.recipes import RECIPES
from zoo.train.step import AnyExperiment, abstract_state, check_batch, check_numbers, with_compute


@dataclass(frozen=True)
class Session:
    """experiment: complete, with the vocabulary of the data and the compute dtype of the mesh in its model's config."""

    experiment: AnyExperiment
    mesh: Mesh

    def dataset(self, split: str) -> Dataset:
        """The "train" split in the run's batches, or "validation" in micro-batches, which are what fits in memory."""
        rows = self.experiment.batch_size
        rows = rows if split == "train" else rows // self.experiment.accumulate
        return self.experiment.data.open(split, batch_size=rows, seed=self.experiment.seed)

    def facts(self, data: DataInfo) -> dict[str, str]:
        """What a person is told of it, by name; `data` is of the training split."""
        device, config = self.mesh.devices.flat[0], self.experiment.model
        axes = ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items() if size > 1)
        hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
        devices = f"devices: {self.mesh.size}{hosts}" + (f", mesh {axes}" if axes else "")
        model = type(config).__name__.removesuffix("Config")
        count = sharding.parameter_count(sharding.abstract(lambda: config.build(nnx.Rngs(0))))
        return {
            "platform": f"{device.platform} ({device.device_kind}), {devices}",
            "model": f"{model}, {count:,} parameters, products in {config.precision.compute}",
            "data": f"{data.name}: {data.bytes:,} bytes, {data.detail}",
            "SHA-256": data.sha256,
        }


def start(experiment: AnyExperiment, placement: Placement) -> Session:
    """For training; prepares the data. Raises UserError, or a ValueError of ours, where parts do not fit together."""
    check_numbers(experiment)
    asked = experiment.model.precision.compute
    if asked != Precision().compute:
        raise UserError(f"--model.precision.compute {asked} is for code of your own: give a run --compute {asked}")
    mesh = sharding.make_mesh(placement.mesh)
    sharding.check_used(mesh)
    check_batch(experiment, mesh)
    prepare(experiment.data)
    fitted = dataclasses.replace(experiment, model=experiment.data.fit(experiment.model))
    fitted.sampler.check(fitted.model, fitted.data)
    return Session(with_compute(fitted, mesh), mesh)


def prepare(data: DataConfig) -> None:
    """What is not there yet: by the first process while the others wait, or by all where the data shares the work."""
    if jax.process_count() > 1 and (together := getattr(data, "prepare_together", None)):
        together()
    else:
        on_first(data.prepare)


def reopen(folder: Path, placement: Placement) -> Session:
    """For using the model of a run, on any mesh; its texts need not be there, its images do (for their size)."""
    experiment = recorded(folder)
    mesh = sharding.make_mesh(placement.mesh)
    data = experiment.data
    if (folder / run_folder.TOKENIZER).is_file():
        data = dataclasses.replace(data, tokenizer=str(folder / run_folder.TOKENIZER), train_bpe=None)
    model = run_folder.load_model(folder, experiment.model)
    return Session(with_compute(dataclasses.replace(experiment, model=model, data=data), mesh), mesh)


def tokenizer_file(data: Any) -> Path | None:
    """The file that text data is tokenized with, where there is one."""
    find = getattr(data, "tokenizer_file", None)
    return None if find is None else find()


def recorded(folder: Path) -> AnyExperiment:
    """The experiment of a run folder, as it was started."""
    name = run_folder.name(folder)
    if name not in RECIPES:
        nearest = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)
        raise UserError(f"{folder} is a run of {name!r}, which is no recipe here: did you mean {', '.join(nearest)}?")
    return run_folder.load(folder, RECIPES[name]())


def trained_model(folder: Path, session: Session) -> tuple[Any, int]:
    """The model to use (the average where there is one) from a run's newest intact checkpoint, and its step."""
    experiment = session.experiment
    abstract = abstract_state(experiment, session.mesh).best
    part = "model" if experiment.ema is None else "ema"
    found = checkpoints.load(folder / run_folder.CHECKPOINTS, abstract, part)
    return found.state, found.step
