"""3 x 3 convolutions of float32 images with half the multiplications, for CPUs (Lavin and Gray 2016, arXiv 1509.09308).

Down the image it is their F(4, 3): four rows of the result are 12 products of a row of the image with one of the
kernel, and as the coefficients of a product of polynomials they follow from its values at 6 points, which are 6
products of sums of rows. Along the image nothing is saved: each pixel is multiplied with all three columns of a kernel,
and the result sums them, shifted.

Points 0, +-3/4, +-3/2 and infinity round 2.2 times as much as the plain sum does; the usual 0, +-1, +-2 and infinity,
3.2 times (root mean squares over 256 channels; Barabasz et al. 2020, arXiv 1803.10986, say why).
"""

from collections.abc import Sequence
from functools import reduce
from operator import add

import jax
import jax.numpy as jnp
import numpy as np

from zoo.kernels.memory import awaiting, materialized

_ROWS = 4
"""Of the result that a tile has."""

_POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
"""And infinity, at which a polynomial's value is its first coefficient."""


def _values(degree: int) -> np.ndarray:
    """From the coefficients of a polynomial, constant first, to its values at the points: [6, degree + 1]."""
    finite = [[point**i for i in range(degree + 1)] for point in _POINTS]
    return np.array([*finite, [0.0] * degree + [1.0]])


# A convolution is the transpose of a product of polynomials: y = results^T ((kernels k) * (tiles x)).
_RESULTS = _values(_ROWS - 1).T
_KERNELS = _values(2)
_TILES = np.linalg.inv(_values(5)).T


def suits(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether images [B, Y, X, I] and a kernel [Ky, Kx, I, O] are of a size that this is the faster way for.

    Small products do not use all cores, and small images are mostly edge. Products are in the kernel's dtype, float32.
    """
    square = kernel.shape[:2] == (3, 3) and min(kernel.shape[2:]) >= 64
    return square and kernel.dtype == jnp.float32 and x.shape[1] % _ROWS == 0 and min(x.shape[1:3]) >= 16


@jax.jit
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B, Y, X, I] with kernel [3, 3, I, O], at stride 1 with a pixel of zeros around: [B, Y, X, O]; 4 divides Y."""
    batch, height, width, inputs = x.shape
    outputs = kernel.shape[-1]
    # Not made of all a network's kernels when a program begins.
    weights = awaiting(jnp.asarray(_KERNELS, x.dtype), x)
    tiles = _tiles(x)

    def column(i: int) -> jax.Array:
        kernels = (weights @ kernel[:, i].reshape(3, -1)).reshape(6, inputs, outputs)
        products = jnp.einsum("npi,nio->npo", tiles, kernels)
        return products.reshape(6, batch, height // _ROWS, width + 2, outputs)[:, :, :, i : i + width]

    sums = list(reduce(add, (column(i) for i in range(3))))
    return jnp.stack(_combined(_RESULTS, sums), 2).reshape(batch, height, width, outputs)


@jax.jit
def kernel_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient of `convolve` by its kernel, [3, 3, I, O], for dy [B, Y, X, O]."""
    inputs, outputs = x.shape[-1], dy.shape[-1]
    sums = jnp.stack(_combined(_RESULTS.T, [dy[:, i::_ROWS] for i in range(_ROWS)]))
    shifted = [jnp.pad(sums, ((0, 0), (0, 0), (0, 0), (i, 2 - i), (0, 0))) for i in range(3)]
    dproducts = jnp.stack(shifted, -2).reshape(6, -1, 3 * outputs)
    dkernels = jnp.einsum("npi,npo->nio", _tiles(x), dproducts)
    dkernel = jnp.asarray(_KERNELS.T, x.dtype) @ dkernels.reshape(6, -1)
    return dkernel.reshape(3, inputs, 3, outputs).transpose(0, 2, 1, 3)


def _tiles(x: jax.Array) -> jax.Array:
    """What each of 6 products has of the image, sums of its rows: [6, B * Y / 4 * (X + 2), I]."""
    # Written once: each sum reads four rows or five, and would make what made them as often.
    padded = materialized(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))
    last = x.shape[1] - _ROWS + 1
    sums = _combined(_TILES, [padded[:, i : i + last : _ROWS] for i in range(_ROWS + 2)])
    return jnp.stack(sums).reshape(6, -1, x.shape[-1])


def _combined(weights: np.ndarray, terms: Sequence[jax.Array]) -> list[jax.Array]:
    """weights [N, M] times M arrays: N sums, without the terms that are nothing."""
    rows = [[(float(w), x) for w, x in zip(row, terms, strict=True) if abs(w) > 1e-12] for row in weights]
    return [reduce(add, (w * x for w, x in row)) for row in rows]
