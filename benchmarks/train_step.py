"""Training steps of each published family, beside those of Hugging Face's models in torch, on a CPU.

    python -m benchmarks.train_step --torch-python PATH            PATH: an interpreter with torch and transformers

The zoo side is the model, objective and step that the recipes run; only batch, length and the layers of large models
are cut. Both sides are built from one config.json and train on one batch of random tokens, or images, without dropout,
each from its own initialisation. Each side is a process that stays alive, and they take turns, a few steps each, so
that whatever else the machine does falls on both. Reported: the median over steps of tokens a second (of the source,
where there is one), or images a second, and the peak resident size of the process, which for zoo includes compilation.
What bounds it: benchmarks/notes/train_step.md.
"""

import argparse
import dataclasses
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
import numpy as np

from benchmarks import sides, tasks
from zoo import models, sharding
from zoo.train import step
from zoo.train.experiment import Optimizer
from zoo.train.recipes import RECIPES

TORCH = Path(__file__).with_name("torch_train.py")
RESULTS = Path(__file__).with_name("results") / "train_step.jsonl"


def config_of(kind: str) -> Any:
    """The preset of a model_type with its head, without dropout, its layers cut; images are of 224 x 224."""
    config, _ = tasks.task(kind, models.preset(tasks.PRESETS[kind]))
    config = tasks.cut(tasks.undropped(config))
    return dataclasses.replace(config, image_size=(224, 224)) if hasattr(config, "image_size") else config


def compare(options: argparse.Namespace, config: Any, dtype: str) -> dict[str, dict[str, Any]]:
    """Each side's figures and first losses, of the model of `config`."""
    _, objective = tasks.task(config.to_published()["model_type"], config)
    batch: dict[str, Any] = tasks.batch(objective, config, options.batch, options.length)
    units = len(batch["images"]) if "images" in batch else options.batch * options.length
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if options.huge_pages else {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config.to_published()))
        np.savez(Path(folder) / "batch.npz", **batch)
        shared = [folder, "--dtype", dtype]
        commands = {"zoo": [sys.executable, "-m", "benchmarks.train_step", "--serve", *shared]}
        if options.torch_python:
            commands["torch"] = [options.torch_python, str(TORCH), *shared, "--threads", str(options.threads)]
        both = [sides.Side(name, command, environment) for name, command in commands.items()]
        sides.alternate(both, options.steps, options.rounds)
    return {side.name: side.summary(units, warmup=options.steps) | {"losses": side.results[:6]} for side in both}


def serve(folder: Path, dtype: str) -> None:
    """The zoo side; each turn is one step, whose result is its loss in nats a prediction."""
    batch = dict(np.load(folder / "batch.npz"))
    fields = json.loads((folder / "config.json").read_text())
    sides.serve(turns(experiment_of(fields, len(batch["weights"]), dtype), batch))


def turns(experiment: Any, batch: dict[str, np.ndarray]) -> Callable[[], float]:
    """The compiled training step of an experiment; each call takes one on this batch, and returns its loss."""
    mesh = sharding.make_mesh()
    experiment = step.with_compute(experiment, mesh)
    with sharding.use(mesh):
        # As in a run, the weights are not what the compiler's memory comes on top of.
        inputs = step.abstract_state(experiment, mesh), step.abstract_batch(batch, len(batch["weights"]), mesh)
        train = step.compiled(step.train_step(experiment, mesh).lower(*inputs))
        state = step.init_state(experiment, mesh)

    def turn() -> float:
        nonlocal state
        state, metrics = train(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
        sums = jax.tree.map(float, metrics.loss)
        return experiment.objective.summary(*sums)["loss"]

    return turn


def experiment_of(fields: dict[str, Any], rows: int, dtype: str) -> Any:
    """The recipe of GPT-2 with the model of a config.json and its objective."""
    model, objective = tasks.task(fields["model_type"], models.published_config(fields))
    return dataclasses.replace(
        RECIPES["gpt2"](),
        model=dataclasses.replace(model, remat="products"),
        objective=objective,
        batch_size=rows,
        accumulate=1,
        compute=dtype,
        optimizer=Optimizer(learning_rate=3e-4, warmup_steps=0, schedule="constant"),
    )


def show(title: str, unit: str, results: dict[str, dict[str, Any]]) -> None:
    print(f"\n{title}")
    for name, result in results.items():
        print(
            f"  {name:6s} {result['per_second']:7.1f} {unit}/s (fastest step"
            f" {result['fastest_per_second']:.1f}), peak {result['peak_mib']:6.0f} MiB, losses "
            + " ".join(f"{loss:.3f}" for loss in result["losses"])
        )
    if "torch" in results:
        zoo, torch = results["zoo"], results["torch"]
        speed = zoo["per_second"] / torch["per_second"]
        print(f"  zoo / torch: {speed:.2f} in {unit}/s, {zoo['peak_mib'] / torch['peak_mib']:.2f} in peak memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="interpreter with torch and transformers; without, zoo runs alone")
    parser.add_argument("--model", nargs="+", choices=tasks.PRESETS, metavar="MODEL_TYPE", help="default: all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="one of them alone; default: both")
    parser.add_argument("--batch", type=int, default=2, help=f"rows of text; of images {tasks.IMAGES_A_ROW} for each")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=3, help="steps of each turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns after the first, which warms up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch; zoo takes all cores")
    parser.add_argument("--huge-pages", action="store_true", help="ask glibc for huge pages, on both sides")
    parser.add_argument("--save", action="store_true", help=f"add the result to {RESULTS.name}")
    parser.add_argument("--serve", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.dtype)
        return
    dtypes = (options.dtype,) if options.dtype else ("float32", "bfloat16")
    for kind, dtype in itertools.product(options.model or tasks.PRESETS, dtypes):
        config, whole = config_of(kind), models.preset(tasks.PRESETS[kind])
        results = compare(options, config, dtype)
        cut = "" if config.num_layers == whole.num_layers else f", {config.num_layers} of {whole.num_layers} layers"
        unit = "images" if hasattr(config, "image_size") else "tokens"
        show(f"{tasks.PRESETS[kind]}{cut}, {dtype}", unit, results)
        if options.save:
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as file:
                setting = {
                    "model": kind,
                    "layers": config.num_layers,
                    "preset_layers": whole.num_layers,
                    "dtype": dtype,
                    "batch": options.batch,
                    "length": options.length,
                    "cores": os.cpu_count(),
                    "huge_pages": options.huge_pages,
                }
                setting |= {"jax": version("jax"), "date": datetime.date.today().isoformat()}
                file.write(json.dumps(setting | results) + "\n")


if __name__ == "__main__":
    main()
