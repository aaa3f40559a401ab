"""What a run shows at its end: held-out figures beside plain compressors, a sample, a report, and what to do next."""

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from zoo import sharding
from zoo.train import processes, report
from zoo.train.data.compression import compressors
from zoo.train.data.text import TextData
from zoo.train.metrics import Meter
from zoo.train.progress import Display, duration
from zoo.train.recipes import RECIPES
from zoo.train.session import Session
from zoo.train.step import AnyExperiment


def conclude(
    session: Session,
    asked: AnyExperiment,
    folder: Path,
    model: Any,
    figures: Mapping[str, float],
    meter: Meter,
    show: Display,
) -> None:
    """Prints the results of a run, and writes its sample and report. `asked`: the experiment before it was fitted."""
    with sharding.use(session.mesh):
        data, key = session.experiment.data, jax.random.key(asked.seed)
        sample = asked.sampler.sample(model, data, key, folder)
    if not processes.is_first():
        return
    results = {"held out": sentence(figures), **yardsticks(data), "time": times(meter), "run folder": str(folder)}
    commands = next_steps(folder, asked)
    facts = session.facts(session.dataset("train").info) | results
    page = report.write(folder, title=asked.name, facts=facts, sample=sample, commands=commands)
    show.line(f"sample\n\n{sample}\n")
    for name, text in {**results, "report": str(page), **commands}.items():
        show.line(f"{name:<12}{text}")


def sentence(figures: Mapping[str, float]) -> str:
    """loss 1.2345, bits per byte 2.3456"""
    formats = {name: ".4f" if value < 1e4 else ".4g" for name, value in figures.items()}
    return ", ".join(f"{name.replace('_', ' ')} {value:{formats[name]}}" for name, value in figures.items())


def yardsticks(data: Any) -> dict[str, str]:
    """What compressors make of text data, in the unit of a model's bits per byte."""
    if not isinstance(data, TextData):
        return {}
    return {
        found.name: f"{found.held_out:.4f} bits per byte of the held-out text, {found.whole:.4f} of all as one file"
        for found in compressors(data) or ()
    }


def times(meter: Meter) -> str:
    lost = [f"{to} {duration(seconds)}" for to, seconds in meter.lost.items() if seconds >= 0.5]
    return duration(meter.seconds()) + (f", of which {', '.join(lost)}" if lost else "")


def next_steps(folder: Path, asked: AnyExperiment) -> dict[str, str]:
    """The commands that resume and sample a run, where it is one of a recipe."""
    if asked.name not in RECIPES:
        return {}
    changed = " ".join(map(shlex.quote, flags(asked, RECIPES[asked.name]())))
    run = shlex.quote(str(folder))
    return {"resume": f"zoo train {asked.name} --run {run} {changed}".rstrip(), "draw": f"zoo sample {run}"}


def flags(experiment: Any, default: Any, prefix: str = "--") -> list[str]:
    """The command-line flags that make `default` into `experiment`."""
    found: list[str] = []
    for f in dataclasses.fields(experiment):
        value, usual = getattr(experiment, f.name), getattr(default, f.name)
        name = f.name.replace("_", "-")
        if dataclasses.is_dataclass(value) and type(value) is type(usual):
            found += flags(value, usual, f"{prefix}{name}.")
        elif value != usual:
            if isinstance(value, bool):
                found.append(f"{prefix}{'' if value else 'no-'}{name}")
            elif str(value).startswith("-"):
                found.append(f"{prefix}{name}={value}")
            else:
                found += [f"{prefix}{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return found
