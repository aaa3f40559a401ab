"""Networks that know the distribution of images: what a denoiser would predict that had learned all there is."""

import jax
import jax.numpy as jnp
import numpy as np

from zoo.diffusion import schedules
from zoo.diffusion.sampling import Denoiser
from zoo.diffusion.schedules import Schedule


def mixture(schedule: Schedule, means: list[float], deviation: float) -> Denoiser:
    """Of an even mixture of N(mean, deviation^2), independent in each pixel: the expectation of the schedule's target.

    x is N(signal mean, signal^2 deviation^2 + sigma^2) given its component, and jointly normal with image and noise.
    """
    centres = jnp.asarray(means, jnp.float32)

    def denoise(x: jax.Array, times: jax.Array) -> jax.Array:
        signal, sigma = (schedules.over_images(values) for values in schedule.at(times))
        variance = signal**2 * deviation**2 + sigma**2
        away = x[..., None] - signal[..., None] * centres
        share = jax.nn.softmax(-(away**2) / (2 * variance[..., None]), -1)
        noise = sigma * (share * away).sum(-1) / variance
        image = (share * (centres + (signal * deviation**2 / variance)[..., None] * away)).sum(-1)
        if schedule.target == "velocity":
            direction = schedule.direction(schedules.Levels(signal, sigma))
            return direction.signal * image + direction.sigma * noise
        return noise if schedule.target == "noise" else image

    return denoise


def quantile_distance(x: np.ndarray, means: list[float], deviation: float) -> float:
    """Wasserstein distance of order 1 of samples from the mixture: the mean gap of sorted samples and quantiles."""
    from scipy.stats import norm

    grid = np.linspace(min(means) - 6 * deviation, max(means) + 6 * deviation, 20_001)
    cdf = np.mean([norm.cdf(grid, mean, deviation) for mean in means], axis=0)
    found = np.sort(x.ravel().astype(np.float64))
    expected = np.interp((np.arange(found.size) + 0.5) / found.size, cdf, grid)
    return float(abs(found - expected).mean())
