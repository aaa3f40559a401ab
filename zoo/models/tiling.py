"""A map over images too large to be taken at once: over tiles that overlap, and are blended where they do."""

from collections.abc import Callable

import jax
import numpy as np
from jax.core import Tracer

from zoo.layers.linear import LayerError


def tiled(
    f: Callable[[np.ndarray], jax.Array], x: jax.Array, *, tile: int, out_tile: int, overlap: float
) -> np.ndarray:
    """f of x [B, Y, X, C], where f makes [B, y r, x r, D] of a tile [B, y, x, C] and r is out_tile / tile.

    Tiles have `tile` pixels a side, those at the lower and right edges fewer, and share int(tile * overlap) with the
    next. There the result goes linearly from the one to the other, first downwards, then to the right, as in diffusers'
    AutoencoderKL. The device holds one tile at a time, the host what they become; f is called with at most three sizes
    a side.
    Raises LayerError where tiles and what they become do not overlap alike.
    """
    if isinstance(x, Tracer):
        raise LayerError("tiles are put together by the host, which jit cannot trace: call this outside jit")
    if not 0 <= overlap < 1:
        raise LayerError(f"overlap {overlap} is no share of a tile: choose a number from 0, below 1")
    stride, blend = int(tile * (1 - overlap)), int(out_tile * overlap)
    kept = out_tile - blend
    if stride < 1 or kept * tile != stride * out_tile:
        raise LayerError(
            f"tiles of {tile} that become {out_tile} do not overlap by {overlap} on both sides: "
            "choose another size of tile, or overlap"
        )
    images = np.asarray(x)
    above: list[np.ndarray] = []
    done = []
    for top in range(0, images.shape[1], stride):
        row: list[np.ndarray] = []
        for i, left in enumerate(range(0, images.shape[2], stride)):
            made = np.asarray(f(images[:, top : top + tile, left : left + tile]))
            if above:
                made = blended(above[i], made, blend, axis=1)
            if row:
                made = blended(row[-1], made, blend, axis=2)
            row.append(made)
        done.append(np.concatenate([made[:, :kept, :kept] for made in row], 2))
        above = row
    return np.concatenate(done, 1)


def blended(before: np.ndarray, after: np.ndarray, extent: int, *, axis: int) -> np.ndarray:
    """`after`, whose first `extent` places along the axis (or as many as there are) come in over the last of `before`.

    Place i of n is (1 - i / n) of the one and i / n of the other.
    """
    extent = min(before.shape[axis], after.shape[axis], extent)
    _, ending = np.split(before, [before.shape[axis] - extent], axis)
    beginning, rest = np.split(after, [extent], axis)
    share = np.arange(extent, dtype=np.float32) / np.float32(max(extent, 1))
    share = share.reshape([-1 if i == axis else 1 for i in range(after.ndim)])
    return np.concatenate([ending * (1 - share) + beginning * share, rest], axis)
