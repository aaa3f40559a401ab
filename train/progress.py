"""What a person sees while a run goes on: a live bar in a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Protocol

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from zoo.diffusion.sampling import Callback


class Display(Protocol):
    def line(self, text: str) -> None:
        """Prints one line that stays."""
        ...

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        """Shows step and figures: step_seconds and, in training, loss and UNIT_per_second."""
        ...

    def close(self) -> None: ...


def display(steps: int, unit: str, *, quiet: bool) -> Display:
    """What suits this process and its standard output."""
    if quiet:
        return Quiet()
    return Bar(steps, unit) if sys.stdout.isatty() else Lines(steps, unit)


@contextlib.contextmanager
def sampling(steps: int, *, shown: bool = True) -> Iterator[Callback | None]:
    """A bar on standard error while images are drawn, and the callback of `sample` that moves it.

    None, and no bar, without a terminal, where not `shown`, and in several processes, which must compile one program.
    """
    if not (shown and jax.process_count() == 1 and sys.stderr.isatty()):
        yield None
        return
    with contextlib.closing(waiting(steps)) as bar:
        # What is left is told by the steps after the first, which waited for the compiler.
        ended: list[float] = []

        def step(number: int, x: np.ndarray) -> None:
            ended.append(time.perf_counter())
            if len(ended) > 1:
                bar.update(len(ended), {"step_seconds": (ended[-1] - ended[0]) / (len(ended) - 1)})

        yield step
        # Steps call back in no promised order, and some may not have yet.
        jax.effects_barrier()


def waiting(steps: int, counted: str = "step") -> Display:
    """A bar on standard error where that is a terminal, for what prints its result on standard output.

    counted: what a step is called.
    """
    return Bar(steps, "", console=Console(stderr=True), counted=counted) if sys.stderr.isatty() else Quiet()


def duration(seconds: float) -> str:
    """1:02:03, 2:03, 0:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Quiet:
    def line(self, text: str) -> None: ...

    def update(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Lines:
    """One line an update; flushed, so that a log file can be followed."""

    def __init__(self, steps: int, unit: str):
        self._steps, self._unit = steps, unit

    def line(self, text: str) -> None:
        print(text, flush=True)

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        left = duration((self._steps - step) * figures["step_seconds"])
        rate = figures[f"{self._unit}_per_second"]
        self.line(f"step {step}/{self._steps}  loss {figures['loss']:.4f}  {rate:,.0f} {self._unit}/s  {left} left")

    def close(self) -> None: ...


class Bar:
    """A bar that stays at the bottom of the terminal; lines scroll above it."""

    def __init__(self, steps: int, unit: str, *, console: Console | None = None, counted: str = "step"):
        self._steps, self._unit = steps, unit
        self._bar = Progress(
            TextColumn(counted),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}"),
            console=console or Console(highlight=False),
            transient=True,
        )
        self._task = self._bar.add_task("", total=steps, text="preparing")
        self._bar.start()

    def line(self, text: str) -> None:
        self._bar.console.print(text, markup=False, soft_wrap=True)

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        text = f"{duration((self._steps - step) * figures['step_seconds'])} left"
        if "loss" in figures:
            text = f"loss {figures['loss']:.3f}  {figures[f'{self._unit}_per_second']:,.0f} {self._unit}/s  {text}"
        self._bar.update(self._task, completed=step, text=text)

    def close(self) -> None:
        self._bar.stop()
