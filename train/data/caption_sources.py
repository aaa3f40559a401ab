"""Where images with captions come from: scikit-learn's digits, described, and folders of pictures with a list of texts.

A source is one of images and, in the same order, one of documents: what keeps pixels and what tokenises text read it.
"""

import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

import numpy as np

from zoo.train.data.digit_captions import captions
from zoo.train.data.files import files_fingerprint
from zoo.train.data.image_sources import SUFFIXES, Digits, Example, read_picture, resized
from zoo.train.data.splits import SPLITS, check_fraction, content_hash, held_out
from zoo.train.data.text_sources import fields_of, lines
from zoo.train.experiment import UserError

LISTS = ("captions.jsonl", "metadata.jsonl")
_SHOWN = 3


class CaptionSource(Protocol):
    """`examples` and `documents` of a split are of the same images, in the same order, at every call."""

    @property
    def name(self) -> str: ...

    def fingerprint(self) -> str: ...

    def examples(self, split: str) -> Iterator[Example]: ...

    def documents(self, split: str) -> Iterator[str]: ...


def caption_source(source: str, size: int | None, field: str, fraction: float, unpaired: float) -> CaptionSource:
    """The data set that `source` names: "digits", or a folder with captions.jsonl or metadata.jsonl.

    unpaired: share of pictures and of captions that may be without the other.
    """
    check_fraction(fraction)
    if size is not None and size < 1:
        raise UserError(f"image size {size} is not a whole number from 1")
    if not 0 <= unpaired <= 1:
        raise UserError(f"--data.unpaired {unpaired} is not a share: choose from 0 to 1")
    if source == "digits":
        return CaptionedDigits(size, fraction)
    path = Path(source).expanduser()
    if not source or not path.is_dir():
        raise UserError(f"no folder {source!r}: give digits, or a folder of pictures with {' or '.join(LISTS)}")
    return CaptionedFolder(path, size, field, fraction, unpaired)


class CaptionedDigits:
    """scikit-learn's digits with what zoo.train.data.digit_captions says of them."""

    def __init__(self, size: int | None, fraction: float):
        self._digits, self._plain = Digits(size, fraction), Digits(None, fraction)

    name = "digits with captions"

    def fingerprint(self) -> str:
        return f"captions 1 {self._digits.fingerprint()}"

    def examples(self, split: str) -> Iterator[Example]:
        return self._digits.examples(split)

    def documents(self, split: str) -> Iterator[str]:
        return iter(self._captions[split])

    @cached_property
    def _captions(self) -> dict[str, list[str]]:
        # Measured over all digits, as they are published; those held out are chosen by the images that are trained on.
        everything = [example for split in SPLITS for example in self._plain.examples(split)]
        images, labels = (np.array(column) for column in zip(*everything, strict=True))
        of = dict(zip((image.tobytes() for image in images), captions(images[..., 0], labels), strict=True))
        order = {split: [example.image.tobytes() for example in self._plain.examples(split)] for split in SPLITS}
        return {split: [of[image] for image in images] for split, images in order.items()}


class Pair(NamedTuple):
    """A picture, and a text that is said of it."""

    file: Path
    caption: str


class CaptionedFolder:
    """Pictures of a folder and those below it, and captions.jsonl (or metadata.jsonl, as Hugging Face's image folders
    have it), lines of {"file_name": "a/b.png", "text": "..."}; a picture may have several.

    Where `train` and `validation` in it each have such a list they are the splits; otherwise `fraction` is held out, by
    the hash of each picture's file. Nothing outside the folder is read. Pictures are grey where the first one is.
    """

    def __init__(self, path: Path, size: int | None, field: str, fraction: float, unpaired: float):
        self._path, self._size, self._field = path, size, field
        self._fraction, self._unpaired = fraction, unpaired

    @property
    def name(self) -> str:
        return self._path.resolve().name

    def fingerprint(self) -> str:
        files = {"": [file for _, file in self._lists] + self._pictures(self._path)}
        return f"{files_fingerprint(self._path, files)} {self._size} {self._field} {self._fraction} {self._unpaired}"

    def examples(self, split: str) -> Iterator[Example]:
        grey: bool | None = None
        for file, _ in self._pairs[split]:
            image, is_grey = read_picture(file, grey)
            grey = is_grey if grey is None else grey
            yield Example(resized(image, self._size), 0)

    def documents(self, split: str) -> Iterator[str]:
        return (caption for _, caption in self._pairs[split])

    @cached_property
    def _lists(self) -> list[tuple[Path, Path]]:
        """Folders and their lists of captions: those of the splits, or one."""
        folders = [self._path / split for split in SPLITS]
        found = [(folder, _list_of(folder)) for folder in folders]
        if not all(listed for _, listed in found):
            found = [(self._path, _list_of(self._path))]
        if found[0][1] is None:
            raise UserError(f"{self._path} holds no {' or '.join(LISTS)}: write one, a line for each picture")
        return [(folder, listed) for folder, listed in found if listed is not None]

    @cached_property
    def _pairs(self) -> dict[str, list[Pair]]:
        if len(self._lists) == len(SPLITS):
            return {split: self._read(*place) for split, place in zip(SPLITS, self._lists, strict=True)}
        pairs = self._read(*self._lists[0])
        hashes = {file: content_hash(file.read_bytes()) for file in {pair.file for pair in pairs}}
        mask = held_out([hashes[pair.file] for pair in pairs], np.ones(len(pairs)), self._fraction)
        kept = {"train": ~mask, "validation": mask}
        return {split: [pair for pair, here in zip(pairs, kept[split], strict=True) if here] for split in SPLITS}

    def _read(self, folder: Path, listed: Path) -> list[Pair]:
        """What a list says of the pictures that are there; UserError where too many are not, or are not in the list."""
        pictures, pairs, absent = set(self._pictures(folder)), [], []
        for where, line in lines(listed):
            if line.strip():
                name, caption = fields_of(line, ("file_name", self._field), where)
                file = _inside(folder, name, where)
                if file in pictures and caption.strip():
                    pairs.append(Pair(file, caption.strip()))
                elif file not in pictures:
                    absent.append(name)
        bare = sorted(f"{file.relative_to(folder)}" for file in pictures - {pair.file for pair in pairs})
        self._report(listed, len(pairs), absent, bare)
        return pairs

    def _report(self, listed: Path, pairs: int, absent: list[str], bare: list[str]) -> None:
        found = ((absent, "captions without a picture"), (bare, "pictures without a caption"))
        said = [f"{len(names):,} {what} ({', '.join(names[:_SHOWN])})" for names, what in found if names]
        if not said:
            return
        message = f"{listed} has {pairs:,} pairs, {' and '.join(said)}"
        if len(absent) + len(bare) > self._unpaired * (pairs + len(absent) + len(bare)):
            raise UserError(f"{message}: mend it, or allow a larger share by --data.unpaired")
        print(f"{message}, which are left out", file=sys.stderr)

    def _pictures(self, folder: Path) -> list[Path]:
        return [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file()]


def _list_of(folder: Path) -> Path | None:
    return next((folder / name for name in LISTS if (folder / name).is_file()), None)


def _inside(folder: Path, name: str, where: str) -> Path:
    """The file of this name below `folder`; UserError for one that would be elsewhere, by way of a link too."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise UserError(f"{where} names {name!r}, which is not below {folder}: give a path below it")
    if not (folder / path).resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{where} names {name!r}, a link to outside of {folder}: put the picture there")
    return folder / path
