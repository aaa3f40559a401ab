"""The training step of image recipes, compiled for a slice of TPUs that is not there: that it does, and what it holds.

    python -m benchmarks.pod                         every recipe below, half an hour
    python -m benchmarks.pod ddpm-cifar10 --mesh data=2,fsdp=4

Needs the extra `aot` (libtpu). A row is a recipe at its own batch and precision; no data is read: batches are of the
size that the recipe's model says.
"""

import argparse
from typing import Any

import numpy as np
from jax.experimental import topologies

from benchmarks import tpu
from zoo import sharding
from zoo.train import step
from zoo.train.recipes import RECIPES

TOPOLOGY = "v5e:2x4"
DIGIT = (8, 8)
"""Of a model that does not say for what size of images it is."""

SMALL = ("ddpm-digits", "autoencoder-digits", "text-to-digits", "latent-digits")
LARGE = ("ddpm-fashion", "ddpm-cifar10", "text-to-emoji", "dit-xl-2")


def batch(experiment: Any) -> dict[str, np.ndarray]:
    """One row of a recipe's batches."""
    model, length = experiment.model, getattr(experiment.data, "length", None)
    side = getattr(model, "image_size", None) or getattr(model, "sample_size", DIGIT)
    size = side if isinstance(side, tuple) else (side, side)
    told = {"labels": np.zeros(1, np.int32)} if length is None else {"tokens": np.zeros((1, length), np.int32)}
    images = np.zeros((1, *size, model.image_channels), np.float32)
    return {"images": images, "weights": np.ones(1, np.float32), **told}


def devices() -> Any:
    """Those of TOPOLOGY; raises what JAX does where there is no libtpu."""
    tpu.prepare()
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices


def held(experiment: Any, example: Any, mesh: str) -> float:
    """GiB a chip of an experiment's training step over batches of rows such as `example`."""
    laid = sharding.make_mesh(mesh, devices())
    experiment = step.with_compute(experiment, laid)
    with sharding.use(laid):
        state = step.abstract_state(experiment, laid)
        abstract = step.abstract_batch(example, experiment.batch_size, laid)
        memory = step.train_step(experiment, laid).lower(state, abstract).compile().memory_analysis()
    return (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30


def compiled(name: str, mesh: str) -> float:
    """GiB a chip of the training step of a recipe."""
    experiment = RECIPES[name]()
    return held(experiment, batch(experiment), mesh)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", choices=[*SMALL, *LARGE, []], metavar="RECIPE")
    parser.add_argument("--mesh", default="fsdp=8")
    options = parser.parse_args()
    for name in options.recipes or (*SMALL, *LARGE):
        print(f"{name:<24}{compiled(name, options.mesh):>8.2f} GiB a chip of {TOPOLOGY}, {options.mesh}", flush=True)


if __name__ == "__main__":
    main()
