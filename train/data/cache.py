"""Where prepared data is kept, and how two programs that start at once do not spoil it for each other."""

import contextlib
import errno
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from zoo.train.experiment import UserError

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def writable(folder: Path) -> bool:
    """Whether `folder` is there, or can be made, and takes new files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def cache_dir() -> Path:
    """$FLAXZOO_CACHE; else flaxzoo in $XDG_CACHE_HOME or ~/.cache; else, where that is read-only, in the system's /tmp.

    Raises UserError where none can be written, or where the one in the temporary folder belongs to somebody else.
    """
    if named := os.environ.get("FLAXZOO_CACHE"):
        folder = Path(named).expanduser()
        if not writable(folder):
            raise UserError(f"FLAXZOO_CACHE={named} cannot be written: name a folder that can")
        return folder
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "flaxzoo"
    if writable(folder):
        return folder
    user = os.getuid()
    shared = Path(tempfile.gettempdir()) / f"flaxzoo-{user}"
    with contextlib.suppress(OSError):
        shared.mkdir(mode=0o700, exist_ok=True)
    if not writable(shared) or shared.is_symlink() or shared.stat().st_uid != user:
        raise UserError(f"neither {folder} nor {shared} can be written: set FLAXZOO_CACHE to a folder that can")
    return shared


def tfds_dir(name: str) -> str:
    """The TFDS folder (or bucket) that holds, or is to hold, the data set `name`.

    $TFDS_DATA_DIR, unless it lacks the set and cannot be written; else TFDS's own ~/tensorflow_datasets where the set
    is there already; else in the cache.
    """
    if named := os.environ.get("TFDS_DATA_DIR"):
        folder = Path(named).expanduser()
        if "://" in named:
            return named
        if (folder / name).is_dir() or writable(folder):
            return str(folder)
    standard = Path("~/tensorflow_datasets").expanduser()
    return str(standard if (standard / name).is_dir() else cache_dir() / "tfds")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process of this machine at a time; the system frees the lock of a process that dies.

    Where the file system has no locks, nothing is locked: what is prepared twice is then renamed into place twice.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that prepares {path.with_suffix('')}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield


def prepared(folder: Path, complete: Callable[[Path], bool], write: Callable[[Path], object]) -> Path:
    """`folder`, written by `write` unless it is `complete`; it appears whole or not at all.

    `write` fills a temporary folder, which is renamed. One that is not complete (a file is missing or cut short) is
    written anew, and what a killed process left behind is removed. Raises UserError where the disk does not take it.
    """
    if complete(folder):
        return folder
    try:
        with locked(folder.parent / f"{folder.name}.lock"):
            if complete(folder):
                return folder
            for left in folder.parent.glob(f"{folder.name}.*.partial"):
                shutil.rmtree(left, ignore_errors=True)
            partial = folder.parent / f"{folder.name}.{os.getpid()}.partial"
            partial.mkdir()
            try:
                write(partial)
                _to_disk(partial)
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot prepare data in {folder}: {error.strerror or error}: set FLAXZOO_CACHE to another disk"
        ) from error
    return folder


def map_file(path: Path, dtype: np.dtype | type) -> np.ndarray:
    """The numbers in a file, mapped and read-only.

    The system is told that reads are random: reading ahead, which it does otherwise, made a batch of 512 sequences
    from a file of 40 GB fifty times slower.
    """
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype)


def _to_disk(folder: Path) -> None:
    """Waits until the files of `folder` are on the disk, so that a rename does not outlive what it names."""
    for file in folder.iterdir():
        with open(file, "rb") as written:
            os.fsync(written.fileno())
