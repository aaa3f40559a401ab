"""Losses of diffusion models: the squared error of what is predicted, weighted, and the variational bound."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zoo.diffusion.paths import Path, along, posterior
from zoo.diffusion.sampling import Denoiser
from zoo.diffusion.schedules import Flow, Levels, Schedule, ScheduleError, mixed, over_images, target_of
from zoo.diffusion.variance import check_variance, divided, said_by, share, variances

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
    bound_weight: float = 1e-3,
) -> jax.Array:
    """Mean squared error, per element, of the schedule's target for images [B, Y, X, C] at times [B]: [B] float32.

    noise: standard normal [B, Y, X, C]. With the target "noise" and no weighting it is L_simple of Ho et al. 2020,
    equation 14; with "velocity" on the straight path, that of flow matching (Lipman et al. 2023, equation 23).
    weighting, gamma: see `weights`.
    bound_weight: where the network says a variance as well (zoo.diffusion.variance), what is added is this many times
        the variational bound in bits per dimension, estimated as the schedule's number of steps times the term of this
        one; its gradient is of the variance alone. It is L_hybrid of Nichol and Dhariwal 2021, equation 16. At time 0
        the term is of 8-bit images, as in their code and in that of DiT, where the images are latents.
    Raises ScheduleError where a network says a variance on a schedule without steps.
    """
    levels = schedule.at(times)
    predicted, said = divided(denoise(mixed(levels, images, noise), times), images.shape[-1])
    errors = predicted - target_of(schedule, levels, images, noise)
    losses = weights(levels, schedule.target, weighting, gamma) * jnp.square(errors).mean((1, 2, 3))
    if said is None or not bound_weight:
        return losses
    return losses + bound_weight * schedule.timesteps * _bits_of_variance(schedule, images, times, errors, said)


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
    variance: str = "small",
    clip: float | None = 1.0,
) -> Bound:
    """The bound on -log p(images) of ancestral sampling (Ho et al. 2020, equation 5), one draw of noise a step.

    images [B, Y, X, C]: levels 0 .. 255 as value / 127.5 - 1.  variance, clip: as zoo.diffusion.samplers.DDPM.
    One scan over all the schedule's steps. Raises ScheduleError for a schedule without steps, and where a learned
    variance is asked of a network that says none.
    """
    check_variance(variance)
    path = _every_step(schedule)
    terms = _terms(path)
    if variance == "large":
        # The decoder keeps the small one, as Ho et al.'s own code has it.
        terms["span"][-1] = 0.0
    rows = {name: jnp.asarray(values, jnp.float32) for name, values in terms.items()}
    rows["time"] = jnp.asarray(path.times, jnp.int32)

    def body(bits: jax.Array, row: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        noise = jax.random.normal(jax.random.fold_in(key, row["time"]), images.shape)
        x = row["signal"] * images + row["sigma"] * noise
        predicted, said = divided(denoise(x, jnp.full(x.shape[0], row["time"])), images.shape[-1])
        predicted = row["image_x"] * x + row["image_p"] * predicted
        predicted = predicted if clip is None else jnp.clip(predicted, -clip, clip)
        part = share(said_by(said)) if variance == "learned" else float(variance == "large")
        nats = _step_nats(row, images, predicted - images, part)
        return bits + jnp.where(row["time"] > 0, nats, 0.0) / math.log(2), nats / math.log(2)

    steps, bits = jax.lax.scan(body, jnp.zeros(images.shape[0]), rows)
    signal2, sigma2 = path.begin.signal[0] ** 2, path.begin.sigma[0] ** 2
    prior = (signal2 * jnp.square(images) + (sigma2 - 1.0 - math.log(sigma2))).mean((1, 2, 3)) / 2 / math.log(2)
    return Bound(prior, steps, bits[-1])


def _bits_of_variance(
    schedule: Schedule, images: jax.Array, times: jax.Array, errors: jax.Array, said: jax.Array
) -> jax.Array:
    """The bound's terms at times [B], bits per dimension [B], of which the gradient is that of the variance alone.

    errors: of what is predicted.  said: of the variance, both [B, Y, X, C].
    """
    path = _every_step(schedule)
    table = {name: jnp.asarray(values[::-1], jnp.float32) for name, values in _terms(path).items()}
    row = {name: over_images(values[times]) for name, values in table.items()} | {"time": over_images(times)}
    # x is of the true image and noise, so that the image's error is the prediction's by a factor.
    error = jax.lax.stop_gradient(row["image_p"] * errors)
    return _step_nats(row, images, error, share(said)) / math.log(2)


def _every_step(schedule: Schedule) -> Path:
    if isinstance(schedule, Flow):
        raise ScheduleError("schedule 'flow' has no steps to sum a variational bound over: choose a discrete one")
    return along(schedule, np.arange(schedule.timesteps)[::-1].astype(np.float64))


def _terms(path: Path) -> dict[str, np.ndarray]:
    """What `_step_nats` reads of each step, [steps]."""
    log_small, span = variances(path)
    return {
        "signal": path.begin.signal,
        "sigma": path.begin.sigma,
        "image_x": path.convert.image_x,
        "image_p": path.convert.image_p,
        "log_small": log_small,
        "span": span,
        "scale": np.square(posterior(path).image) * np.exp(-log_small),
    }


def _step_nats(row: Mapping[str, jax.Array], images: jax.Array, error: jax.Array, part: jax.Array | float) -> jax.Array:
    """A step's term of the bound, nats per dimension [B], of the error of the image that is predicted.

    It is the divergence of the posterior from a normal whose variance is `part` of the way from the small to the large
    one; at time 0, whose mean is the predicted image itself, that of the decoder.
    """
    wider = part * row["span"]
    divergence = (wider + jnp.expm1(-wider) + row["scale"] * jnp.square(error) * jnp.exp(-wider)) / 2
    last = row["time"] == 0
    # Errors of noisy times would be infinitely unlikely here, and their gradient is asked for though it is not used.
    mean, deviation = images + jnp.where(last, error, 0.0), jnp.exp((row["log_small"] + wider) / 2)
    decoder = discretized_nats(images, mean, deviation)
    return jnp.where(last, decoder, divergence).mean((1, 2, 3))


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
