"""Two implementations that take turns: processes that stay alive, work when told to, and answer with a line of JSON.

Needs nothing but Python, since one of them runs under an interpreter that has torch and not JAX. Such a script is named
by its path and imports this file as `sides`: with the project's root on its path, transformers would take the folder
`kernels` for a package that it knows.
"""

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Side:
    """A process that takes turns of work when told to, and what it has answered."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str]):
        self.name, self.seconds, self.cpu_seconds = name, [], []
        self.results: list[Any] = []
        self.peak_mib = 0.0
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
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
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(answer | {"peak_mib": peak}), flush=True)


def rows(batch: int, longest: int) -> list[list[int]]:
    """Random tokens of `batch` prompts, from half the longest to the longest."""
    draw, shortest = random.Random(0), longest // 2
    lengths = [longest - row * shortest // max(1, batch - 1) for row in range(batch)]
    return [[draw.randrange(10, 30000) for _ in range(length)] for length in lengths]


def resident(name: str) -> float:
    """Resident memory of this process, now (VmRSS) or at its highest (VmHWM), in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def batch(model: str, rows: int, length: int) -> dict[str, list]:
    """A batch of random tokens for one step of a model, as nested lists, by the names that zoo gives them.

    gpt2: tokens, targets [rows, length].  bert: tokens, token_types, and 15 % of each row as places and targets, and
    next_sentence [rows].  t5: sources [rows, length], tokens and targets [rows, length / 4].
    """
    draw = random.Random(0)

    def tokens(count: int) -> list[list[int]]:
        return [[draw.randrange(1000, 30000) for _ in range(count)] for _ in range(rows)]

    if model == "gpt2":
        given = tokens(length + 1)
        return {"tokens": [row[:-1] for row in given], "targets": [row[1:] for row in given]}
    if model == "bert":
        predicted = round(0.15 * length)
        return {
            "tokens": tokens(length),
            "token_types": [[int(place >= length // 2) for place in range(length)] for _ in range(rows)],
            "places": [sorted(draw.sample(range(length), predicted)) for _ in range(rows)],
            "targets": tokens(predicted),
            "next_sentence": [draw.randrange(2) for _ in range(rows)],
        }
    return {"sources": tokens(length), "tokens": tokens(length // 4), "targets": tokens(length // 4)}
