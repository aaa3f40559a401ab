"""Greedy generation with a cache, batched, beside Hugging Face's in torch: tokens/s, from the same weights.

    python -m benchmarks.generation --torch-python PATH            PATH: an interpreter with torch and transformers

A randomly initialised model of each size is written once with `zoo.save_pretrained`, and both sides load it. Prompts
differ in length; neither side stops before the last token, and both must give the same ones. Sides are processes that
take turns. Reported: medians of new tokens a second, and the share of the rate at which this machine reads memory, that
rate being the better of the two sides' sums over as many bytes as the model has: a step reads every weight once.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import sides

TORCH = Path(__file__).with_name("torch_generation.py")
MODELS = {"gpt2": "gpt2", "t5": "t5-small"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="interpreter with torch and transformers; without, zoo runs alone")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the longest prompt, or source")
    parser.add_argument("--new", type=int, default=128, help="tokens that follow each")
    parser.add_argument("--rounds", type=int, default=5, help="turns after the first, which warms up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch; zoo takes all cores")
    parser.add_argument("--serve", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            compare(name, Path(folder) / name, options)


def compare(name: str, folder: Path, options: argparse.Namespace) -> None:
    size = write(name, folder)
    shape = [f"--{field}={getattr(options, field)}" for field in ("batch", "prompt", "new")]
    commands = {"zoo": [sys.executable, "-m", "benchmarks.generation", f"--serve={folder}", *shape]}
    if options.torch_python:
        commands["torch"] = [options.torch_python, str(TORCH), f"--threads={options.threads}", str(folder), *shape]
    both = [sides.Side(side, command, {"JAX_PLATFORMS": "cpu"}) for side, command in commands.items()]
    sides.alternate(both, turns=1, rounds=options.rounds)
    tokens = options.batch * options.new
    rate = max(result["read_rate"] for side in both for result in side.results[1:])
    print(f"\n{name}: {size / 2**20:.0f} MiB of float32 weights, read at {rate / 2**30:.1f} GiB/s at best")
    for side in both:
        figures = side.summary(tokens, warmup=1)
        steps = figures["per_second"] / options.batch
        print(
            f"  {side.name:6s} {figures['per_second']:7.1f} tokens/s, {1e3 / steps:6.1f} ms a step, weights at "
            f"{steps * size / rate:4.0%} of that rate, peak {figures['peak_mib']:5.0f} MiB, "
            f"compilations after the first turn: {side.results[-1]['compilations'] - side.results[0]['compilations']}"
        )
    if len(both) == 2:
        ratio = statistics.median(both[1].seconds[1:]) / statistics.median(both[0].seconds[1:])
        same = both[0].results[-1]["tokens"] == both[1].results[-1]["tokens"]
        print(f"  zoo / torch: {ratio:.2f}; the tokens are {'the same' if same else 'NOT THE SAME'}")


def write(name: str, folder: Path) -> int:
    """Writes a model in float32; returns its bytes."""
    import jax
    from flax import nnx

    import zoo
    from zoo import models

    config = models.preset(MODELS[name])
    model = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    zoo.save_pretrained(model, folder)
    return 4 * models.parameter_count(config)


def serve(options: argparse.Namespace) -> None:
    import time

    import jax
    import numpy as np

    import zoo
    from zoo.generation import generate

    model = zoo.from_pretrained(options.serve)
    given = {"sources" if hasattr(model, "encode") else "prompts": sides.rows(options.batch, options.prompt)}
    weights = np.ones(sum(x.size for x in jax.tree.leaves(model)), np.float32)
    compilations = 0

    def count(event: str, duration: float, **_: Any) -> None:
        nonlocal compilations
        compilations += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(count)

    def turn() -> dict[str, Any]:
        made = generate(model, **given, max_new_tokens=options.new, stop_tokens=())
        return {"tokens": made.tokens, "compilations": compilations, "read_rate": rate}

    begun = time.perf_counter()
    weights.sum()
    rate = weights.nbytes / (time.perf_counter() - begun)
    sides.serve(turn)


if __name__ == "__main__":
    main()
