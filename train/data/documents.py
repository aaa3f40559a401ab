"""Where text comes from: the interpreter, local files, TFDS; each read as documents of two splits."""

import contextlib
import difflib
import hashlib
import json
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from zoo.train.data import topics
from zoo.train.data.cache import locked, tfds_dir
from zoo.train.data.splits import SPLITS, Undivided
from zoo.train.experiment import UserError

_VALIDATION_NAMES = ("validation", "valid", "val", "dev")


class TextSource(Protocol):
    """A text data set. `documents` yields the same text in the same order at every call."""

    @property
    def name(self) -> str: ...

    def fingerprint(self) -> str:
        """Changes when the text may have changed; cheap: names, sizes and times of files, not their contents."""
        ...

    def documents(self, split: str) -> Iterator[str]:
        """The documents of "train" or "validation"; raises UserError where the text cannot be read."""
        ...


def text_source(source: str, field: str, fraction: float) -> TextSource:
    """The data set that `source` names: "python_docs", a file or folder, or a TFDS name[/config][:version].

    field: what holds the text, in JSON lines and TFDS features. fraction: of a set without a split, to hold out.
    """
    if source == "python_docs":
        return PythonDocsText()
    path = Path(source).expanduser()
    if path.exists():
        return LocalText(path, field, fraction)
    if path.is_absolute() or source.startswith((".", "~")) or path.suffix in (".txt", ".jsonl"):
        raise UserError(f"no file or folder {source}: give a .txt or .jsonl file, a folder of them, or a TFDS name")
    return TfdsText(source, field, fraction)


class PythonDocsText:
    """The TFDS data set `python_docs` of this interpreter (zoo.train.data.python_docs), prepared at first use."""

    @property
    def name(self) -> str:
        return f"python_docs {topics.topics_version()}"

    def fingerprint(self) -> str:
        return f"python_docs {topics.VERSION} {topics.topics_version()}"

    def documents(self, split: str) -> Iterator[str]:
        from zoo.train.data import python_docs  # brings in TFDS, which a prepared corpus does without

        for example in python_docs.builder().as_data_source(split=split):
            yield example["text"].decode()


class LocalText:
    """Text files (one document each) and JSON lines (one document a line) of a folder and those below it, or one file.

    A folder that holds both `train` and `validation` (folders, or files such as train.jsonl) is split by them, and other
    files are left alone; otherwise `fraction` of all is held out.
    """

    def __init__(self, path: Path, field: str, fraction: float):
        self._path, self._field, self._fraction = path, field, fraction

    @property
    def name(self) -> str:
        return self._path.resolve().name

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        """Files by split; all under "" where the folder has no split."""
        if self._path.is_file():
            found = [self._path]
        else:
            found = sorted(file for file in self._path.rglob("*") if file.suffix in (".txt", ".jsonl"))
            found = [file for file in found if file.is_file()]
        if not found or self._path.is_file() and self._path.suffix not in (".txt", ".jsonl"):
            what = "is neither" if self._path.is_file() else "holds no"
            raise UserError(
                f"{self._path} {what} .txt {'nor' if what == 'is neither' else 'or'} .jsonl: give such files"
            )
        by_split: dict[str, list[Path]] = {split: [] for split in SPLITS}
        for file in found if self._path.is_dir() else ():
            first = file.relative_to(self._path).parts[0].split(".")[0]
            split = "validation" if first in _VALIDATION_NAMES else first
            if split in by_split:
                by_split[split].append(file)
        return by_split if all(by_split.values()) else {"": found}

    @cached_property
    def _undivided(self) -> Undivided:
        return Undivided(partial(self._read, self._files[""]), self._fraction)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self._field} {self._fraction if '' in self._files else None}\n".encode())
        for split, files in self._files.items():
            for file in files:
                stat = file.stat()
                digest.update(f"{split} {file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return f"{self._path.resolve()} {digest.hexdigest()}"

    def documents(self, split: str) -> Iterator[str]:
        if "" in self._files:
            return self._undivided.documents(split)
        return self._read(self._files[split])

    def _read(self, files: list[Path]) -> Iterator[str]:
        for file in files:
            if file.suffix == ".txt":
                yield _decode(file.read_bytes(), file, 0)
            else:
                yield from self._read_lines(file)

    def _read_lines(self, file: Path) -> Iterator[str]:
        offset = 0
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                text = _decode(line, file, offset)
                offset += len(line)
                if text.strip():
                    yield self._field_of(text, f"{file}, line {number}")

    def _field_of(self, line: str, where: str) -> str:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f'{where} is not a JSON object: write {{"{self._field}": "..."}} on each line')
        text = record.get(self._field)
        if not isinstance(text, str):
            what = f"no field {self._field!r}" if self._field not in record else f"{self._field!r} that is not a string"
            raise UserError(f"{where} has {what}: its fields are {_listed(record)}; choose by --data.text-field")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where} holds half a surrogate pair in {self._field!r}, which is no text") from error
        return text


class TfdsText:
    """A data set of TFDS by name[/config][:version], read from ArrayRecord; prepared (downloaded) if it is not yet.

    Where it has no "validation", `fraction` of "train" is held out (its "test", if any, stays unread).
    """

    def __init__(self, name: str, field: str, fraction: float):
        self._name, self._field, self._fraction = name, field, fraction

    @property
    def name(self) -> str:
        return self._builder.info.full_name

    @cached_property
    def _builder(self) -> Any:
        return tfds_builder(self._name)

    @cached_property
    def _undivided(self) -> Undivided:
        return Undivided(partial(self._read, "train"), self._fraction)

    def fingerprint(self) -> str:
        splits = {name: split.shard_lengths for name, split in sorted(self._builder.info.splits.items())}
        return f"{self.name} {self._field} {self._fraction} {splits}"

    def documents(self, split: str) -> Iterator[str]:
        if "validation" in self._builder.info.splits:
            return self._read(split)
        return self._undivided.documents(split)

    def _read(self, split: str) -> Iterator[str]:
        features = self._builder.info.features
        if self._field not in features:
            raise UserError(
                f"{self.name} has no feature {self._field!r}: its features are {_listed(features)}; choose by --data.text-field"
            )
        for index, example in enumerate(tfds_read(self._builder, split)):
            text = example[self._field]
            if not isinstance(text, bytes):
                raise UserError(
                    f"feature {self._field!r} of {self.name} is not text: choose another by --data.text-field"
                )
            yield _decode(text, f"{self.name}, {split} example {index}", 0)


def tfds_builder(name: str) -> Any:
    """A prepared builder of any TFDS data set; UserError in one line for what TFDS says in many."""
    import tensorflow_datasets as tfds

    base = name.split(":")[0].split("/")[0]
    folder = tfds_dir(base)
    try:
        builder = tfds.builder(name, data_dir=folder)
        if not builder.is_prepared():
            with locked(Path(folder) / f"{base}.lock") if "://" not in folder else contextlib.nullcontext():
                builder = tfds.builder(name, data_dir=folder, file_format="array_record")
                builder.download_and_prepare()
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(base, ["python_docs", *tfds.list_builders()], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`tfds.list_builders()` lists them"
        raise UserError(f"{name!r} is no file, no folder and no TFDS data set: {hint}") from error
    except Exception as error:  # builders raise whatever their download, their extraction and their code raise
        raise UserError(f"TFDS data set {name!r} cannot be prepared in {folder}: {_first_line(error)}") from error
    if "train" not in builder.info.splits:
        raise UserError(f"TFDS data set {name!r} has no split 'train': its splits are {_listed(builder.info.splits)}")
    return builder


def tfds_read(builder: Any, split: str) -> Any:
    """The random-access source of a split; UserError where it is stored in a format without random access."""
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise UserError(
            f"{builder.info.full_name} in {builder.data_dir} is stored as {builder.info.file_format.value}: "
            "write it as ArrayRecord with `tfds convert_format --out_file_format array_record`"
        ) from error


def _decode(data: bytes, where: Path | str, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}): "
            "convert it, for example by `iconv -f latin1 -t utf-8`"
        ) from error


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in list(names)[:20]) or "none"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
