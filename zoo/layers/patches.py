"""Images as sequences of patches and of tokens beside them, with positions learned on one grid and read on any."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from zoo.layers.linear import Initializer, LayerError, Linear, Precision, normal
from zoo.layers.positions import LearnedPositions
from zoo.sharding import constrain


class ImageTokens(nnx.Module):
    """Images [B, Y, X, C] to what a transformer reads, [B, T, D]: class tokens, registers, and patches row by row.

    A patch of patch_size pixels is mapped to D features (Dosovitskiy et al. 2021). Class tokens and patches have
    learned positions, of the grid of image_size; those of images of another size are resampled, antialiased or not.

    class_tokens: learned vectors whose states say what an image is, 1 or 0.
    registers: learned vectors between those and the patches, for whatever the network keeps there (Darcet et al. 2024).
    mask_token: whether there is a vector that stands in for patches that are masked; 0 at first.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        patch_size: tuple[int, int],
        channels: int,
        width: int,
        *,
        rngs: nnx.Rngs,
        class_tokens: int = 1,
        registers: int = 0,
        mask_token: bool = False,
        antialias: bool = False,
        precision: Precision = Precision(),
        init: Initializer = normal(0.02),
    ):
        self.patch_size, self.grid, self.antialias = patch_size, patch_grid(image_size, patch_size), antialias
        common = {"rngs": rngs, "precision": precision, "init": init}
        self.patches = Linear((*patch_size, channels), width, axes=("kernel_y", "kernel_x", None, "embed"), **common)
        self.positions = LearnedPositions(class_tokens + self.grid[0] * self.grid[1], width, **common)

        def vectors(count: int, init: Initializer) -> nnx.Param | None:
            made = init(rngs.params(), (count, width), jnp.dtype(precision.parameters)) if count else None
            return None if made is None else nnx.Param(made, axes=("positions", "embed"))

        self.class_tokens = vectors(class_tokens, init)
        # As in DINOv2's code: from 0 they would all stay the same.
        self.registers = vectors(registers, normal(1e-6))
        self.mask_token = vectors(int(mask_token), jax.nn.initializers.zeros)

    def __call__(self, images: jax.Array, masked: jax.Array | None = None) -> jax.Array:
        """masked: [B, patches], true where the mask token stands in. Raises LayerError for images that do not fit."""
        _, height, width, _ = self._checked(images)
        x = self.patches(cut_into_patches(images, self.patch_size))
        if masked is not None:
            if self.mask_token is None:
                raise LayerError("masked was given, and this model has no mask token: build it with mask_token=True")
            x = jnp.where(masked[..., None], self.mask_token[...].astype(x.dtype), x)
        first, rest = self._positions(patch_grid((height, width), self.patch_size))
        parts = [x + rest.astype(x.dtype)]
        if self.registers is not None:
            parts.insert(0, self.registers[...])
        if self.class_tokens is not None:
            parts.insert(0, self.class_tokens[...] + first)
        parts = [jnp.broadcast_to(part.astype(x.dtype), (len(x), *part.shape[-2:])) for part in parts]
        return constrain(jnp.concatenate(parts, 1), "act_batch", "act_length", "act_embed")

    def _checked(self, images: jax.Array) -> tuple[int, ...]:
        channels = self.patches.in_shape[-1]
        if images.ndim != 4 or images.shape[-1] != channels:
            raise LayerError(f"images have shape {images.shape}: the model takes [B, Y, X, {channels}]")
        return images.shape

    def _positions(self, grid: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """Vectors of the class tokens' positions, and [patches, D] of a grid's."""
        table = constrain(self.positions.table[...], None, None)
        count = len(table) - self.grid[0] * self.grid[1]
        first, rest = table[:count], table[count:]
        if grid != self.grid:
            on_grid = rest.reshape(*self.grid, -1)
            rest = resize_bicubic(on_grid, grid, antialias=self.antialias).reshape(-1, on_grid.shape[-1])
        return first, rest


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
