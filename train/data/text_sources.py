"""Where text comes from: the interpreter, local files, TFDS; each read as documents of two splits."""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from zoo.train.data import topics
from zoo.train.data.files import LocalFiles, files_fingerprint
from zoo.train.data.splits import UndividedText, check_fraction
from zoo.train.data.tfds_sets import TfdsSet, listed, tfds_read
from zoo.train.experiment import UserError

_SUFFIXES = (".txt", ".jsonl")


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
    check_fraction(fraction)
    if source == "python_docs":
        return PythonDocsText()
    path = Path(source).expanduser()
    if source and path.exists():
        return LocalText(path, field, fraction)
    if not source or path.is_absolute() or source.startswith((".", "~")) or path.suffix in _SUFFIXES:
        raise UserError(f"no file or folder {source!r}: give a .txt or .jsonl file, a folder of them, or a TFDS name")
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

        for example in tfds_read(python_docs.builder(), split):
            yield example["text"].decode()


class LocalText(LocalFiles):
    """Text files (one document each) and JSON lines (one document a line) of a folder and those below it, or one file.

    A folder that holds both `train` and `validation` (folders, or files such as train.jsonl) is split by them, and
    other files are left alone; otherwise `fraction` of all is held out.
    """

    def __init__(self, path: Path, field: str, fraction: float):
        super().__init__(path, _SUFFIXES)
        self._field, self._fraction = field, fraction

    @cached_property
    def _undivided(self) -> UndividedText:
        return UndividedText(partial(self._read, self._files[""]), self._fraction)

    def fingerprint(self) -> str:
        fraction = self._fraction if "" in self._files else None
        return f"{files_fingerprint(self._path, self._files)} {self._field} {fraction}"

    def documents(self, split: str) -> Iterator[str]:
        if "" in self._files:
            return self._undivided.examples(split)
        return self._read(self._files[split])

    def _read(self, files: list[Path]) -> Iterator[str]:
        for file in files:
            try:
                if file.suffix.lower() == ".txt":
                    yield decoded(file.read_bytes(), file)
                else:
                    yield from self._read_lines(file)
            except OSError as error:
                raise UserError(f"{file} cannot be read: {error.strerror}") from error

    def _read_lines(self, file: Path) -> Iterator[str]:
        for where, line in lines(file):
            if line.strip():
                yield from fields_of(line, (self._field,), where)


class TfdsText(TfdsSet):
    """The texts of one feature of a TFDS data set."""

    def __init__(self, name: str, field: str, fraction: float):
        super().__init__(name)
        self._field, self._fraction = field, fraction

    @cached_property
    def _undivided(self) -> UndividedText:
        return UndividedText(partial(self._read, "train"), self._fraction)

    def fingerprint(self) -> str:
        return f"{self.name} {self._field} {self._fraction} {self._shards}"

    def documents(self, split: str) -> Iterator[str]:
        if self._is_divided:
            return self._read(split)
        return self._undivided.examples(split)

    def _read(self, split: str) -> Iterator[str]:
        for (text,) in tfds_texts(self._builder, split, (self._field,)):
            yield text


def tfds_texts(builder: Any, split: str, names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """These features of each example of a split; raises UserError where there is no such feature, or it is no text."""
    features, name = builder.info.features, builder.info.full_name
    if missing := [field for field in names if field not in features]:
        raise UserError(
            f"{name} has no feature {missing[0]!r}: its features are {listed(sorted(features))}; "
            "choose by --data.text-field"
        )
    for index, example in enumerate(tfds_read(builder, split)):
        for field in names:
            if not isinstance(example[field], bytes):
                raise UserError(f"feature {field!r} of {name} is not text: choose another by --data.text-field")
        yield tuple(decoded(example[field], f"{name}, {split} example {index}") for field in names)


def lines(file: Path) -> Iterator[tuple[str, str]]:
    """Where each line stands, in words, and the line; raises UserError where it is not UTF-8."""
    offset = 0
    with open(file, "rb") as opened:
        for number, line in enumerate(opened, 1):
            text = decoded(line, file, offset)
            offset += len(line)
            yield f"{file}, line {number}", text


def fields_of(line: str, names: Sequence[str], where: str) -> Iterator[str]:
    """The texts in these fields of a line of JSON; raises UserError where it has none such."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict):
        written = ", ".join(f'"{name}": "..."' for name in names)
        raise UserError(f"{where} is not a JSON object: write {{{written}}} on each line")
    for name in names:
        text = record.get(name)
        if not isinstance(text, str):
            what = f"no field {name!r}" if name not in record else f"{name!r} that is not a string"
            raise UserError(f"{where} has {what}: its fields are {listed(record)}; choose by --data.text-field")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where} holds half a surrogate pair in {name!r}, which is no text") from error
        yield text


def decoded(data: bytes, where: Path | str, offset: int = 0) -> str:
    """`data`, which begins at byte `offset` of what `where` names, as text; raises UserError where it is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}): "
            "convert it, for example by `iconv -f latin1 -t utf-8`"
        ) from error
