"""`zoo sample RUN [flags]`: draws from a trained model; the flags are those of the recipe's sampler.

Of a published pipeline instead of a run, the flags are those of zoo.commands.sample_pipeline.
"""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax

from zoo import __version__, sharding
from zoo.commands.flags import parse
from zoo.commands.runs import Devices, key_of, split_folder
from zoo.train import launch
from zoo.train.experiment import UserError

HELP = """\
usage: zoo sample RUN [flags]
       zoo sample PIPELINE [flags]

Draws from the newest checkpoint of a run: text as it is made, or the path of a picture, RUN/samples.png, which is the
newest one's. Or from a published diffusion pipeline, a folder with model_index.json or a model of the hub, into a file
that is not there yet: samples.png, samples-2.png and so on, or --out. What made a picture is in its metadata.
zoo sample RUN --help and zoo sample PIPELINE --help show the flags.

  zoo sample runs/mine --prompt "The for statement" --seed 1
  zoo sample runs/digits --classes 0-9 --sampler dpmpp_2m --steps 20 --guidance 1.5
  zoo sample google/ddpm-cifar10-32 --count 16 --sampler ddim --steps 50
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
    if is_pipeline(arguments[0]):
        from zoo.commands.sample_pipeline import sample_pipeline

        return sample_pipeline(arguments[0], rest)
    # Imported here because it needs the data's libraries, which the help above does not.
    from zoo.train import session as sessions

    experiment = sessions.recorded(folder)
    description = f"Draws from {folder}, a run of {experiment.name}."
    parts = (experiment.sampler, Draw(), Devices())
    sampler, draw, devices = parse(parts, rest, prog=f"zoo sample {folder}", description=description)
    launch.start(devices.placement())
    session = sessions.reopen(folder, devices.placement())
    model, step = sessions.trained_model(folder, session)
    streamed = False

    def emit(text: str) -> None:
        nonlocal streamed
        streamed = True
        print(text, end="", flush=True)

    with sharding.use(session.mesh):
        result = sampler.sample(model, session.experiment.data, key_of(draw.seed), folder, emit)
    lines = [] if streamed else map(Path, result.splitlines())
    made = [path for path in lines if path.suffix == ".png" and path.parent == folder.absolute() and path.is_file()]
    if made and jax.process_index() == 0:
        from zoo.train import pictures

        told = {"run": str(folder), "recipe": experiment.name, "step": str(step), "seed": str(draw.seed)}
        for name, value in asdict(sampler).items():
            if value is not None:
                told[name] = "\n".join(value) if isinstance(value, tuple) else str(value)
        told |= {"command": shlex.join(["zoo", "sample", *arguments])}
        for path in made:
            pictures.describe(path, told | {"Software": f"flaxzoo {__version__}"})
    print("" if streamed else result)
    return 0


def is_pipeline(source: str) -> bool:
    """Whether this names a published pipeline, and not a run; raises UserError for a published model that is none."""
    from zoo.published_folder import PIPELINE_INDEX, find, is_on_hub, read_json

    folder = Path(source).expanduser()
    if not folder.exists():
        if not is_on_hub(source):
            return False
        folder = find(source, (PIPELINE_INDEX, "config.json"))
    if (folder / PIPELINE_INDEX).is_file():
        return True
    fields = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "_class_name" in fields:
        raise UserError(
            f"{source} is a bare {fields['_class_name']}, without the scheduler that says how to sample from it: name "
            f"the folder of its pipeline, which has {PIPELINE_INDEX}"
        )
    if folder != Path(source).expanduser():
        raise UserError(f"{source} is no pipeline of images: its folder on the hub has no {PIPELINE_INDEX}")
    return False
