"""IDX files, in which MNIST and Fashion-MNIST are published: for each split one of images and one of their classes.

A file is a magic number (two zero bytes, the type of its values, the number of axes), each axis's length as a
big-endian int32, and the values; yann.lecun.com/exdb/mnist. Sizes are read and compared before any values are.
"""

import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from zoo.train.experiment import UserError

PREFIXES = {"train": "train", "validation": "t10k"}
"""What the files of our splits begin with: the ten thousand that are published for tests are held out."""

_KINDS = {"images": 3, "labels": 1}
_SIDE = 1 << 14  # pixels; what is longer is no image of such a set


def idx_files(folder: Path) -> dict[str, tuple[Path, Path]]:
    """The files of images and of classes of each split, none where `folder` has no IDX files; UserError for a part."""
    if not folder.is_dir():
        return {}
    found = {(split, kind): _file(folder, split, kind) for split in PREFIXES for kind in _KINDS}
    if not any(found.values()):
        return {}
    for (split, kind), file in found.items():
        if file is None:
            there = next(file.name for file in found.values() if file is not None)
            raise UserError(f"{folder} holds {there} and no {_stem(split, kind)}[.gz]: add it")
    return {split: (cast(Path, found[split, "images"]), cast(Path, found[split, "labels"])) for split in PREFIXES}


def read_idx(images: Path, labels: Path) -> Iterator[tuple[np.ndarray, int]]:
    """uint8 [Y, X, 1] and the class of each, one image in memory at a time; UserError where a file is damaged."""
    with _opened(images) as pixels, _opened(labels) as classes:
        count, height, width = _sizes(pixels, images, "images")
        (classed,) = _sizes(classes, labels, "labels")
        if classed != count:
            raise UserError(f"{images} has {count} images and {labels} {classed} classes: they are of different sets")
        for number in range(count):
            image = _values(pixels, height * width, images, f"image {number} of {count}")
            label = _values(classes, 1, labels, f"class {number} of {count}")
            yield image.reshape(height, width, 1), int(label[0])
        for file, path in ((pixels, images), (classes, labels)):
            if _read(file, 1, path):
                raise UserError(f"{path} is longer than the {count} that its head announces: fetch it again")


def _stem(split: str, kind: str) -> str:
    return f"{PREFIXES[split]}-{kind}-idx{_KINDS[kind]}-ubyte"


def _file(folder: Path, split: str, kind: str) -> Path | None:
    """Unpacked, or else as published."""
    paths = (folder / f"{_stem(split, kind)}{suffix}" for suffix in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def _opened(path: Path) -> BinaryIO:
    try:
        return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _sizes(file: BinaryIO, path: Path, kind: str) -> tuple[int, ...]:
    """The length of each axis; of a file that is not packed, checked against its size."""
    axes = _KINDS[kind]
    head = _read(file, 4 + 4 * axes, path)
    magic = bytes([0, 0, 8, axes])  # 8: bytes without sign
    if head[:4] != magic:
        raise UserError(
            f"{path} is no IDX file of {kind}: it begins with {head[:4].hex()}, and they with {magic.hex()}"
        )
    if len(head) < 4 + 4 * axes:
        raise UserError(f"{path} ends within its head: fetch it again")
    count, *sides = struct.unpack(f">{axes}I", head[4:])
    if not count or not all(0 < side <= _SIDE for side in sides):
        raise UserError(f"{path} announces {' x '.join(map(str, (count, *sides)))} {kind}: fetch it again")
    expected = len(head) + count * int(np.prod(sides, dtype=np.int64))
    if path.suffix != ".gz" and (size := path.stat().st_size) != expected:
        raise UserError(f"{path} has {size} bytes, and its head announces {expected}: fetch it again")
    return count, *sides


def _values(file: BinaryIO, size: int, path: Path, what: str) -> np.ndarray:
    values = _read(file, size, path)
    if len(values) < size:
        raise UserError(f"{path} ends within {what}: fetch it again")
    return np.frombuffer(values, np.uint8)


def _read(file: BinaryIO, size: int, path: Path) -> bytes:
    try:
        return file.read(size)
    except EOFError:  # gzip, where its stream is cut short
        return b""
    except (OSError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}: fetch it again") from error
