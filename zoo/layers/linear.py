"""Matrix products under one precision policy: linear maps over several axes, and embeddings with a tied head."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.kernels.memory import awaiting, materialized, saved
from zoo.sharding import constrain, logical_axes

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]

VOCABULARY_MULTIPLE = 128

DTYPES = ("float32", "bfloat16", "float16", "float64")


class LayerError(ValueError):
    """Sizes or names that a layer cannot be built from; the message names the value and the mend."""


@dataclass(frozen=True)
class Precision:
    """Dtypes by name. Statistics, softmax, logits and losses are float32 whatever is asked for here.

    parameters: what parameters are stored, updated and differentiated in.
    compute: what activations and the operands of products are. Sums of products are float32.
    products: jax.lax.Precision of float32 products by name ("default", "high", "highest"). None leaves it to JAX: full
        float32 on CPU, TF32 where a GPU allows it, one bfloat16 pass on a TPU.
    """

    parameters: str = "float32"
    compute: str = "float32"
    products: str | None = None

    def __post_init__(self) -> None:
        for name in ("parameters", "compute"):
            if getattr(self, name) not in DTYPES:
                raise LayerError(f"{name} dtype {getattr(self, name)!r} is unknown: choose one of {', '.join(DTYPES)}")


def check_sizes(**sizes: int) -> None:
    """Raises LayerError for a size below 1, by its name."""
    for name, size in sizes.items():
        if size < 1:
            raise LayerError(f"{name} {size} is too small: choose a whole number from 1")


def normal(stddev: float) -> Initializer:
    """Initialises from N(0, stddev^2)."""
    return jax.nn.initializers.normal(stddev)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, in_rank: int, precision: Precision) -> jax.Array:
    """x [..., *in] contracted with kernel [*in, *out], plus bias [*out]: [..., *out] in the compute dtype.

    Operands are of the compute dtype, sums float32. Written with its own cotangents so that they too are (on CPUs,
    bfloat16 x bfloat16 -> float32 runs at twice the speed of anything else), so that gradients arrive in the dtype of
    the parameters, rounded nowhere and reduced across devices in float32, and so that the backward pass finds the
    parameters as they are, not a copy in another shape or dtype. Leading axes of x are not merged: the compiler does
    that where it may, and may not where both are sharded.
    """
    leading, out_shape = x.shape[: x.ndim - in_rank], kernel.shape[in_rank:]
    y = _dot(x.reshape(*leading, -1), _matrix(kernel, in_rank), (len(leading),), (0,), precision)
    y = y.reshape(*leading, *out_shape)
    return (y if bias is None else y + bias).astype(precision.compute)


def _affine_forward(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, in_rank: int, precision: Precision
) -> tuple:
    return affine(x, kernel, bias, in_rank, precision), (x, kernel, bias)


def _affine_backward(in_rank: int, precision: Precision, residuals: tuple, dy: jax.Array) -> tuple:
    x, kernel, bias = residuals
    axes = tuple(range(x.ndim - in_rank))
    leading = x.shape[: len(axes)]
    rows, columns = x.reshape(*leading, -1), dy.reshape(*leading, -1)
    dx = _dot(columns, _matrix(kernel, in_rank), (len(axes),), (1,), precision)
    # Written for this product alone, and not before it.
    dkernel = _dot(awaiting(rows, dy), columns, axes, axes, precision)
    dbias = None if bias is None else dy.astype(jnp.float32).sum(axes).astype(bias.dtype)
    return dx.reshape(x.shape).astype(x.dtype), dkernel.reshape(kernel.shape).astype(kernel.dtype), dbias


affine.defvjp(_affine_forward, _affine_backward)


def _matrix(kernel: jax.Array, in_rank: int) -> jax.Array:
    return kernel.reshape(math.prod(kernel.shape[:in_rank]), -1)


def _dot(
    a: jax.Array, b: jax.Array, a_axes: tuple[int, ...], b_axes: tuple[int, ...], precision: Precision
) -> jax.Array:
    return jax.lax.dot_general(
        a.astype(precision.compute),
        b.astype(precision.compute),
        ((a_axes, b_axes), ((), ())),
        precision=precision.products,
        preferred_element_type=jnp.float32,
    )


class Linear(nnx.Module):
    """An affine map between groups of axes: x [..., *in_shape] to [..., *out_shape].

    `axes` are the logical axes of the kernel, [*in_shape, *out_shape]; the bias takes those of out_shape. `init` sees
    the kernel as a matrix [prod(in_shape), prod(out_shape)], so that fans count all axes of a side.
    """

    def __init__(
        self,
        in_shape: int | tuple[int, ...],
        out_shape: int | tuple[int, ...],
        *,
        axes: tuple[str | None, ...],
        rngs: nnx.Rngs,
        precision: Precision = Precision(),
        bias: bool = True,
        init: Initializer = normal(0.02),
    ):
        self.in_shape = (in_shape,) if isinstance(in_shape, int) else tuple(in_shape)
        self.out_shape = (out_shape,) if isinstance(out_shape, int) else tuple(out_shape)
        self.precision = precision
        dtype = jnp.dtype(precision.parameters)
        matrix = init(rngs.params(), (math.prod(self.in_shape), math.prod(self.out_shape)), dtype)
        self.kernel = nnx.Param(matrix.reshape(self.in_shape + self.out_shape), axes=axes)
        bias_axes = axes[len(self.in_shape) :]
        self.bias = nnx.Param(jnp.zeros(self.out_shape, dtype), axes=bias_axes) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        y = affine(x, self.kernel[...], bias, len(self.in_shape), self.precision)
        return saved(y, "product")


def joined(*parts: Linear) -> Linear:
    """One map to the outputs of all parts, side by side along the first axis of their out_shape."""
    whole, axis = copy.copy(parts[0]), -len(parts[0].out_shape)

    def beside(*parameters: nnx.Param) -> nnx.Param:
        joint = jnp.concatenate([parameter[...] for parameter in parameters], axis)
        return nnx.Param(joint, axes=logical_axes(parameters[0]))

    whole.out_shape = (sum(part.out_shape[0] for part in parts), *whole.out_shape[1:])
    whole.kernel = beside(*(part.kernel for part in parts))
    whole.bias = None if whole.bias is None else beside(*(part.bias for part in parts if part.bias is not None))
    return whole


class Head(NamedTuple):
    """What scores hidden states against a vocabulary, as `zoo.kernels.linear_cross_entropy` takes it.

    kernel: [D, V], in the parameters' dtype.  vocabulary: entries of V that are real; those behind only pad.
    precision: of the product, by name, as in `Precision.products`.  bias: [V], added to the scores, or none.
    """

    kernel: jax.Array
    vocabulary: int
    precision: str | None = None
    bias: jax.Array | None = None


class Embed(nnx.Module):
    """A table of vectors, and the tied head that scores a vector against each of them.

    The table's rows are padded with zeros to a multiple of 128, so that a vocabulary of any size fits tiles and meshes;
    its metadata `rows` says how many are real.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        *,
        rngs: nnx.Rngs,
        precision: Precision = Precision(),
        init: Initializer = normal(0.02),
    ):
        self.vocab_size, self.precision = vocab_size, precision
        table = init(rngs.params(), (vocab_size, width), jnp.dtype(precision.parameters))
        padded = jnp.pad(table, ((0, -vocab_size % VOCABULARY_MULTIPLE), (0, 0)))
        self.table = nnx.Param(padded, axes=("vocab", "embed"), rows=vocab_size)

    def __call__(self, tokens: jax.Array, *, pad: int | None = None) -> jax.Array:
        """The vectors of tokens [...], int: [..., D] in the compute dtype; NaN for one outside the padded table.

        pad: a token whose vector learns nothing from here, as torch's padding_idx.
        """
        # Rows are looked up whole: cut along D, the result would have to change layout on its way to the batch's.
        table = constrain(self.table[...], "act_vocab", None)
        vectors = table.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        if pad is not None:
            vectors = jnp.where((tokens == pad)[..., None], jax.lax.stop_gradient(vectors), vectors)
        return vectors.astype(self.precision.compute)

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits of x [..., D] against every row: [..., V padded] float32, -inf at the rows that only pad."""
        logits = cast(jax.Array, scores(x, self.table[...], self.precision))
        real = jnp.arange(logits.shape[-1]) < self.vocab_size
        leading = ("act_batch", *("act_length",) * (x.ndim - 2))[: x.ndim - 1]
        return constrain(materialized(jnp.where(real, logits, -jnp.inf)), *leading, "act_vocab")

    def head(self) -> Head:
        """What `attend` scores with, for a loss that never holds all its logits."""
        return Head(self.table[...].T, self.vocab_size, self.precision.products)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def scores(x: jax.Array, table: jax.Array, precision: Precision) -> jax.Array:
    """x [..., D] times the transpose of table [V, D], with compute-dtype operands: [..., V] float32."""
    return _dot(x, table, (x.ndim - 1,), (1,), precision)


def _scores_forward(x: jax.Array, table: jax.Array, precision: Precision) -> tuple[jax.Array, tuple]:
    return scores(x, table, precision), (x, table)


def _scores_backward(precision: Precision, residuals: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, table = residuals
    leading = tuple(range(x.ndim - 1))
    dx = _dot(dy, table, (dy.ndim - 1,), (0,), precision)
    dtable = _dot(dy, x, leading, leading, precision)
    return dx.astype(x.dtype), dtable.astype(table.dtype)


scores.defvjp(_scores_forward, _scores_backward)
