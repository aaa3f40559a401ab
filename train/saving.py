"""One checkpoint on its way to disk: orbax saves in the background, then the first process commits the manifest.

orbax has no setting for codecs (its zarr 3 arrays checksum their index and not their values), so its handler of arrays
is extended in `serialize` alone: what it reads with stays as it is, and reads these files too. This module imports
orbax; what only reads checkpoints does not import this module.
"""

import asyncio
import errno
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

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
        futures = [
            self._pool.submit(
                self._write, Path(info.path), value.shape, value.dtype.name, arrays.chunk_shape(value), copy
            )
            for info, value, copy in zip(infos, values, copies, strict=True)
        ]
        self._pool.shutdown(wait=False)
        return futures

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
        for future in [
            store[index].write(value, can_reference_source_data_indefinitely=True) for index, value in shards
        ]:
            future.result()
        self.written += [
            f"{folder.name}/{file}" for index, _ in shards for file in arrays.chunk_files(index, shape, chunks)
        ]


class Save:
    """A save that is under way: copied to the host when the object exists, on disk when `finish` returns.

    Every process makes one at the same point. Whatever fails in one of them is kept until `finish`, so that the others
    never wait for it in vain.
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
        self._barrier = ocp.multihost.get_barrier_sync_fn()
        self._arrays = ChecksummedArrayHandler()
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False,
            use_zarr3=True,
            type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, self._arrays)),
        )
        item = {manifest.file_name(name): value for name, value in values.items()}
        try:
            saving = handler.async_save(target.absolute() / manifest.ARRAYS, args=ocp.args.PyTreeSave(item))
            # In a thread of its own, because the caller's may already run an event loop, as a notebook's does.
            with ThreadPoolExecutor(1) as pool:
                self._futures = pool.submit(asyncio.run, saving).result() or ()
        except Exception as error:
            self._failure = reason(error)

    def finish(self) -> str:
        """Waits for the files of every process, then commits; returns what went wrong, in one line, or ""."""
        if not self._failure:
            try:
                for future in self._futures:
                    future.result()
                files = [f"{manifest.ARRAYS}/{name}" for name in self._arrays.written]
                part = {file: manifest.describe_chunk(self._target / file) for file in files}
                self._part(jax.process_index()).write_text(json.dumps(part))
            except Exception as error:
                self._failure = reason(error)
        try:
            self._barrier(key=f"checkpoint_{self._step}", timeout_ms=_BARRIER_MS)
            if jax.process_index() == 0 and not self._failure:
                self._commit()
        except Exception as error:
            self._failure = reason(error)
        if self._failure and jax.process_index() == 0:
            shutil.rmtree(self._target, ignore_errors=True)
        return self._failure

    def _part(self, process: int) -> Path:
        return self._target / f"part_{process:05d}.json"

    def _commit(self) -> None:
        chunks: dict[str, dict[str, Any]] = {}
        for process in range(jax.process_count()):
            try:
                chunks |= json.loads(self._part(process).read_bytes())
            except FileNotFoundError:
                raise OSError(f"process {process} wrote nothing that process 0 can see in {self._target}") from None
            self._part(process).unlink()
        for name, array in self._described.items():
            folder = manifest.array_folder(name)
            for file in arrays.all_chunk_files(array["shape"], array["chunks"]):
                if f"{folder}/{file}" not in chunks:
                    raise OSError(f"no process wrote {folder}/{file}")
        others = [file for file in manifest.walk(self._target) if file not in chunks]
        files = chunks | {file: manifest.describe_file(self._target / file) for file in others}
        Manifest(self._step, self._meta, self._described, dict(sorted(files.items()))).write(self._target)


def reason(error: BaseException) -> str:
    """Why a write failed, in a few words of one line."""
    text = arrays.first_line(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or re.search(r"No space left|quota exceeded", text, re.IGNORECASE):
        return "the disk is full"
    return text or type(error).__name__
