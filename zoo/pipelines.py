"""Published pipelines of diffusers in and out: a folder with model_index.json, each part in a folder of its own.

model_index.json names a class for each part. Names are looked up in the tables below, and nothing is ever imported or
run because a file says so.
"""

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from zoo.diffusion import published_schedulers
from zoo.published_folder import PIPELINE_INDEX, PretrainedError, read_json, write_json
from zoo.tokenizers import FILES as TOKENIZER_FILES
from zoo.tokenizers import Tokenizer, tokenizer

PIPELINES: dict[str, dict[str, str]] = {
    "DDIMPipeline": {"unet": "UNet2DModel"},
    "DDPMPipeline": {"unet": "UNet2DModel"},
    "DiTPipeline": {"transformer": "DiTTransformer2DModel", "vae": "AutoencoderKL"},
    "StableDiffusionPipeline": {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
    },
}
"""The parts of each pipeline, besides the scheduler that all have, and their classes."""

OTHER_NAMES = {"Transformer2DModel": "DiTTransformer2DModel", "CLIPTokenizerFast": "CLIPTokenizer"}
"""Names under which files have some of these classes, too."""

LEFT_OUT = {"StableDiffusionPipeline": ("safety_checker", "feature_extractor", "image_encoder")}
"""Parts that are not read, though published pipelines have them."""

SETTINGS = {"DiTPipeline": ("id2label",), "StableDiffusionPipeline": ("requires_safety_checker",)}
"""What model_index.json says of each pipeline besides its parts."""

MODELS = ("unet", "transformer", "vae", "text_encoder")
NETWORKS = ("unet", "transformer")
"""Models that denoise: what noise they were trained under, the scheduler says."""

SCHEDULER = "scheduler_config.json"


class Fields(dict[str, Any]):
    """Fields of a JSON file as they stand, hashed by their text, so that a pytree can carry them as constants."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(json.dumps(self, sort_keys=True))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=MODELS,
    meta_fields=("kind", "scheduler", "tokenizer", "settings"),
)
@dataclass(frozen=True)
class Pipeline:
    """The parts of a published pipeline by their published names, None where its kind has none; a pytree of its models.

    kind: a name in PIPELINES.  scheduler: the fields of scheduler_config.json.
    settings: those of model_index.json that name no part, see SETTINGS.
    """

    kind: str
    scheduler: Mapping[str, Any]
    unet: Any = None
    transformer: Any = None
    vae: Any = None
    text_encoder: Any = None
    tokenizer: Tokenizer | None = None
    settings: Mapping[str, Any] = field(default_factory=Fields)

    def __post_init__(self) -> None:
        for name in ("scheduler", "settings"):
            object.__setattr__(self, name, Fields(getattr(self, name)))


def read_pipeline(folder: Path, **how: Any) -> Pipeline:
    """The pipeline of a folder; `how` its models are read is what `zoo.from_pretrained` takes.

    The `noising` of its network's config is what the scheduler says.
    """
    from zoo.pretrained import read_model

    index = read_json(folder / PIPELINE_INDEX)
    kind = _kind(index.get("_class_name"))
    settings = _checked(index, kind)
    scheduler = read_json(_inside(folder, "scheduler", SCHEDULER) / SCHEDULER)
    if scheduler.get("_class_name") != index["scheduler"][1]:
        raise PretrainedError(
            f"{folder} has the scheduler {index['scheduler'][1]!r} in {PIPELINE_INDEX} and "
            f"{scheduler.get('_class_name')!r} in {SCHEDULER}: give both the name of one"
        )
    parts = {name: (_inside(folder, name, "config.json"), cls) for name, cls in PIPELINES[kind].items()}
    for name in MODELS:  # What can be refused is refused before weights are read.
        if name in parts:
            _check_class(*parts[name])
    noising = published_scheduler(kind, scheduler).noising
    words = tokenizer(parts["tokenizer"][0]) if "tokenizer" in parts else None
    models: dict[str, Any] = {name: read_model(parts[name][0], **how) for name in MODELS if name in parts}
    for name in models.keys() & NETWORKS:
        models[name].config = replace(models[name].config, noising=noising)
    return Pipeline(kind, scheduler, tokenizer=words, settings=settings, **models)


def published_scheduler(kind: str, fields: Mapping[str, Any]) -> published_schedulers.Scheduler:
    """What a pipeline's scheduler says; as published, a DDIMPipeline samples by DDIM whichever scheduler it has."""
    return published_schedulers.from_published(
        {**fields, "_class_name": "DDIMScheduler"} if kind == "DDIMPipeline" else fields
    )


def scheduler_of(pipeline: Pipeline) -> published_schedulers.Scheduler:
    """What the pipeline's scheduler says; raises PretrainedError where its network was trained under other noise."""
    found = published_scheduler(pipeline.kind, pipeline.scheduler)
    for name in NETWORKS:
        network = getattr(pipeline, name)
        if network is not None and network.config.noising != found.noising:
            raise PretrainedError(
                f"the {name} was trained under {network.config.noising}, and the pipeline's scheduler has "
                f"{found.noising}: give it a scheduler of the same"
            )
    return found


def save_pipeline(pipeline: Pipeline, folder: Path, *, shard_bytes: int) -> None:
    """Writes a folder that diffusers loads; model_index.json, without which there is no pipeline, at the very end."""
    from zoo.pretrained import save_pretrained

    kind = _kind(pipeline.kind)
    if (folder / PIPELINE_INDEX).exists():
        raise PretrainedError(f"{folder} holds a pipeline already: name another folder, or move that one away")
    index: dict[str, Any] = {"_class_name": kind} | {name: [None, None] for name in LEFT_OUT.get(kind, ())}
    for name, cls in PIPELINES[kind].items():
        part = getattr(pipeline, name)
        if part is None:
            raise PretrainedError(f"a {kind} has a {name}, and this one has None: give it one")
        fields = {"architectures": [cls]} if name == "tokenizer" else part.config.to_published()
        if (found := _class(fields)) != cls:
            raise PretrainedError(f"a {kind} has a {name} of the class {cls}, and this one has {found!r}")
        index[name] = ["diffusers" if "_class_name" in fields else "transformers", cls]
    if not isinstance(pipeline.scheduler.get("_class_name"), str):
        raise PretrainedError("the pipeline's scheduler has no _class_name: give it that of a scheduler of diffusers")
    scheduler_of(pipeline)
    index["scheduler"] = ["diffusers", pipeline.scheduler["_class_name"]]
    for name in PIPELINES[kind]:
        if name in MODELS:
            save_pretrained(getattr(pipeline, name), folder / name, shard_bytes=shard_bytes)
    if jax.process_index() == 0:
        if pipeline.tokenizer is not None:
            _copy_tokenizer(pipeline.tokenizer, folder / "tokenizer")
        write_json(folder / "scheduler" / SCHEDULER, pipeline.scheduler)
        write_json(folder / PIPELINE_INDEX, index | dict(pipeline.settings))


def _kind(name: Any) -> str:
    if name not in PIPELINES:
        raise PretrainedError(
            f"{PIPELINE_INDEX} has _class_name {name!r}, and pipelines here are {', '.join(PIPELINES)}"
        )
    return name


def _checked(index: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The settings of an index that names the parts of its kind and no others; warns of those that are left out."""
    parts, dropped = PIPELINES[kind] | {"scheduler": None}, False
    settings = {name: index[name] for name in SETTINGS.get(kind, ()) if name in index}
    for name, value in index.items():
        if name.startswith("_") or name in settings:
            continue
        if not isinstance(value, list) or len(value) != 2 or not all(isinstance(x, str | None) for x in value):
            raise PretrainedError(f"{PIPELINE_INDEX} has {name} {value!r}, which a {kind} here knows nothing of")
        if name in parts or value[1] is None:
            continue
        if name not in LEFT_OUT.get(kind, ()):
            raise PretrainedError(f"{PIPELINE_INDEX} names a {name} ({value[1]}), which a {kind} here has none of")
        warnings.warn(f"the {name} ({value[1]}) of a {kind} is left out: zoo has none", stacklevel=4)
        dropped |= name == "safety_checker"
    for name, cls in parts.items():
        found = (index.get(name) or [None, None])[1]
        if found is None or cls not in (None, OTHER_NAMES.get(found, found)):
            wanted = "one" if cls is None else f"a {cls}"
            raise PretrainedError(f"{PIPELINE_INDEX} has {name} {found!r}, and a {kind} here has {wanted} there")
    return settings | ({"requires_safety_checker": False} if dropped else {})


def _inside(folder: Path, name: str, file: str) -> Path:
    """The folder of a part, which must be there, and not by a link to somewhere else.

    Older ones with a single model, as google/ddpm-cifar10-32, have no such folders: `file` and weights lie beside the
    index.
    """
    place = folder / name
    if not place.exists() and (folder / file).is_file():
        return folder
    if not place.is_dir():
        raise PretrainedError(f"{place} is not there, and {PIPELINE_INDEX} names a {name}: fetch it")
    if not place.resolve().is_relative_to(folder.resolve()):
        raise PretrainedError(f"{place} is a link out of {folder}: put the {name} itself there")
    return place


def _check_class(place: Path, cls: str) -> None:
    if (found := _class(read_json(place / "config.json"))) != cls:
        raise PretrainedError(f"{place / 'config.json'} is of the class {found!r}, and the pipeline has a {cls} there")


def _class(fields: Mapping[str, Any]) -> Any:
    """The published class that a config.json names."""
    architectures = fields.get("architectures")
    name = fields.get("_class_name", architectures[0] if isinstance(architectures, list) and architectures else None)
    return OTHER_NAMES.get(name, name) if isinstance(name, str) else name


def _copy_tokenizer(tokenizer: Tokenizer, place: Path) -> None:
    """The files that a tokenizer was read from; nothing about them depends on this library."""
    place.mkdir(parents=True, exist_ok=True)
    for pattern in TOKENIZER_FILES:
        for path in tokenizer.settings.folder.glob(pattern):
            shutil.copyfile(path, place / path.name)
