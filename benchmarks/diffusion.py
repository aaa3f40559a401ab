"""Diffusion families beside diffusers' and transformers' in torch, on a CPU: a training step, and sampling.

    python -m benchmarks.diffusion --torch-python PATH        PATH: an interpreter with torch, diffusers, transformers
    python -m benchmarks.diffusion --torch-python PATH --model ddpm-cifar10 --what sample

Presets are at the sizes of benchmarks.diffusion_tasks, large ones cut. Both sides are built from one config.json,
without dropout, in float32, each from its own initialisation; sampling, zoo reads its own from a published folder, once
the program is compiled. zoo trains with the objective and step of its recipes, and samples with the sampler that `zoo
sample` uses; a third side calls its network alone, as often as the sampler does, for what the sampler's loop costs
beyond it. Sides are processes that take turns. Reported: medians of images (or texts) a second (of one step of
sampling: images times steps), and the peak resident size, which for zoo includes compilation. What is known of it:
benchmarks/notes/diffusion.md.
"""

import argparse
import datetime
import itertools
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

import zoo
from benchmarks import diffusion_tasks, sides, train_step
from benchmarks.diffusion_tasks import TASKS
from zoo import sharding
from zoo.diffusion import published_schedulers, samplers, schedules
from zoo.diffusion.sampling import sample
from zoo.models.noising import Noising
from zoo.train import step

TORCH = Path(__file__).with_name("torch_diffusion.py")
RESULTS = Path(__file__).with_name("results") / "diffusion.jsonl"


def told(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the network is told beside images and times."""
    names = {"labels": "classes", "context": "context"}
    return {ours: batch[name] for name, ours in names.items() if name in batch}


def read(folder: Path, abstract: Any) -> Any:
    """A published model, as the abstract one that its program was compiled for: compiling took the memory first."""
    return jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(zoo.from_pretrained(folder)))


def draw(
    folder: Path, abstract: Any, noising: Noising, batch: dict[str, np.ndarray], steps: int
) -> Callable[[], float]:
    """So many steps of DDIM, from noise."""
    table = samplers.DDIM().table(schedules.make(noising), steps)

    def drawn(model: Any, given: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        return sample(lambda x, t: model(x, t, **given), table, batch["images"].shape, key).std()

    given, key = told(batch), jax.random.key(0)
    program = step.compiled(jax.jit(drawn).lower(abstract, given, key))
    model = read(folder, abstract)
    return lambda: float(program(model, given, key))


def evaluate(folder: Path, abstract: Any, batch: dict[str, np.ndarray], steps: int) -> Callable[[], float]:
    """So many calls of the network, each of the one before, as cheap a loop as there is."""

    def called(model: Any, given: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        def once(x: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
            return model(x, jnp.full(len(x), t), **given), None

        return jax.lax.scan(once, x, jnp.arange(steps))[0].std()

    given, x = told(batch), jnp.asarray(batch["images"])
    program = step.compiled(jax.jit(called).lower(abstract, given, x))
    model = read(folder, abstract)
    return lambda: float(program(model, given, x))


def serve(folder: Path, name: str, what: str, steps: int) -> None:
    batch = dict(np.load(folder / "batch.npz"))
    fields = json.loads((folder / "config.json").read_text())
    experiment = diffusion_tasks.step_on_a_cpu(name, fields, len(batch["weights"]))
    if what == "train":
        sides.serve(train_step.turns(experiment, batch))
    else:
        abstract = sharding.abstract(lambda: experiment.model.build(nnx.Rngs(0)))
        if what == "sample":
            turn = draw(folder, abstract, experiment.model.noising, batch, steps)
        else:
            turn = evaluate(folder, abstract, batch, steps)
        sides.serve(turn)


def compare(options: argparse.Namespace, name: str, config: Any, what: str) -> dict[str, dict[str, Any]]:
    """Each side's figures; `what` is "train" or "sample"."""
    task = TASKS[name]
    with tempfile.TemporaryDirectory() as folder:
        if what == "sample":
            # Weights of a program that makes them would cost more memory than sampling does.
            zoo.save_pretrained(jax.jit(lambda: config.build(nnx.Rngs(0)))(), folder)
        (Path(folder) / "config.json").write_text(json.dumps(config.to_published()))
        if diffusion_tasks.denoises(name):
            scheduler = published_schedulers.to_published(config.noising, samplers.DDPM())
            (Path(folder) / "scheduler.json").write_text(json.dumps(scheduler))
        np.savez(Path(folder) / "batch.npz", **diffusion_tasks.batch(config, task.rows, task.side))
        ours = [sys.executable, "-m", "benchmarks.diffusion", "--folder", folder, "--steps", str(options.steps)]
        ours += ["--model", name, "--serve"]
        commands = {"zoo": [*ours, what]}
        if what == "sample":
            commands["network alone"] = [*ours, "network"]
        if options.torch_python:
            torch = [options.torch_python, str(TORCH), folder, "--threads", str(options.threads)]
            commands["torch"] = [*torch, "--sample", str(options.steps)] if what == "sample" else torch
        all_sides = [sides.Side(side, command, {}) for side, command in commands.items()]
        sides.alternate(all_sides, 1, options.rounds)
    units = task.rows * (options.steps if what == "sample" else 1)
    return {side.name: side.summary(units, warmup=1) for side in all_sides}


def show(title: str, unit: str, results: dict[str, dict[str, Any]]) -> None:
    print(f"\n{title}")
    for name, result in results.items():
        print(
            f"  {name:14s} {result['per_second']:7.2f} {unit}/s (fastest {result['fastest_per_second']:.2f}), "
            f"peak {result['peak_mib']:6.0f} MiB"
        )
    zoo = results["zoo"]
    if "torch" in results:
        torch = results["torch"]
        speed, memory = zoo["per_second"] / torch["per_second"], zoo["peak_mib"] / torch["peak_mib"]
        print(f"  zoo / torch: {speed:.2f} in {unit}/s, {memory:.2f} in peak memory")
    if "network alone" in results:
        beyond = results["network alone"]["per_second"] / zoo["per_second"] - 1
        print(f"  the sampler beyond its network: {beyond:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="interpreter with torch and diffusers; without, zoo runs alone")
    parser.add_argument("--model", nargs="+", choices=TASKS, default=list(TASKS), metavar="PRESET", help="default: all")
    parser.add_argument("--what", nargs="+", choices=("train", "sample"), default=["train"])
    parser.add_argument("--steps", type=int, default=4, help="of sampling, in each turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns after the first, which warms up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch; zoo takes all cores")
    parser.add_argument("--save", action="store_true", help=f"add the result to {RESULTS.name}")
    parser.add_argument("--serve", choices=("train", "sample", "network"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.folder, options.model[0], options.serve, options.steps)
        return
    for name in options.model if "sample" in options.what else ():
        if not diffusion_tasks.denoises(name):
            parser.error(f"{name} denoises nothing: leave it out, or --what sample")
    for name, what in itertools.product(options.model, options.what):
        config, ran = diffusion_tasks.on_a_cpu(name)
        results = compare(options, name, config, what)
        title = f"{name}{ran and f' ({ran})'}, " + (
            "training step" if what == "train" else f"sampling, DDIM, {options.steps} steps"
        )
        show(title, "images" if TASKS[name].side else "texts", results)
        if options.save:
            setting = {"what": what, "model": name, "ran": ran, "rows": TASKS[name].rows, "steps": options.steps}
            setting |= {"cores": os.cpu_count(), "jax": version("jax"), "date": datetime.date.today().isoformat()}
            with RESULTS.open("a") as file:
                file.write(json.dumps(setting | results) + "\n")


if __name__ == "__main__":
    main()
