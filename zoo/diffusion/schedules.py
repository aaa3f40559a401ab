"""Noise schedules of discrete-time diffusion (Ho et al. 2020), as tables over t = 0 .. T - 1 and functions of them.

x_0 is an image in [-1, 1], x_t = signal(t) x_0 + sigma(t) noise with signal^2 + sigma^2 = 1. Time counts from 0: t = 0
is the least noisy step (the paper's t = 1), and t = -1 stands for the image itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.noising import Noising


@dataclass(frozen=True, eq=False)
class Schedule:
    """betas [T], float64: the variance that step t adds. Tables are made in float64 on the host, and then rounded."""

    betas: np.ndarray

    @property
    def timesteps(self) -> int:
        return len(self.betas)

    @cached_property
    def alpha_bars(self) -> np.ndarray:
        """signal^2 [T], float64: the product of 1 - beta up to t (Ho et al., equation 4)."""
        return np.cumprod(1.0 - self.betas)

    def alpha_bar(self, t: jax.Array) -> jax.Array:
        """signal^2 at t [...], float32; 1 at t = -1."""
        table = jnp.asarray(np.append(self.alpha_bars, 1.0), jnp.float32)
        return table[t]

    def variance(self, t: jax.Array) -> jax.Array:
        """sigma^2 = 1 - alpha_bar at t [...], float32, without the cancellation where there is little noise."""
        table = jnp.asarray(np.append(1.0 - self.alpha_bars, 0.0), jnp.float32)
        return table[t]


class ScheduleError(ValueError):
    """A schedule, or a run of steps through one, that there is not; the message names the value and the mend."""


def linear(timesteps: int = 1000, *, first: float = 1e-4, last: float = 0.02) -> Schedule:
    """Betas from `first` to `last` in even steps (Ho et al., section 4), made for 1000 of them."""
    return Schedule(np.linspace(first, last, timesteps))


def cosine(timesteps: int = 1000, *, offset: float = 0.008, largest: float = 0.999) -> Schedule:
    """alpha_bar falls as cos^2 of time (Nichol and Dhariwal 2021, equation 17); no beta exceeds `largest`."""
    time = np.arange(timesteps + 1) / timesteps
    alpha_bars = np.cos((time + offset) / (1 + offset) * np.pi / 2) ** 2
    return Schedule(np.minimum(1.0 - alpha_bars[1:] / alpha_bars[:-1], largest))


SCHEDULES: dict[str, Callable[[int], Schedule]] = {"linear": linear, "cosine": cosine}


def make(noising: Noising) -> Schedule:
    """The schedule that a model's config names; raises ScheduleError for a name there is not."""
    if noising.schedule not in SCHEDULES:
        raise ScheduleError(f"noise schedule {noising.schedule!r} is unknown: choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[noising.schedule](noising.timesteps)


def add_noise(schedule: Schedule, images: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """x_t of images [B, Y, X, C] at t [B], with standard normal noise: a draw from q(x_t | x_0) (equation 4)."""
    signal, sigma = jnp.sqrt(schedule.alpha_bar(t)), jnp.sqrt(schedule.variance(t))
    return _over_images(signal) * images + _over_images(sigma) * noise


def predicted_image(schedule: Schedule, x: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """x_0 from x_t [B, Y, X, C] at t [] and the noise in it: equation 4 the other way round."""
    return (x - jnp.sqrt(schedule.variance(t)) * noise) / jnp.sqrt(schedule.alpha_bar(t))


class Posterior(NamedTuple):
    """mean [B, Y, X, C] and variance [] of q(x_s | x_t, x_0)."""

    mean: jax.Array
    variance: jax.Array


def posterior(schedule: Schedule, images: jax.Array, x: jax.Array, t: jax.Array, s: jax.Array) -> Posterior:
    """q(x_s | x_t, x_0) for s < t: equations 6 and 7, with the steps between s and t taken as one.

    images: x_0, and x: x_t [B, Y, X, C].  t, s: [] int.  With s = -1 it is the image itself, without variance.
    """
    alpha = schedule.alpha_bar(t) / schedule.alpha_bar(s)
    beta = step_variance(schedule, t, s)
    from_image = jnp.sqrt(schedule.alpha_bar(s)) * beta / schedule.variance(t)
    from_x = jnp.sqrt(alpha) * schedule.variance(s) / schedule.variance(t)
    return Posterior(from_image * images + from_x * x, beta * schedule.variance(s) / schedule.variance(t))


def step_variance(schedule: Schedule, t: jax.Array, s: jax.Array) -> jax.Array:
    """Variance of q(x_t | x_s), []: beta_t where s = t - 1."""
    # sigma_t^2 - alpha sigma_s^2 is 1 - alpha, without the cancellation of the latter where alpha is nearly 1.
    return schedule.variance(t) - schedule.alpha_bar(t) / schedule.alpha_bar(s) * schedule.variance(s)


def _over_images(values: jax.Array) -> jax.Array:
    return values[:, None, None, None]
