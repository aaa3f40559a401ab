"""The learned variance: what it is trained by, what it learns, and what samplers make of it."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import norm

from tests.diffusion.exact import mixture
from zoo.diffusion import losses, schedules
from zoo.diffusion.samplers import DDIM, DDPM, SAMPLERS
from zoo.diffusion.sampling import guided, sample, walk
from zoo.diffusion.schedules import ScheduleError
from zoo.models.noising import Noising

STEPS = 12
SCHEDULE = schedules.make(Noising("linear", STEPS, first_beta=0.01, last_beta=0.5))
DEVIATION = 0.6


def saying(denoise, said):
    """`denoise`, and behind it what `said` [STEPS] has of each time."""

    def network(x: jax.Array, times: jax.Array) -> jax.Array:
        return jnp.concatenate([denoise(x, times), jnp.broadcast_to(said[times][:, None, None, None], x.shape)], -1)

    return network


def reference() -> dict[str, np.ndarray]:
    """Of each time, in float64, by the paper's own names: beta and the posterior's variance, clipped at time 0."""
    a = SCHEDULE.alpha_bars
    before = np.append(1.0, a[:-1])
    beta = 1 - a / before
    small = beta * (1 - before) / (1 - a)
    small[0] = small[1]
    return {"a": a, "before": before, "beta": beta, "small": small}


def test_the_bound_is_the_divergence_of_normals() -> None:
    """The means are those of equation 7 of Ho et al. 2020, and at time 0 the mass of an 8-bit level counts."""
    draw = np.random.default_rng(0)
    images = np.round(255 * draw.random((STEPS, 2, 2, 1))) / 127.5 - 1
    noise, wrong, said = draw.standard_normal((3, STEPS, 2, 2, 1))
    times, table = np.arange(STEPS), {name: x[:, None, None, None] for name, x in reference().items()}
    a, before, beta, small = table.values()
    x = np.sqrt(a) * images + np.sqrt(1 - a) * noise
    guess = (x - np.sqrt(1 - a) * wrong) / np.sqrt(a)

    def mean(image):
        return (np.sqrt(before) * beta * image + np.sqrt(1 - beta) * (1 - before) * x) / (1 - a)

    variance = beta ** ((said + 1) / 2) * small ** ((1 - said) / 2)
    kl = (np.log(variance / small) + (small + (mean(images) - mean(guess)) ** 2) / variance - 1) / 2
    upper = np.where(images > 0.999, np.inf, images + 1 / 255)
    lower = np.where(images < -0.999, -np.inf, images - 1 / 255)
    mass = norm.cdf(upper, guess, np.sqrt(variance)) - norm.cdf(lower, guess, np.sqrt(variance))
    bits = np.where(times[:, None, None, None] > 0, kl, -np.log(mass)).mean((1, 2, 3)) / math.log(2)
    found = losses.denoising(
        lambda x, t: jnp.concatenate([jnp.asarray(wrong), jnp.asarray(said)], -1),
        SCHEDULE,
        jnp.asarray(images, jnp.float32),
        jnp.asarray(times),
        jnp.asarray(noise, jnp.float32),
        bound_weight=0.25,
    )
    expected = np.square(wrong - noise).mean((1, 2, 3)) + 0.25 * STEPS * bits
    np.testing.assert_allclose(found, expected, rtol=2e-4)


def batch():
    """Images ~ N(0, DEVIATION^2) and noise: 2048 pixels at each time."""
    images, noise = jax.random.normal(jax.random.key(1), (2, STEPS, 32, 64, 1))
    return DEVIATION * images, jnp.arange(STEPS), noise


def learned(bound_weight: float) -> np.ndarray:
    """What is said of each time after training, the mean being the best there is."""
    images, times, noise = batch()
    denoise, optimizer = mixture(SCHEDULE, [0.0], DEVIATION), optax.adam(0.05)

    def loss(said):
        network = saying(denoise, said)
        return losses.denoising(network, SCHEDULE, images, times, noise, bound_weight=bound_weight).mean()

    def step(carry, _):
        said, state = carry
        updates, state = optimizer.update(jax.grad(loss)(said), state)
        return (optax.apply_updates(said, updates), state), None

    said = jnp.zeros(STEPS)
    return np.asarray(jax.jit(lambda s: jax.lax.scan(step, (s, optimizer.init(s)), length=200)[0][0])(said))


def test_the_variance_that_is_learned_is_the_best_there_is() -> None:
    """x before a step is normal given x after it: its variance is what the posterior's and the image's leave."""
    a, before, beta, small = reference().values()
    left = DEVIATION**2 * (1 - a) / (a * DEVIATION**2 + 1 - a)
    best = small + before * (beta / (1 - a)) ** 2 * left

    def logs(said):
        share = (said + 1) / 2
        return share * np.log(beta) + (1 - share) * np.log(small)

    # Of 2048 squared normals, five standard errors. Time 0 has a decoder.
    close = 5 * math.sqrt(2 / 2048)
    np.testing.assert_allclose(logs(learned(1e-3))[1:], np.log(best)[1:], atol=close)
    unlearned = learned(0.0)
    np.testing.assert_array_equal(unlearned, 0.0)
    assert np.abs(logs(unlearned) - np.log(best))[1:].max() > 2 * close


def test_the_bound_has_no_say_in_the_mean() -> None:
    images, times, noise = batch()

    def loss(scales, bound_weight):
        mean, said = scales
        network = saying(lambda x, t: mean * x, said * jnp.ones(STEPS))
        return losses.denoising(network, SCHEDULE, images, times, noise, bound_weight=bound_weight).mean()

    with_bound, without = (jax.jit(jax.grad(partial(loss, bound_weight=w)))((0.3, 0.1)) for w in (1.0, 0.0))
    assert float(with_bound[0]) == pytest.approx(float(without[0]), rel=1e-6)
    assert abs(float(with_bound[1])) > 1e-2 and float(without[1]) == 0.0


def test_gradients_are_finite_where_the_decoder_would_be_far_out() -> None:
    schedule = schedules.make(Noising("cosine", 1000))
    images, noise = jax.random.normal(jax.random.key(0), (2, 3, 2, 2, 1))

    def loss(scale):
        def network(x, t):
            return jnp.concatenate([scale * x, 3.0 * scale * x], -1)

        return losses.denoising(network, schedule, 3 * images, jnp.array([0, 500, 999]), noise).sum()

    assert np.isfinite(jax.value_and_grad(loss)(0.5)).all()


@pytest.mark.parametrize(("said", "variance"), [(-1.0, "small"), (1.0, "large")])
def test_the_ends_of_the_range_are_the_fixed_variances(said, variance) -> None:
    """In samples, and in the bound, whose decoder alone differs: there the large variance is not taken."""
    denoise = mixture(SCHEDULE, [0.0], DEVIATION)
    network = saying(denoise, jnp.full(STEPS, said))
    shape, key = (3, 4, 4, 1), jax.random.key(0)
    for one, other in (
        (DDPM(variance="learned", spacing="leading"), DDPM(variance=variance, spacing="leading")),
        (DDIM(eta=0.5), DDIM(eta=0.5)),
    ):
        found = sample(network, one.table(SCHEDULE, STEPS // 2), shape, key)
        np.testing.assert_allclose(found, sample(denoise, other.table(SCHEDULE, STEPS // 2), shape, key), atol=1e-5)
    images = jnp.round(255 * jax.random.uniform(key, shape)) / 127.5 - 1
    found = losses.variational_bound(network, SCHEDULE, images, key, variance="learned")
    expected = losses.variational_bound(denoise, SCHEDULE, images, key, variance=variance)
    np.testing.assert_allclose(found.steps, expected.steps, rtol=1e-5)
    assert np.allclose(found.decoder, expected.decoder, rtol=1e-5) == (variance == "small")


def test_bits_are_those_that_training_counts() -> None:
    """The bound is the sum of the terms whose mean, times the number of steps, training estimates."""
    said = jnp.linspace(-1.2, 0.9, STEPS)
    network = saying(mixture(SCHEDULE, [0.0], 0.3), said)
    images = jnp.round((0.3 * jax.random.normal(jax.random.key(2), (1, 64, 64, 1)) + 1) * 127.5) / 127.5 - 1
    bound = losses.variational_bound(network, SCHEDULE, images, jax.random.key(0), variance="learned", clip=None)
    noise = jax.random.normal(jax.random.key(3), (STEPS, 64, 64, 1))
    many = jnp.broadcast_to(images, noise.shape)
    weighed, plain = (
        losses.denoising(network, SCHEDULE, many, jnp.arange(STEPS), noise, bound_weight=weight) for weight in (1.0, 0)
    )
    assert float((weighed - plain).mean()) == pytest.approx(float(bound.steps[0] + bound.decoder[0]), rel=0.05)


def test_guidance_leaves_the_variance_as_it_is_told() -> None:
    def denoise(x, time, label):
        rows = label[:, None, None, None]
        return jnp.concatenate([rows * x, jnp.broadcast_to(10 * rows, x.shape)], -1)

    x = jnp.ones((2, 2, 2, 3))
    found = guided(denoise, jnp.array([1.0, 2.0]), jnp.zeros(2), scale=3.0)(x, jnp.zeros(2, int))
    assert found.shape == (2, 2, 2, 6)
    np.testing.assert_allclose(found[:, 0, 0], [[3, 3, 3, 10, 10, 10], [6, 6, 6, 20, 20, 20]])


def test_a_mistake_is_one_line() -> None:
    images, key = jnp.zeros((1, 2, 2, 2)), jax.random.key(0)
    silent = "variance 'learned' is asked of a network that says none: choose small or large"
    with pytest.raises(ScheduleError, match=silent):
        walk(lambda x, t: x, DDPM(variance="learned").table(SCHEDULE, 2), images, lambda step: images)
    with pytest.raises(ScheduleError, match=silent):
        losses.variational_bound(lambda x, t: x, SCHEDULE, images, key, variance="learned")
    with pytest.raises(ScheduleError, match="gives 1 channels for images of 2: a prediction has 2, and one with"):
        walk(lambda x, t: x[..., :1], SAMPLERS["ddim"].table(SCHEDULE, 2), images, lambda step: images)
    with pytest.raises(ScheduleError, match="variance 'huge' is unknown: choose one of small, large, learned"):
        DDPM(variance="huge")
    flow = schedules.make(Noising("flow", target="velocity"))
    with pytest.raises(ScheduleError, match="'flow' has no steps"):
        losses.denoising(lambda x, t: jnp.concatenate([x, x], -1), flow, images, jnp.ones(1), images)
