"""Arrays on disk: zarr version 3, chunks that each end in a CRC-32C, readable shard by shard onto any layout.

An array `name` of a checkpoint is the folder `name/` with `zarr.json` and one file a chunk, `c/<i>/<j>/...`, that holds
the raw little-endian values and then four bytes of checksum. TensorStore computes it from memory while it writes and
compares it whenever it reads, so that a flipped bit is an error and never a value; and because it stands at the end of
the file, a manifest can name the contents of terabytes after reading four bytes of each chunk.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import tensorstore as ts

LARGEST_CHUNK = 64 * 2**20
"""Bytes. A shard above it is cut, so that writing and verifying need little memory beside the state's own."""

Index = tuple[slice, ...]


class DamagedError(Exception):
    """Part of a checkpoint is not as it was written; the message says what, without the checkpoint's name."""


def chunk_shape(value: jax.Array) -> tuple[int, ...]:
    """The chunks `value` is stored in: its shards, or equal parts of them where a shard exceeds LARGEST_CHUNK.

    The cut goes through one dimension, the one that needs fewest pieces; a shard whose sizes have no fitting divisor
    (primes) stays whole.
    """
    shape = [max(1, size) for size in value.sharding.shard_shape(value.shape)]
    needed = math.ceil(math.prod(shape) * value.dtype.itemsize / LARGEST_CHUNK)
    if needed > 1:
        fitting = range(needed, 4 * needed + 1)
        cuts = [(pieces, axis) for axis, size in enumerate(shape) for pieces in fitting if size % pieces == 0]
        if cuts:
            pieces, axis = min(cuts)
            shape[axis] //= pieces
    return tuple(shape)


def open_for_write(folder: Path, shape: Sequence[int], dtype: str, chunks: Sequence[int], *, create: bool) -> Any:
    """A TensorStore at `folder`; exactly one process passes create=True, which writes `zarr.json`."""
    spec = {
        **_spec(folder),
        "metadata": {
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        },
        # A chunk of zeros is a file like any other: a missing file must never read as zeros.
        "store_data_equal_to_fill_value": True,
    }
    if create:
        ts.open(spec, create=True).result()
    return ts.open(spec, open=True, assume_metadata=True).result()


def open_for_read(folder: Path) -> Any:
    return ts.open({**_spec(folder), "fill_missing_data_reads": False}, open=True, read=True).result()


def _spec(folder: Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder.resolve()}/"}}


def chunk_files(index: Index, shape: Sequence[int], chunks: Sequence[int]) -> Iterator[str]:
    """File names, relative to the array's folder, of the chunks that cover `index` of an array of `shape`."""
    if 0 in shape:
        return
    bounds = [part.indices(size) for part, size in zip(index, shape, strict=True)]
    grid = [range(start // chunk, -(-stop // chunk)) for (start, stop, _), chunk in zip(bounds, chunks, strict=True)]
    for cell in itertools.product(*grid):
        yield "/".join(["c", *map(str, cell)])


def all_chunk_files(shape: Sequence[int], chunks: Sequence[int]) -> Iterator[str]:
    return chunk_files((slice(None),) * len(shape), shape, chunks)


def stored_checksum(file: Path) -> str:
    """The CRC-32C at the end of a chunk's file, as eight hexadecimal digits; raises OSError where it has none."""
    with file.open("rb") as opened:
        opened.seek(-4, 2)
        return opened.read(4)[::-1].hex()


def read(folders: Mapping[str, Path], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays `wanted`, by name: `jax.ShapeDtypeStruct`s, read onto their sharding where they carry one.

    Each process reads what its own devices hold, each part once. A value without a sharding becomes a numpy array.
    Raises DamagedError, naming the array, where a chunk is missing or its checksum does not fit.
    """

    def one(name: str) -> Any:
        try:
            return _read_one(open_for_read(folders[name]), wanted[name])
        except (ValueError, OSError) as error:
            raise DamagedError(f"{name}: {first_line(error)}") from error

    # Threads, because opening an array waits for its metadata; eight arrays in flight bound the memory of the host.
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(wanted, pool.map(one, wanted), strict=True))


def _read_one(store: Any, value: Any) -> Any:
    sharding = getattr(value, "sharding", None)
    if sharding is None:
        return store.read().result()
    indices = sharding.addressable_devices_indices_map(tuple(value.shape))
    parts = {_bounds(index, value.shape): store[index].read() for index in indices.values()}
    shards = [jax.device_put(parts[_bounds(index, value.shape)].result(), device) for device, index in indices.items()]
    return jax.make_array_from_single_device_arrays(tuple(value.shape), sharding, shards)


def _bounds(index: Index, shape: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    return tuple(part.indices(size) for part, size in zip(index, shape, strict=True))


def damage(folder: Path, shape: Sequence[int], chunks: Sequence[int]) -> Iterator[str]:
    """One line for each chunk of the array in `folder` that cannot be read or whose checksum does not fit."""
    try:
        store = open_for_read(folder)
    except (ValueError, OSError) as error:
        yield first_line(error)
        return
    for corner in itertools.product(*map(range, [0] * len(shape), shape, chunks)):
        chunk = tuple(slice(start, start + size) for start, size in zip(corner, chunks, strict=True))
        try:
            store[chunk].read().result()
        except (ValueError, OSError) as error:
            yield first_line(error)


def first_line(error: BaseException) -> str:
    """What TensorStore says, without the spec and source lines that it appends."""
    return str(error).split("\n", 1)[0].split(" [tensorstore_spec", 1)[0].split(" [source locations", 1)[0]


def shards_to_write(value: jax.Array) -> list[tuple[Index, jax.Array]]:
    """The parts of `value` that this process writes: among all processes, each part has one writer."""
    if value.is_fully_addressable and jax.process_index() != 0:
        return []
    return [(shard.index, shard.data) for shard in value.addressable_shards if shard.replica_id == 0]
