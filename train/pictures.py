"""Images as PNG files: one grid of many, written whole or not at all."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CAPTION_HEIGHT = 15  # pixels


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


def write_png(pixels: np.ndarray, path: Path) -> None:
    """Writes pixels [Y, X, C] uint8 (C is 1, 3 or 4) to `path`, by way of a temporary file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(temporary, format="PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
