"""Two implementations that take turns: processes that stay alive, work when told to, and answer with a line of JSON.

Needs nothing but Python, since one of them runs under an interpreter that has torch and not JAX. Such a script is named
by its path and imports this file as `sides`: see `environment`.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def environment(interpreter: str) -> dict[str, str]:
    """What a process under this interpreter inherits: no PYTHONPATH, unless the interpreter is ours.

    With this repository on its path, transformers would take the folder `kernels` for a package that it knows.
    """
    ours = interpreter == sys.executable
    return {name: value for name, value in os.environ.items() if ours or name != "PYTHONPATH"}


class Side:
    """A process that takes turns of work when told to, and what it has answered.

    more: variables of its environment, besides those that it inherits.
    """

    def __init__(self, name: str, command: list[str], more: dict[str, str]):
        self.name, self.seconds, self.cpu_seconds = name, [], []
        self.results: list[Any] = []
        self.peak_mib = 0.0
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(command[0]) | more
        )

    def take(self, turns: int) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"turns": turns}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the {self.name} side ended: its message stands above")
        answer = json.loads(line)
        self.seconds += answer["seconds"]
        self.cpu_seconds += answer["cpu_seconds"]
        self.results += answer["results"]
        self.peak_mib = answer["peak_mib"]

    def close(self) -> None:
        self.process.communicate()

    def summary(self, units: int, warmup: int) -> dict[str, Any]:
        """Medians over the turns of `units` each after the first `warmup`."""
        return {
            "per_second": units / statistics.median(self.seconds[warmup:]),
            "fastest_per_second": units / min(self.seconds[warmup:]),
            "cpu_seconds": statistics.median(self.cpu_seconds[warmup:]),
            "peak_mib": self.peak_mib,
        }


def alternate(sides: list[Side], turns: int, rounds: int) -> None:
    """`turns` of each side in turn, rounds + 1 times: the first warms up, and the machine's whims fall on all alike."""
    try:
        for _ in range(rounds + 1):
            for side in sides:
                side.take(turns)
    finally:
        for side in sides:
            side.close()


def serve(turn: Callable[[], Any]) -> None:
    """Takes as many turns as each line of standard input asks for ({"turns": n})."""
    for line in sys.stdin:
        answer: dict[str, list[Any]] = {"seconds": [], "cpu_seconds": [], "results": []}
        for _ in range(json.loads(line)["turns"]):
            start, cpu = time.perf_counter(), time.process_time()
            answer["results"].append(turn())
            answer["seconds"].append(time.perf_counter() - start)
            answer["cpu_seconds"].append(time.process_time() - cpu)
        # Not getrusage's, which begins with that of the process that started this one.
        print(json.dumps(answer | {"peak_mib": resident("VmHWM")}), flush=True)


def rows(batch: int, longest: int) -> list[list[int]]:
    """Random tokens of `batch` prompts, from half the longest to the longest."""
    draw, shortest = random.Random(0), longest // 2
    lengths = [longest - row * shortest // max(1, batch - 1) for row in range(batch)]
    return [[draw.randrange(10, 30000) for _ in range(length)] for length in lengths]


def resident(name: str) -> float:
    """Resident memory of this process, now (VmRSS) or at its highest (VmHWM), in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
