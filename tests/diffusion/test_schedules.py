import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.diffusion import schedules
from zoo.models.noising import Noising

ALL = [schedules.linear(1000), schedules.cosine(1000), schedules.linear(10), schedules.cosine(7)]


def test_linear_is_the_published_table() -> None:
    schedule = schedules.linear(1000)
    assert schedule.betas[0] == 1e-4 and schedule.betas[-1] == 0.02
    # A product written out, in float64; and the end of the chain is nearly pure noise.
    product = 1.0
    for t in range(500):
        product *= 1 - (1e-4 + t * (0.02 - 1e-4) / 999)
    assert schedule.alpha_bars[499] == pytest.approx(product, rel=1e-12)
    assert schedule.alpha_bars[-1] == pytest.approx(4.0358e-5, rel=1e-4)


def test_cosine_follows_its_formula_until_betas_are_bounded() -> None:
    schedule = schedules.cosine(1000)
    time = (np.arange(1, 1001) / 1000 + 0.008) / 1.008 * np.pi / 2
    expected = np.cos(time) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(schedule.alpha_bars[:999], expected[:999], rtol=1e-9)
    assert schedule.betas.max() == 0.999


@pytest.mark.parametrize("schedule", ALL)
def test_tables_keep_precision_at_both_ends(schedule) -> None:
    t = jnp.arange(-1, schedule.timesteps)
    np.testing.assert_allclose(schedule.alpha_bar(t), np.append(1.0, schedule.alpha_bars), rtol=1e-7)
    np.testing.assert_allclose(schedule.variance(t), np.append(0.0, 1 - schedule.alpha_bars), rtol=1e-7)


def test_noised_images_have_the_closed_form_marginal() -> None:
    """x_t by one draw and by t + 1 single steps of the chain have the same mean and variance."""
    schedule, t, rows = schedules.cosine(20), 12, 40_000
    images = jnp.full((rows, 1, 1, 1), 0.7)
    direct = schedules.add_noise(
        schedule, images, jnp.full(rows, t), jax.random.normal(jax.random.key(0), images.shape)
    )
    x = images
    for step in range(t + 1):
        fresh = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), images.shape)
        x = np.sqrt(1 - schedule.betas[step]) * x + np.sqrt(schedule.betas[step]) * fresh
    for draws in (direct, x):
        # Four standard errors.
        assert abs(draws.mean() - 0.7 * np.sqrt(schedule.alpha_bars[t])) < 4 / np.sqrt(rows)
        assert abs(draws.var() - (1 - schedule.alpha_bars[t])) < 4 * np.sqrt(2 / rows)


def test_predicted_image_undoes_noise() -> None:
    schedule = schedules.linear(1000)
    images, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 1))
    for t in (0, 17, 654):
        x = schedules.add_noise(schedule, images, jnp.full(3, t), noise)
        np.testing.assert_allclose(schedules.predicted_image(schedule, x, t, noise), images, atol=1e-5)


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("skip", [1, 3])
def test_posterior_is_bayes_rule(schedule, skip) -> None:
    """q(x_s | x_t, x_0) from its own definition: the product of two normal densities in x_s, in float64."""
    t, s = schedule.timesteps - 2, schedule.timesteps - 2 - skip
    a_t, a_s = schedule.alpha_bars[t], schedule.alpha_bars[s]
    x_0, x_t = 0.3, -1.2
    ratio = a_t / a_s
    prior_mean, prior_precision = np.sqrt(a_s) * x_0, 1 / (1 - a_s)
    likelihood_mean, likelihood_precision = x_t / np.sqrt(ratio), ratio / (1 - ratio)
    precision = prior_precision + likelihood_precision
    mean = (prior_precision * prior_mean + likelihood_precision * likelihood_mean) / precision
    found = schedules.posterior(schedule, jnp.full((1, 1, 1, 1), x_0), jnp.full((1, 1, 1, 1), x_t), t, s)
    assert float(found.variance) == pytest.approx(1 / precision, rel=1e-4)
    assert float(found.mean[0, 0, 0, 0]) == pytest.approx(mean, rel=1e-4, abs=1e-5)


def test_last_step_gives_the_image_itself() -> None:
    schedule = schedules.linear(1000)
    images, x = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 1))
    mean, variance = schedules.posterior(schedule, images, x, jnp.int32(0), jnp.int32(-1))
    np.testing.assert_allclose(mean, images, rtol=1e-6)
    assert variance == 0


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(ValueError, match="'sigmoidal' is unknown: choose one of linear, cosine"):
        schedules.make(Noising("sigmoidal", 10))
