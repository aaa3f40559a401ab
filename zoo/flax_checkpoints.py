"""Checkpoints of the Flax classes that Hugging Face transformers had until version 5, as published folders of today.

flax_model.msgpack is a tree of arrays in MessagePack. It is read as data: maps of names, and arrays of numbers whose
bytes are counted before they are taken; nothing else that the format can hold is admitted. Names and layouts are those
that transformers 4 read such files into its torch classes by: kernels are transposed, and the rest is renamed.
"""

import math
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import msgpack
import numpy as np

from zoo.models import published_config
from zoo.pretrained import SHARD_BYTES, refuse, wanted_tensors
from zoo.published_folder import FLOATS, PretrainedError, Writer, read_json

WEIGHTS = "flax_model.msgpack"
INDEX = "flax_model.msgpack.index.json"
MODEL_TYPES = ("bert", "gpt2", "t5")
"""What is converted: those whose Flax names differ from the torch ones by rule alone."""

BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")
"""What a folder holds besides, copied as it is: what tokenizers and generation read."""

_ARRAY, _NUMBER = 1, 3  # Flax's extension types; its complex numbers are none of a model's.
_CHUNKED = "__msgpack_chunked_array__"
_LIMITS = {"max_str_len": 1024, "max_array_len": 32, "max_map_len": 65536}


def convert(source: str | os.PathLike, target: str | os.PathLike) -> dict[str, Any]:
    """Writes the folder `target`, which `from_pretrained` and torch load, from a folder with flax_model.msgpack.

    Returns its config.json. Raises PretrainedError, and PublishedError for a config that no family here is; then
    nothing is written.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise PretrainedError(f"{target} is there and not an empty folder: name another, or move that one away")
    fields = _fields(source)
    tensors = {torch_name(path): value for path, value in arrays(source)}
    tensors = {name: value.T if kernel else value for (name, kernel), value in tensors.items()}
    config = published_config(fields)
    _check(source, tensors, config)
    writer = Writer(target, SHARD_BYTES)
    for name, value in tensors.items():
        writer.add(name, np.ascontiguousarray(value))
    for path in (path for pattern in BESIDE for path in sorted(source.glob(pattern))):
        if path.name not in ("config.json", INDEX):
            shutil.copyfile(path, target / path.name)
    dtypes = {str(value.dtype) for value in tensors.values()}
    fields |= {"dtype": "float32" if len(dtypes) > 1 else dtypes.pop()}
    writer.finish(fields)
    return fields


def _fields(source: Path) -> dict[str, Any]:
    fields = read_json(source / "config.json")
    if fields.get("model_type") not in MODEL_TYPES:
        raise PretrainedError(
            f"{source} has model_type {fields.get('model_type')!r}, and what is converted is {', '.join(MODEL_TYPES)}"
        )
    named = fields.get("architectures")
    if not isinstance(named, list):
        raise PretrainedError(
            f"{source / 'config.json'} has architectures {named!r}: write the class into a list there"
        )
    return fields | {"architectures": [str(name).removeprefix("Flax") for name in named]}


def torch_name(path: tuple[str, ...]) -> tuple[str, bool]:
    """A tensor's name in torch from its path in Flax, and whether it is a kernel, which lies transposed there."""
    *modules, last = path
    names = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    return ".".join((*modules, names.get(last, last))), last == "kernel"


def arrays(folder: Path) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Every array of a folder's Flax checkpoint, with its path."""
    for file in _files(folder):
        yield from _leaves(file, (), _tree(file))


def _files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise PretrainedError(f"{folder} has neither {WEIGHTS} nor {INDEX}: name the folder of a Flax checkpoint")
    named = read_json(folder / INDEX).get("weight_map")
    names = sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise PretrainedError(f"{folder / INDEX} names {name!r}, which is no file of this folder: refused")
    if not names:
        raise PretrainedError(f"{folder / INDEX} has no weight_map: fetch it again")
    return [folder / name for name in names]


def _tree(path: Path) -> Any:
    def extension(kind: int, content: bytes) -> np.ndarray:
        if kind not in (_ARRAY, _NUMBER):
            raise PretrainedError(f"{path} holds an extension of type {kind}, which is no array: refused")
        return _array(path, content)

    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            return msgpack.unpackb(pages, ext_hook=extension, strict_map_key=True, **_LIMITS)
    except PretrainedError:
        raise
    # msgpack has no class of its own for all that can be wrong with a file.
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as problem:
        reason = str(problem).strip() or type(problem).__name__
        raise PretrainedError(f"{path} is no whole MessagePack file ({reason}): fetch it again") from None


def _array(path: Path, content: bytes) -> np.ndarray:
    """An array from what Flax packs it as: shape, name of the dtype, bytes."""
    packed = msgpack.unpackb(content, max_str_len=32, max_array_len=32, max_map_len=0, max_ext_len=0)
    if not isinstance(packed, list) or len(packed) != 3:
        raise PretrainedError(f"{path} holds an array without shape, dtype and bytes: fetch it again")
    shape, kind, data = packed
    if kind not in FLOATS.values():
        raise PretrainedError(f"{path} holds an array of dtype {kind!r}, and weights are {', '.join(FLOATS.values())}")
    sizes = isinstance(shape, list) and all(isinstance(size, int) and size >= 0 for size in shape)
    dtype = jax.numpy.dtype(kind)
    if not sizes or not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        raise PretrainedError(f"{path} holds an array of shape {shape} whose bytes are another number: fetch it again")
    return np.frombuffer(data, dtype).reshape(shape)


def _leaves(file: Path, path: tuple[str, ...], tree: Any) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    if not path and not isinstance(tree, dict):
        raise PretrainedError(f"{file} holds a {type(tree).__name__}: a model's tree is a map of names")
    if isinstance(tree, np.ndarray):
        yield path, tree
        return
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        raise PretrainedError(
            f"{file} holds a {type(tree).__name__} at {'.'.join(path)!r}: a model's tree has arrays alone"
        )
    if _CHUNKED in tree:
        yield path, _joined(file, path, tree)
        return
    for name, child in tree.items():
        yield from _leaves(file, (*path, name), child)


def _joined(file: Path, path: tuple[str, ...], tree: dict[str, Any]) -> np.ndarray:
    """An array of more than a gigabyte, which Flax writes in pieces."""
    pieces, shape = _in_order(tree.get("chunks")), _in_order(tree.get("shape"))
    flat = [piece for piece in pieces if isinstance(piece, np.ndarray) and piece.ndim == 1]
    sizes = [size for size in shape if isinstance(size, int) and size >= 0]
    known = flat and (len(flat), len(sizes)) == (len(pieces), len(shape))
    if known and sum(piece.size for piece in flat) == math.prod(sizes):
        return np.concatenate(flat).reshape(sizes)
    raise PretrainedError(f"{file} holds pieces at {'.'.join(path)!r} that make no array: fetch it again")


def _in_order(numbered: Any) -> list[Any]:
    """The values of a map whose keys are "0", "1", ..., as Flax writes a list."""
    return [numbered.get(str(i)) for i in range(len(numbered))] if isinstance(numbered, dict) else []


def _check(source: Path, tensors: Mapping[str, np.ndarray], config: Any) -> None:
    """Raises PretrainedError, with all names, unless these are the tensors of the config's class."""
    config = config.with_tensors(tensors) if hasattr(config, "with_tensors") else config
    layout, wanted = config.published_layout(), wanted_tensors(config)
    full = {
        name if name.startswith(layout.prefix) or name in wanted else layout.prefix + name: x
        for name, x in tensors.items()
    }
    refuse(
        source,
        {
            "missing": sorted(wanted.keys() - full.keys()),
            "left over": sorted(full.keys() - wanted.keys() - layout.tied.keys()),
            "of another shape": [n for n in sorted(wanted.keys() & full.keys()) if full[n].shape != wanted[n]],
        },
    )
