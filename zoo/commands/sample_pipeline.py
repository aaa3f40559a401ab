"""`zoo sample FOLDER [flags]` of a published pipeline: its images in one PNG file."""

import contextlib
import math
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import zoo
from zoo import sharding
from zoo.commands.flags import parse
from zoo.commands.runs import Devices, key_of
from zoo.image_generation import (
    USUAL,
    denoiser,
    draw,
    image_channels,
    share_of_steps,
    table_of,
    told_by,
    usual_steps,
    wanted_size,
)
from zoo.pipelines import Pipeline
from zoo.train import launch, pictures
from zoo.train.experiment import UserError
from zoo.train.image_sampler import chosen_classes, class_ranges
from zoo.train.processes import is_first
from zoo.train.progress import sampling


@dataclass(frozen=True)
class Request:
    """What to draw. What is left out is as the pipeline is published."""

    prompt: tuple[str, ...] = ()  # what to draw, of pipelines that are told a text; one or several
    negative_prompt: str | None = None  # what guidance leads away from
    classes: str | None = None  # what to draw, of pipelines that are told classes: 207,360, or 0-9, all, none
    count: int | None = None  # images; as many as prompts or classes, else 1
    columns: int | None = None  # of the grid; about as many as rows
    steps: int | None = None  # along the schedule
    sampler: str | None = None  # ddpm, ddim, euler, dpmpp_2m or plms
    guidance: float | None = None  # towards what is asked for; 1 is none
    rescale: float = 0.0  # share of guidance's contrast that is taken back
    seed: int = 0  # another number, other images
    size: str | None = None  # height x width in pixels: 512x768; that of --image, else what it was trained on
    image: Path | None = None  # begin with this one; with --size it is resized
    strength: float | None = None  # share of the steps that change --image; 0.8, with --mask 1
    mask: Path | None = None  # paint --image anew where this one is white, keep it where it is black
    out: Path | None = None  # a new PNG file; the first that is free of samples.png, samples-2.png, ...
    dtype: str | None = None  # of weights and products, such as bfloat16; as stored, and float32


def sample_pipeline(source: str, arguments: Sequence[str]) -> int:
    description = f"Draws from {source}, a published pipeline, into a new PNG file; its metadata say how."
    request, devices = parse((Request(), Devices()), arguments, prog=f"zoo sample {source}", description=description)
    # What needs no weights to be refused is refused before they are read.
    size = parsed_size(request.size)
    class_ranges(request.classes or "all")
    share_of_steps(request.image, request.mask, request.strength)
    if request.columns is not None and request.columns < 1:
        raise UserError(f"--columns {request.columns} make no grid: choose a number from 1")
    target = new_file(request.out)
    launch.start(devices.placement())
    mesh = sharding.make_mesh(devices.mesh)
    sharding.check_used(mesh)
    key = key_of(request.seed)
    with told_in_one_line():
        pipeline = zoo.from_pretrained(source, dtype=request.dtype, mesh=mesh)
        size = None if size is None else wanted_size(pipeline, size)
        image, mask = given_images(request, pipeline, size)
        size = wanted_size(pipeline, image.shape[:2] if image is not None else size)
        table = table_of(
            pipeline,
            steps=request.steps,
            sampler=request.sampler,
            strength=share_of_steps(image, mask, request.strength),
        )
        with sharding.use(mesh), sampling(table.path.steps) as told:
            images = draw(
                pipeline,
                key,
                prompts=request.prompt or None,
                negative_prompt=request.negative_prompt,
                classes=wanted_classes(pipeline, request.classes),
                count=request.count,
                steps=request.steps,
                sampler=request.sampler,
                guidance=request.guidance,
                rescale=request.rescale,
                size=size,
                image=image,
                mask=mask,
                strength=request.strength,
                callback=told,
            )
            images = np.asarray(images)
    if is_first():
        columns = request.columns or math.ceil(math.sqrt(len(images)))
        pixels = pictures.grid(images, columns, gap=0 if len(images) == 1 else 2)
        pictures.write_png(pixels, target, text=settings(source, request, pipeline, size))
        print(target)
    return 0


def parsed_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if not found or not all(map(int, found.groups())):
        raise UserError(f"--size {text} is none: give height x width in pixels, such as 512x768")
    return int(found[1]), int(found[2])


def wanted_classes(pipeline: Pipeline, text: str | None) -> list[int] | None:
    """The numbers that `text` names; none where the pipeline is told no classes, which `draw` refuses."""
    if text is None:
        return None
    if told_by(pipeline) != "classes":
        return []
    config = denoiser(pipeline).config
    return chosen_classes(text, config.num_classes, none=config.null_class)


def new_file(asked: Path | None) -> Path:
    """The file to write, which is not there yet."""
    if asked is None:
        names = (Path(f"samples{number}.png") for number in ["", *(f"-{i}" for i in range(2, 100_000))])
        return next(path for path in names if not path.exists()).absolute()
    if asked.suffix.lower() != ".png":
        raise UserError(f"--out {asked} is no PNG file: give it the ending .png")
    if asked.exists():
        raise UserError(f"--out {asked} is there already: name another file, or move that one away")
    if (file := next((place for place in asked.parents if place.is_file()), None)) is not None:
        raise UserError(f"--out {asked} is below {file}, which is a file: name a folder there")
    return asked.absolute()


def given_images(
    request: Request, pipeline: Pipeline, size: tuple[int, int] | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """image [Y, X, C] in [-1, 1] and mask [Y, X, 1], 1 where to paint; both of `size` where it is given."""
    if request.image is None:
        return None, None
    pixels = resized(request.image, pictures.read_image(request.image, image_channels(pipeline)), size)
    image = pixels.astype(np.float32) / 127.5 - 1
    if request.mask is None:
        return image, None
    mask = resized(request.mask, pictures.read_image(request.mask, 1), size, smooth=False)
    if mask.shape[:2] != image.shape[:2]:
        sides = [f"{a.shape[0]}x{a.shape[1]}" for a in (mask, image)]
        raise UserError(f"--mask is {sides[0]} and --image {sides[1]}: give --size {sides[1]}, which resizes both")
    return image, (mask > 127).astype(np.float32)


def resized(path: Path, pixels: np.ndarray, size: tuple[int, int] | None, *, smooth: bool = True) -> np.ndarray:
    if size is None or pixels.shape[:2] == size:
        return pixels
    print(f"{path} is {pixels.shape[0]}x{pixels.shape[1]}: resized to {size[0]}x{size[1]}", file=sys.stderr)
    return pictures.resized(pixels, size, smooth=smooth)


def settings(source: str, request: Request, pipeline: Pipeline, size: tuple[int, int]) -> dict[str, str]:
    """How images were made, as their file says it; what was left out is there as it was taken."""
    guidance = USUAL[pipeline.kind].guidance if request.guidance is None else request.guidance
    taken: dict[str, Any] = {
        "model": source,
        "pipeline": pipeline.kind,
        "prompt": "\n".join(request.prompt) or None,
        "negative prompt": request.negative_prompt,
        "classes": request.classes,
        "seed": request.seed,
        "steps": usual_steps(pipeline) if request.steps is None else request.steps,
        "sampler": request.sampler or pipeline.scheduler["_class_name"],
        "guidance": guidance,
        "rescale": request.rescale,
        "size": f"{size[0]}x{size[1]}",
        "image": request.image,
        "mask": request.mask,
        "strength": share_of_steps(request.image, request.mask, request.strength) if request.image else None,
        "dtype": request.dtype,
        "Software": f"flaxzoo {zoo.__version__}",
    }
    return {name: str(value) for name, value in taken.items() if value is not None}


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """Warnings as the command says them."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if is_first():
            print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
