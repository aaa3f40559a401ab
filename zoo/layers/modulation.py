"""Modulation of normalised states by a condition: adaLN-zero (Peebles and Xie 2023, arXiv 2212.09748, section 3.2)."""

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.layers.linear import Linear, Precision
from zoo.sharding import constrain


class Modulation(nnx.Module):
    """One linear map of silu(condition) to all the vectors that modulate a layer; it starts at zero.

    At zero, states stay as they are normalised and a gated branch adds nothing: a block begins as the identity.
    """

    def __init__(
        self, condition_width: int, width: int, parts: int, *, rngs: nnx.Rngs, precision: Precision = Precision()
    ):
        self.parts = parts
        # One flat axis, not [parts, D]: its bias is a vector, which does not decay.
        self.linear = Linear(
            condition_width,
            parts * width,
            axes=("time", "mlp"),
            rngs=rngs,
            precision=precision,
            init=jax.nn.initializers.zeros,
        )

    def __call__(self, condition: jax.Array) -> tuple[jax.Array, ...]:
        """condition [B, E]: as many vectors as `parts`, [B, 1, D] each."""
        made = jnp.split(self.linear(jax.nn.silu(condition))[:, None], self.parts, -1)
        return tuple(constrain(vector, "act_batch", None, "act_embed") for vector in made)


def modulated(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x [B, T, D] times (1 + scale), plus shift, both [B, 1, D]; in float32, and back to the dtype of x."""
    return (x.astype(jnp.float32) * (1 + scale.astype(jnp.float32)) + shift).astype(x.dtype)
