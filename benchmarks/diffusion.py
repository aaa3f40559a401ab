"""The U-Net of DDPM for CIFAR-10 beside diffusers' in torch, on a CPU: a training step, and sampling.

    python -m benchmarks.diffusion --torch-python PATH             PATH: an interpreter with torch and diffusers

Both sides are built from one config.json, without dropout, each from its own initialisation, in float32. zoo trains
with the objective and step of its recipes, and samples with the sampler that `zoo sample` uses; a third side calls its
network alone, as often as the sampler does, for what the sampler's loop costs beyond it. Sides are processes that take
turns. Reported: medians of images a second (of one step of sampling: images times steps), and the peak resident size,
which for zoo includes compilation. What is known of it: benchmarks/notes/diffusion.md.
"""

import argparse
import dataclasses
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import sides
from zoo import models, sharding
from zoo.diffusion import samplers, schedules
from zoo.diffusion.sampling import sample
from zoo.train import step
from zoo.train.experiment import Optimizer
from zoo.train.recipes import RECIPES

TORCH = Path(__file__).with_name("torch_diffusion.py")
RESULTS = Path(__file__).with_name("results") / "diffusion.jsonl"
SHAPE = (32, 32, 3)


def train(config: Any, images: np.ndarray) -> Callable[[], float]:
    """One training step of the recipe, with this model."""
    mesh = sharding.make_mesh()
    experiment = dataclasses.replace(
        RECIPES["ddpm-cifar10"](),
        model=config,
        batch_size=len(images),
        ema=None,
        compute="float32",
        optimizer=Optimizer(learning_rate=2e-4, warmup_steps=0, schedule="constant", weight_decay=0.0),
    )
    experiment = step.with_compute(experiment, mesh)
    batch = {"images": images, "labels": np.zeros(len(images), np.int32), "weights": np.ones(len(images), np.float32)}
    with sharding.use(mesh):
        state = step.init_state(experiment, mesh)
        abstract = step.abstract_batch(batch, len(images), mesh)
        compiled = step.compiled(step.train_step(experiment, mesh).lower(state, abstract))

    def turn() -> float:
        nonlocal state
        state, metrics = compiled(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
        return float(metrics.loss.total / metrics.loss.weight)

    return turn


def draw(config: Any, images: np.ndarray, steps: int) -> Callable[[], float]:
    """So many steps of DDIM, from noise."""
    model = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    table = samplers.DDIM().table(schedules.make(config.noising), steps)
    compiled = jax.jit(lambda model, key: sample(model, table, images.shape, key).std())
    return lambda: float(compiled(model, jax.random.key(0)))


def evaluate(config: Any, images: np.ndarray, steps: int) -> Callable[[], float]:
    """So many calls of the network, each of the one before, as cheap a loop as there is."""
    model = jax.jit(lambda: config.build(nnx.Rngs(0)))()

    @jax.jit
    def compiled(model: Any, x: jax.Array) -> jax.Array:
        times = jnp.arange(steps)
        return jax.lax.scan(lambda x, t: (model(x, jnp.full(len(x), t)), None), x, times)[0].std()

    return lambda: float(compiled(model, images))


def serve(folder: Path, what: str, steps: int) -> None:
    config = models.published_config(json.loads((folder / "config.json").read_text()))
    images = np.load(folder / "batch.npz")["images"]
    sides.serve(
        train(config, images)
        if what == "train"
        else draw(config, images, steps)
        if what == "sample"
        else evaluate(config, images, steps)
    )


def compare(options: argparse.Namespace, what: str) -> dict[str, dict[str, Any]]:
    """Each side's figures; `what` is "train" or "sample"."""
    config = dataclasses.replace(models.preset("ddpm-cifar10"), dropout=0.0)
    images = np.random.default_rng(0).uniform(-1, 1, (options.batch, *SHAPE)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config.to_published()))
        np.savez(Path(folder) / "batch.npz", images=images)
        ours = [sys.executable, "-m", "benchmarks.diffusion", "--folder", folder, "--steps", str(options.steps)]
        commands = {"zoo": [*ours, "--serve", what]}
        if what == "sample":
            commands["network alone"] = [*ours, "--serve", "network"]
        if options.torch_python:
            torch = [options.torch_python, str(TORCH), folder, "--threads", str(options.threads)]
            commands["torch"] = [*torch, "--sample", str(options.steps)] if what == "sample" else torch
        all_sides = [sides.Side(name, command, {}) for name, command in commands.items()]
        sides.alternate(all_sides, 1, options.rounds)
    units = options.batch * (options.steps if what == "sample" else 1)
    return {side.name: side.summary(units, warmup=1) for side in all_sides}


def show(title: str, results: dict[str, dict[str, Any]]) -> None:
    print(f"\n{title}")
    for name, result in results.items():
        print(
            f"  {name:14s} {result['per_second']:7.2f} images/s (fastest {result['fastest_per_second']:.2f}), "
            f"peak {result['peak_mib']:6.0f} MiB"
        )
    zoo = results["zoo"]
    if "torch" in results:
        torch = results["torch"]
        speed, memory = zoo["per_second"] / torch["per_second"], zoo["peak_mib"] / torch["peak_mib"]
        print(f"  zoo / torch: {speed:.2f} in images/s, {memory:.2f} in peak memory")
    if "network alone" in results:
        beyond = results["network alone"]["per_second"] / zoo["per_second"] - 1
        print(f"  the sampler beyond its network: {beyond:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="interpreter with torch and diffusers; without, zoo runs alone")
    parser.add_argument("--what", nargs="+", choices=("train", "sample"), default=["train", "sample"])
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--steps", type=int, default=4, help="of sampling, in each turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns after the first, which warms up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch; zoo takes all cores")
    parser.add_argument("--save", action="store_true", help=f"add the result to {RESULTS.name}")
    parser.add_argument("--serve", choices=("train", "sample", "network"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.folder, options.serve, options.steps)
        return
    for what in options.what:
        results = compare(options, what)
        show("training step" if what == "train" else f"sampling, DDIM, {options.steps} steps", results)
        if options.save:
            setting = {"what": what, "batch": options.batch, "steps": options.steps, "cores": os.cpu_count()}
            setting |= {"jax": version("jax"), "date": datetime.date.today().isoformat()}
            with RESULTS.open("a") as file:
                file.write(json.dumps(setting | results) + "\n")


if __name__ == "__main__":
    main()
