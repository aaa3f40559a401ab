"""Where pairs of a source and a target come from: the interpreter, local files, TFDS; each read as two splits.

A pair is two documents, one after the other, of a `TextSource`: what tokenises and keeps text does so for pairs.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path

from zoo.train.data import python_trees
from zoo.train.data.files import LocalFiles, files_fingerprint
from zoo.train.data.splits import Undivided, check_fraction
from zoo.train.data.text_sources import TextSource, fields_of, lines, tfds_texts
from zoo.train.data.tfds_sets import TfdsSet
from zoo.train.experiment import UserError

_SUFFIXES = (".tsv", ".jsonl")

Pair = tuple[str, str]


def pair_source(source: str, fields: str, fraction: float) -> TextSource:
    """The pairs that `source` names: "python_trees", a file or folder, or a TFDS name[/config][:version].

    fields: what holds source and target in JSON lines and TFDS features, a comma between them.
    fraction: of pairs without a split, to hold out.
    """
    check_fraction(fraction)
    names = [name.strip() for name in fields.split(",")]
    if len(names) != 2 or not all(names):
        raise UserError(f"--data.text-field {fields!r} names no source and target: write two names, a comma between")
    if source == "python_trees":
        return PythonTrees(fraction)
    path = Path(source).expanduser()
    if source and path.exists():
        return LocalPairs(path, (names[0], names[1]), fraction)
    if not source or path.is_absolute() or source.startswith((".", "~")) or path.suffix in _SUFFIXES:
        raise UserError(f"no file or folder {source!r}: give a .tsv or .jsonl file, a folder of them, or a TFDS name")
    return TfdsPairs(source, (names[0], names[1]), fraction)


def undivided(read: Callable[[], Iterator[Pair]], fraction: float) -> Undivided[Pair]:
    """Pairs without a split of their own: equal sources stay on one side."""
    return Undivided(read, lambda pair: (pair[0], len(pair[0]) + len(pair[1])), fraction)


class PythonTrees:
    """Statements of this interpreter's standard library, and their syntax trees: zoo.train.data.python_trees."""

    def __init__(self, fraction: float):
        self._fraction = fraction

    @property
    def name(self) -> str:
        return f"python_trees {python_trees.version()}"

    def fingerprint(self) -> str:
        folder, files = python_trees.library()
        return f"{self.name} {files_fingerprint(folder, {'': files})} {self._fraction}"

    def documents(self, split: str) -> Iterator[str]:
        return chain.from_iterable(self._undivided.examples(split))

    @cached_property
    def _undivided(self) -> Undivided[Pair]:
        pairs = python_trees.read()
        return undivided(lambda: iter(pairs), self._fraction)


class LocalPairs(LocalFiles):
    """Lines "source<TAB>target" of .tsv files, and JSON lines, of a folder and those below it, or of one file.

    Divided as text files are (zoo.train.data.text_sources.LocalText).
    """

    def __init__(self, path: Path, fields: Pair, fraction: float):
        super().__init__(path, _SUFFIXES)
        self._fields, self._fraction = fields, fraction

    @cached_property
    def _undivided(self) -> Undivided[Pair]:
        return undivided(lambda: self._read(self._files[""]), self._fraction)

    def fingerprint(self) -> str:
        fraction = self._fraction if "" in self._files else None
        return f"pairs {files_fingerprint(self._path, self._files)} {self._fields} {fraction}"

    def documents(self, split: str) -> Iterator[str]:
        whole = "" in self._files
        return chain.from_iterable(self._undivided.examples(split) if whole else self._read(self._files[split]))

    def _read(self, files: list[Path]) -> Iterator[Pair]:
        for file in files:
            empty = True
            try:
                for where, line in lines(file):
                    if line.strip(" \r\n"):
                        empty = False
                        yield self._pair(line, where, tabs=file.suffix.lower() == ".tsv")
            except OSError as error:
                raise UserError(f"{file} cannot be read: {error.strerror}") from error
            if empty:
                raise UserError(f"{file} holds no pairs: write one on each line, or take the file away")

    def _pair(self, line: str, where: str, *, tabs: bool) -> Pair:
        pair = line.rstrip("\r\n").split("\t") if tabs else list(fields_of(line, self._fields, where))
        if len(pair) != 2:
            raise UserError(
                f"{where} has {len(pair) - 1} tabs: write one, between source and target; it is {line!r:.60}"
            )
        for side, text in zip(("source", "target"), pair, strict=True):
            if not text.strip():
                raise UserError(f"{where} has an empty {side}: write it, or take the line away; it is {line!r:.60}")
        return pair[0], pair[1]


class TfdsPairs(TfdsSet):
    """Two features of a TFDS data set, such as the languages of a translation set. Pairs with an empty side, which
    published sets have, are left out.
    """

    def __init__(self, name: str, fields: Pair, fraction: float):
        super().__init__(name)
        self._fields, self._fraction = fields, fraction

    @cached_property
    def _undivided(self) -> Undivided[Pair]:
        return undivided(lambda: self._read("train"), self._fraction)

    def fingerprint(self) -> str:
        return f"pairs {self.name} {self._fields} {self._fraction} {self._shards}"

    def documents(self, split: str) -> Iterator[str]:
        return chain.from_iterable(self._read(split) if self._is_divided else self._undivided.examples(split))

    def _read(self, split: str) -> Iterator[Pair]:
        for source, target in tfds_texts(self._builder, split, self._fields):
            if source.strip() and target.strip():
                yield source, target
