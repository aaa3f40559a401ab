"""`zoo export RUN FOLDER`: a run's model as a published folder, with its tokenizer and a card that says what it is."""

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo import __version__
from zoo.commands.runs import split_folder
from zoo.train.experiment import Placement, UserError

HELP = """\
usage: zoo export RUN FOLDER

Writes the newest checkpoint of a run as a published model: config.json and safetensors, tokenizer.json where it is of
text, and README.md. zoo.from_pretrained, zoo.tokenizer and Hugging Face transformers or diffusers load the folder.

  zoo export runs/mine my-gpt
"""

ROLES = {
    "pad": "pad_token",
    "mask": "mask_token",
    "classify": "cls_token",
    "separate": "sep_token",
    "begin": "bos_token",
    "end": "eos_token",
}
"""Published names of the roles of zoo.train.data.vocabulary."""


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    run, rest = split_folder(arguments, "export")
    if len(rest) != 1 or rest[0].startswith("-"):
        raise UserError(f"zoo export takes a run and the folder to write, and got {' '.join(rest) or 'no folder'}")
    step = export(run, Path(rest[0]))
    print(f"{rest[0]} holds step {step:,} of {run}: zoo.from_pretrained({rest[0]!r}) loads it")
    return 0


def export(run: Path, target: Path) -> int:
    """Writes the published folder; returns the step. All that can be refused is refused before the first file."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there and not empty: name a folder that is not there yet")
    # Imported here because it needs JAX and the data's libraries, which the help above does not.
    from zoo.models.published import SpecialTokens
    from zoo.pipelines import Pipeline
    from zoo.pretrained import save_pretrained
    from zoo.train import session as sessions

    session = sessions.reopen(run, Placement())
    experiment = session.experiment
    config: Any = experiment.model
    if not hasattr(config, "to_published"):
        kind = type(config).__name__.removesuffix("Config")
        raise UserError(
            f"{run} is a run of {experiment.name}, and a {kind} has no published form: docs/checkpoints.md says how "
            "its arrays are read"
        )
    files: dict[str, str] = {}
    if hasattr(experiment.data, "load_tokenizer"):
        tokenizer, special = published_tokenizer(experiment.data)
        if not experiment.data.roles:
            end = tokenizer.token_to_id(special["eos_token"])
            config = dataclasses.replace(config, special_tokens=SpecialTokens(bos=end, eos=(end,)))
        told = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
        told |= {"model_max_length": experiment.data.length}
        files |= {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(told, indent=2) + "\n"}
    scheduler: dict[str, Any] | None = None
    if is_drawn_from(config):
        config = dataclasses.replace(config, image_size=experiment.data.example_shape[:2])
        scheduler = published_scheduler(config.noising)
    config.to_published()
    session = dataclasses.replace(session, experiment=dataclasses.replace(experiment, model=config))
    model, step = sessions.trained_model(run, session)
    files["README.md"] = card(run, target, config, step)
    target.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (target / name).write_text(text, encoding="utf-8")
    save_pretrained(model if scheduler is None else Pipeline("DDPMPipeline", scheduler, unet=model), target)
    return step


def is_drawn_from(config: Any) -> bool:
    """Whether a model of this config makes a pipeline by itself: a U-Net that is told no text."""
    from zoo.models.unet import UNetConfig

    return isinstance(config, UNetConfig) and config.context_width is None


def published_scheduler(noising: Any) -> dict[str, Any]:
    """The fields of a scheduler for a network trained under `noising`: ancestral sampling, or Euler's of a flow."""
    from zoo.diffusion.published_schedulers import to_published
    from zoo.diffusion.samplers import DDPM, Euler

    return to_published(noising, Euler() if noising.schedule == "flow" else DDPM())


def published_tokenizer(data: Any) -> tuple[Any, dict[str, str]]:
    """The tokenizer of text data as the library's, with the special tokens of its objective, and these by their
    published roles. A text stands between those that its rows begin and end with."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.processors import TemplateProcessing

    from zoo.train.data.vocabulary import NAMES

    path, words = data.tokenizer_file(), data.vocabulary
    made: Any = byte_tokenizer() if path is None else Tokenizer.from_file(str(path))
    for role, token in sorted(words.roles.items(), key=lambda item: item[1]):
        if token >= words.text:
            name = NAMES[role][0] if role in NAMES else f"<extra_id_{role.removeprefix('sentinel ')}>"
            made.add_special_tokens([AddedToken(name, special=True, normalized=False)])
            if made.token_to_id(name) != token:
                raise UserError(f"{path} has {name} as text, which the run has for another token: it cannot be both")
    if not words.roles:
        return made, dict.fromkeys(("bos_token", "eos_token"), made.id_to_token(words.end_of_text))
    special = {role: made.id_to_token(token) for role, token in words.roles.items() if role in ROLES}
    before = [special[role] for role in ("classify", "begin") if role in special]
    after = [special[role] for role in ("separate", "end") if role in special]
    made.post_processor = TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{piece}:1" for piece in ("$B", *after))],
        special_tokens=[(name, made.token_to_id(name)) for name in dict.fromkeys([*before, *after])],
    )
    return made, {ROLES[role]: name for role, name in special.items()}


def byte_tokenizer() -> Any:
    """zoo's byte tokenizer: a byte-level BPE that merges nothing, whose ids are the bytes, and <|endoftext|>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from zoo.train.data.tokenizers import END_OF_TEXT

    # GPT-2's letters for bytes: themselves where they can be seen, else those from 256 on, in order.
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in seen]
    letters = {chr(256 + hidden.index(byte)) if byte not in seen else chr(byte): byte for byte in range(256)}
    made = Tokenizer(models.BPE(letters, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return made


def card(run: Path, target: Path, config: Any, step: int) -> str:
    """README.md: what was trained, on what, how, and how well."""
    from zoo.pretrained import wanted_tensors
    from zoo.train import run_folder
    from zoo.train import session as sessions
    from zoo.train.ending import flags, sentence
    from zoo.train.metrics import read_records
    from zoo.train.recipes import RECIPES

    experiment = sessions.recorded(run)
    data = run_folder.load_data(run)
    changed = shlex.join(flags(experiment, RECIPES[experiment.name]()))
    records = read_records(run / run_folder.METRICS)
    held_out = [record for record in records if record["kind"] == "validation" and record["step"] <= step]
    figures = "none were taken"
    if held_out:
        told = {k: v for k, v in held_out[-1].items() if k not in ("step", "kind", "seconds")}
        figures = f"{sentence(told)} (step {held_out[-1]['step']:,})"
    average = "" if experiment.ema is None else f", the average of decay {experiment.ema}"
    shapes, fields = wanted_tensors(config).values(), config.to_published()
    kind = fields["_class_name"] if "_class_name" in fields else fields["architectures"][0]
    rows = {
        "model": f"{kind}, {sum(map(math.prod, shapes)):,} parameters",
        "recipe": f"`zoo train {experiment.name} {changed}`".replace(" `", "`"),
        "steps": f"{step:,} of {experiment.steps:,}, {experiment.batch_size:,} examples each{average}",
        "data": f"{data['name']}: {data['bytes']:,} bytes, {data['detail']}",
        "SHA-256 of the data": f"`{data['sha256']}`",
        "held out": figures,
    }
    table = "\n".join(f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in rows.items())
    generates = re.match(r"\w+(LMHeadModel|ForCausalLM),", rows["model"])
    task = "pipeline_tag: text-generation\n" if generates else ""
    task = "pipeline_tag: unconditional-image-generation\n" if is_drawn_from(config) else task
    told = "" if getattr(config, "num_classes", None) is None else "classes=[0], "
    use = (DRAWING if is_drawn_from(config) else LOADING).format(folder=target.name, told=told)
    library = "diffusers" if "_class_name" in fields else "transformers"
    named = {"name": experiment.name, "library": library, "use": use}
    return CARD.format(table=table, task=task, version=__version__, **named)


CARD = """\
---
library_name: {library}
tags: [flaxzoo, jax]
{task}---

# {name}

| | |
|---|---|
{table}

Trained with flaxzoo {version}. Nothing was measured of it but the held-out figures above.

```python
{use}
```
"""

LOADING = """\
import zoo

model = zoo.from_pretrained({folder!r})"""

DRAWING = """\
import jax
import zoo
from zoo.image_generation import draw

pipeline = zoo.from_pretrained({folder!r})
images = draw(pipeline, jax.random.key(0), {told}count=4, steps=100)  # [4, Y, X, C], in [-1, 1]"""
