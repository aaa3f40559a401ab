"""The manifest of a checkpoint: what belongs to it, and the point at which it exists.

A checkpoint is the folder `step_00000060/` with the folder `arrays/` and, written last, `manifest.json`. No manifest,
no checkpoint: a save cut off anywhere leaves a folder that nobody reads, and deleting begins with the manifest.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from zoo.train import arrays
from zoo.train.arrays import DamagedError

NAME = "manifest.json"
ARRAYS = "arrays"
_FORMAT = 1
_FOLDER = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Manifest:
    """meta: what the caller saved with the arrays (experiment, data and its position, seed), as JSON.

    arrays: shape, dtype and chunk shape by name. files: for each file, relative to the checkpoint's folder, its "size"
    in bytes and its digest, "crc32c" for the chunk of an array (the one that ends the file) and "sha256" for any other.
    """

    step: int
    meta: dict[str, Any]
    arrays: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]]

    def encode(self) -> bytes:
        """JSON whose last field is the SHA-256 of the rest; raises TypeError or ValueError where `meta` is not JSON."""
        content = {"format": _FORMAT, **asdict(self)}
        digest = hashlib.sha256(_json(content)).hexdigest()
        return _json({**content, "sha256": digest})

    def write(self, folder: Path) -> None:
        """The commit: whole or not at all, and on the disk when it returns."""
        temporary = folder / f"{NAME}.partial"
        with temporary.open("wb") as file:
            file.write(self.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / NAME)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint's folder; raises DamagedError where one of its bytes is not as written."""
    try:
        data = (folder / NAME).read_bytes()
        content = json.loads(data)
        manifest = Manifest(**{key: content[key] for key in ("step", "meta", "arrays", "files")})
        intact = manifest.encode() == data
    except OSError as error:
        raise DamagedError(f"{NAME} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise DamagedError(f"{NAME} was altered or is of another format than {_FORMAT}")
    if folder.name != folder_name(manifest.step):
        raise DamagedError(f"{NAME} is of step {manifest.step}")
    return manifest


def _json(content: Mapping[str, Any]) -> bytes:
    """JSON with one line for each array and file, so that people and `diff` can read it."""

    def dump(value: Any) -> str:
        return json.dumps(value, allow_nan=False)

    fields = []
    for key, value in content.items():
        if isinstance(value, dict) and value:
            entries = ",\n".join(f"  {dump(str(name))}: {dump(entry)}" for name, entry in value.items())
            fields.append(f" {dump(key)}: {{\n{entries}\n }}")
        else:
            fields.append(f" {dump(key)}: {dump(value)}")
    return ("{\n" + ",\n".join(fields) + "\n}\n").encode()


def file_name(name: str) -> str:
    """The name of an array as that of a folder: what is unusual in file names is percent-encoded."""
    return quote(name, safe="._-[]()=+@ ")


def array_folder(name: str) -> str:
    """Where an array lies, relative to the checkpoint's folder."""
    return f"{ARRAYS}/{file_name(name)}"


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def checkpoint_folders(folder: Path) -> dict[int, Path]:
    """Every folder below `folder` that has the name of a checkpoint, complete or not, by step in ascending order."""
    found = {}
    for entry in folder.iterdir() if folder.is_dir() else ():
        match = _FOLDER.fullmatch(entry.name)
        if match and entry.name == folder_name(int(match[1])) and entry.is_dir() and not entry.is_symlink():
            found[int(match[1])] = entry
    return dict(sorted(found.items()))


def remove(folder: Path) -> None:
    """Deletes a checkpoint, its manifest first: killed anywhere, this leaves a checkpoint or a folder that is none."""
    (folder / NAME).unlink(missing_ok=True)
    shutil.rmtree(folder)


def describe_chunk(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "crc32c": arrays.stored_checksum(file)}


def describe_file(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def problems(folder: Path, manifest: Manifest, files: Collection[str]) -> Iterator[str]:
    """One line for each of `files` that is missing, has another size, or whose digest is not the manifest's.

    Of a chunk, the stored checksum is compared; that its data has this checksum is seen by whoever reads the data.
    """
    for name in files:
        expected = manifest.files[name]
        file = folder / name
        try:
            size = file.stat().st_size
            if size != expected["size"]:
                yield f"{name} has {size} bytes and should have {expected['size']}"
            elif (describe_chunk if "crc32c" in expected else describe_file)(file) != expected:
                yield f"{name} was altered"
        except FileNotFoundError:
            yield f"{name} is missing"
        except OSError as error:
            yield f"{name} cannot be read ({error.strerror})"


def strangers(folder: Path, manifest: Manifest) -> list[str]:
    """Files below a checkpoint's folder that its manifest does not list."""
    return sorted(file for file in walk(folder) if file not in manifest.files)


def walk(folder: Path) -> Iterator[str]:
    """The files below a checkpoint's folder, relative to it, except for the manifest."""
    for root, _, names in os.walk(folder):
        for name in names:
            relative = (Path(root) / name).relative_to(folder).as_posix()
            if relative != NAME:
                yield relative
