"""GPT-2 124M: training steps of zoo beside those of Hugging Face's model in torch, on one machine's CPU.

    python -m benchmarks.train_step --torch-python PATH            PATH: an interpreter with torch and transformers

The zoo side is the model and the step that `zoo train gpt2` runs; only batch and length are cut. Both sides train on
one batch of random tokens, from their own initialisation of the same distribution, so that losses can be compared.
Each side is a process that stays alive, and they take turns, a few steps each, so that whatever else the machine does
falls on both. Reported: the median over steps of tokens a second, and the peak resident size of the process, which for
zoo includes compilation. benchmarks/notes/train_step.md says what bounds it.
"""

import argparse
import dataclasses
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

TORCH = Path(__file__).with_name("torch_gpt2.py")
RESULTS = Path(__file__).with_name("results") / "train_step.jsonl"


class Side:
    """A process that takes steps when told to, and what it has answered."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str]):
        self.name, self.seconds, self.cpu_seconds, self.losses = name, [], [], []
        self.peak_mib = 0.0
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )

    def take(self, steps: int) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"steps": steps}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the {self.name} side ended: its message stands above")
        answer = json.loads(line)
        self.seconds += answer["seconds"]
        self.cpu_seconds += answer["cpu_seconds"]
        self.losses += answer["losses"]
        self.peak_mib = answer["peak_mib"]

    def close(self) -> None:
        self.process.communicate()

    def summary(self, tokens: int, warmup: int) -> dict[str, object]:
        """Medians over the steps after the first `warmup`, and the losses of the first steps."""
        return {
            "tokens_per_second": tokens / statistics.median(self.seconds[warmup:]),
            "fastest_tokens_per_second": tokens / min(self.seconds[warmup:]),
            "cpu_seconds_per_step": statistics.median(self.cpu_seconds[warmup:]),
            "peak_mib": self.peak_mib,
            "losses": self.losses[:6],
        }


def compare(options: argparse.Namespace, dtype: str) -> dict[str, dict[str, object]]:
    shape = ["--batch", str(options.batch), "--length", str(options.length), "--dtype", dtype]
    commands = {"zoo": [sys.executable, "-m", "benchmarks.train_step", "--serve", *shape]}
    if options.torch_python:
        commands["torch"] = [options.torch_python, str(TORCH), *shape, "--threads", str(options.threads)]
    environment = {"JAX_PLATFORMS": "cpu"}
    if options.huge_pages:
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    sides = [Side(name, command, environment) for name, command in commands.items()]
    try:
        for _ in range(options.rounds + 1):
            for side in sides:
                side.take(options.steps)
    finally:
        for side in sides:
            side.close()
    return {side.name: side.summary(options.batch * options.length, warmup=options.steps) for side in sides}


def serve(options: argparse.Namespace) -> None:
    """The zoo side: takes as many steps as each line of standard input asks for, and answers with a line."""
    steps = zoo_steps(options)
    next(steps)
    for line in sys.stdin:
        answer: dict[str, list[float]] = {"seconds": [], "cpu_seconds": [], "losses": []}
        for _ in range(json.loads(line)["steps"]):
            start, cpu = time.perf_counter(), time.process_time()
            answer["losses"].append(next(steps))
            answer["seconds"].append(time.perf_counter() - start)
            answer["cpu_seconds"].append(time.process_time() - cpu)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(answer | {"peak_mib": peak}), flush=True)


def zoo_steps(options: argparse.Namespace) -> Iterator[float]:
    """The loss of each step, nats a token; before the first step, once all is compiled, nan."""
    import jax
    import numpy as np

    from zoo import sharding
    from zoo.train import step
    from zoo.train.experiment import Optimizer
    from zoo.train.recipes import RECIPES

    experiment = RECIPES["gpt2"]()
    experiment = dataclasses.replace(
        experiment,
        batch_size=options.batch,
        accumulate=1,
        compute=options.dtype,
        optimizer=Optimizer(learning_rate=3e-4, warmup_steps=0, schedule="constant"),
    )
    mesh = sharding.make_mesh()
    experiment = step.with_compute(experiment, mesh)
    tokens = np.random.default_rng(0).integers(50257, size=(options.batch, options.length + 1), dtype=np.int32)
    ones = np.ones((options.batch, options.length), np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": ones,
        "positions": np.broadcast_to(np.arange(options.length, dtype=np.int32), ones.shape),
        "weights": ones.astype(np.float32),
        "bytes": ones,
    }
    with sharding.use(mesh):
        state = step.init_state(experiment, mesh)
        train = (
            step.train_step(experiment, mesh).lower(state, step.abstract_batch(batch, options.batch, mesh)).compile()
        )
        yield float("nan")
        while True:
            state, metrics = train(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
            yield float(metrics.loss.total) / float(metrics.loss.weight)


def show(dtype: str, results: dict[str, dict[str, object]]) -> None:
    print(f"\n{dtype}")
    for name, result in results.items():
        print(
            f"  {name:6s} {result['tokens_per_second']:7.1f} tokens/s (fastest step"
            f" {result['fastest_tokens_per_second']:.1f}), peak {result['peak_mib']:6.0f} MiB, losses "
            + " ".join(f"{loss:.3f}" for loss in result["losses"])
        )
    if "torch" in results:
        zoo, torch = results["zoo"], results["torch"]
        speed = zoo["tokens_per_second"] / torch["tokens_per_second"]
        print(f"  zoo / torch: {speed:.2f} in tokens/s, {zoo['peak_mib'] / torch['peak_mib']:.2f} in peak memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="interpreter with torch and transformers; without, zoo runs alone")
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
        serve(options)
        return
    for dtype in (options.dtype,) if options.dtype else ("float32", "bfloat16"):
        results = compare(options, dtype)
        show(dtype, results)
        if options.save:
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as file:
                setting = {"dtype": dtype, "cores": os.cpu_count(), "huge_pages": options.huge_pages}
                setting |= {"jax": version("jax"), "date": datetime.date.today().isoformat()}
                file.write(json.dumps(setting | results) + "\n")


if __name__ == "__main__":
    main()
