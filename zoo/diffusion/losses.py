"""Losses of diffusion models."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from zoo.diffusion.schedules import Schedule, add_noise

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]
"""(x_t [B, Y, X, C], t [B] int32) to a prediction of the noise in x_t, [B, Y, X, C]."""


def noise_prediction(
    denoise: Denoiser, schedule: Schedule, images: jax.Array, t: jax.Array, noise: jax.Array
) -> jax.Array:
    """Mean squared error, per element, of the noise predicted in images [B, Y, X, C] noised to t [B]: [B] float32.

    L_simple of Ho et al. 2020, equation 14. noise: standard normal [B, Y, X, C].
    """
    predicted = denoise(add_noise(schedule, images, t, noise), t)
    return jnp.square(predicted.astype(jnp.float32) - noise).mean((1, 2, 3))
