import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from tests.diffusion.exact import mixture
from zoo.diffusion import losses, schedules
from zoo.diffusion.schedules import Levels
from zoo.models.noising import Noising

LINEAR = Noising("linear", 100, first_beta=2e-3, last_beta=0.2)


@pytest.mark.parametrize("target", schedules.TARGETS)
@pytest.mark.parametrize("schedule", ["linear", "flow"])
def test_the_loss_is_the_expectation_s_error(target, schedule) -> None:
    """Of images ~ N(0, 0.25), the best prediction leaves the posterior's variance, in the units of each target."""
    made = schedules.make(Noising(schedule, 100, target))
    images, noise = jax.random.normal(jax.random.key(0), (2, 20_000, 1, 1, 1))
    times = jnp.full(20_000, 30)
    found = losses.denoising(mixture(made, [0.0], 0.5), made, 0.5 * images, times, noise)
    (signal,), (sigma,) = made.levels(np.array([30]))
    variance = 0.25 * sigma**2 / (0.25 * signal**2 + sigma**2)
    expected = {"image": 1.0, "noise": (signal / sigma) ** 2, "velocity": sigma**-2}[target] * variance
    # Five standard errors of a mean of squared normals.
    assert float(found.mean()) == pytest.approx(expected, rel=5 * math.sqrt(2 / 20_000))


def test_flow_matching_s_target_is_noise_minus_image() -> None:
    schedule = schedules.make(Noising("flow", target="velocity"))
    images, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 1))
    asked = []

    def silent(x: jax.Array, times: jax.Array) -> jax.Array:
        asked.append(x)
        return jnp.zeros_like(x)

    found = losses.denoising(silent, schedule, images, jnp.full(3, 250.0), noise)
    np.testing.assert_allclose(found, jnp.square(noise - images).mean((1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(asked[0], 0.75 * images + 0.25 * noise, rtol=1e-6)


def test_min_snr_weights_are_the_paper_s() -> None:
    """Hang et al. 2023, section 3.4: min(SNR, gamma) over 1, SNR and SNR + 1 for image, noise and velocity."""
    alpha_bars = np.linspace(0.01, 0.99, 9)
    snr = alpha_bars / (1 - alpha_bars)
    levels = Levels(np.sqrt(alpha_bars), np.sqrt(1 - alpha_bars))
    for target, divisor in (("image", 1.0), ("noise", snr), ("velocity", snr + 1)):
        np.testing.assert_allclose(losses.weights(levels, target, "min_snr"), np.minimum(snr, 5) / divisor, rtol=1e-5)
        np.testing.assert_array_equal(losses.weights(levels, target), 1.0)
    # Without signal: nothing of the image is asked of image and velocity, and noise counts in full.
    nothing = Levels(np.zeros(1), np.ones(1))
    with np.errstate(divide="ignore"):
        assert [float(losses.weights(nothing, target, "min_snr")[0]) for target in schedules.TARGETS] == [1, 0, 0]


def eight_bits(rows: int, deviation: float) -> jax.Array:
    images = deviation * jax.random.normal(jax.random.key(5), (rows, 8, 8, 1))
    return jnp.round((images + 1) * 127.5) / 127.5 - 1


@pytest.mark.parametrize("large", [False, True])
def test_bits_per_dimension_of_a_normal_are_the_closed_form(large) -> None:
    schedule = schedules.make(LINEAR)
    deviation, images = 0.25, eight_bits(256, 0.25)
    bound = jax.jit(
        lambda images, key: losses.variational_bound(
            mixture(schedule, [0.0], deviation), schedule, images, key, variance="large" if large else "small"
        )
    )(images, jax.random.key(0))
    a = schedule.alpha_bars
    prior = (a[-1] * deviation**2 + (1 - a[-1]) - 1 - math.log(1 - a[-1])) / 2 / math.log(2)
    assert float(bound.prior.mean()) == pytest.approx(prior, rel=0.06)
    # The mean of every step's divergence, by the variance of the image given x (Kingma et al. 2021, equation 13).
    steps, beta = 0.0, 1 - a[1:] / a[:-1]
    for t in range(1, 100):
        left = deviation**2 * (1 - a[t]) / (a[t] * deviation**2 + 1 - a[t])
        small = (1 - a[t - 1]) / (1 - a[t]) * beta[t - 1]
        error = a[t - 1] * beta[t - 1] ** 2 / (1 - a[t]) ** 2 * left
        used = beta[t - 1] if large else small
        steps += (small / used - 1 - math.log(small / used) + error / used) / 2 / math.log(2)
    # A single step has up to half of it: a mean of 16384 squared normals, known to 1.1 %.
    assert float(bound.steps.mean()) == pytest.approx(steps, rel=0.03)
    # No code is shorter than the images' own; this one is longer by the schedule's few steps.
    entropy = 0.5 * math.log2(2 * math.pi * math.e * deviation**2) - math.log2(2 / 255)
    assert entropy < float(bound.total.mean()) < entropy + (0.3 if large else 1.1)


def test_the_decoder_is_the_mass_of_a_normal_in_each_bin() -> None:
    levels = np.array([0, 1, 60, 127, 200, 254, 255])
    images, mean, deviation = levels / 127.5 - 1, np.linspace(-1.1, 1.1, 5)[:, None], 0.02
    upper = np.where(levels == 255, np.inf, images + 1 / 255)
    lower = np.where(levels == 0, -np.inf, images - 1 / 255)
    # The survival function on the side where it is the smaller one.
    mass = np.where(
        images > mean,
        norm.sf(lower, mean, deviation) - norm.sf(upper, mean, deviation),
        norm.cdf(upper, mean, deviation) - norm.cdf(lower, mean, deviation),
    )
    found = losses.discretized_nats(jnp.asarray(images, jnp.float32), jnp.asarray(mean, jnp.float32), deviation)
    seen = mass > 1e-250
    np.testing.assert_allclose(np.asarray(found)[seen], -np.log(mass[seen]), rtol=2e-3, atol=1e-3)
    assert np.isfinite(found).all()
    assert float(jnp.exp(-losses.discretized_nats(jnp.arange(256) / 127.5 - 1, 0.3, 0.05)).sum()) == pytest.approx(1)


def test_a_mistake_is_one_line() -> None:
    flow, images = schedules.make(Noising("flow", target="velocity")), jnp.zeros((1, 2, 2, 1))
    with pytest.raises(ValueError, match="'flow' has no steps to sum"):
        losses.variational_bound(lambda x, t: x, flow, images, jax.random.key(0))
    zero = schedules.make(Noising(zero_terminal_snr=True))
    with pytest.raises(ValueError, match="target 'noise' says nothing of the image"):
        losses.variational_bound(lambda x, t: x, zero, images, jax.random.key(0))
    with pytest.raises(ValueError, match="weighting 'p2' is unknown: choose one of simple, min_snr"):
        losses.denoising(lambda x, t: x, flow, images, jnp.ones(1), images, weighting="p2")
