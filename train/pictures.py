"""Images as PNG files: one grid of many, written whole or not at all, with how they were made; and images read."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin

from zoo.train.experiment import UserError

CAPTION_HEIGHT = 15  # pixels
WIDTH = 640  # pixels, about, of a grid


def grid(images: np.ndarray, columns: int, *, scale: int = 1, gap: int = 1) -> np.ndarray:
    """images [N, Y, X, C] in [-1, 1] side by side, row by row: [Y', X', C] uint8.

    scale: how many pixels a side each pixel becomes. gap: pixels between images, before scaling, mid-grey.
    Values outside [-1, 1] are clipped; places after the last image are left grey.
    """
    images = np.asarray(images, np.float32)
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    canvas = np.zeros((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), np.float32)
    for i, image in enumerate(images):
        y, x = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[y : y + height, x : x + width] = image
    levels = np.round((np.clip(canvas, -1, 1) + 1) * 127.5).astype(np.uint8)
    return levels.repeat(scale, 0).repeat(scale, 1)


def captioned(images: np.ndarray, captions: Sequence[str], columns: int, *, scale: int = 1) -> np.ndarray:
    """As `grid`, with a line of text below each image, cut where it is wider than the image is drawn."""
    tiles = np.asarray(images, np.float32).repeat(scale, 1).repeat(scale, 2)
    _, _, width, channels = tiles.shape
    lines = []
    for caption in captions:
        line = Image.new("L", (width, CAPTION_HEIGHT))
        ImageDraw.Draw(line).text((2, 2), caption, fill=255)
        lines.append(np.asarray(line, np.float32)[..., None].repeat(channels, -1) / 127.5 - 1)
    return grid(np.concatenate([tiles, np.stack(lines)], 1), columns, gap=4)


def check_grid(rows: int, columns: int, scale: int | None) -> None:
    """Raises UserError for a grid that shows nothing."""
    if rows < 1 or columns < 1:
        raise UserError(f"a grid of {rows} x {columns} images is empty: choose both sides from 1")
    if scale is not None and scale < 1:
        raise UserError(f"a scale of {scale} pixels shows nothing: choose a whole number from 1, or None")


def save(
    images: np.ndarray,
    columns: int,
    folder: Path,
    name: str = "samples",
    *,
    scale: int | None = None,
    captions: Sequence[str] | None = None,
) -> str:
    """Writes folder/NAME.png, a grid of images with or without captions, in the first process; returns its path.

    scale: None: so much that the grid is about WIDTH wide.
    """
    path = folder.absolute() / f"{name}.png"
    if jax.process_index() == 0:
        scale = scale or max(1, WIDTH // (columns * (images.shape[2] + 1)))
        drawn = (
            grid(images, columns, scale=scale)
            if captions is None
            else captioned(images, captions, columns, scale=scale)
        )
        write_png(drawn, path)
    return str(path)


def write_png(pixels: np.ndarray, path: Path, *, text: Mapping[str, str] | None = None) -> None:
    """Writes pixels [Y, X, C] uint8 (C is 1, 3 or 4) to `path`, by way of a temporary file beside it.

    text: of the picture, by keyword, as the file's tEXt chunks (iTXt where it is not Latin-1).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    told = PngImagePlugin.PngInfo()
    for keyword, value in (text or {}).items():
        told.add_text(keyword, value)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        image.save(temporary, format="PNG", pnginfo=told)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def describe(path: Path, text: Mapping[str, str]) -> None:
    """Writes a PNG again with `text`, as `write_png` has it."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    write_png(pixels[..., None] if pixels.ndim == 2 else pixels, path, text=text)


def read_image(path: Path, channels: int) -> np.ndarray:
    """The image of a file as [Y, X, C] uint8, upright, of 1 or 3 channels; raises UserError where there is none."""
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise UserError(f"{path} cannot be read as an image of {channels} channels: those of 1 and 3 are")
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            upright = ImageOps.exif_transpose(image).convert(modes[channels])
    except FileNotFoundError:
        raise UserError(f"{path} is not there: name an image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise UserError(f"{path} is no whole image ({reason}): give another file") from None
    pixels = np.asarray(upright)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def resized(pixels: np.ndarray, size: tuple[int, int], *, smooth: bool = True) -> np.ndarray:
    """pixels [Y, X, C] uint8 as [*size, C]."""
    way = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    y, x = size
    planes = [np.asarray(Image.fromarray(plane).resize((x, y), way)) for plane in np.moveaxis(pixels, -1, 0)]
    return np.stack(planes, -1)
