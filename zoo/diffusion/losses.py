"""Losses of diffusion models: the squared error of what is predicted, weighted, and the variational bound."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zoo.diffusion.paths import Path, along, posterior
from zoo.diffusion.sampling import Denoiser
from zoo.diffusion.schedules import Flow, Levels, Schedule, ScheduleError, mixed, target_of

WEIGHTINGS = ("simple", "min_snr")


def denoising(
    denoise: Denoiser,
    schedule: Schedule,
    images: jax.Array,
    times: jax.Array,
    noise: jax.Array,
    *,
    weighting: str = "simple",
    gamma: float = 5.0,
) -> jax.Array:
    """Mean squared error, per element, of the schedule's target for images [B, Y, X, C] at times [B]: [B] float32.

    noise: standard normal [B, Y, X, C]. With the target "noise" and no weighting it is L_simple of Ho et al. 2020,
    equation 14; with "velocity" on the straight path, that of flow matching (Lipman et al. 2023, equation 23).
    weighting, gamma: see `weights`.
    """
    levels = schedule.at(times)
    predicted = denoise(mixed(levels, images, noise), times).astype(jnp.float32)
    errors = jnp.square(predicted - target_of(schedule, levels, images, noise)).mean((1, 2, 3))
    return weights(levels, schedule.target, weighting, gamma) * errors


def weights(levels: Levels, target: str, weighting: str = "simple", gamma: float = 5.0) -> jax.Array:
    """What the squared error of `target` is weighted with at levels [B]: [B] float32.

    "simple": 1. "min_snr": min(SNR, gamma) times that of the image it implies, SNR = signal^2 / sigma^2, so that the
    steps with little noise do not rule (Hang et al. 2023, section 3.4, whose weights are these for each target).
    """
    signal2, sigma2 = jnp.square(levels.signal), jnp.square(levels.sigma)
    if weighting == "simple":
        return jnp.ones_like(signal2)
    if weighting != "min_snr":
        raise ScheduleError(f"weighting {weighting!r} is unknown: choose one of {', '.join(WEIGHTINGS)}")
    # The image's error is sigma times the velocity's and sigma / signal times the noise's.
    if target == "velocity":
        return jnp.minimum(signal2, gamma * sigma2)
    if target == "noise":
        return jnp.minimum(1.0, gamma * sigma2 / signal2)
    return jnp.minimum(signal2 / sigma2, gamma)


class Bound(NamedTuple):
    """Bits per dimension [B] of images of 8 bits: the three parts of the variational bound."""

    prior: jax.Array
    steps: jax.Array
    decoder: jax.Array

    @property
    def total(self) -> jax.Array:
        return self.prior + self.steps + self.decoder


def variational_bound(
    denoise: Denoiser,
    schedule: Schedule,
    images: jax.Array,
    key: jax.Array,
    *,
    large_variance: bool = False,
    clip: float | None = 1.0,
) -> Bound:
    """The bound on -log p(images) of ancestral sampling (Ho et al. 2020, equation 5), one draw of noise a step.

    images [B, Y, X, C]: levels 0 .. 255 as value / 127.5 - 1.  large_variance, clip: as zoo.diffusion.samplers.DDPM.
    One scan over all the schedule's steps. Raises ScheduleError for a schedule without steps.
    """
    if isinstance(schedule, Flow):
        raise ScheduleError("schedule 'flow' has no steps to sum a variational bound over: choose a discrete one")
    path = along(schedule, np.arange(schedule.timesteps)[::-1].astype(np.float64))
    rows = {name: jnp.asarray(values, jnp.float32) for name, values in _terms(path, large_variance).items()}
    rows["time"] = jnp.asarray(path.times, jnp.int32)

    def body(bits: jax.Array, row: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        noise = jax.random.normal(jax.random.fold_in(key, row["time"]), images.shape)
        x = row["signal"] * images + row["sigma"] * noise
        predicted = row["image_x"] * x + row["image_p"] * denoise(x, jnp.full(x.shape[0], row["time"]))
        predicted = predicted if clip is None else jnp.clip(predicted, -clip, clip)
        error = jnp.square(predicted - images).mean((1, 2, 3))
        # The last row's mean is the predicted image itself.
        decoder = discretized_nats(images, predicted, row["deviation"]).mean((1, 2, 3))
        nats = jnp.where(row["time"] > 0, row["constant"] + row["scale"] * error, decoder)
        return bits + jnp.where(row["time"] > 0, nats, 0.0) / math.log(2), nats / math.log(2)

    steps, bits = jax.lax.scan(body, jnp.zeros(images.shape[0]), rows)
    signal2, sigma2 = path.begin.signal[0] ** 2, path.begin.sigma[0] ** 2
    prior = (signal2 * jnp.square(images) + (sigma2 - 1.0 - math.log(sigma2))).mean((1, 2, 3)) / 2 / math.log(2)
    return Bound(prior, steps, bits[-1])


def _terms(path: Path, large_variance: bool) -> dict[str, np.ndarray]:
    """KL divergence of each step's two normals as constant + scale * squared error of the image, in nats [steps]."""
    step = posterior(path)
    variance = step.variance.copy()
    # Nothing is left of the last step's: its decoder has that of the step before (Ho et al.'s own code).
    variance[-1] = variance[-2] if path.steps > 1 else step.added[-1]
    chosen = np.append(step.added[:-1], variance[-1]) if large_variance else variance
    return {
        "signal": path.begin.signal,
        "sigma": path.begin.sigma,
        "image_x": path.convert.image_x,
        "image_p": path.convert.image_p,
        "constant": (variance / chosen - 1.0 - np.log(variance / chosen)) / 2,
        "scale": step.image**2 / chosen / 2,
        "deviation": np.sqrt(chosen),
    }


def discretized_nats(images: jax.Array, mean: jax.Array, deviation: jax.Array) -> jax.Array:
    """-log of a normal's mass in the bins of 8-bit images, elementwise; the outermost bins are open (equation 13)."""
    half = 1.0 / 255

    def log_cdf(x: jax.Array) -> jax.Array:
        return jax.scipy.stats.norm.logcdf((x - mean) / deviation)

    # By symmetry from whichever side the mass is small on, where float32 can tell it apart.
    flip = jnp.where(images > mean, -1.0, 1.0)
    upper = jnp.where(flip > 0, images + half, 2 * mean - (images - half))
    lower = jnp.where(flip > 0, images - half, 2 * mean - (images + half))
    log_upper = jnp.where(jnp.where(flip > 0, images > 0.999, images < -0.999), 0.0, log_cdf(upper))
    log_lower = log_cdf(lower)
    open_lower = jnp.where(flip > 0, images < -0.999, images > 0.999)
    # log(exp(log_upper) - exp(log_lower)), with the gap kept from 0 where both are far out.
    gap = jnp.maximum(log_upper - log_lower, 1e-7)
    return -(log_upper + jnp.where(open_lower, 0.0, jnp.log(-jnp.expm1(-gap))))
