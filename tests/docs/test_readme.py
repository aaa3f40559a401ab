"""What the README says can be done can be done."""

import re
import shlex
from pathlib import Path

import pytest

from zoo import cli
from zoo.commands import train
from zoo.train.recipes import RECIPES

README = (Path(__file__).parents[2] / "README.md").read_text()
COMMANDS = re.findall(r"zoo \w+[^`|&\n]*", "\n".join(re.findall(r"`zoo [^`]+`|&& zoo .*", README)))


def test_there_are_commands() -> None:
    assert {shlex.split(command)[1] for command in COMMANDS} >= {"train", "sample", "list", "doctor"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_be_read(command: str) -> None:
    _, verb, *arguments = shlex.split(command)
    assert verb in cli.VERBS
    if verb == "train":
        experiment, _ = train.read(arguments)
        assert experiment.name in RECIPES


def test_the_code_runs() -> None:
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict[str, object] = {}
    exec(code, scope)
    assert getattr(scope["logits"], "shape", None) == (1, 16, 50257)
