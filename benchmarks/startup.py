"""From the command `zoo train gpt-nano` to its first training step, as a person waits for it.

    python -m benchmarks.startup [--recipe gpt-nano] [--repeats 3]

Each measurement starts the command in an empty run folder and watches for the record of the first step. It is taken
three times over: with nothing prepared, with the data prepared, and with the compiled program in the cache as well;
what lies between them is what preparing the data, and compiling, cost. Importing everything is timed by itself.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def to_first_step(recipe: str, caches: Path, *, compile_cache: bool) -> float:
    """Seconds from starting the command until the first step's record is on disk."""
    flag = "--compile-cache" if compile_cache else "--no-compile-cache"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "FLAXZOO_CACHE": str(caches),
        "JAX_COMPILATION_CACHE_DIR": str(caches / "compiled"),
    }
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        run = Path(folder, "run")
        command = [sys.executable, "-m", "zoo", "train", recipe, "--run", str(run), "--steps", "1", flag]
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                output.seek(0)
                raise SystemExit(f"{' '.join(command)} ended before its first step:\n{output.read().decode()}")
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        process.wait()
    return seconds


def importing() -> float:
    """Seconds from starting Python until all that training needs is imported."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import zoo.cli, zoo.train.loop"], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="gpt-nano")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows: dict[str, list[float]] = {"imports": [], "nothing prepared": [], "data prepared": [], "compiled as well": []}
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as caches:
            rows["imports"].append(importing())
            for name in ("nothing prepared", "data prepared"):
                rows[name].append(to_first_step(options.recipe, Path(caches), compile_cache=False))
            to_first_step(options.recipe, Path(caches), compile_cache=True)
            rows["compiled as well"].append(to_first_step(options.recipe, Path(caches), compile_cache=True))
    for name, seconds in rows.items():
        print(f"{name:18s} {statistics.median(seconds):6.2f} s  ({', '.join(f'{each:.2f}' for each in seconds)})")


if __name__ == "__main__":
    main()
