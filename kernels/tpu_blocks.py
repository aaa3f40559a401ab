"""Block sizes of the TPU kernels, by pass, chip, dtype, head size and length; a JSON file comes before the table."""

import json
import math
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax

from zoo.kernels.mask import AttentionError
from zoo.kernels.problem import Problem

OVERRIDE = "FLAXZOO_BLOCKS"
"""Environment variable: path of a JSON list of objects with the fields of `Entry`, tried before those of the table."""

LANES = 128


class Blocks(NamedTuple):
    """Queries and keys of a block; a tile within it has `rows` queries and `step` keys.

    turned: whether queries are kept transposed; the backward pass then holds a tile's weights in the matrix unit (see
    tpu_backward).
    """

    queries: int
    keys: int
    rows: int
    step: int
    turned: bool = False

    def counts(self, queries: int, keys: int) -> tuple[int, int]:
        """How many blocks these lengths take."""
        return -(-queries // self.queries), -(-keys // self.keys)

    def padded(self, queries: int, keys: int) -> tuple[int, int]:
        """These lengths in whole blocks."""
        of_queries, of_keys = self.counts(queries, keys)
        return of_queries * self.queries, of_keys * self.keys


class Entry(NamedTuple):
    """One line of the table, taken by the first call that it fits; what is None fits all. Lengths and sizes: at most.

    direction: "forward" or "backward".
    """

    direction: str
    queries: int
    keys: int
    rows: int
    step: int
    turned: bool = False
    chip: str | None = None
    dtype: str | None = None
    head_dim: int | None = None
    length: int | None = None

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.queries, self.keys, self.rows, self.step, self.turned)

    def fits(self, direction: str, chip: str, dtype: str, head_dim: int, length: int) -> bool:
        return (
            self.direction == direction
            and self.chip in (None, chip)
            and self.dtype in (None, dtype)
            and (self.head_dim is None or head_dim <= self.head_dim)
            and (self.length is None or length <= self.length)
        )


# Chosen by the modelled bound of whole calls, as `python -m benchmarks.attention_bound` prints it, on v4 by what fits
# its VMEM; not measured.
TABLE = (
    Entry("forward", 512, 512, 512, 512, chip="v4", dtype="float32"),
    Entry("backward", 128, 256, 128, 256, chip="v4", dtype="float32"),
    Entry("forward", 512, 1024, 512, 512, dtype="float32"),
    Entry("backward", 256, 512, 256, 512, dtype="float32"),
    Entry("forward", 1024, 1024, 1024, 1024, turned=True, chip="v6e", length=2048),
    Entry("forward", 1024, 2048, 1024, 1024, turned=True, chip="v6e", head_dim=128),
    Entry("forward", 1024, 2048, 1024, 512, turned=True, chip="v6e"),
    Entry("backward", 512, 1024, 512, 512, turned=True, chip="v6e"),
    Entry("forward", 1024, 1024, 1024, 1024, turned=True, chip="v7x", length=2048),
    Entry("forward", 1024, 2048, 1024, 1024, turned=True, chip="v7x", head_dim=128),
    Entry("forward", 1024, 2048, 1024, 512, turned=True, chip="v7x"),
    Entry("backward", 512, 1024, 512, 512, turned=True, chip="v7x"),
    Entry("backward", 512, 1024, 512, 512, chip="v5p"),
    Entry("forward", 512, 1024, 512, 512, chip="v4"),
    Entry("backward", 512, 512, 256, 512, chip="v4", head_dim=128),
    Entry("backward", 256, 512, 256, 512, chip="v4"),
    Entry("forward", 512, 1024, 512, 512, length=2048),
    Entry("forward", 512, 2048, 512, 512, length=8192),
    Entry("forward", 1024, 2048, 512, 512),
    Entry("backward", 512, 1024, 256, 512),
)


class Chip(NamedTuple):
    """device_kind as JAX gives it, by either of its names, and the bytes of a core's VMEM that a kernel may take."""

    device_kinds: tuple[str, ...]
    vmem: int


CHIPS = {
    "v4": Chip(("TPU v4",), 14 * 2**20),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 112 * 2**20),
    "v5p": Chip(("TPU v5", "TPU v5p"), 56 * 2**20),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 112 * 2**20),
    "v7x": Chip(("TPU7x",), 56 * 2**20),
}


def chip() -> str | None:
    """The chip that is compiled for: of the mesh that is set, else of this machine; None for a TPU that is not known.

    A machine without a TPU counts as v5e: what it compiles for is known only where a mesh says so.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    if not kind.startswith("TPU"):
        return "v5e"
    return next((name for name, one in CHIPS.items() if kind in one.device_kinds), None)


def vmem() -> int:
    """Bytes of VMEM that a kernel may take."""
    return CHIPS[chip() or "v5e"].vmem


def find(direction: str, problem: Problem) -> Blocks:
    """The blocks of `chosen` for a call, cut to its lengths. A window makes a call one of its own length, twice."""
    shape, left = problem.shape, problem.mask.rules.left
    head_dim, length = max(shape.head_dim, problem.v.shape[-1]), max(shape.queries, shape.keys)
    length = length if left is None else min(length, 2 * (left + 1))
    return cut(chosen(direction, chip() or "v5e", head_dim, length, str(problem.q.dtype)), shape.queries, shape.keys)


def cut(blocks: Blocks, queries: int, keys: int) -> Blocks:
    """To these lengths: as few blocks as the limit allows, as even as whole registers allow."""
    (block_q, rows), (block_k, step) = _cut(queries, blocks.queries, blocks.rows), _cut(keys, blocks.keys, blocks.step)
    return Blocks(block_q, block_k, rows, step, blocks.turned)


def chosen(direction: str, chip: str, head_dim: int, length: int, dtype: str = "bfloat16") -> Blocks:
    """The first fitting entry's."""
    path = os.environ.get(OVERRIDE)
    entries = (*(read(path) if path else ()), *TABLE)
    return next(entry.blocks for entry in entries if entry.fits(direction, chip, dtype, head_dim, length))


def _cut(length: int, block: int, tile: int) -> tuple[int, int]:
    """Block and tile of one length."""
    each = -(-length // -(-length // block))
    unit = LANES if each <= 4 * LANES else 2 * LANES
    size = min(-(-each // unit) * unit, block)
    return size, size if size < tile else math.gcd(size, tile)


@cache
def read(path: str) -> tuple[Entry, ...]:
    """The entries of a JSON file; raises AttentionError where it does not hold what it should."""
    try:
        lines = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise AttentionError(f"{OVERRIDE}={path}: {error}") from None
    if not isinstance(lines, list):
        raise AttentionError(f"{OVERRIDE}={path} holds {type(lines).__name__}: give a list of objects")
    return tuple(_checked(path, line) for line in lines)


def _checked(path: str, line: Any) -> Entry:
    where = f"{OVERRIDE}={path}: {json.dumps(line)}"
    try:
        entry = Entry(**line)
    except TypeError:
        needed, known = Entry._fields[:5], Entry._fields
        raise AttentionError(f"{where}: needs {', '.join(needed)}; the fields are {', '.join(known)}") from None
    if entry.direction not in ("forward", "backward"):
        raise AttentionError(f"{where}: direction is forward or backward")
    limits = [x for x in (entry.head_dim, entry.length) if x is not None]
    if not all(isinstance(x, int) for x in limits) or not isinstance(entry.turned, bool):
        raise AttentionError(f"{where}: head_dim and length are whole numbers, turned is true or false")
    if entry.chip not in (None, *CHIPS) or entry.dtype not in (None, "bfloat16", "float32"):
        raise AttentionError(f"{where}: chip is one of {', '.join(CHIPS)}, dtype bfloat16 or float32")
    for block, tile in ((entry.queries, entry.rows), (entry.keys, entry.step)):
        whole = all(isinstance(x, int) and x > 0 and x % LANES == 0 for x in (block, tile))
        if not whole or block % tile:
            raise AttentionError(f"{where}: blocks are multiples of their tiles, and tiles of {LANES}")
    return entry
