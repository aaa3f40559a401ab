import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.diffusion import schedules
from zoo.diffusion.schedules import Discrete, Flow, Levels
from zoo.layers.linear import LayerError
from zoo.models.noising import Noising

NOISINGS = [
    Noising("linear"),
    Noising("cosine"),
    Noising("scaled_linear", first_beta=0.00085, last_beta=0.012),
    Noising("sigmoid"),
    Noising("linear", 10),
    Noising("cosine", 7),
    Noising("scaled_linear", zero_terminal_snr=True, target="velocity"),
]
SCHEDULES = [schedules.make(noising) for noising in NOISINGS]


def test_linear_is_the_published_table() -> None:
    alpha_bars = schedules.make(Noising("linear")).alpha_bars
    # A product written out, in float64; and the end of the chain is nearly pure noise.
    product = 1.0
    for t in range(500):
        product *= 1 - (1e-4 + t * (0.02 - 1e-4) / 999)
    assert alpha_bars[499] == pytest.approx(product, rel=1e-12)
    assert alpha_bars[-1] == pytest.approx(4.0358e-5, rel=1e-4)


def test_cosine_follows_its_formula_until_betas_are_bounded() -> None:
    alpha_bars = schedules.make(Noising("cosine")).alpha_bars
    time = (np.arange(1, 1001) / 1000 + 0.008) / 1.008 * np.pi / 2
    expected = np.cos(time) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(alpha_bars[:999], expected[:999], rtol=1e-9)
    assert alpha_bars[999] / alpha_bars[998] == pytest.approx(0.001, rel=1e-9)


def test_scaled_linear_and_sigmoid_have_the_ends_they_are_given() -> None:
    for name in ("scaled_linear", "sigmoid"):
        betas = schedules.BETAS[name](1000, 0.00085, 0.012)
        # The logistic curve is cut at -6 and 6, a quarter of a hundredth from its ends.
        assert betas[0] == pytest.approx(0.00085, rel=0.04) and betas[-1] == pytest.approx(0.012, rel=0.003)
        assert (np.diff(betas) > 0).all()
    roots = np.sqrt(schedules.scaled_linear(11, 0.01, 0.04))
    np.testing.assert_allclose(roots, np.linspace(0.1, 0.2, 11))
    assert schedules.sigmoid(3, 0.1, 0.3)[1] == pytest.approx(0.2)


def test_zero_terminal_snr_ends_without_signal_and_begins_as_before() -> None:
    before, after = (schedules.make(Noising(zero_terminal_snr=zero)).alpha_bars for zero in (False, True))
    assert after[-1] == 0 and after[0] == pytest.approx(before[0], rel=1e-12)
    assert (np.diff(after) < 0).all()
    # Differences of signals keep their proportions.
    np.testing.assert_allclose(np.diff(np.sqrt(after)) / np.diff(np.sqrt(before)), 1.0064, atol=1e-4)


@pytest.mark.parametrize("schedule", [*SCHEDULES, Flow(50)])
def test_levels_keep_precision_at_both_ends(schedule) -> None:
    times = np.arange(schedule.timesteps)
    host, device = schedule.levels(times), schedule.at(jnp.asarray(times))
    for expected, found in zip(host, device, strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-7, atol=0 if isinstance(schedule, Discrete) else 1e-7)
    if isinstance(schedule, Discrete):
        np.testing.assert_allclose(host.signal**2 + host.sigma**2, 1.0, rtol=1e-12)


def test_between_whole_times_the_ratio_is_linear() -> None:
    schedule = SCHEDULES[0]
    low, middle, high = (levels.sigma / levels.signal for levels in map(schedule.levels, np.array([[7], [7.25], [8]])))
    np.testing.assert_allclose(middle, 0.75 * low + 0.25 * high)


@pytest.mark.parametrize("noising", [Noising("cosine", 20), Noising("scaled_linear", 20, last_beta=0.5)])
def test_noised_images_have_the_closed_form_marginal(noising) -> None:
    """x_t by one draw and by t + 1 single steps of the chain have the same mean and variance."""
    schedule, t, rows = schedules.make(noising), 12, 40_000
    betas = schedules.BETAS[noising.schedule](20, noising.first_beta, noising.last_beta)
    images = jnp.full((rows, 1, 1, 1), 0.7)
    noise = jax.random.normal(jax.random.key(0), images.shape)
    x, signal2 = images, 1.0
    for step in range(t + 1):
        fresh = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), images.shape)
        x = np.sqrt(1 - betas[step]) * x + np.sqrt(betas[step]) * fresh
        signal2 *= 1 - betas[step]
    for draws in (schedules.mixed(schedule.at(jnp.full(rows, t)), images, noise), x):
        # Four standard errors.
        assert abs(draws.mean() - 0.7 * np.sqrt(signal2)) < 4 / np.sqrt(rows)
        assert abs(draws.var() - (1 - signal2)) < 4 * np.sqrt(2 / rows)


POINTS = st.floats(0.02, 0.98), st.floats(-3, 3), st.floats(-3, 3), st.booleans()


@given(*POINTS)
@settings(max_examples=60, deadline=None)
def test_every_target_says_the_same_of_image_and_noise(share: float, image: float, noise: float, flow: bool) -> None:
    """Noise, image and velocity, made by their definitions, all convert back to the same image and noise."""
    signal, sigma = (1 - share, share) if flow else (np.cos(share * np.pi / 2), np.sin(share * np.pi / 2))
    x = signal * image + sigma * noise
    velocity = noise - image if flow else signal * noise - sigma * image
    for target, predicted in (("noise", noise), ("image", image), ("velocity", velocity)):
        schedule = Flow(1000, target) if flow else Discrete(np.array([0.5]), target)
        convert = schedules.conversion(schedule, Levels(np.float64(signal), np.float64(sigma)))
        assert convert.image_x * x + convert.image_p * predicted == pytest.approx(image, abs=1e-9)
        assert convert.noise_x * x + convert.noise_p * predicted == pytest.approx(noise, abs=1e-9)
        levels = Levels(np.array([signal]), np.array([sigma]))
        found = schedules.target_of(schedule, levels, jnp.full((1, 1, 1, 1), image), jnp.full((1, 1, 1, 1), noise))
        assert float(found[0, 0, 0, 0]) == pytest.approx(predicted, abs=1e-5)


@pytest.mark.parametrize("schedule", [*SCHEDULES, Flow(50)])
def test_velocity_has_unit_determinant(schedule) -> None:
    levels = schedule.levels(np.arange(schedule.timesteps))
    direction = schedule.direction(levels)
    np.testing.assert_allclose(levels.signal * direction.sigma - levels.sigma * direction.signal, 1.0, rtol=1e-12)


def test_unknown_names_and_betas_that_are_none_are_named() -> None:
    with pytest.raises(ValueError, match=r"'sigmoidal' is unknown: choose one of linear, cosine, .*, flow"):
        schedules.make(Noising("sigmoidal", 10))
    with pytest.raises(ValueError, match=r"target 'score' is unknown: choose one of noise, image, velocity"):
        schedules.make(Noising(target="score"))
    with pytest.raises(LayerError, match=r"first_beta 0.3 and last_beta 0.02 make no schedule"):
        Noising(first_beta=0.3)
