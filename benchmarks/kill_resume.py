"""Kills training runs and resumes them: python -m benchmarks.kill_resume [--repeat 20] [--folder DIR] [-- FLAGS]

Trains gpt-nano for 60 steps once without interruption. Then, again and again in a new run folder, starts the same
command, kills it with SIGKILL at a random moment between its first step and its last checkpoint, starts it once more,
and compares the last checkpoint with that of the uninterrupted run: every array bit for bit, the optimizer's included.
FLAGS go to `zoo train gpt-nano`. The exit status is 1 if a run differed or a listed checkpoint did not verify.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from zoo.train import manifest
from zoo.train.checkpoints import load_arrays, steps, verify

STEPS = 60
FLAGS = ["--model.num-layers=2", "--model.width=96", "--model.dropout=0.1"]
FLAGS += ["--batch-size=4", "--log-every=1", "--checkpoint-every=3"]


def start(run: Path, flags: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "zoo", "train", "gpt-nano", "--steps", str(STEPS), "--run", str(run), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("step "):
            return
    raise SystemExit(f"the run ended with {child.wait()} before its first step")


def finish(child: subprocess.Popen[str]) -> str:
    output, _ = child.communicate()
    if child.returncode:
        raise SystemExit(f"the run failed with {child.returncode}:\n{output}")
    return output


def contents(run: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every array of the last checkpoint: dtype, shape and bytes."""
    arrays = load_arrays(run / "checkpoints", step=STEPS).state
    return {name: (str(value.dtype), value.shape, value.tobytes()) for name, value in arrays.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where the runs go (default: a temporary folder)")
    parser.add_argument("flags", nargs="*", default=FLAGS, help="of zoo train gpt-nano, after --")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        child = start(folder / "whole", options.flags)
        wait_for_step(child)
        begun = time.time()
        finish(child)
        last = folder / "whole/checkpoints" / manifest.folder_name(STEPS) / manifest.NAME
        duration = last.stat().st_mtime - begun
        expected = contents(folder / "whole")
        size = sum(len(data) for _, _, data in expected.values())
        print(f"{STEPS} steps in {duration:.1f} s, {len(expected)} arrays of {size:,} bytes in all")
        print("run  killed after  checkpoints  half-written  resumed from  identical")
        done = failures = 0
        while done < options.repeat:
            run = folder / f"run{done + 1}"
            child = start(run, options.flags)
            wait_for_step(child)
            moment = draw.uniform(0, duration)
            time.sleep(moment)
            child.kill()
            child.communicate()
            there = steps(run / "checkpoints")
            if STEPS in there:  # faster than the run that set the time: it proves nothing
                shutil.rmtree(run)
                continue
            half = len(manifest.checkpoint_folders(run / "checkpoints")) - len(there)
            intact = all(not verify(run / "checkpoints", step) for step in there)
            output = finish(start(run, options.flags))
            resumed = [line.split()[-1] for line in output.splitlines() if line.startswith("resumed")] or ["0"]
            same = intact and resumed[0] == str(max(there, default=0)) and contents(run) == expected
            done += 1
            failures += not same
            columns = f"{done:>3}  {moment:>10.2f} s  {', '.join(map(str, there)) or 'none':>11}  {half:>12}"
            print(f"{columns}  {resumed[0]:>12}  {'yes' if same else 'NO'}", flush=True)
            shutil.rmtree(run)
    print(f"{options.repeat - failures} of {options.repeat} resumed runs end in the same bits")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
