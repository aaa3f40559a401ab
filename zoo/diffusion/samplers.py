"""Sampling from a noise predictor: ancestral (DDPM) and DDIM, each one `jax.lax.scan` over the time steps.

The steps are public and pure: a step is given the noise it adds. A sampler is a function of its key alone.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from zoo.diffusion.losses import Denoiser
from zoo.diffusion.schedules import Schedule, ScheduleError, posterior, predicted_image, step_variance

Step = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""(x_t, predicted noise, fresh noise [B, Y, X, C], t [], s []) to x_s, where s < t is the next time of the path."""


def trailing_times(timesteps: int, steps: int) -> np.ndarray:
    """`steps` times from timesteps - 1 downwards, evenly spaced: [steps] int32.

    The path begins where training had most noise, which other spacings miss (Lin et al. 2024, section 3.3).
    """
    if not 1 <= steps <= timesteps:
        raise ScheduleError(f"sampling in {steps} steps is not possible with {timesteps}: choose 1 to {timesteps}")
    return np.round(np.arange(steps, 0, -1) * timesteps / steps).astype(np.int32) - 1


def ddpm_step(
    schedule: Schedule,
    x: jax.Array,
    predicted_noise: jax.Array,
    fresh_noise: jax.Array,
    t: jax.Array,
    s: jax.Array,
    *,
    clip: float | None = 1.0,
    large_variance: bool = False,
) -> jax.Array:
    """x_s from x_t [B, Y, X, C] by ancestral sampling (Ho et al. 2020, algorithm 2). s = -1 gives the image.

    clip: bound put on the predicted image (None: none). large_variance: the step's own variance, the choice that is
        right for x_0 ~ N(0, 1), instead of the posterior's, which is right for a single image (section 3.2).
    """
    images = _clipped(predicted_image(schedule, x, t, predicted_noise), clip)
    mean, variance = posterior(schedule, images, x, t, s)
    if large_variance:
        variance = jnp.where(s < 0, 0.0, step_variance(schedule, t, s))
    return mean + jnp.sqrt(variance) * fresh_noise


def ddim_step(
    schedule: Schedule,
    x: jax.Array,
    predicted_noise: jax.Array,
    fresh_noise: jax.Array,
    t: jax.Array,
    s: jax.Array,
    *,
    eta: float = 0.0,
    clip: float | None = 1.0,
) -> jax.Array:
    """x_s from x_t [B, Y, X, C] (Song et al. 2021, equations 12 and 16). s = -1 gives the image.

    eta: 0 adds no noise; 1 adds as much as ancestral sampling with the posterior's variance.
    clip: bound put on the predicted image (None: none); the predicted noise is used as it is.
    """
    images = _clipped(predicted_image(schedule, x, t, predicted_noise), clip)
    variance = eta**2 * schedule.variance(s) / schedule.variance(t) * step_variance(schedule, t, s)
    direction = jnp.sqrt(jnp.maximum(schedule.variance(s) - variance, 0.0))
    return jnp.sqrt(schedule.alpha_bar(s)) * images + direction * predicted_noise + jnp.sqrt(variance) * fresh_noise


def sample(denoise: Denoiser, step: Step, times: np.ndarray, shape: Sequence[int], key: jax.Array) -> jax.Array:
    """Images [B, Y, X, C] from noise, by `step` along descending `times` [steps]; float32.

    The noise depends on the key and on global indices alone, so that every sharding draws the same images.
    """
    first_key, path_key = jax.random.split(key)
    x = jax.random.normal(first_key, tuple(shape))
    path = jnp.asarray(times, jnp.int32), jnp.asarray(np.append(times[1:], -1), jnp.int32)

    def body(x: jax.Array, times: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        t, s = times
        predicted = denoise(x, jnp.full(x.shape[0], t)).astype(jnp.float32)
        fresh = jax.random.normal(jax.random.fold_in(path_key, t), x.shape)
        return step(x, predicted, fresh, t, s), None

    return jax.lax.scan(body, x, path)[0]


def ddpm(
    denoise: Denoiser,
    schedule: Schedule,
    shape: Sequence[int],
    key: jax.Array,
    *,
    steps: int | None = None,
    clip: float | None = 1.0,
    large_variance: bool = False,
) -> jax.Array:
    """Images of `shape` [B, Y, X, C] by ancestral sampling, in all the schedule's steps unless fewer are given."""
    times = trailing_times(schedule.timesteps, steps or schedule.timesteps)
    return sample(denoise, partial(ddpm_step, schedule, clip=clip, large_variance=large_variance), times, shape, key)


def ddim(
    denoise: Denoiser,
    schedule: Schedule,
    shape: Sequence[int],
    key: jax.Array,
    *,
    steps: int = 50,
    eta: float = 0.0,
    clip: float | None = 1.0,
) -> jax.Array:
    """Images of `shape` [B, Y, X, C] by DDIM. With eta = 0 the key decides the first noise and nothing else."""
    times = trailing_times(schedule.timesteps, steps)
    return sample(denoise, partial(ddim_step, schedule, eta=eta, clip=clip), times, shape, key)


def _clipped(images: jax.Array, bound: float | None) -> jax.Array:
    return images if bound is None else jnp.clip(images, -bound, bound)
