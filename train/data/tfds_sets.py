"""Data sets of TFDS by name, read without TensorFlow."""

import contextlib
import difflib
import io
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from zoo.train.data.cache import locked, tfds_dir
from zoo.train.experiment import UserError


class TfdsSet:
    """A data set of TFDS by name[/config][:version], prepared (downloaded) at first use if it is not yet.

    Where it has no "validation", a part of its "train" is to be held out (its "test", if any, stays unread).
    """

    def __init__(self, name: str):
        self._name = name

    @property
    def name(self) -> str:
        return self._builder.info.full_name

    @cached_property
    def _builder(self) -> Any:
        return tfds_builder(self._name)

    @property
    def _shards(self) -> dict[str, Any]:
        """Lengths of the shards of each split, for a fingerprint."""
        return {name: split.shard_lengths for name, split in sorted(self._builder.info.splits.items())}

    @property
    def _is_divided(self) -> bool:
        return "validation" in self._builder.info.splits


def tfds_builder(name: str) -> Any:
    """A prepared builder of any TFDS data set; UserError in one line for what TFDS says in many."""
    import tensorflow_datasets as tfds

    base = name.split(":")[0].split("/")[0]
    folder = tfds_dir(base)
    lock = contextlib.nullcontext() if "://" in folder else locked(Path(folder) / f"{base}.lock")
    try:
        with quiet():
            builder = tfds.builder(name, data_dir=folder)
            if not builder.is_prepared():
                with lock:
                    builder = tfds.builder(name, data_dir=folder, file_format="array_record")
                    builder.download_and_prepare()
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(base, ["python_docs", *tfds.list_builders(with_community_datasets=False)], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "tfds.list_builders() lists them"
        raise UserError(f"{name!r} is no file, no folder and no TFDS data set: {hint}") from error
    except Exception as error:  # builders raise whatever their download, their extraction and their code raise
        raise UserError(f"TFDS data set {name!r} cannot be prepared in {folder}: {_reason(error)}") from error
    if "train" not in builder.info.splits:
        raise UserError(f"TFDS data set {name!r} has no split 'train': its splits are {listed(builder.info.splits)}")
    return builder


def tfds_read(builder: Any, split: str) -> Iterator[dict[str, Any]]:
    """The examples of a split; UserError where they are damaged, or stored in a format that needs TensorFlow."""
    stored = f"{builder.info.full_name} in {builder.data_dir}"
    try:
        yield from builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise UserError(
            f"{stored} is stored as {builder.info.file_format.value}: "
            "write it as ArrayRecord with `tfds convert_format --out_file_format array_record`"
        ) from error
    except (RuntimeError, OSError, ValueError, IndexError) as error:
        raise UserError(
            f"{stored} is damaged: delete that folder, and it is prepared anew ({_reason(error)})"
        ) from error


def listed(names: Iterable[str]) -> str:
    """Names in quotes, the first twenty of them."""
    return ", ".join(repr(name) for name in list(names)[:20]) or "none"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without TFDS's lines on standard output and its warnings; bars of downloads go to standard error, and stay."""
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _reason(error: BaseException) -> str:
    """The first line of what went wrong; of an import that failed far below, the package that is missing."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and cause.name is not None:
            return f"writing it needs the package {cause.name}: install it for this once"
        cause = cause.__cause__ or cause.__context__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
