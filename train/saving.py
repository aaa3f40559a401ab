"""One checkpoint on its way to disk: orbax saves in the background, then the first process commits the manifest.

orbax has no setting for codecs (its zarr 3 arrays checksum their index and not their values), so its handler of arrays
is extended in `serialize` alone: what it reads with stays as it is, and reads these files too. This module imports
orbax; what only reads checkpoints does not import this module.
"""

import asyncio
import contextlib
import errno
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from zoo.train import arrays, manifest
from zoo.train.manifest import Manifest

_BARRIER_MS = 20 * 60 * 1000


class ChecksummedArrayHandler(ocp.type_handlers.ArrayHandler):
    """Serves one save. `written` has the chunks of this process, relative to the folder, once the futures are done."""

    def __init__(self) -> None:
        super().__init__(enable_write_sharding_file=False)
        self.written: list[str] = []
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="checkpoint")

    async def serialize(
        self, values: Sequence[jax.Array], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Future[None]]:
        """Copies what this process writes to the host before it returns; the futures stand for the writing."""
        shards = [arrays.shards_to_write(value) for value in values]
        for _, data in (shard for one in shards for shard in one):
            data.copy_to_host_async()
        # A copy even where host and device share memory: the next step may reuse the donated buffers.
        copies = [[(index, np.array(data, copy=True)) for index, data in one] for one in shards]
        return [
            self._pool.submit(
                self._write, Path(info.path), value.shape, value.dtype.name, arrays.chunk_shape(value), copy
            )
            for info, value, copy in zip(infos, values, copies, strict=True)
        ]

    def wait(self) -> None:
        """Returns when nothing writes any more, whether it failed or not."""
        self._pool.shutdown()

    def _write(
        self,
        folder: Path,
        shape: tuple[int, ...],
        dtype: str,
        chunks: tuple[int, ...],
        shards: Sequence[tuple[arrays.Index, np.ndarray]],
    ) -> None:
        create = jax.process_index() == 0
        if not create and not shards:
            return
        store = arrays.open_for_write(folder, shape, dtype, chunks, create=create)
        writes = [store[index].write(value, can_reference_source_data_indefinitely=True) for index, value in shards]
        # All are waited for before one is complained of: the caller may remove the folder then.
        for error in [write.exception() for write in writes]:
            if error is not None:
                raise error
        self.written += [
            f"{folder.name}/{file}" for index, _ in shards for file in arrays.chunk_files(index, shape, chunks)
        ]


class Save:
    """A save that is under way: copied to the host when the object exists, on disk when `finish` returns.

    Every process makes one at the same point. Whatever fails in one is kept until the end, so that the others never
    wait for it in vain; they meet at barriers of JAX's coordination service, which leave the devices to the training.
    """

    def __init__(self, target: Path, step: int, values: Mapping[str, jax.Array], meta: dict[str, Any]):
        self._target = target
        self._step = step
        self._meta = meta
        self._described = {
            name: {"shape": list(value.shape), "dtype": value.dtype.name, "chunks": list(arrays.chunk_shape(value))}
            for name, value in values.items()
        }
        self._futures: Sequence[Any] = ()
        self._failure = ""
        self._arrays = ChecksummedArrayHandler()
        self._barrier = ocp.multihost.get_barrier_sync_fn()
        with self._keeping_failure():
            if jax.process_index() == 0:
                make_room(target)
        with self._keeping_failure():
            self._meet("begun")
            if not self._failure:
                self._futures = self._start(values)

    def _start(self, values: Mapping[str, jax.Array]) -> Sequence[Any]:
        """orbax's futures of the files that this process writes."""
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False,
            use_zarr3=True,
            type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, self._arrays)),
        )
        item = {manifest.file_name(name): value for name, value in values.items()}
        folder = epath.Path(self._target.absolute() / manifest.ARRAYS)
        saving = handler.async_save(folder, args=ocp.args.PyTreeSave(item))
        # In a thread of its own, because the caller's may already run an event loop, as a notebook's does.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, saving).result() or ()

    def finish(self) -> str:
        """Waits for the files of every process and for the commit; returns what went wrong, in one line, or ""."""
        self._arrays.wait()
        with self._keeping_failure():
            for future in self._futures:
                future.result()
        with self._keeping_failure():
            self._write_part()
        with self._keeping_failure():
            self._meet("written")
            if jax.process_index() == 0 and not self._failure:
                self._commit()
        with self._keeping_failure():
            self._meet("committed")
            if not self._failure and not (self._target / manifest.NAME).exists():
                self._failure = "process 0 did not commit it"
        # What is committed stays, also where another process died before it knew.
        if self._failure and jax.process_index() == 0 and not (self._target / manifest.NAME).exists():
            shutil.rmtree(self._target, ignore_errors=True)
        return self._failure

    @contextlib.contextmanager
    def _keeping_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of whatever kind: see the class
            self._failure = self._failure or reason(error)

    def _meet(self, point: str) -> None:
        self._barrier(key=f"checkpoint_{self._step}_{point}", timeout_ms=_BARRIER_MS)

    def _part(self, process: int) -> Path:
        return self._target / f"part_{process:05d}.json"

    def _write_part(self) -> None:
        """Tells process 0 what this process wrote."""
        files = [] if self._failure else [f"{manifest.ARRAYS}/{name}" for name in self._arrays.written]
        content = {
            "failure": self._failure,
            "files": {file: manifest.describe_chunk(self._target / file) for file in files},
        }
        self._part(jax.process_index()).write_text(json.dumps(content))

    def _commit(self) -> None:
        chunks: dict[str, dict[str, Any]] = {}
        for process in range(jax.process_count()):
            try:
                part = json.loads(self._part(process).read_bytes())
            except (OSError, ValueError):
                raise OSError(f"process {process} left no word in {self._target}, which all must see") from None
            if part["failure"]:
                raise OSError(f"process {process}: {part['failure']}")
            chunks |= part["files"]
            self._part(process).unlink()
        for name, array in self._described.items():
            folder = manifest.array_folder(name)
            for file in arrays.all_chunk_files(array["shape"], array["chunks"]):
                if f"{folder}/{file}" not in chunks:
                    raise OSError(f"no process wrote {folder}/{file}")
        others = [file for file in manifest.walk(self._target) if file not in chunks]
        files = chunks | {file: manifest.describe_file(self._target / file) for file in others}
        Manifest(self._step, self._meta, self._described, dict(sorted(files.items()))).write(self._target)


def make_room(target: Path) -> None:
    """Makes an empty folder `target`, and removes what interrupted saves and deletions have left beside it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for folder in manifest.checkpoint_folders(target.parent).values():
        if folder == target or not (folder / manifest.NAME).exists():
            manifest.remove(folder)
    target.mkdir()


def reason(error: BaseException) -> str:
    """Why a write failed, in a few words of one line."""
    text = arrays.first_line(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or re.search(r"No space left|quota exceeded", text, re.IGNORECASE):
        return "the disk is full"
    return text or type(error).__name__
