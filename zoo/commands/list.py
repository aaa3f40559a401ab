"""`zoo list`: recipes, models and their presets with parameter counts."""

import inspect
from collections.abc import Sequence

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from zoo import models
from zoo.commands.flags import parse_none
from zoo.train.recipes import RECIPES

DESCRIPTION = "Recipes (for zoo train), and the presets of each model family with their parameter counts."


def main(arguments: Sequence[str]) -> int:
    parse_none(arguments, prog="zoo list", description=DESCRIPTION)
    # Counting needs shapes alone: no accelerator is taken for it.
    jax.config.update("jax_platforms", "cpu")
    console = Console()
    console.print(recipes(), end="\n\n")
    console.print(presets())
    return 0


def recipes() -> Table:
    table = _table("recipe", "model", "data", "what it is")
    for name, recipe in RECIPES.items():
        experiment = recipe()
        summary = inspect.cleandoc(recipe.__doc__ or "").partition("\n")[0]
        table.add_row(name, _family(experiment.model), _family(experiment.data), Text(summary))
    return table


def presets() -> Table:
    table = _table("preset", "model")
    table.add_column("parameters", justify="right")
    for name, config in models.presets().items():
        table.add_row(name, _family(config), f"{models.parameter_count(config):,}")
    return table


def _family(config: object) -> str:
    return type(config).__name__.removesuffix("Config").removesuffix("Data")


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=column != "what it is")
    return table
