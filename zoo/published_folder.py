"""The folder of a published model: where it is, its tensors as they lie, and how one is written.

Weights come from safetensors alone, and from the folder that was named alone.
"""

import json
import math
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

STEMS = ("model", "diffusion_pytorch_model")
"""How names of files with weights begin: what transformers writes, and what diffusers does."""

FILES = ("*.json", "*.safetensors", "*.model", "*.spm", "*.txt", "*.jinja")
PIPELINE_INDEX = "model_index.json"
"""What a folder holds whose models are parts of a pipeline, each in a folder of its own."""

PIPELINE_FILES = (
    PIPELINE_INDEX,
    *(
        f"{part}/{name}"
        for part in ("unet", "transformer", "vae", "text_encoder")
        for stem in STEMS
        for name in (
            "config.json",
            f"{stem}.safetensors",
            f"{stem}-*-of-*.safetensors",
            f"{stem}.safetensors.index.json",
        )
    ),
    *(f"tokenizer/{name}" for name in ("*.json", "*.txt")),
    "scheduler/*.json",
)
"""What is downloaded of a pipeline: no weights of another precision, nor those of parts that are not read."""

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
STORED_DTYPES = FLOATS | {
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


class PretrainedError(ValueError):
    """A published checkpoint that cannot be read or written; the message names the file or tensor and the mend."""


def find(source: str | os.PathLike, files: Sequence[str] = FILES) -> Path:
    """The folder of a model: the one named, or the cached copy of a hub model, downloaded where it is not there.

    files: patterns of the names that are downloaded.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not HUB_ID.fullmatch(str(source)):
        raise PretrainedError(f"{source} is no folder: name the folder that holds config.json, or a model of the hub")
    return _downloaded(str(source), files, ignored="*/*")


def is_on_hub(source: str) -> bool:
    """Whether this is to be looked for on the hub: x/y, with a folder x here, is a folder that is missing."""
    folder = Path(source).expanduser()
    return bool(HUB_ID.fullmatch(source)) and "/" in source and not folder.exists() and not folder.parent.exists()


def find_model(source: str | os.PathLike) -> Path:
    """As `find`, of a model or of a whole pipeline: of that, what zoo reads is downloaded."""
    if Path(source).expanduser().exists():
        return find(source)
    # Small files first: beside the folders of its parts, a pipeline may have the same weights in other forms.
    folder = find(source, (PIPELINE_INDEX, "config.json"))
    if not (folder / PIPELINE_INDEX).exists() or (folder / "config.json").exists():
        return find(source)
    return _downloaded(str(source), PIPELINE_FILES, ignored=None)


def _downloaded(source: str, files: Sequence[str], *, ignored: str | None) -> Path:
    import huggingface_hub  # Only for what is not here.

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=list(files), ignore_patterns=ignored))
    except (OSError, ValueError) as problem:
        reason = str(problem).strip().splitlines()[0]
        raise PretrainedError(f"{source} is no folder, and the hub does not give it ({reason})") from None


def weights_and_index(stem: str) -> tuple[str, str]:
    """Names of a model's one file of weights, and of the index where there are several."""
    return f"{stem}.safetensors", f"{stem}.safetensors.index.json"


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """The safetensors files of a folder: one, or those that its index names."""
    weights, index = weights_and_index(stem)
    if (folder / weights).exists():
        return [folder / weights]
    if not (folder / index).exists():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if pickles:
            raise PretrainedError(
                f"{folder} has its weights in {pickles[0]} alone, a pickle, which can run any code when it is read: "
                f"load it where you trust it, and write safetensors with save_pretrained"
            )
        if (folder / "flax_model.msgpack").exists():
            raise PretrainedError(f"{folder} has its weights in flax_model.msgpack: `zoo convert` writes safetensors")
        raise PretrainedError(f"{folder} has neither {weights} nor {index}: there are no weights to read")
    named = read_json(folder / index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise PretrainedError(f"{folder / index} has no weight_map: fetch it again")
    files = sorted({str(name) for name in named.values()})
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise PretrainedError(
                f"{folder / index} names {name!r}, which is no safetensors file of this folder: refused"
            )
        if not (folder / name).exists():
            raise PretrainedError(f"{folder / index} names {name}, which is not there: fetch it")
    return [folder / name for name in files]


def weight_file(path: Path) -> Path:
    """A safetensors file that was named itself; a pickle is refused with the command that converts it."""
    if not path.is_file():
        raise PretrainedError(f"{path} is not there: name a safetensors file")
    with path.open("rb") as file:
        start = file.read(4)
    # A zip archive, which torch saves, or pickle's own mark; by either name it is none of ours.
    if path.suffix in (".pth", ".pt", ".bin", ".pkl") or start == b"PK\x03\x04" or start[:1] == b"\x80":
        name = path.with_suffix("").name
        raise PretrainedError(
            f"{path} is a pickle, which can run any code when it is read: where torch is, write safetensors by python "
            f"-c \"import torch, safetensors.torch as s; s.save_file(torch.load('{path.name}', weights_only=True), "
            f"'{name}.safetensors')\""
        )
    return path


def holds_model(folder: Path) -> bool:
    names = ("config.json", PIPELINE_INDEX, *(name for stem in STEMS for name in weights_and_index(stem)))
    return any((folder / name).exists() for name in names)


def read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PretrainedError(f"{path} is not there: a published model's folder holds one") from None
    except (ValueError, RecursionError) as problem:
        raise PretrainedError(f"{path} is no JSON ({problem}): fetch it again") from None
    if not isinstance(fields, dict):
        raise PretrainedError(f"{path} holds no object but a {type(fields).__name__}: fetch it again")
    return fields


class Stored(NamedTuple):
    """Where a tensor lies."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """A view of the file, whose pages leave memory with it."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, self.dtype)
        start = self.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        end = self.offset + math.prod(self.shape) * jax.numpy.dtype(self.dtype).itemsize
        with self.path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), end - start, offset=start, access=mmap.ACCESS_READ)
        return np.frombuffer(pages, self.dtype, math.prod(self.shape), self.offset - start).reshape(self.shape)


def stored_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of one file. Its header is checked by safetensors, which admits no gap between them."""
    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            found = {name: (x.get_dtype(), tuple(x.get_shape())) for name, x in slices.items()}
    except SafetensorError as problem:
        raise PretrainedError(f"{path} is no whole safetensors file ({problem}): fetch it again") from None
    with path.open("rb") as raw:
        offset = 8 + int.from_bytes(raw.read(8), "little")
    placed = {}
    for name, (kind, shape) in found.items():
        if kind not in STORED_DTYPES:
            raise PretrainedError(
                f"{path}: {name} has dtype {kind}, and those read here are {', '.join(STORED_DTYPES)}"
            )
        placed[name] = Stored(path, offset, STORED_DTYPES[kind], shape)
        offset += math.prod(shape) * jax.numpy.dtype(STORED_DTYPES[kind]).itemsize
    return placed


class Writer:
    """Writes tensors into one file, or into as many as their size asks, with an index; all under temporary names
    until the last is whole, and config.json, without which there is no model, at the very end."""

    def __init__(self, folder: Path, shard_bytes: int, stem: str = "model"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise PretrainedError(f"{folder} is, or lies below, a file: name a folder") from None
        self.folder, self.shard_bytes, self.stem = folder, shard_bytes, stem
        self.pending: dict[str, np.ndarray] = {}
        self.files: list[tuple[Path, list[str]]] = []
        self.bytes = 0

    def add(self, name: str, value: np.ndarray) -> None:
        if self.pending and sum(x.nbytes for x in self.pending.values()) + value.nbytes > self.shard_bytes:
            self.flush()
        self.pending[name] = value

    def flush(self) -> None:
        path = self.folder / f".writing-{len(self.files)}"
        path.touch()
        mode = path.stat().st_mode  # safetensors gives its file to the owner alone
        save_file(self.pending, path, metadata={"format": "pt"})
        path.chmod(mode)
        self.bytes += sum(x.nbytes for x in self.pending.values())
        self.files.append((path, list(self.pending)))
        self.pending = {}

    def finish(self, fields: Mapping[str, Any]) -> None:
        self.flush()
        names, (weights, index) = {}, weights_and_index(self.stem)
        for number, (path, tensors) in enumerate(self.files, start=1):
            file = weights if len(self.files) == 1 else f"{self.stem}-{number:05}-of-{len(self.files):05}.safetensors"
            path.replace(self.folder / file)
            names |= dict.fromkeys(tensors, file)
        if len(self.files) > 1:
            write_json(self.folder / index, {"metadata": {"total_size": self.bytes}, "weight_map": names})
        write_json(self.folder / "config.json", fields)


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{path.name}")
    temporary.write_text(json.dumps(fields, indent=2) + "\n")
    temporary.replace(path)
