"""Run folders: config.json, metrics.jsonl, checkpoints/ and what a run adds. Created or resumed, never replaced."""

import contextlib
import dataclasses
import fcntl
import json
import time
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from zoo.train.experiment import DataInfo, Experiment, UserError, differing_fields

E = TypeVar("E", bound=Experiment[Any, Any, Any, Any])

CONFIG = "config.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer.json"


def default_folder(experiment: Experiment[Any, Any, Any, Any]) -> Path:
    """runs/NAME-TIMESTAMP, a folder that is not there yet."""
    base = Path("runs") / f"{experiment.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, count = base, 1
    while folder.exists():
        count += 1
        folder = base.with_name(f"{base.name}-{count}")
    return folder


def is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def is_published(folder: Path) -> bool:
    """Whether the config.json of a folder is that of a published model, and not of a run."""
    return is_run(folder) and '"experiment"' not in (folder / CONFIG).read_text()


def check(folder: Path, experiment: Experiment[Any, Any, Any, Any]) -> None:
    """Raises UserError unless `experiment` may use `folder`: it is missing, empty, or a run of the same experiment."""
    if is_run(folder):
        differing = differing_fields(load(folder, experiment), experiment)
        if differing:
            raise UserError(
                f"--run {folder} holds another experiment ({'; '.join(differing)}): "
                "choose another folder, or the same flags"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--run {folder} is not a run and not an empty folder: choose another folder")


def create(
    folder: Path, experiment: Experiment[Any, Any, Any, Any], model: Any, data: DataInfo, tokenizer: Path | None = None
) -> None:
    """Makes `folder` a run of `experiment` on `data`, or checks that it is; what it holds stays.

    model: the config as fitted to the data, and tokenizer: a file of which the folder keeps a copy, are for using the
    run where its data is not. Raises UserError where it is a run of another experiment, or of data with other contents.
    """
    check(folder, experiment)
    if is_run(folder):
        check_data(folder, data)
        return
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        _write(folder / TOKENIZER, tokenizer.read_bytes())
    content = {"experiment": encode(experiment), "model": encode(model), "data": dataclasses.asdict(data)}
    _write(folder / CONFIG, json.dumps(content, indent=2).encode() + b"\n")


def check_data(folder: Path, data: DataInfo) -> None:
    """Raises UserError where the training data is not what the run was started with."""
    known = _read(folder)["data"]["sha256"]
    if known != data.sha256:
        raise UserError(
            f"the training data of run {folder} had SHA-256 {known[:16]} and now has {data.sha256[:16]}: "
            "bring the old data back, or choose another folder"
        )


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in a run's folder; raises UserError where one does. Ends with the process."""
    with open(folder / CONFIG, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--run {folder} is being trained by another process: wait, or choose another") from None
        except OSError:
            pass  # a file system without locks
        yield


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def name(folder: Path) -> str:
    """The name of the experiment that `folder` is a run of; raises UserError where it is none."""
    if not is_run(folder):
        raise UserError(f"{folder} is not a run (it has no {CONFIG}): name a folder that zoo train made")
    return _read(folder)["experiment"]["name"]


def load(folder: Path, default: E) -> E:
    """The experiment of a run. `default`, the recipe's own, says of what types its parts are.

    Raises UserError where the file is of other types.
    """
    content = _read(folder)["experiment"]
    if content["name"] != default.name:
        raise UserError(f"{folder} is a run of {content['name']}, not of {default.name}: choose another folder")
    return decode(content, type(default), default, str(folder / CONFIG))


def load_model(folder: Path, default: Any) -> Any:
    """The config of a run's model, as fitted to its data. `default` is of its type."""
    return decode(_read(folder)["model"], type(default), default, str(folder / CONFIG))


def load_data(folder: Path) -> dict[str, Any]:
    """The fields of the DataInfo that a run was started with."""
    return _read(folder)["data"]


def _read(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / CONFIG).read_text())
        if "model_type" in content:
            raise UserError(
                f"{folder} is a published model and not a run: zoo.from_pretrained({str(folder)!r}) loads it"
            )
        missing = [part for part in ("experiment", "model", "data") if not isinstance(content[part], dict)]
        if missing or not isinstance(content["experiment"]["name"], str) or "sha256" not in content["data"]:
            raise ValueError("parts are missing")
        return content
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} is damaged ({error}): restore it, or start another run") from None


def encode(value: Any) -> Any:
    """A dataclass of dataclasses, tuples, paths and plain values as JSON's types."""
    if dataclasses.is_dataclass(value):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def decode(content: Any, hint: Any, default: Any, where: str) -> Any:
    """The inverse of `encode` by a type hint and, for dataclasses, an instance that says which one a field holds."""
    if dataclasses.is_dataclass(default) and isinstance(content, dict):
        kind: Any = type(default)
        hints = typing.get_type_hints(kind)
        known = {f.name for f in dataclasses.fields(kind)}
        if set(content) != known:
            odd = ", ".join(sorted(set(content) ^ known))
            raise UserError(f"{where} and this version differ in fields {odd} of {kind.__name__}: start another run")
        return kind(**{k: decode(v, hints[k], getattr(default, k), where) for k, v in content.items()})
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    choices = typing.get_args(hint) if is_union else (hint,)
    for choice in choices:
        if (typing.get_origin(choice) or choice) is tuple and isinstance(content, list):
            items = typing.get_args(choice)
            inner = items[0] if items else Any
            return tuple(decode(item, inner, None, where) for item in content)
        if choice is Path and isinstance(content, str):
            return Path(content)
        if dataclasses.is_dataclass(choice) and isinstance(content, dict):
            return decode(content, choice, choice(), where)  # pyright: ignore[reportCallIssue]
        if choice is float and type(content) is int and int not in choices:
            return float(content)
    return content
