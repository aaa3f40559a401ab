"""How arrays are laid out and cut for the TPU kernels.

Heads whose size is a multiple of the 128 lanes are read where they lie, as columns of [B, L, N H]; others are moved to
[B, N, L, H] first. A Place says which block of which head of which row the kernel is at.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import pallas as pl

from zoo.kernels.problem import padded
from zoo.kernels.tpu_blocks import LANES, Blocks

ZERO = np.int32(0)
"""In index maps, which are of 32-bit integers whatever `jax_enable_x64` says."""

Place = Callable[..., tuple[Any, Any, Any]]
"""(row, block, head) at given grid indices, which the references of Scalars follow."""


class Operand(NamedTuple):
    """An array, or the shape of a result, and how it is cut for the kernel."""

    array: Any
    spec: pl.BlockSpec


class Buffers(NamedTuple):
    """What a kernel reads, writes and keeps between visits, by name."""

    inputs: Mapping[str, Operand] = {}
    outputs: Mapping[str, Operand] = {}
    scratch: Mapping[str, Any] = {}

    def join(self, other: "Buffers") -> "Buffers":
        return Buffers(*({**mine, **its} for mine, its in zip(self, other, strict=True)))


def heads(x: jax.Array, length: int, rows: int, place: Place) -> Operand:
    """[B, L, N, X], padded to `length`, in blocks of `rows`."""
    x = padded(x, length, axis=1)
    array = x.reshape(*x.shape[:2], -1) if x.shape[3] % LANES == 0 else x.swapaxes(1, 2)
    return Operand(array, _blocks(x.shape[3], rows, place))


def result(shape: tuple[int, int, int, int], like: jax.Array, rows: int, place: Place, dtype: Any = None) -> Operand:
    """For [B, L, N, X], which `restored` gives back; `like` tells its type and the mesh axes it varies over."""
    b, length, n, width = shape
    laid = (b, length, n * width) if width % LANES == 0 else (b, n, length, width)
    return Operand(shape_like(laid, like, dtype or like.dtype), _blocks(width, rows, place))


def restored(x: jax.Array, length: int, count: int) -> jax.Array:
    """[B, length, count, X]."""
    x = x.reshape(*x.shape[:2], count, -1) if x.ndim == 3 else x.swapaxes(1, 2)
    return x[:, :length]


def shape_like(shape: tuple[int, ...], like: jax.Array, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def by_row(array: Any, columns: int, place: Place) -> Operand:
    """[B, N, count, L] in blocks of `columns`."""

    def index(*indices: Any) -> tuple:
        row, block, head = place(*indices)
        return row, head, ZERO, block

    return Operand(array, pl.BlockSpec((None, None, array.shape[2], columns), index))


def by_head(array: Any, place: Place) -> Operand:
    """[1 or B, N, X, Y], whole for each head."""

    def index(*indices: Any) -> tuple:
        row, _, head = place(*indices)
        return row if array.shape[0] > 1 else ZERO, head, ZERO, ZERO

    return Operand(array, pl.BlockSpec((None, None, *array.shape[2:]), index))


def by_pair(array: Any, blocks: Blocks, query: Place, key: Place) -> Operand:
    """[1 or B, 1 or N, T, S] in blocks of pairs."""

    def index(*indices: Any) -> tuple:
        row, of_queries, head = query(*indices)
        where = [place if size > 1 else ZERO for place, size in zip((row, head), array.shape[:2], strict=True)]
        return *where, of_queries, key(*indices)[1]

    return Operand(array, pl.BlockSpec((None, None, blocks.queries, blocks.keys), index))


def _blocks(width: int, rows: int, place: Place) -> pl.BlockSpec:
    def by_head(*indices: Any) -> tuple:
        row, block, head = place(*indices)
        return row, head, block, ZERO

    if width % LANES == 0:
        return pl.BlockSpec((None, rows, width), place)
    return pl.BlockSpec((None, None, rows, width), by_head)
