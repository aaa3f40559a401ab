"""Training steps of GPT-2 124M, BERT base and T5 small, beside those of Hugging Face's models in torch, on a CPU.

    python -m benchmarks.train_step --torch-python PATH            PATH: an interpreter with torch and transformers

The zoo side is the model, objective and step that the recipes run; only batch and length are cut. Both sides train on
one batch of random tokens, without dropout, from their own initialisation of the same distribution, so that losses can
be compared. Each side is a process that stays alive, and they take turns, a few steps each, so that whatever else the
machine does falls on both. Reported: the median over steps of tokens a second (a T5's are those of the source), and the
peak resident size of the process, which for zoo includes compilation. What bounds it: benchmarks/notes/train_step.md.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import sides

TORCH = Path(__file__).with_name("torch_train.py")
RESULTS = Path(__file__).with_name("results") / "train_step.jsonl"


MODELS = {"gpt2": "gpt2", "bert": "bert-base-uncased", "t5": "t5-small"}


def compare(options: argparse.Namespace, model: str, dtype: str) -> dict[str, dict[str, Any]]:
    shape = ["--model", model, "--batch", str(options.batch), "--length", str(options.length), "--dtype", dtype]
    commands = {"zoo": [sys.executable, "-m", "benchmarks.train_step", "--serve", *shape]}
    if options.torch_python:
        commands["torch"] = [options.torch_python, str(TORCH), *shape, "--threads", str(options.threads)]
    environment = {"JAX_PLATFORMS": "cpu"}
    if options.huge_pages:
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    both = [sides.Side(name, command, environment) for name, command in commands.items()]
    sides.alternate(both, options.steps, options.rounds)
    tokens = options.batch * options.length
    return {side.name: side.summary(tokens, warmup=options.steps) | {"losses": side.results[:6]} for side in both}


def serve(options: argparse.Namespace) -> None:
    """The zoo side; each turn is one step, whose result is its loss in nats a predicted token."""
    import jax

    from zoo import sharding
    from zoo.train import step

    mesh = sharding.make_mesh()
    experiment = step.with_compute(experiment_of(options), mesh)
    batch = batch_of(options)
    with sharding.use(mesh):
        state = step.init_state(experiment, mesh)
        abstract = step.abstract_batch(batch, options.batch, mesh)
        train = step.train_step(experiment, mesh).lower(state, abstract).compile()

        def turn() -> float:
            nonlocal state
            state, metrics = train(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
            sums = jax.tree.map(float, metrics.loss)
            return experiment.objective.summary(*sums)["loss"]

        sides.serve(turn)


def experiment_of(options: argparse.Namespace) -> Any:
    """The recipe of GPT-2, with another model and objective where that is asked for, cut to a CPU's size."""
    from zoo import models
    from zoo.train.experiment import Optimizer
    from zoo.train.objectives import MaskedLM, NextToken, SequenceToSequence
    from zoo.train.recipes import RECIPES

    objectives = {"gpt2": NextToken(), "bert": MaskedLM(), "t5": SequenceToSequence()}
    model = dataclasses.replace(models.preset(MODELS[options.model]), remat="products", dropout=0.0)
    if options.model == "bert":
        model = dataclasses.replace(model, head="pretraining", attention_dropout=0.0)
    return dataclasses.replace(
        RECIPES["gpt2"](),
        model=model,
        objective=objectives[options.model],
        batch_size=options.batch,
        accumulate=1,
        compute=options.dtype,
        optimizer=Optimizer(learning_rate=3e-4, warmup_steps=0, schedule="constant"),
    )


def batch_of(options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    given = sides.batch(options.model, options.batch, options.length)
    batch: dict[str, Any] = {name: np.array(rows, np.int32) for name, rows in given.items()}
    ones = np.ones_like(batch["tokens"])
    if options.model == "gpt2":
        places = np.broadcast_to(np.arange(ones.shape[1], dtype=np.int32), ones.shape)
        batch |= {"segments": ones, "positions": places, "bytes": ones}
    elif options.model == "bert":
        batch["segments"] = ones
    return batch | {"weights": np.ones(batch["targets"].shape, np.float32)}


def show(title: str, results: dict[str, dict[str, Any]]) -> None:
    print(f"\n{title}")
    for name, result in results.items():
        print(
            f"  {name:6s} {result['per_second']:7.1f} tokens/s (fastest step"
            f" {result['fastest_per_second']:.1f}), peak {result['peak_mib']:6.0f} MiB, losses "
            + " ".join(f"{loss:.3f}" for loss in result["losses"])
        )
    if "torch" in results:
        zoo, torch = results["zoo"], results["torch"]
        speed = zoo["per_second"] / torch["per_second"]
        print(f"  zoo / torch: {speed:.2f} in tokens/s, {zoo['peak_mib'] / torch['peak_mib']:.2f} in peak memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="interpreter with torch and transformers; without, zoo runs alone")
    parser.add_argument("--model", nargs="+", choices=MODELS, help="default: all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="one of them alone; default: both")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="steps of each turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns after the first, which warms up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch; zoo takes all cores")
    parser.add_argument("--huge-pages", action="store_true", help="ask glibc for huge pages, on both sides")
    parser.add_argument("--save", action="store_true", help=f"add the result to {RESULTS.name}")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        (options.model,) = options.model
        serve(options)
        return
    dtypes = (options.dtype,) if options.dtype else ("float32", "bfloat16")
    for model, dtype in itertools.product(options.model or MODELS, dtypes):
        results = compare(options, model, dtype)
        show(f"{MODELS[model]}, {dtype}", results)
        if options.save:
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as file:
                setting = {
                    "model": model,
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
