"""`zoo train RECIPE [flags]`: trains a recipe, in a new run folder or on from where one stopped."""

import dataclasses
import inspect
import sys
from collections.abc import Sequence
from typing import Any

from zoo import models
from zoo.commands.flags import choose, parse
from zoo.train import hosts, launch
from zoo.train.experiment import Experiment, Placement, UserError
from zoo.train.recipes import RECIPES

AnyExperiment = Experiment[Any, Any, Any, Any]

HELP = """\
usage: zoo train RECIPE [--preset MODEL] [flags]

  zoo train gpt-nano --steps 100 --model.num-layers 2 --optimizer.learning-rate 1e-3
  zoo train gpt-nano --run runs/mine                      the same command starts a run and resumes it
  zoo train gpt-nano --mesh data=2,fsdp=2 --simulate-devices 4

zoo train RECIPE --help shows every flag. Recipes:
"""


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        for name, recipe in RECIPES.items():
            print(f"  {name:<16} {_first_line(recipe)}")
        return 0
    experiment, placement = read(arguments)
    if placement.simulate_hosts != 1:
        command = [sys.executable, "-P", "-m", "zoo", "train", *arguments]
        return hosts.run(lambda each: [*command, *hosts.flags(each)], placement)
    launch.start(placement)
    # Imported here because the loop needs orbax and grain: seconds that help and mistakes need not wait for.
    from zoo.train import loop

    loop.run(experiment, placement)
    return 0


def read(arguments: Sequence[str]) -> tuple[AnyExperiment, Placement]:
    """A recipe's name and flags as the experiment and the placement they stand for."""
    name, *rest = arguments
    recipe = choose("recipe", name, RECIPES)
    experiment, rest = with_preset(recipe(), rest)
    description = inspect.cleandoc(recipe.__doc__ or "")
    parsed = parse((experiment, Placement()), rest, prog=f"zoo train {name}", description=description)
    if parsed[0].name != name:
        raise UserError(f"--name {parsed[0].name}: the name is the recipe's; name the folder of a run with --run")
    return parsed


def with_preset(experiment: AnyExperiment, arguments: list[str]) -> tuple[AnyExperiment, list[str]]:
    """Takes `--preset MODEL` out of the arguments: the recipe with that model, and the other arguments."""
    for index, argument in enumerate(arguments):
        flag, equals, name = argument.partition("=")
        if flag != "--preset":
            continue
        after = index + 1 if equals else index + 2
        if len(arguments) < after:
            raise UserError("--preset needs the name of a model's preset (zoo list shows all)")
        model = models.preset(name if equals else arguments[index + 1])
        if type(model) is not type(experiment.model):
            raise UserError(
                f"--preset: a {type(model).__name__} does not fit recipe {experiment.name}, "
                f"which trains a {type(experiment.model).__name__}"
            )
        return dataclasses.replace(experiment, model=model), arguments[:index] + arguments[after:]
    return experiment, arguments


def _first_line(recipe: Any) -> str:
    return inspect.cleandoc(recipe.__doc__ or "").partition("\n")[0]
