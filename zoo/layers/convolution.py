"""Two-dimensional convolution over images [B, Y, X, C] with written gradients, and group normalisation."""

from collections.abc import Callable
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.kernels import winograd
from zoo.kernels.memory import awaiting
from zoo.layers.linear import Initializer, LayerError, Precision
from zoo.sharding import constrain

Padding = tuple[tuple[int, int], tuple[int, int]]
Product = Callable[[jax.Array, jax.Array], jax.Array]

fan_average = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
"""U(-a, a) with a = sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010): what DDPM's networks start from."""


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, precision: Precision) -> jax.Array:
    """x [B, Y, X, I] with kernel [Ky, Kx, I, O], summed in float32: [B, Y', X', O] in the compute dtype.

    padding: zeros before and after each of Y and X. As deep learning has it, the kernel is not flipped.
    """
    kernel = _gathered(kernel, precision)
    halved = winograd.convolve if _halves(x, kernel, stride, padding) else None
    y = _convolve(x, kernel, ("NHWC", "HWIO", "NHWC"), precision, padding, stride=stride, on_cpu=halved)
    return y.astype(precision.compute)


def _halves(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> bool:
    """Whether CPUs have half the multiplications for x, a kernel in the compute dtype, and their gradients."""
    return stride == 1 and padding == ((1, 1), (1, 1)) and winograd.suits(x, kernel)


def _forward(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, precision: Precision
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return convolve(x, kernel, stride, padding, precision), (x, kernel)


def _backward(
    stride: int, padding: Padding, precision: Precision, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Both gradients are convolutions of dy, spread out by the stride: with the turned kernel, and with x."""
    x, kernel = residuals
    x_padding, kernel_padding = [], []
    for (before, _), size, window, outputs in zip(padding, x.shape[1:3], kernel.shape[:2], dy.shape[1:3], strict=True):
        spread = (outputs - 1) * stride + 1
        x_padding.append((window - 1 - before, size - spread + before))
        kernel_padding.append((before, window - 1 + spread - size - before))
    turned = _gathered(awaiting(kernel, dy), precision)[::-1, ::-1]
    halves = _halves(x, turned, stride, padding)

    def halved(dy: jax.Array, turned: jax.Array) -> jax.Array:
        return winograd.convolve(dy, turned.swapaxes(2, 3))

    layouts, on_cpu = ("NHWC", "HWOI", "NHWC"), halved if halves else None
    dx = _convolve(dy, turned, layouts, precision, x_padding, spread_lhs=stride, on_cpu=on_cpu)
    # What is made of x is not there before dy is; sums of rows, several times as large, not while dx has its own.
    x, dy = (awaiting(x, dx), awaiting(dy, dx)) if halves else (awaiting(x, dy), dy)
    layouts, on_cpu = ("CHWN", "IHWO", "HWNC"), winograd.kernel_gradient if halves else None
    dkernel = _convolve(x, dy, layouts, precision, kernel_padding, spread_rhs=stride, on_cpu=on_cpu)
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


convolve.defvjp(_forward, _backward)


def _gathered(kernel: jax.Array, precision: Precision) -> jax.Array:
    """The kernel in the compute dtype, whole along its input channels on every device.

    Said to the partitioner, because left to choose with inputs, outputs and images cut along three mesh axes it gives a
    wrong gradient of x (jax 0.10.2; jax.lax's own convolution likewise).
    """
    return constrain(kernel.astype(precision.compute), None, None, None, "act_channels")


def _convolve(
    lhs: jax.Array,
    rhs: jax.Array,
    layouts: tuple[str, str, str],
    precision: Precision,
    padding: Padding | list[tuple[int, int]],
    *,
    stride: int = 1,
    spread_lhs: int = 1,
    spread_rhs: int = 1,
    on_cpu: Product | None = None,
) -> jax.Array:
    """A convolution of operands in the compute dtype and in the given layouts; float32.

    on_cpu: computes the same there, in another way.

    On CPUs the operands are transposed to NHWC and HWIO first: inside a loop (accumulation of gradients is one) XLA has
    a fast convolution for these alone, and any other order is some hundred times slower (jax#12868). Elsewhere the
    order is part of what the compiler recognises a gradient by, and stays. GPUs also sum in float32, but cuDNN returns
    the dtype of the operands.
    """
    convolution = partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride, stride),
        padding=padding,
        lhs_dilation=(spread_lhs, spread_lhs),
        rhs_dilation=(spread_rhs, spread_rhs),
        precision=precision.products,
    )

    def direct(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return convolution(lhs, rhs, dimension_numbers=layouts).astype(jnp.float32)

    def summed(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return convolution(lhs, rhs, dimension_numbers=layouts, preferred_element_type=jnp.float32)

    def transposed(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        lhs = lhs.transpose([layouts[0].index(axis) for axis in "NHWC"])
        rhs = rhs.transpose([layouts[1].index(axis) for axis in "HWIO"])
        layout = ("NHWC", "HWIO", "NHWC")
        y = convolution(lhs, rhs, dimension_numbers=layout, preferred_element_type=jnp.float32)
        return y.transpose(["NHWC".index(axis) for axis in layouts[2]])

    lhs, rhs = lhs.astype(precision.compute), rhs.astype(precision.compute)
    return jax.lax.platform_dependent(lhs, rhs, cpu=on_cpu or transposed, tpu=summed, default=direct)


class Conv(nnx.Module):
    """A square convolution with bias. Channels of images themselves (1, 3, 4) name no axis: nothing divides them.

    padding: zeros before and after each side. None: as many as keep the size at stride 1; with stride 2 they halve it,
        and an odd one stands after the image.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        rngs: nnx.Rngs,
        size: int = 3,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        in_axis: str | None = "conv_in",
        out_axis: str | None = "conv_out",
        precision: Precision = Precision(),
        init: Initializer = fan_average,
    ):
        total = size - stride
        self.padding = (total // 2, total - total // 2) if padding is None else padding
        self.stride, self.precision = stride, precision
        dtype = jnp.dtype(precision.parameters)
        kernel = init(rngs.params(), (size, size, in_channels, out_channels), dtype)
        self.kernel = nnx.Param(kernel, axes=("kernel_y", "kernel_x", in_axis, out_axis))
        self.bias = nnx.Param(jnp.zeros(out_channels, dtype), axes=(out_axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        around = (self.padding, self.padding)
        y = cast(jax.Array, convolve(x, self.kernel[...], self.stride, around, self.precision))
        return y + self.bias[...].astype(y.dtype)


class GroupNorm(nnx.Module):
    """Normalises each image over its area and each of `groups` runs of channels (Wu and He 2018), in float32."""

    def __init__(self, channels: int, groups: int, *, epsilon: float = 1e-6, precision: Precision = Precision()):
        if channels % groups:
            raise LayerError(f"{channels} channels do not divide into {groups} groups: choose a divisor of {channels}")
        self.groups, self.epsilon, self.compute = groups, epsilon, precision.compute
        dtype = jnp.dtype(precision.parameters)
        self.scale = nnx.Param(jnp.ones(channels, dtype), axes=("norm",))
        self.bias = nnx.Param(jnp.zeros(channels, dtype), axes=("norm",))

    def __call__(self, x: jax.Array) -> jax.Array:
        return scaled(x, self.coefficients(x), self.compute)

    def coefficients(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Factors and terms, [B, 1, 1, C] float32, by which x is normalised."""
        mean, variance = cast(tuple[jax.Array, jax.Array], _moments(x.astype(jnp.float32), self.groups))
        factors = jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
        return factors, self.bias[...] - mean * factors


def scaled(x: jax.Array, coefficients: tuple[jax.Array, jax.Array], dtype: str) -> jax.Array:
    """x times the first, plus the second, in float32 and then in a dtype."""
    factors, terms = coefficients
    return (x.astype(jnp.float32) * factors + terms).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _moments(x: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """x [B, Y, X, C]: the mean and the variance of each channel's group, [B, 1, 1, C].

    Over the area first: a group is a few channels, and a sum over both would read a few numbers at a time. With a
    gradient of its own, which reads x and not its differences from the mean: those would be kept beside it.
    """
    mean = _group_means(x.mean((1, 2)), groups)
    return mean, _group_means(jnp.square(x - mean).mean((1, 2)), groups)


def _moments_forward(x: jax.Array, groups: int) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    moments = cast(tuple[jax.Array, jax.Array], _moments(x, groups))
    return moments, (x, moments[0])


def _moments_backward(
    groups: int, residuals: tuple[jax.Array, jax.Array], gradient: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array]:
    x, mean = residuals
    d_mean, d_variance = (_group_means(dy[:, 0, 0], groups) / (x.shape[1] * x.shape[2]) for dy in gradient)
    return (2 * d_variance * x + (d_mean - 2 * d_variance * mean),)


_moments.defvjp(_moments_forward, _moments_backward)


def _group_means(x: jax.Array, groups: int) -> jax.Array:
    """[B, C] to [B, 1, 1, C]: of each channel's group."""
    means = x.reshape(x.shape[0], groups, -1).mean(-1)
    return jnp.repeat(means, x.shape[-1] // groups, 1)[:, None, None]
