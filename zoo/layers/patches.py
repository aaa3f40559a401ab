"""Images as sequences of patches, and positions learned on one grid of patches read on another."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from zoo.layers.linear import LayerError


def patch_grid(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Patches down and across an image; what is left over of a side, below or to the right, is in none of them.

    Raises LayerError where an image is smaller than a patch.
    """
    grid = image_size[0] // patch_size[0], image_size[1] // patch_size[1]
    if not all(grid):
        sizes = ["{} x {}".format(*size) for size in (image_size, patch_size)]
        raise LayerError(f"an image of {sizes[0]} pixels is smaller than a patch of {sizes[1]}: give a larger one")
    return grid


def cut_into_patches(images: jax.Array, patch_size: tuple[int, int]) -> jax.Array:
    """images [B, Y, X, C] to [B, T, patch Y, patch X, C], row by row.

    A product of what comes out with a kernel [patch Y, patch X, C, D] is a convolution whose stride is its size, as one
    matrix product.
    """
    _, y, x, _ = images.shape
    rows, columns = patch_grid((y, x), patch_size)
    whole = images[:, : rows * patch_size[0], : columns * patch_size[1]]
    return rearrange(whole, "b (i y) (j x) c -> b (i j) y x c", i=rows, j=columns)


def resize_bicubic(table: jax.Array, grid: tuple[int, int], *, antialias: bool = False) -> jax.Array:
    """table [Y, X, D] resampled to [*grid, D], in float32: two products with constant matrices.

    The same as torch.nn.functional.interpolate(mode="bicubic", align_corners=False, antialias=...), by its `size`.
    """
    down, across = (bicubic_matrix(*sizes, antialias=antialias) for sizes in zip(table.shape, grid, strict=False))
    products = jax.lax.Precision.HIGHEST
    return jnp.einsum("iy,jx,yxd->ijd", down, across, table.astype(jnp.float32), precision=products)


def bicubic_matrix(old: int, new: int, *, antialias: bool) -> np.ndarray:
    """[new, old] float32: what each of `new` samples takes of `old` ones on the same line, by cubic convolution.

    Keys 1981, "Cubic convolution interpolation for digital image processing", whose free coefficient torch sets to
    -0.75 where it takes the four nearest samples, those beyond an end being the sample at the end; and to -0.5 where it
    antialiases: then the kernel is as wide as new samples lie apart, and what falls beyond an end is left out.
    """
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    if antialias:
        weights = _keys((np.arange(old) - centres[:, None]) / max(old / new, 1.0), -0.5)
        return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    taps = np.floor(centres)[:, None].astype(int) + np.arange(-1, 3)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], taps.clip(0, old - 1)), _keys(taps - centres[:, None], -0.75))
    return matrix.astype(np.float32)


def _keys(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys's kernel (his equation 15, and before a is set equation 4): 1 at 0, and 0 from a distance of 2."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))
