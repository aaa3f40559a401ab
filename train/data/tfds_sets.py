"""Data sets of TFDS by name, read without TensorFlow."""

import contextlib
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zoo.train.data.cache import locked, tfds_dir
from zoo.train.experiment import UserError


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
        raise UserError(f"TFDS data set {name!r} has no split 'train': its splits are {listed(builder.info.splits)}")
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


def listed(names: Iterable[str]) -> str:
    """Names in quotes, the first twenty of them."""
    return ", ".join(repr(name) for name in list(names)[:20]) or "none"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
