"""Matrix products under one precision policy: linear maps over several axes, and embeddings with a tied head."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]

VOCABULARY_MULTIPLE = 128


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


def normal(stddev: float) -> Initializer:
    """Initialises from N(0, stddev^2)."""
    return jax.nn.initializers.normal(stddev)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def affine(x: jax.Array, weight: jax.Array, bias: jax.Array | None, precision: Precision) -> jax.Array:
    """x [..., I] @ weight [I, O] + bias [O], summed in float32: [..., O] in the compute dtype.

    Written with its own cotangents so that they too are products of compute-dtype operands with float32 sums (on CPUs,
    bfloat16 x bfloat16 -> float32 runs at twice the speed of anything else), and so that gradients arrive in the dtype
    of the parameters: rounded nowhere, reduced across devices in float32. The leading axes of x are not merged, because
    the compiler does that where it may, and may not where both are sharded.
    """
    y = _dot(x, weight, (x.ndim - 1,), (0,), precision)
    return (y if bias is None else y + bias).astype(precision.compute)


def _affine_forward(x: jax.Array, weight: jax.Array, bias: jax.Array | None, precision: Precision) -> tuple:
    return affine(x, weight, bias, precision), (x, weight, bias)


def _affine_backward(precision: Precision, residuals: tuple, dy: jax.Array) -> tuple:
    x, weight, bias = residuals
    leading = tuple(range(x.ndim - 1))
    dx = _dot(dy, weight, (dy.ndim - 1,), (1,), precision).astype(x.dtype)
    dweight = _dot(x, dy, leading, leading, precision).astype(weight.dtype)
    dbias = None if bias is None else dy.astype(jnp.float32).sum(leading).astype(bias.dtype)
    return dx, dweight, dbias


affine.defvjp(_affine_forward, _affine_backward)


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
        leading = x.shape[: x.ndim - len(self.in_shape)]
        columns = math.prod(self.out_shape)
        weight = self.kernel[...].reshape(-1, columns)
        bias = None if self.bias is None else self.bias[...].reshape(columns)
        y = affine(x.reshape(*leading, -1), weight, bias, self.precision).reshape(*leading, *self.out_shape)
        return checkpoint_name(y, "product")


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

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The vectors of tokens [...], int: [..., D] in the compute dtype. A token outside the table gives NaN."""
        return self.table[...].at[tokens].get(mode="fill", fill_value=jnp.nan).astype(self.precision.compute)

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits of x [..., D] against every row: [..., V padded] float32, -inf at the rows that only pad."""
        logits = scores(x, self.table[...], self.precision)
        real = jnp.arange(logits.shape[-1]) < self.vocab_size
        return jnp.where(real, logits, -jnp.inf)


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
