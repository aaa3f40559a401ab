"""Tables of weights: single steps against the papers' text in float64, and distributions whose exact score is known."""

import jax
import numpy as np
import pytest

from tests.diffusion.exact import mixture, quantile_distance
from zoo.diffusion import paths, schedules
from zoo.diffusion.samplers import DDIM, DDPM, PLMS, SAMPLERS, DPMSolver, Euler, Table
from zoo.diffusion.sampling import sample
from zoo.models.noising import Noising

LINEAR = schedules.make(Noising("linear"))
COSINE = schedules.make(Noising("cosine"))
ZERO = schedules.make(Noising("linear", target="velocity", zero_terminal_snr=True))
FLOW = schedules.make(Noising("flow", target="velocity"))

MEANS, DEVIATION = [-0.6, 0.6], 0.1

# Steps, and the distance from the mixture that 4096 samples may have. Exact samples are about 0.01 away: their halves
# are even to +- 0.8 %, and what is on the wrong side is 1.2 from its place. The rest of the bound, a fifth of each
# mode's deviation, is for the discretisation.
CASES = {
    "ddpm": (COSINE, DDPM(clip=None), 250, 0.03),
    "ddpm large variance": (LINEAR, DDPM(clip=None, variance="large"), 250, 0.03),
    "ddim": (LINEAR, DDIM(clip=None), 100, 0.03),
    "ddim eta 0.5": (COSINE, DDIM(clip=None, eta=0.5), 100, 0.03),
    "ddim, velocity from no signal": (ZERO, DDIM(clip=None), 100, 0.03),
    "euler": (LINEAR, Euler(), 100, 0.03),
    "euler, karras": (LINEAR, Euler(karras=True), 50, 0.03),
    "euler, flow": (FLOW, Euler(spacing="trailing"), 100, 0.03),
    "dpmpp_2m": (LINEAR, DPMSolver(), 40, 0.035),
    "dpmpp_2m, karras": (LINEAR, DPMSolver(karras=True), 25, 0.03),
    "dpmpp_2m, flow": (FLOW, DPMSolver(spacing="trailing"), 40, 0.03),
    "dpmpp_3m": (LINEAR, DPMSolver(order=3), 40, 0.03),
    "plms": (LINEAR, PLMS(), 50, 0.03),
}


@pytest.mark.parametrize("name", CASES)
def test_exact_score_of_a_mixture_gives_the_mixture(name) -> None:
    schedule, sampler, steps, bound = CASES[name]
    denoise, table = mixture(schedule, MEANS, DEVIATION), sampler.table(schedule, steps)
    x = np.asarray(jax.jit(lambda key: sample(denoise, table, (16, 16, 16, 1), key))(jax.random.key(0)))
    print(name, quantile_distance(x, MEANS, DEVIATION))
    assert quantile_distance(x, MEANS, DEVIATION) < bound


def one_step(table: Table, step: int, x: np.ndarray, image: np.ndarray, noise: np.ndarray, fresh: np.ndarray):
    """A step of a sampler without history, in float64."""
    weights = (w[step, 0] if w.shape[1] else 0.0 for w in (table.xs, table.images, table.noises))
    return sum(w * value for w, value in zip(weights, (x, image, noise), strict=True)) + table.fresh[step] * fresh


def reference_steps(alpha_bars: np.ndarray, x, noise, fresh, t: int, s: int) -> dict:
    """Single steps by the text of the papers: algorithm 2 of Ho et al., equation 12 of Song et al."""
    a_t, a_s = alpha_bars[t], alpha_bars[s] if s >= 0 else 1.0
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
    }


STEPS = {
    "ddpm": DDPM(),
    "ddpm large variance": DDPM(variance="large"),
    "ddim": DDIM(),
    "ddim eta 0.7": DDIM(eta=0.7),
    "ddim, the network's noise": DDIM(clipped_noise=False),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("t", "s"), [(900, 899), (654, 553), (100, 0), (1, 0), (0, -1), (300, -1)])
def test_steps_agree_with_the_papers(name, t, s) -> None:
    times = np.array([t, s] if s >= 0 else [t])
    table = STEPS[name].weights(paths.along(LINEAR, times))
    x, noise, fresh = np.random.default_rng(t).normal(size=(3, 8))
    image = (x - np.sqrt(1 - LINEAR.alpha_bars[t]) * noise) / np.sqrt(LINEAR.alpha_bars[t])
    expected = reference_steps(LINEAR.alpha_bars, x, noise, fresh, t, s)[name.partition(",")[0]]
    np.testing.assert_allclose(one_step(table, 0, x, image, noise, fresh), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE, FLOW], ids=["linear", "cosine", "flow"])
@pytest.mark.parametrize("skip", [1, 3])
def test_posterior_is_bayes_rule(schedule, skip) -> None:
    """q(x_s | x_t, x_0) from its own definition: the product of two normal densities in x_s."""
    path = paths.along(schedule, np.array([500, 500 - skip]))
    (signal_t, signal_s), (sigma_t, sigma_s) = path.begin
    ratio = signal_t / signal_s
    x_0, x_t, added = 0.3, -1.2, sigma_t**2 - ratio**2 * sigma_s**2
    precision = 1 / sigma_s**2 + ratio**2 / added
    mean = (signal_s * x_0 / sigma_s**2 + ratio * x_t / added) / precision
    found = paths.posterior(path)
    assert found.variance[0] == pytest.approx(1 / precision, rel=1e-9)
    assert found.x[0] * x_t + found.image[0] * x_0 == pytest.approx(mean, rel=1e-9)
    # The last step gives the image itself.
    assert (found.x[1], found.image[1], found.variance[1]) == (0, 1, 0)


def test_all_steps_of_ddim_with_eta_1_are_ancestral_sampling() -> None:
    """The same keys give the same draws: eta = 1 has the posterior's mean and variance (Song et al. 2021)."""
    schedule = schedules.make(Noising("linear", 100))
    denoise, key = mixture(schedule, [-0.5, 0.5], 0.2), jax.random.key(3)
    samplers = DDIM(eta=1.0, clip=None), DDPM(clip=None)
    ddim, ddpm = (sample(denoise, sampler.table(schedule, 100), (8, 2, 2, 1), key) for sampler in samplers)
    np.testing.assert_allclose(ddim, ddpm, atol=2e-4)


def test_first_order_methods_without_noise_are_one() -> None:
    """DPM-Solver++ of order 1 and Euler's method are DDIM with eta 0 (Lu et al. 2022, section 4.1)."""
    for schedule in (LINEAR, ZERO, FLOW):
        path = paths.along(schedule, np.linspace(990, 10, 8).round())
        ddim, euler, dpm = (sampler.weights(path) for sampler in (DDIM(), Euler(), DPMSolver(order=1)))
        x, noise = np.random.default_rng(0).normal(size=(2, 5))
        for i, (signal, sigma) in enumerate(zip(*path.begin, strict=True)):
            image = (x - sigma * noise) / signal
            results = [one_step(table, i, x, image, noise, 0 * x) for table in (ddim, euler, dpm)]
            np.testing.assert_allclose(results[1], results[0], rtol=1e-9)
            np.testing.assert_allclose(results[2], results[0], rtol=1e-9)


@pytest.mark.parametrize(("order", "degree"), [(1, 0), (2, 1), (3, 1)])
def test_dpm_solver_is_exact_for_polynomials(order, degree) -> None:
    """Where the predicted image is a polynomial of lambda, the expansion has no error."""
    heun = DPMSolver(order=order, heun=True, to_image=False)
    path = heun.path(LINEAR, 20)
    table = heun.weights(path)
    lambdas = np.log(path.begin.signal / path.begin.sigma)
    powers = np.polynomial.polynomial.polyvander(lambdas, degree)
    i = 7
    h = np.log(path.end.signal[i] / path.end.sigma[i]) - lambdas[i]
    nodes, weights = np.polynomial.legendre.leggauss(40)
    along = lambdas[i] + h * (nodes + 1) / 2
    for power in range(degree + 1):
        # The exact solution is sigma_end (x / sigma_begin + integral of exp(lambda) image(lambda)).
        integral = (weights * np.exp(along) * along**power).sum() * h / 2
        found = sum(table.images[i, lag] * powers[i - lag, power] for lag in range(table.images.shape[1]))
        assert found == pytest.approx(path.end.sigma[i] * integral, rel=1e-8)


def test_clipping_bounds_the_image_in_both() -> None:
    for sampler in (DDPM(), DDIM()):
        drawn = sample(lambda x, t: -3.0 * x, sampler.table(LINEAR, 5), (2, 2, 2, 1), jax.random.key(0))
        assert abs(drawn).max() <= 1.0


@pytest.mark.parametrize("clipped", [True, False])
def test_noise_of_a_clipped_image_is_what_remains_of_x(clipped) -> None:
    path = paths.along(LINEAR, np.array([600, 500]))
    (signal, signal_end), (sigma, sigma_end) = path.begin
    x, said = np.array([2.0, -0.3]), np.array([5.0, 0.25])
    noise = (x - signal * said) / sigma
    # As the scan does it: the image is clipped, the noise is the network's.
    image = np.clip(said, -1, 1)
    found = one_step(DDIM(clipped_noise=clipped).weights(path), 0, x, image, noise, 0 * x)
    remains = (x - signal * image) / sigma if clipped else noise
    np.testing.assert_allclose(found, signal_end * image + sigma_end * remains, rtol=1e-9)


def test_spacings_are_those_of_the_table() -> None:
    """Lin et al. 2024, table 2."""
    np.testing.assert_array_equal(paths.spaced(LINEAR, 10), [999, 899, 799, 699, 599, 499, 399, 299, 199, 99])
    np.testing.assert_array_equal(paths.spaced(LINEAR, 4, "leading", 1), [751, 501, 251, 1])
    np.testing.assert_array_equal(paths.spaced(LINEAR, 10, "linspace").round(), np.arange(9, -1, -1) * 111)
    np.testing.assert_array_equal(paths.spaced(FLOW, 4), [1000, 750, 500, 250])
    np.testing.assert_array_equal(SAMPLERS["dpmpp_2m"].path(LINEAR, 3).times, [999, 666, 333])
    assert (np.diff(DDIM().path(LINEAR, 7).times) < 0).all()


def test_histories_are_as_long_as_they_are_needed() -> None:
    lags = {name: [w.shape[1] for w in (t.xs, t.images, t.noises, t.predictions)] for name, t in TABLES.items()}
    assert lags == {
        "ddpm": [1, 1, 0, 0],
        "ddim": [1, 1, 0, 0],
        "euler": [0, 1, 1, 0],
        "dpmpp_2m": [1, 2, 0, 0],
        "plms": [2, 0, 0, 5],
    }


TABLES = {name: sampler.table(LINEAR, 20) for name, sampler in SAMPLERS.items()}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DDIM().table(LINEAR, 1001), "in 1001 steps is not possible with 1000"),
        (lambda: DDPM().table(LINEAR, 0), "in 0 steps"),
        (lambda: DPMSolver().table(LINEAR, 1000), "in 1000 steps does not fit between 1000 times: choose 1 to 999"),
        (lambda: PLMS().table(LINEAR, 1), "PLMS in 1 step has nothing to extrapolate"),
        (lambda: PLMS().table(ZERO, 10), "PLMS cannot begin where nothing of the image is left"),
        (lambda: DDIM(eta=1.5), "eta 1.5 is not a share"),
        (lambda: DPMSolver(order=4), "of order 4 is unknown: choose 1, 2 or 3"),
        (lambda: DDIM(spacing="even").table(LINEAR, 5), "spacing 'even' is unknown: choose one of trailing"),
        (lambda: DDIM(spacing="leading", offset=3).table(LINEAR, 1000), "with offset 3 reach time 1002"),
        (lambda: DDIM().table(LINEAR, 50, strength=0.01), "strength 0.01 leaves none of 50 steps"),
        (lambda: DDIM().table(LINEAR, 50, strength=1.2), "choose from 0.02 to 1"),
        (lambda: DDIM().table(LINEAR, 50, strength=-0.5), "strength -0.5"),
        (lambda: Euler(shift=3.0).table(LINEAR, 5), "shift 3.0 is of the schedule 'flow'"),
        (lambda: Euler(karras=True).table(FLOW, 5), "leave karras off"),
        (
            lambda: DDIM().table(schedules.make(Noising(zero_terminal_snr=True)), 5),
            "target 'noise' says nothing of the image at time 999",
        ),
    ],
)
def test_a_mistake_is_one_line(make, words) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)
