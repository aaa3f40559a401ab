"""Position-wise feed-forward networks, plain and gated."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.layers.dropout import dropout
from zoo.layers.linear import Initializer, LayerError, Linear, Precision, normal
from zoo.sharding import constrain

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


@jax.custom_jvp
def gelu_tanh(x: jax.Array) -> jax.Array:
    """x (1 + tanh z) / 2, written x sigmoid(2 z), with z = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks, Gimpel 2016)."""
    return x * jax.nn.sigmoid(2 * SQRT_2_OVER_PI * (x + 0.044715 * x**3))


@gelu_tanh.defjvp
def _gelu_tanh_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # The slope shares nothing with the value: XLA's CPU compiler would write what they share as float32, and read it
    # transposed for the gradient of the next kernel, at three times the cost of computing it twice.
    (x,) = primals
    t = jnp.tanh(SQRT_2_OVER_PI * (x + 0.044715 * x**3))
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * SQRT_2_OVER_PI * (1 + 3 * 0.044715 * x**2)
    return gelu_tanh(x), slope * tangents[0]


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), Phi the distribution of the standard normal (Hendrycks, Gimpel 2016, section 2)."""
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


@gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # By the other sign of erf's argument, so that the slope shares nothing with the value here either.
    (x,) = primals
    slope = 0.5 * (1 - jax.lax.erf(-math.sqrt(0.5) * x)) + x * jnp.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
    return gelu(x), slope * tangents[0]


def gelu_sigmoid(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x) (Hendrycks, Gimpel 2016, section 2), which CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_sigmoid": gelu_sigmoid,
    "gelu_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class FeedForward(nnx.Module):
    """down(f(up(x))), or gated, down(f(gate(x)) * up(x)) (Shazeer 2020), over x [B, T, D] with F hidden features.

    activation: a name in ACTIVATIONS; "gelu_tanh" is the approximation that GPT-2 was trained with.
    """

    def __init__(
        self,
        width: int,
        mlp_width: int,
        *,
        rngs: nnx.Rngs,
        activation: str = "gelu_tanh",
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        precision: Precision = Precision(),
        init: Initializer = normal(0.02),
        out_init: Initializer | None = None,
    ):
        if activation not in ACTIVATIONS:
            raise LayerError(f"activation {activation!r} is unknown: choose one of {', '.join(ACTIVATIONS)}")
        self.activation, self.dropout = activation, dropout
        into = partial(
            Linear, width, mlp_width, axes=("embed", "mlp"), rngs=rngs, precision=precision, bias=bias, init=init
        )
        self.up = into()
        self.gate = into() if gated else None
        self.down = Linear(
            mlp_width,
            width,
            axes=("mlp", "embed"),
            rngs=rngs,
            precision=precision,
            bias=bias,
            init=out_init or init,
        )

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        up = constrain(self.up(x), "act_batch", "act_length", "act_mlp")
        gate = None if self.gate is None else constrain(self.gate(x), "act_batch", "act_length", "act_mlp")

        def activate_and_project(up: jax.Array, gate: jax.Array | None) -> jax.Array:
            f = ACTIVATIONS[self.activation]
            wide = (up if gate is None else gate).astype(jnp.float32)
            hidden = (f(wide) if gate is None else f(wide) * up).astype(up.dtype)
            return self.down(dropout(hidden, self.dropout, key))

        # The backward pass keeps the inputs of the activation, and makes its output and slope from them again: cheap,
        # and the widest arrays of a block are held once instead of several times. Its product is not repeated.
        return jax.checkpoint(activate_and_project, prevent_cse=False)(up, gate)
