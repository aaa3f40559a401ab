"""Inception-v3 as the network of the FID: features of images, 2048 each, from its last pooling.

Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", section 6, in the form that the FID is
taken with (Heusel et al. 2017), which is TensorFlow's of 2015-12-05. It is another than torchvision's: means of 3 x 3
count no padding, the last block takes their maximum instead, and the weights differ. Names are those of the weights
that pytorch-fid publishes (pt_inception-2015-12-05-6726825d); docs/diffusion.md says how they come to safetensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.layers.convolution import convolve
from zoo.layers.linear import LayerError, Precision
from zoo.models.published import Layout, Weight
from zoo.sharding import constrain

SIDE = 299
"""Height and width, in pixels, that images are brought to."""

WIDTH = 2048
EPSILON = 1e-3

AXES = ("kernel_y", "kernel_x", None, None)
"""Of a kernel: 22 million parameters in all, which every device holds whole."""


class Filter(NamedTuple):
    """A convolution with its normalisation; unpadded, or with as many zeros around as keep the size."""

    name: str
    outputs: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True


class Branch(NamedTuple):
    """Filters one after the other, behind a pooling where there is one; the `ends` stand side by side at the end."""

    filters: tuple[Filter, ...] = ()
    ends: tuple[Filter, ...] = ()
    pool: str | None = None

    def outputs(self, inputs: int) -> int:
        """Channels, for as many as go in."""
        if self.ends:
            return sum(end.outputs for end in self.ends)
        return self.filters[-1].outputs if self.filters else inputs


Branches = tuple[Branch, ...]


def _a(pooled: int) -> Branches:
    return (
        Branch((Filter("branch1x1", 64),)),
        Branch((Filter("branch5x5_1", 48), Filter("branch5x5_2", 64, (5, 5)))),
        Branch(
            (
                Filter("branch3x3dbl_1", 64),
                Filter("branch3x3dbl_2", 96, (3, 3)),
                Filter("branch3x3dbl_3", 96, (3, 3)),
            )
        ),
        Branch((Filter("branch_pool", pooled),), pool="mean"),
    )


def _b() -> Branches:
    return (
        Branch((Filter("branch3x3", 384, (3, 3), 2, False),)),
        Branch(
            (
                Filter("branch3x3dbl_1", 64),
                Filter("branch3x3dbl_2", 96, (3, 3)),
                Filter("branch3x3dbl_3", 96, (3, 3), 2, False),
            )
        ),
        Branch(pool="halve"),
    )


def _c(inner: int) -> Branches:
    across, down = (1, 7), (7, 1)
    return (
        Branch((Filter("branch1x1", 192),)),
        Branch(
            (
                Filter("branch7x7_1", inner),
                Filter("branch7x7_2", inner, across),
                Filter("branch7x7_3", 192, down),
            )
        ),
        Branch(
            (
                Filter("branch7x7dbl_1", inner),
                Filter("branch7x7dbl_2", inner, down),
                Filter("branch7x7dbl_3", inner, across),
                Filter("branch7x7dbl_4", inner, down),
                Filter("branch7x7dbl_5", 192, across),
            )
        ),
        Branch((Filter("branch_pool", 192),), pool="mean"),
    )


def _d() -> Branches:
    return (
        Branch((Filter("branch3x3_1", 192), Filter("branch3x3_2", 320, (3, 3), 2, False))),
        Branch(
            (
                Filter("branch7x7x3_1", 192),
                Filter("branch7x7x3_2", 192, (1, 7)),
                Filter("branch7x7x3_3", 192, (7, 1)),
                Filter("branch7x7x3_4", 192, (3, 3), 2, False),
            )
        ),
        Branch(pool="halve"),
    )


def _e(pool: str) -> Branches:
    return (
        Branch((Filter("branch1x1", 320),)),
        Branch(
            (Filter("branch3x3_1", 384),),
            ends=(Filter("branch3x3_2a", 384, (1, 3)), Filter("branch3x3_2b", 384, (3, 1))),
        ),
        Branch(
            (Filter("branch3x3dbl_1", 448), Filter("branch3x3dbl_2", 384, (3, 3))),
            ends=(Filter("branch3x3dbl_3a", 384, (1, 3)), Filter("branch3x3dbl_3b", 384, (3, 1))),
        ),
        Branch((Filter("branch_pool", 192),), pool=pool),
    )


STEM: tuple[Filter | str, ...] = (
    Filter("Conv2d_1a_3x3", 32, (3, 3), 2, False),
    Filter("Conv2d_2a_3x3", 32, (3, 3), 1, False),
    Filter("Conv2d_2b_3x3", 64, (3, 3)),
    "halve",
    Filter("Conv2d_3b_1x1", 80),
    Filter("Conv2d_4a_3x3", 192, (3, 3), 1, False),
    "halve",
)
"""What stands before the blocks of branches."""

MIXED: dict[str, Branches] = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": _b(),
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": _d(),
    "Mixed_7b": _e("mean"),
    "Mixed_7c": _e("max"),
}


@dataclass(frozen=True)
class InceptionConfig:
    """An Inception-v3 of the FID; all its sizes are given."""

    precision: Precision = Precision()

    def build(self, rngs: nnx.Rngs) -> "Inception":
        return Inception(self, rngs=rngs)

    def published_layout(self) -> Layout:
        parts = {"bn.weight": "scale", "bn.bias": "bias", "bn.running_mean": "mean", "bn.running_var": "variance"}
        weights = []
        for path in _paths():
            weights.append(Weight(f"{path}.conv.weight", (f"{path}.kernel",), "o i y x -> y x i o"))
            weights += [Weight(f"{path}.{name}", (f"{path}.{ours}",), "d -> d") for name, ours in parts.items()]
        return Layout(tuple(weights), ignored=(r".*\.num_batches_tracked", r"fc\..*", r"AuxLogits\..*"))


def _paths() -> Iterator[str]:
    """Of every filter, published and here."""
    yield from (step.name for step in STEM if isinstance(step, Filter))
    for block, branches in MIXED.items():
        for branch in branches:
            yield from (f"{block}.{made.name}" for made in branch.filters + branch.ends)


class Filtered(nnx.Module):
    """A Filter over images [B, Y, X, C]: convolution without bias, normalisation by stored statistics, ReLU."""

    def __init__(self, inputs: int, made: Filter, *, rngs: nnx.Rngs, precision: Precision):
        (y, x), self.stride, self.precision = made.size, made.stride, precision
        self.padding = ((y // 2, y // 2), (x // 2, x // 2)) if made.padded else ((0, 0), (0, 0))
        dtype = jnp.dtype(precision.parameters)
        kernel = jax.nn.initializers.he_normal()(rngs.params(), (y, x, inputs, made.outputs), dtype)
        self.kernel = nnx.Param(kernel, axes=AXES)
        self.scale, self.variance = (nnx.Param(jnp.ones(made.outputs, dtype), axes=("norm",)) for _ in range(2))
        self.bias, self.mean = (nnx.Param(jnp.zeros(made.outputs, dtype), axes=("norm",)) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = cast(jax.Array, convolve(x, self.kernel[...], self.stride, self.padding, self.precision))
        scale = self.scale[...] * jax.lax.rsqrt(self.variance[...] + EPSILON)
        return jax.nn.relu((y - self.mean[...]) * scale + self.bias[...]).astype(y.dtype)


class Mixed(nnx.Module):
    """Branches over the same images, side by side in their channels. Filters are attributes by their names."""

    def __init__(self, inputs: int, branches: Branches, *, rngs: nnx.Rngs, precision: Precision):
        self.branches = branches
        make = partial(Filtered, rngs=rngs, precision=precision)
        for branch in branches:
            channels = inputs
            for made in branch.filters:
                setattr(self, made.name, make(channels, made))
                channels = made.outputs
            for made in branch.ends:
                setattr(self, made.name, make(channels, made))

    def __call__(self, x: jax.Array) -> jax.Array:
        found = []
        for branch in self.branches:
            y = x if branch.pool is None else POOLS[branch.pool](x)
            for made in branch.filters:
                y = getattr(self, made.name)(y)
            found += [getattr(self, made.name)(y) for made in branch.ends] or [y]
        return jnp.concatenate(found, -1)


POOLS = {
    "mean": partial(nnx.avg_pool, window_shape=(3, 3), strides=(1, 1), padding="SAME", count_include_pad=False),
    "max": partial(nnx.max_pool, window_shape=(3, 3), strides=(1, 1), padding="SAME"),
    "halve": partial(nnx.max_pool, window_shape=(3, 3), strides=(2, 2), padding="VALID"),
}


class Inception(nnx.Module):
    """Images [B, Y, X, 3] in [-1, 1] to features [B, 2048], float32.

    Images of another size are brought to 299 x 299 bilinearly, without antialiasing, as pytorch-fid does. Figures that
    are to compare across hardware take float32 products: jax.default_matmul_precision("highest").
    """

    def __init__(self, config: InceptionConfig, *, rngs: nnx.Rngs):
        self.config = config
        common, channels = {"rngs": rngs, "precision": config.precision}, 3
        for step in STEM:
            if isinstance(step, Filter):
                setattr(self, step.name, Filtered(channels, step, **common))
                channels = step.outputs
        for name, branches in MIXED.items():
            setattr(self, name, Mixed(channels, branches, **common))
            channels = sum(branch.outputs(channels) for branch in branches)

    def __call__(self, images: jax.Array) -> jax.Array:
        if images.ndim != 4 or images.shape[-1] != 3:
            raise LayerError(f"images of shape {images.shape} are given, and an Inception takes [B, Y, X, 3]")
        x = images.astype(jnp.float32)
        if x.shape[1:3] != (SIDE, SIDE):
            x = jax.image.resize(x, (len(x), SIDE, SIDE, 3), "linear", antialias=False)
        x = x.astype(self.config.precision.compute)
        for step in STEM:
            x = POOLS[step](x) if isinstance(step, str) else getattr(self, step.name)(x)
        for name in MIXED:
            x = getattr(self, name)(x)
        return constrain(x.astype(jnp.float32).mean((1, 2)), "act_batch", None)
