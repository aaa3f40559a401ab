"""The one loop: what it depends on, and what it begins with, keeps and tells."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion.exact import mixture
from zoo.diffusion import schedules
from zoo.diffusion.samplers import DDIM, DDPM, SAMPLERS
from zoo.diffusion.sampling import guided, sample
from zoo.models.noising import Noising
from zoo.sharding import make_mesh, use

SCHEDULE = schedules.make(Noising("cosine", 50))
DENOISE = mixture(SCHEDULE, [-0.5, 0.5], 0.2)
SHAPE = (8, 4, 4, 1)
DRAW = {
    name: jax.jit(partial(sample, DENOISE, sampler.table(SCHEDULE, 6), SHAPE)) for name, sampler in SAMPLERS.items()
}


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_samples_are_functions_of_the_key(name) -> None:
    one, again, other = (np.asarray(DRAW[name](jax.random.key(seed))) for seed in (0, 0, 1))
    assert (one == again).all()
    assert abs(one - other).min() > 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_eight_devices_draw_what_one_draws(name) -> None:
    key = jax.random.key(2)
    expected = np.asarray(DRAW[name](key))
    with use(make_mesh("data=4,fsdp=2")):
        found = jax.jit(lambda key: sample(DENOISE, SAMPLERS[name].table(SCHEDULE, 6), SHAPE, key))(key)
        assert len(found.sharding.device_set) == 8
    np.testing.assert_allclose(np.asarray(found), expected, atol=2e-6)


def test_eight_devices_guide_and_keep_as_one_does() -> None:
    def draw(key: jax.Array) -> jax.Array:
        mask = jnp.zeros((8, 4, 4, 1)).at[:, :2].set(1)
        denoise = guided(conditional, GIVEN / 8, BLANK, scale=2.0, rescale=0.5)
        return sample(denoise, DDIM().table(SCHEDULE, 3), SHAPE, key, image=IMAGE, mask=mask)

    expected = np.asarray(jax.jit(draw)(jax.random.key(4)))
    with use(make_mesh("data=4,fsdp=2")):
        found = np.asarray(jax.jit(lambda key: draw(key))(jax.random.key(4)))
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_sampler_compiles_to_one_loop() -> None:
    schedule = schedules.make(Noising("cosine"))
    table, denoise = DDPM().table(schedule, 1000), mixture(schedule, [0.0], 0.5)
    text = jax.jit(lambda key: sample(denoise, table, (2, 2, 2, 1), key)).lower(jax.random.key(0)).as_text()
    assert len(text.splitlines()) < 2000
    assert text.count("stablehlo.while") < 6


def test_the_callback_is_told_of_every_step() -> None:
    told = {}
    table = DDIM().table(SCHEDULE, 6)
    last = sample(DENOISE, table, SHAPE, jax.random.key(0), callback=lambda i, x: told.update({int(i): np.asarray(x)}))
    jax.effects_barrier()
    assert sorted(told) == [0, 1, 2, 3, 4, 5]
    np.testing.assert_array_equal(told[5], last)


IMAGE = jax.random.uniform(jax.random.key(9), SHAPE, minval=-1, maxval=1)


def test_full_strength_is_sampling_from_noise() -> None:
    key = jax.random.key(0)
    table = DDIM().table(SCHEDULE, 6, strength=1.0)
    found = sample(DENOISE, table, SHAPE, key, image=IMAGE)
    np.testing.assert_array_equal(found, sample(DENOISE, table, SHAPE, key))


@pytest.mark.parametrize("name", SAMPLERS)
def test_image_to_image_begins_part_of_the_way(name) -> None:
    """A network that knows the image keeps it; times and levels are those of the last steps."""
    whole = SAMPLERS[name].path(SCHEDULE, 10)
    table = SAMPLERS[name].table(SCHEDULE, 10, strength=0.35)
    assert (table.path.begin.signal[0], table.path.begin.sigma[0]) == table.path.first
    assert table.path.first == (whole.begin.signal[7], whole.begin.sigma[7])
    assert table.path.times[-1] == whole.times[-1]
    assert len(table.path.times) == 3 + (name == "plms")

    def knowing(x: jax.Array, times: jax.Array) -> jax.Array:
        signal, sigma = (schedules.over_images(values) for values in SCHEDULE.at(times))
        return (x - signal * IMAGE) / sigma

    found = sample(knowing, table, SHAPE, jax.random.key(0), image=IMAGE)
    np.testing.assert_allclose(found, IMAGE, atol=1e-4 if name != "ddpm" else 1e-3)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_inpainting_keeps_what_is_known(strength) -> None:
    mask = jnp.zeros((8, 4, 4, 1)).at[:, :2].set(1)
    for sampler in (DDIM(), DDPM(), DDIM(to_image=False)):
        table = sampler.table(SCHEDULE, 6, strength=strength)
        found = sample(DENOISE, table, SHAPE, jax.random.key(0), image=IMAGE, mask=mask)
        np.testing.assert_array_equal(found[:, 2:], IMAGE[:, 2:])
        assert abs(found[:, :2] - IMAGE[:, :2]).min() > 1e-4


def test_inpainting_fits_what_it_paints_to_what_it_keeps() -> None:
    """Pixels of an image are all alike: those painted must come out as those kept, which the network alone knows."""

    def alike(x: jax.Array, times: jax.Array) -> jax.Array:
        signal, sigma = (schedules.over_images(values) for values in SCHEDULE.at(times))
        pixels = x[0].size
        value = (signal * x.sum((1, 2, 3), keepdims=True)) / (pixels * signal**2 + sigma**2)
        return (x - signal * value) / sigma

    image = jnp.broadcast_to(jnp.linspace(-0.9, 0.9, 8)[:, None, None, None], SHAPE)
    mask = jnp.zeros((8, 4, 4, 1)).at[:, :1].set(1)
    table = DDPM(clip=None).table(SCHEDULE, 50)
    found = sample(alike, table, SHAPE, jax.random.key(1), image=image, mask=mask)
    assert abs(found[:, :1] - image[:, :1]).mean() < 0.2


def conditional(x: jax.Array, times: jax.Array, shift: jax.Array) -> jax.Array:
    return 0.5 * x + schedules.over_images(shift) + 0.01 * schedules.over_images(times)


GIVEN, BLANK = jnp.arange(8.0), jnp.zeros(8)


def test_guidance_of_scale_1_is_none_and_costs_one_pass() -> None:
    batches = []

    def counted(x: jax.Array, times: jax.Array, shift: jax.Array) -> jax.Array:
        batches.append(x.shape[0])
        return conditional(x, times, shift)

    x, times = jax.random.normal(jax.random.key(0), SHAPE), jnp.full(8, 3)
    found = guided(counted, GIVEN, BLANK, scale=1.0)(x, times)
    np.testing.assert_array_equal(found, conditional(x, times, GIVEN))
    guided(counted, GIVEN, BLANK, scale=2.0)(x, times)
    assert batches == [8, 16]


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_is_its_formula(rescale) -> None:
    x, times = jax.random.normal(jax.random.key(0), SHAPE), jnp.full(8, 3)

    def curved(x: jax.Array, times: jax.Array, shift: jax.Array) -> jax.Array:
        return jnp.tanh(x * (1 + schedules.over_images(shift)))

    given, blank = (np.asarray(curved(x, times, shift), np.float64) for shift in (GIVEN, BLANK))
    expected = blank + 3.0 * (given - blank)
    axes = (1, 2, 3)
    scaled = expected * given.std(axes, keepdims=True) / expected.std(axes, keepdims=True)
    expected = rescale * scaled + (1 - rescale) * expected
    found = guided(curved, GIVEN, BLANK, scale=3.0, rescale=rescale)(x, times)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_mistake_is_one_line() -> None:
    key, half = jax.random.key(0), DDIM().table(SCHEDULE, 6, strength=0.5)
    with pytest.raises(ValueError, match="less than full strength begins with parts of an image, and none is given"):
        sample(DENOISE, half, SHAPE, key)
    with pytest.raises(ValueError, match="a mask keeps parts of an image"):
        sample(DENOISE, DDIM().table(SCHEDULE, 6), SHAPE, key, mask=jnp.ones(SHAPE))
    with pytest.raises(ValueError, match=r"guidance rescale 1.5 is not a share"):
        guided(conditional, GIVEN, BLANK, scale=2.0, rescale=1.5)
