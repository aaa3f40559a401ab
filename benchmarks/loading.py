"""Loading GPT-2 124M from safetensors, beside Hugging Face's from_pretrained in torch: seconds and peak memory.

    python -m benchmarks.loading --torch-python PATH               PATH: an interpreter with torch and transformers

A randomly initialised model is written once; then each side loads it in a process of its own, in turn, after its
libraries are imported and have run something. torch maps the file and reads a weight when it is first used, so that
both times are given: until the model is there, and until every weight has been read once. Peak: of the whole process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import sides
from benchmarks.generation import write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="interpreter with torch and transformers; without, zoo runs alone")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--load", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(options.load)))
        return
    commands = {"zoo": [sys.executable, "-m", "benchmarks.loading", "--load"]}
    if options.torch_python:
        commands["torch"] = [options.torch_python, str(Path(__file__).with_name("torch_loading.py"))]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in commands}
    with tempfile.TemporaryDirectory() as parent:
        folder = str(Path(parent) / "gpt2")
        write("gpt2", Path(folder))
        for _ in range(options.repeats):
            for side, command in commands.items():
                own = sides.environment(command[0])
                run = subprocess.run([*command, folder], stdout=subprocess.PIPE, check=True, env=own)
                found[side].append(json.loads(run.stdout))
    for side, runs in found.items():
        middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        print(
            f"{side:6s} there after {middle['there']:.3f} s, read once after {middle['read']:.3f} s, "
            f"peak {middle['peak_mib']:.0f} MiB, of which {middle['before_mib']:.0f} before"
        )


def load(folder: str) -> dict[str, float]:
    import jax
    import numpy as np

    import zoo.models.gpt  # noqa: F401  torch's side has imported its class, too
    from zoo.pretrained import from_pretrained

    jax.block_until_ready(jax.numpy.ones(3))
    before, begun = sides.resident("VmRSS"), time.perf_counter()
    model = jax.block_until_ready(from_pretrained(folder))
    there = time.perf_counter() - begun
    for x in jax.tree.leaves(model):
        np.asarray(x).sum()
    read = time.perf_counter() - begun
    return {"there": there, "read": read, "before_mib": before, "peak_mib": sides.resident("VmHWM")}


if __name__ == "__main__":
    main()
