"""Files of a local data set: which there are, to which split each belongs, and whether they have changed."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from zoo.train.data.splits import SPLITS
from zoo.train.experiment import UserError

_VALIDATION_NAMES = ("validation", "valid", "val", "dev")


class LocalFiles:
    """A data set that is a file, or files of a folder and those below it, and bears its name."""

    def __init__(self, path: Path, suffixes: Sequence[str]):
        self._path, self._suffixes = path, suffixes

    @property
    def name(self) -> str:
        return self._path.resolve().name

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        return files_by_split(self._path, self._suffixes)


def files_by_split(path: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """Files below `path` (or `path` itself) that end in one of `suffixes`, in order of their names, by split.

    A folder that holds both train and validation (folders, or files such as train.jsonl) is split by them, and what is
    in neither is left alone. Otherwise all stand under "". Raises UserError where there are none.
    """
    below = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [file for file in below if file.suffix.lower() in suffixes and file.is_file()]
    if not found:
        kinds = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
        raise UserError(f"{path} holds no {kinds} file" if path.is_dir() else f"{path} is not a {kinds} file")
    by_split: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for file in found if path.is_dir() else ():
        first = file.relative_to(path).parts[0].split(".")[0]
        split = "validation" if first in _VALIDATION_NAMES else first
        if split in by_split:
            by_split[split].append(file)
    return by_split if all(by_split.values()) else {"": found}


def files_fingerprint(path: Path, files: Mapping[str, Sequence[Path]]) -> str:
    """Changes with the name, size or time of any of the files."""
    digest = hashlib.sha256()
    for split, members in files.items():
        for file in members:
            stat = file.stat()
            digest.update(f"{split} {file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return f"{path.resolve()} {digest.hexdigest()}"
