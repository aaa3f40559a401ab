"""What a network was trained under: how much image and noise there is at each time, and what it predicts of them.

Everything is in terms of x = signal * image + sigma * noise, with images in [-1, 1] and standard normal noise.
`Discrete` schedules are tables over t = 0 .. T - 1, 0 the least noisy (the paper's t = 1), with signal^2 + sigma^2 = 1.
`Flow` is the straight path of flow matching: signal = 1 - s and sigma = s, told to the network as s * timesteps.
Tables are made in float64 on the host, and then rounded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.noising import Noising

Array = Any
"""A np.ndarray of float64 on the host, or a jax.Array of float32: the same formulas serve both."""

LEAST_SIGNAL = 2.0**-12
"""What counts in sigma / signal takes for no signal: the ratio must be finite."""

TARGETS = ("noise", "image", "velocity")


class ScheduleError(ValueError):
    """A schedule, or a run of steps through one, that there is not; the message names the value and the mend."""


class Levels(NamedTuple):
    """How much image and noise there is in x: arrays of one shape."""

    signal: Array
    sigma: Array


class Schedule(Protocol):
    """Levels as functions of the time that the network is told."""

    @property
    def timesteps(self) -> int: ...

    @property
    def least_time(self) -> int:
        """The least noisy time that there is training at; below it is the image itself."""
        ...

    @property
    def target(self) -> str: ...

    def levels(self, times: np.ndarray) -> Levels:
        """At times [...] on the host, float64."""
        ...

    def at(self, times: jax.Array) -> Levels:
        """At times [...] of a batch, float32."""
        ...

    def direction(self, levels: Levels) -> Levels:
        """(dsignal, dsigma) of the velocity dsignal * image + dsigma * noise, with signal dsigma - sigma dsignal = 1.

        The unit determinant makes image and noise of x and the velocity without a division: see `conversion`.
        """
        ...


@dataclass(frozen=True, eq=False)
class Discrete:
    """A variance-preserving chain (Ho et al. 2020). alpha_bars [T], float64: signal^2 (equation 4), falling."""

    alpha_bars: np.ndarray
    target: str = "noise"
    least_time: int = 0

    @property
    def timesteps(self) -> int:
        return len(self.alpha_bars)

    def levels(self, times: np.ndarray) -> Levels:
        """Between whole times sigma / signal is linear in time."""
        table = Levels(np.sqrt(self.alpha_bars), np.sqrt(1.0 - self.alpha_bars))
        whole = np.asarray(times).astype(int)
        if (whole == times).all():
            return Levels(table.signal[whole], table.sigma[whole])
        return from_ratio(np.interp(times, np.arange(self.timesteps), ratios(table)))

    def at(self, times: jax.Array) -> Levels:
        table = self.levels(np.arange(self.timesteps))
        if not jnp.issubdtype(times.dtype, jnp.integer):
            return from_ratio(jnp.interp(times, jnp.arange(self.timesteps), jnp.asarray(ratios(table), jnp.float32)))
        return Levels(*(jnp.asarray(values, jnp.float32)[times] for values in table))

    def direction(self, levels: Levels) -> Levels:
        """The v of Salimans and Ho 2022: a quarter turn from x."""
        return Levels(-levels.sigma, levels.signal)


@dataclass(frozen=True, eq=False)
class Flow:
    """The straight path from image to noise (Lipman et al. 2023; Liu et al. 2023), at times 0 .. timesteps."""

    timesteps: int = 1000
    target: str = "velocity"
    least_time: int = 1

    def levels(self, times: np.ndarray) -> Levels:
        share = np.asarray(times, np.float64) / self.timesteps
        return Levels(1.0 - share, share)

    def at(self, times: jax.Array) -> Levels:
        share = times.astype(jnp.float32) / self.timesteps
        return Levels(1.0 - share, share)

    def direction(self, levels: Levels) -> Levels:
        """noise - image, the same all the way."""
        return Levels(0.0 * levels.signal - 1.0, 0.0 * levels.sigma + 1.0)


def ratios(levels: Levels) -> np.ndarray:
    """sigma / signal on the host, finite."""
    return levels.sigma / np.maximum(levels.signal, LEAST_SIGNAL)


def from_ratio(ratio: Array) -> Levels:
    """Levels with signal^2 + sigma^2 = 1 from sigma / signal."""
    signal = (1.0 + ratio**2) ** -0.5
    return Levels(signal, ratio * signal)


def linear(timesteps: int, first: float, last: float) -> np.ndarray:
    """Betas [T] from `first` to `last` in even steps (Ho et al., section 4), made for 1000 of them."""
    return np.linspace(first, last, timesteps)


def scaled_linear(timesteps: int, first: float, last: float) -> np.ndarray:
    """Betas [T] whose square roots go in even steps: Stable Diffusion's, from 0.00085 to 0.012."""
    return np.linspace(np.sqrt(first), np.sqrt(last), timesteps) ** 2


def sigmoid(timesteps: int, first: float, last: float) -> np.ndarray:
    """Betas [T] along a logistic curve from -6 to 6 (Xu et al. 2022, GeoDiff)."""
    return first + (last - first) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, timesteps)))


def cosine(timesteps: int, first: float, last: float) -> np.ndarray:
    """Betas [T] with alpha_bar a cos^2 of time (Nichol and Dhariwal 2021, equation 17), at most 0.999; no ends."""
    time = np.arange(timesteps + 1) / timesteps
    alpha_bars = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - alpha_bars[1:] / alpha_bars[:-1], 0.999)


BETAS: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "linear": linear,
    "cosine": cosine,
    "scaled_linear": scaled_linear,
    "sigmoid": sigmoid,
}


def make(noising: Noising) -> Discrete | Flow:
    """The schedule that a model's config names; raises ScheduleError for names there are not."""
    if noising.target not in TARGETS:
        raise ScheduleError(f"prediction target {noising.target!r} is unknown: choose one of {', '.join(TARGETS)}")
    if noising.schedule == "flow":
        return Flow(noising.timesteps, noising.target)
    if noising.schedule not in BETAS:
        names = ", ".join([*BETAS, "flow"])
        raise ScheduleError(f"noise schedule {noising.schedule!r} is unknown: choose one of {names}")
    betas = BETAS[noising.schedule](noising.timesteps, noising.first_beta, noising.last_beta)
    alpha_bars = np.cumprod(1.0 - betas)
    if noising.zero_terminal_snr:
        alpha_bars = without_terminal_signal(alpha_bars)
    return Discrete(alpha_bars, noising.target)


def without_terminal_signal(alpha_bars: np.ndarray) -> np.ndarray:
    """Signals shifted and stretched so that the last is 0 and the first stays (Lin et al. 2024, algorithm 1)."""
    signals = np.sqrt(alpha_bars)
    return np.square((signals - signals[-1]) * signals[0] / (signals[0] - signals[-1]))


class Conversion(NamedTuple):
    """Image and noise from x and a prediction p: image = image_x x + image_p p, noise = noise_x x + noise_p p."""

    image_x: Array
    image_p: Array
    noise_x: Array
    noise_p: Array


def conversion(schedule: Schedule, levels: Levels) -> Conversion:
    """What the schedule's target says of image and noise at `levels`; infinite where it says nothing of one."""
    signal, sigma = levels
    zero, one = 0.0 * signal, 0.0 * signal + 1.0
    if schedule.target == "noise":
        return Conversion(1.0 / signal, -sigma / signal, zero, one)
    if schedule.target == "image":
        return Conversion(zero, one, 1.0 / sigma, -signal / sigma)
    direction = schedule.direction(levels)
    return Conversion(direction.sigma, -sigma, -direction.signal, signal)


def target_of(schedule: Schedule, levels: Levels, images: jax.Array, noise: jax.Array) -> jax.Array:
    """What the network should have predicted, [B, Y, X, C]; levels [B]."""
    if schedule.target == "noise":
        return noise
    if schedule.target == "image":
        return images
    return mixed(schedule.direction(levels), images, noise)


def mixed(levels: Levels, images: jax.Array, noise: jax.Array) -> jax.Array:
    """x of images [B, Y, X, C] at levels [B]: with standard normal noise, a draw from q(x_t | x_0) (equation 4)."""
    return over_images(levels.signal) * images + over_images(levels.sigma) * noise


def over_images(values: Array) -> jax.Array:
    """[B] to [B, 1, 1, 1]."""
    return jnp.asarray(values)[:, None, None, None]
