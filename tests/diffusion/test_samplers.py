"""Samplers against distributions whose exact score is known, and their steps against a second implementation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.diffusion import samplers, schedules
from zoo.diffusion.schedules import Schedule

SHAPE = (4096, 2, 1, 1)


def mixture_noise(schedule: Schedule, means, deviation: float):
    """The exact noise predictor of an even mixture of N(mean, deviation^2), independent in each pixel.

    E[noise | x_t] = -sigma grad log p_t(x_t), and p_t is a mixture of N(signal mean, signal^2 deviation^2 + sigma^2).
    """
    means = jnp.asarray(means, jnp.float32)

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        signal2, sigma2 = (values[:, None, None, None] for values in (schedule.alpha_bar(t), schedule.variance(t)))
        variance = signal2 * deviation**2 + sigma2
        away = x[..., None] - jnp.sqrt(signal2)[..., None] * means
        responsibility = jax.nn.softmax(-(away**2) / (2 * variance[..., None]), -1)
        return jnp.sqrt(sigma2) * (responsibility * away).sum(-1) / variance

    return denoise


METHODS = {
    "ddpm": partial(samplers.ddpm, clip=None),
    "ddpm large variance": partial(samplers.ddpm, clip=None, large_variance=True),
    "ddim": partial(samplers.ddim, steps=200, clip=None),
    "ddim eta 0.5": partial(samplers.ddim, steps=200, eta=0.5, clip=None),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schedule", [schedules.linear(1000), schedules.cosine(1000)], ids=["linear", "cosine"])
def test_exact_score_of_a_normal_gives_its_mean_and_variance(method, schedule) -> None:
    denoise = mixture_noise(schedule, [0.4], 0.3)
    x = np.asarray(jax.jit(lambda key: METHODS[method](denoise, schedule, SHAPE, key))(jax.random.key(0)))
    # Four standard errors of the mean, and of the deviation with 2 % for the discretisation.
    assert abs(x.mean() - 0.4) < 4 * 0.3 / np.sqrt(x.size)
    assert abs(x.std() / 0.3 - 1) < 4 / np.sqrt(2 * x.size) + 0.02


@pytest.mark.parametrize("method", METHODS)
def test_exact_score_of_a_mixture_gives_both_modes(method) -> None:
    schedule = schedules.cosine(1000)
    denoise = mixture_noise(schedule, [-0.6, 0.6], 0.1)
    x = np.asarray(jax.jit(lambda key: METHODS[method](denoise, schedule, SHAPE, key))(jax.random.key(1)))
    upper = x > 0
    assert abs(upper.mean() - 0.5) < 4 * 0.5 / np.sqrt(x.size)
    for mode, mean in ((x[upper], 0.6), (x[~upper], -0.6)):
        assert abs(mode.mean() - mean) < 0.01
        assert abs(mode.std() / 0.1 - 1) < 0.06


def test_all_steps_of_ddim_with_eta_1_are_ancestral_sampling() -> None:
    """The same keys give the same draws: eta = 1 has the posterior's mean and variance (Song et al. 2021)."""
    schedule = schedules.linear(100)
    denoise = mixture_noise(schedule, [-0.5, 0.5], 0.2)
    key, shape = jax.random.key(3), (8, 2, 2, 1)
    ddim = samplers.ddim(denoise, schedule, shape, key, steps=100, eta=1.0, clip=None)
    ddpm = samplers.ddpm(denoise, schedule, shape, key, clip=None)
    np.testing.assert_allclose(ddim, ddpm, atol=2e-4)


def test_samples_are_functions_of_the_key() -> None:
    schedule = schedules.cosine(50)
    denoise = mixture_noise(schedule, [0.0], 0.5)
    for method in (samplers.ddpm, partial(samplers.ddim, steps=10)):
        draw = jax.jit(lambda key, method=method: method(denoise, schedule, (2, 2, 2, 1), key))
        one, again, other = (np.asarray(draw(jax.random.key(seed))) for seed in (0, 0, 1))
        assert (one == again).all()
        assert abs(one - other).min() > 0


def test_ddim_with_eta_0_adds_no_noise() -> None:
    schedule = schedules.cosine(50)
    denoise = mixture_noise(schedule, [0.0], 0.5)
    x, first, second = jax.random.normal(jax.random.key(0), (3, 2, 2, 2, 1))
    predicted = denoise(x, jnp.full(2, 30))
    step = partial(samplers.ddim_step, schedule, x, predicted, t=jnp.int32(30), s=jnp.int32(20))
    np.testing.assert_array_equal(step(first), step(second))
    assert abs(step(first, eta=0.5) - step(second, eta=0.5)).max() > 0.01


def reference_steps(betas: np.ndarray, x: np.ndarray, noise: np.ndarray, fresh: np.ndarray, t: int, s: int) -> dict:
    """Single steps in float64, by the text of the papers: algorithm 2 of Ho et al., equation 12 of Song et al."""
    alpha_bar = np.cumprod(1 - betas)
    a_t, a_s = alpha_bar[t], alpha_bar[s] if s >= 0 else 1.0
    alpha = a_t / a_s
    mean = (x - (1 - alpha) / np.sqrt(1 - a_t) * noise) / np.sqrt(alpha)
    tilde = (1 - a_s) / (1 - a_t) * (1 - alpha)
    sigma = 0.7 * np.sqrt((1 - a_s) / (1 - a_t)) * np.sqrt(1 - a_t / a_s)
    image = (x - np.sqrt(1 - a_t) * noise) / np.sqrt(a_t)
    return {
        "ddpm": mean + np.sqrt(tilde) * fresh,
        "ddpm large variance": mean + (np.sqrt(1 - alpha) * fresh if s >= 0 else 0),
        "ddim": np.sqrt(a_s) * image + np.sqrt(1 - a_s) * noise,
        "ddim eta 0.7": np.sqrt(a_s) * image + np.sqrt(1 - a_s - sigma**2) * noise + sigma * fresh,
        "ddim clipped": np.sqrt(a_s) * np.clip(image, -1, 1) + np.sqrt(1 - a_s) * noise,
    }


STEPS = {
    "ddpm": partial(samplers.ddpm_step, clip=None),
    "ddpm large variance": partial(samplers.ddpm_step, clip=None, large_variance=True),
    "ddim": partial(samplers.ddim_step, clip=None),
    "ddim eta 0.7": partial(samplers.ddim_step, eta=0.7, clip=None),
    "ddim clipped": samplers.ddim_step,
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("t", "s"), [(900, 899), (654, 553), (100, 0), (1, 0), (0, -1), (300, -1)])
def test_steps_agree_with_a_reference_in_float64(name, t, s) -> None:
    schedule = schedules.linear(1000)
    x, noise, fresh = np.random.default_rng(t).normal(size=(3, 2, 3, 3, 1))
    expected = reference_steps(schedule.betas, x, noise, fresh, t, s)[name]
    arrays = (jnp.asarray(a, jnp.float32) for a in (x, noise, fresh))
    found = STEPS[name](schedule, *arrays, jnp.int32(t), jnp.int32(s))
    assert abs(found - expected).max() <= 2e-5 * max(1, abs(expected).max())


def test_clipping_bounds_the_image_in_both() -> None:
    schedule = schedules.linear(1000)
    wild = lambda x, t: -3.0 * x  # noqa: E731
    for method in (samplers.ddpm, samplers.ddim):
        assert abs(method(wild, schedule, (2, 2, 2, 1), jax.random.key(0), steps=5)).max() <= 1.0


def test_times_trail_from_the_noisiest() -> None:
    np.testing.assert_array_equal(samplers.trailing_times(1000, 4), [999, 749, 499, 249])
    np.testing.assert_array_equal(samplers.trailing_times(5, 5), [4, 3, 2, 1, 0])
    times = samplers.trailing_times(1000, 7)
    assert times[0] == 999 and (np.diff(times) < 0).all() and times[-1] >= 0
    with pytest.raises(ValueError, match="in 1001 steps is not possible with 1000"):
        samplers.trailing_times(1000, 1001)
    with pytest.raises(ValueError, match="in 0 steps"):
        samplers.trailing_times(1000, 0)


def test_a_sampler_compiles_to_one_loop() -> None:
    schedule = schedules.cosine(1000)
    denoise = mixture_noise(schedule, [0.0], 0.5)
    text = jax.jit(lambda key: samplers.ddpm(denoise, schedule, (2, 2, 2, 1), key)).lower(jax.random.key(0)).as_text()
    assert len(text.splitlines()) < 2000
    assert "while" in text
