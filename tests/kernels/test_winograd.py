"""Convolutions with half the multiplications, against sums in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.kernels import winograd
from zoo.layers.convolution import convolve
from zoo.layers.linear import Precision

PADDING = ((1, 1), (1, 1))
SHAPES = {"square": (2, 16, 16, 64, 72), "oblong": (1, 20, 17, 80, 64)}


def arrays(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, a kernel and a gradient of the result."""
    batch, height, width, inputs, outputs = shape
    draw = np.random.default_rng(0)
    kernel = draw.standard_normal((3, 3, inputs, outputs)) / np.sqrt(9 * inputs)
    x, dy = (draw.standard_normal((batch, height, width, channels)) for channels in (inputs, outputs))
    return tuple(a.astype(np.float32) for a in (x, kernel, dy))  # type: ignore[return-value]


def summed(x: np.ndarray, kernel: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The convolution and its gradients by x and by the kernel, nine products each, in float64."""
    x, kernel, dy = (a.astype(np.float64) for a in (x, kernel, dy))
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), *PADDING, (0, 0)))
    y, dpadded, dkernel = np.zeros_like(dy), np.zeros_like(padded), np.zeros_like(kernel)
    for i, j in np.ndindex(3, 3):
        window = np.s_[:, i : i + height, j : j + width]
        y += padded[window] @ kernel[i, j]
        dpadded[window] += dy @ kernel[i, j].T
        dkernel[i, j] = np.einsum("byxi,byxo->io", padded[window], dy)
    return y, dpadded[:, 1:-1, 1:-1], dkernel


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_convolution_and_its_gradients(shape) -> None:
    x, kernel, dy = arrays(shape)
    assert winograd.suits(x, kernel)
    y, pull = jax.vjp(jax.jit(lambda x, kernel: convolve(x, kernel, 1, PADDING, Precision())), x, kernel)
    for found, expected in zip((y, *pull(dy)), summed(x, kernel, dy), strict=True):
        assert np.abs(found - expected).max() < 3e-6 * np.abs(expected).max()


def test_it_is_what_runs_on_a_cpu_and_nowhere_else() -> None:
    """The plain convolution is gone from a CPU's program, and alone in that of another platform."""
    x, kernel, _ = arrays(SHAPES["square"])
    traced = jax.jit(lambda x, kernel: convolve(x, kernel, 1, PADDING, Precision())).trace(x, kernel)
    for platform, plain in (("cpu", 0), ("tpu", 1), ("cuda", 1)):
        assert traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.convolution") == plain


@pytest.mark.parametrize(
    ("x", "kernel"),
    [
        ((1, 18, 16, 64), (3, 3, 64, 64)),
        ((1, 12, 16, 64), (3, 3, 64, 64)),
        ((1, 16, 16, 32), (3, 3, 32, 64)),
        ((1, 16, 16, 64), (1, 1, 64, 64)),
    ],
)
def test_what_does_not_suit_is_left_alone(x, kernel) -> None:
    assert not winograd.suits(jnp.zeros(x), jnp.zeros(kernel))


def test_bfloat16_is_left_alone() -> None:
    assert not winograd.suits(jnp.zeros((1, 16, 16, 64), jnp.bfloat16), jnp.zeros((3, 3, 64, 64), jnp.bfloat16))
