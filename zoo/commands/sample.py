"""`zoo sample RUN [flags]`: draws from a trained model; the flags are those of the recipe's sampler."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from zoo import sharding
from zoo.commands.flags import parse
from zoo.commands.runs import Devices, split_folder
from zoo.train import launch

HELP = """\
usage: zoo sample RUN [flags]

Draws from the newest checkpoint of a run: text as it is made, or the path of a picture.
zoo sample RUN --help shows the flags of its kind of model.

  zoo sample runs/mine --prompt "The for statement" --seed 1
"""


@dataclass(frozen=True)
class Draw:
    """What differs from draw to draw."""

    seed: int = 0  # another number, another sample


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    folder, rest = split_folder(arguments, "sample")
    # Imported here because it needs the data's libraries, which the help above does not.
    from zoo.train import session as sessions

    experiment = sessions.recorded(folder)
    description = f"Draws from {folder}, a run of {experiment.name}."
    parts = (experiment.sampler, Draw(), Devices())
    sampler, draw, devices = parse(parts, rest, prog=f"zoo sample {folder}", description=description)
    launch.start(devices.placement())
    session = sessions.reopen(folder, devices.placement())
    model, _ = sessions.trained_model(folder, session)
    streamed = False

    def emit(text: str) -> None:
        nonlocal streamed
        streamed = True
        print(text, end="", flush=True)

    with sharding.use(session.mesh):
        result = sampler.sample(model, session.experiment.data, jax.random.key(draw.seed), folder, emit)
    print("" if streamed else result)
    return 0
