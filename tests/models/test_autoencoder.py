import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from products import product_flops

from zoo import models, sharding
from zoo.layers.convolution import GroupNorm
from zoo.layers.linear import LayerError, Precision
from zoo.models.autoencoder import Autoencoder, AutoencoderConfig, Posterior
from zoo.models.published import PublishedError
from zoo.models.tiling import tiled

TINY = AutoencoderConfig(
    image_channels=3, latent_channels=2, channels=(8, 16), blocks_per_level=1, groups=4, sample_size=8
)
IMAGES = jax.random.normal(jax.random.key(1), (8, 8, 12, 3))


@functools.cache
def lively(config: AutoencoderConfig = TINY) -> Autoencoder:
    """No parameter is left at zero."""
    draw = np.random.default_rng(0)
    model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))

    def drawn(leaf: nnx.Variable) -> nnx.Variable:
        matrix = sharding.decays(sharding.logical_axes(leaf))
        mean, deviation = (0.0, np.prod(leaf.shape[:-1]) ** -0.5) if matrix else (1.0, 0.1)
        return leaf.replace(jnp.asarray(draw.normal(mean, deviation, leaf.shape), jnp.float32))

    return jax.tree.map(drawn, model, is_leaf=sharding.is_variable)


@jax.jit
def reconstructed(model: Autoencoder, images: jax.Array, key: jax.Array | None = None) -> Any:
    return model(images, key=key)


def test_the_published_parameters() -> None:
    """As diffusers 0.42 counts them, building the model on torch's meta device."""
    assert models.parameter_count(models.preset("sd-vae-ft-mse")) == 83_653_863


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "channels": (4, 8, 8),
            "blocks_per_level": 2,
            "middle_attention": False,
            "moment_map": False,
            "latent_map": False,
        },
    ],
)
def test_flops_are_those_of_the_compiled_products(changes) -> None:
    """Every product of the traced network, counted from its jaxpr."""
    config = dataclasses.replace(TINY, **changes)
    model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
    jaxpr = jax.make_jaxpr(lambda model: model(IMAGES[:1]).images)(model)
    assert config.forward_flops((8, 12, 3)) == pytest.approx(product_flops(jaxpr.jaxpr), rel=1e-9)


def test_every_normalisation_has_the_published_epsilon() -> None:
    """A larger one, 1e-5 say, would pass for rounding in the golden files."""
    found = jax.tree.leaves(lively(), is_leaf=lambda module: isinstance(module, GroupNorm))
    assert [module.epsilon for module in found if isinstance(module, GroupNorm)] == [1e-6] * 24


def test_latents_are_drawn_by_key() -> None:
    plain, one, again, other = (
        reconstructed(lively(), IMAGES, key) for key in (None, jax.random.key(0), jax.random.key(0), jax.random.key(1))
    )
    assert plain.images.shape == IMAGES.shape and plain.images.dtype == jnp.float32
    assert plain.latents.shape == (8, 4, 6, 2)
    np.testing.assert_array_equal(plain.latents, plain.posterior.mean)
    np.testing.assert_array_equal(one.images, again.images)
    assert jnp.abs(one.images - other.images).max() > 1e-2 and jnp.abs(one.images - plain.images).max() > 1e-2


def test_the_posterior_is_a_normal_distribution() -> None:
    """Its samples have its moments, and its divergence is the mean of the difference of log densities."""
    posterior = Posterior(jnp.full((20_000, 1, 1, 1), 0.7), jnp.full((20_000, 1, 1, 1), -1.0))
    drawn = posterior.sample(jax.random.key(0))
    assert float(drawn.mean()) == pytest.approx(0.7, abs=0.02)
    assert float(drawn.var()) == pytest.approx(np.exp(-1), rel=0.03)
    difference = -0.5 * (drawn - 0.7) ** 2 / np.exp(-1) + 0.5 - (-0.5 * drawn**2)
    assert float(posterior.kl()[0]) == pytest.approx(float(difference.mean()), abs=0.02)
    far = Posterior.of(jnp.array([0.0, 1e4]).reshape(1, 1, 1, 2))
    assert float(far.log_variance[0, 0, 0, 0]) == 20.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.5, 0.5]),
        ({"shift_factor": -1.0}, [1.0, 1.0]),
        ({"latent_mean": (0.0, 1.0), "latent_deviation": (2.0, 0.5)}, [0.25, 0.0]),
    ],
)
def test_latents_are_scaled_and_back(changes, expected) -> None:
    config = dataclasses.replace(TINY, scaling_factor=0.5, **changes)
    scaled = config.scaled(jnp.ones((1, 1, 1, 2)))
    np.testing.assert_allclose(scaled[0, 0, 0], expected)
    np.testing.assert_allclose(config.unscaled(scaled), 1.0, atol=1e-6)


def test_what_fits_a_tile_is_taken_whole() -> None:
    model = lively()
    found, expected = model.encode_tiled(IMAGES[:1, :, :8]), model.encode(IMAGES[:1, :, :8])
    np.testing.assert_array_equal(found.mean, expected.mean)
    latents = expected.mean
    np.testing.assert_array_equal(model.decode_tiled(latents), model.decode(latents))


def test_tiles_of_what_only_looks_at_a_pixel_make_the_whole() -> None:
    """Blending ends where the next tile begins, however small the last ones are."""
    for height, width in ((24, 24), (25, 31), (7, 40), (33, 17)):
        x = jax.random.normal(jax.random.key(0), (2, height, width, 3))
        calls: set[tuple[int, ...]] = set()

        def doubled(tile: np.ndarray, calls: set = calls) -> jax.Array:
            calls.add(tile.shape)
            return jnp.repeat(jnp.repeat(jnp.asarray(tile) * 3, 2, 1), 2, 2)

        found = tiled(doubled, x, tile=8, out_tile=16, overlap=0.25)
        np.testing.assert_allclose(found, np.asarray(x * 3).repeat(2, 1).repeat(2, 2), rtol=1e-6)
        assert len(calls) <= 9 and all(max(shape[1:3]) <= 8 for shape in calls)


def test_tiles_go_over_into_each_other_linearly() -> None:
    """Tiles that are told apart by their number: 0, 1, 2."""
    numbers = iter(range(3))
    found = tiled(
        lambda tile: jnp.full(tile.shape, next(numbers), jnp.float32),
        jnp.zeros((1, 6, 18, 1)),
        tile=8,
        out_tile=8,
        overlap=0.25,
    )
    expected = [0, 0, 0, 0, 0, 0, 0, 0.5, 1, 1, 1, 1, 1, 1.5, 2, 2, 2, 2]
    np.testing.assert_allclose(found[0, 0, :, 0], expected)


def test_tiles_that_cannot_be_are_named() -> None:
    model = lively()
    with pytest.raises(LayerError, match=r"^tiles of 9 pixels hold no whole latents: choose a multiple of 2"):
        model.encode_tiled(IMAGES, tile=9)
    with pytest.raises(LayerError, match=r"^tiles of 6 that become 3 do not overlap by 0.25 on both sides"):
        model.encode_tiled(IMAGES, tile=6)
    with pytest.raises(LayerError, match=r"^overlap 1.0 is no share of a tile"):
        model.encode_tiled(IMAGES, overlap=1.0)
    with pytest.raises(LayerError, match="call this outside jit"):
        jax.jit(lambda model, x: model.decode_tiled(x))(model, jnp.zeros((1, 9, 9, 2)))


def test_bfloat16_is_close_to_float32() -> None:
    exact = reconstructed(lively(), IMAGES)
    rough = reconstructed(lively(dataclasses.replace(TINY, precision=Precision(compute="bfloat16"))), IMAGES)
    assert rough.images.dtype == rough.posterior.mean.dtype == jnp.float32
    assert jnp.sqrt(jnp.square(rough.images - exact.images).mean() / jnp.square(exact.images).mean()) < 0.05


def test_sharded_equals_unsharded() -> None:
    """Reconstruction and gradient on data=2, fsdp=2, tensor=2, to 2e-5 of the largest value; every parameter learns."""

    @jax.jit
    def gradient(model: Autoencoder, images: jax.Array) -> Any:
        def loss(model: Autoencoder) -> Any:
            out = model(images)
            return jnp.square(out.images - images).mean() + 0.1 * out.posterior.kl().mean(), out

        return jax.grad(loss, has_aux=True)(model)

    expected = gradient(lively(), IMAGES)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected[0]):
        name = jax.tree_util.keystr(path)
        # A key's bias shifts all scores of a query alike: softmax does not see it.
        assert jnp.abs(leaf).max() > 1e-7 or ".attention.key.bias" in name, name
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    placed = jax.device_put(lively(), sharding.shardings(lively(), mesh))
    kernel = placed.decoder.middle.block_in.conv_in.kernel[...]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    with sharding.use(mesh):
        found = gradient(placed, jax.device_put(IMAGES, sharding.batch_sharding(mesh)))
    for wanted, got in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5 * max(1, float(jnp.abs(wanted).max())))


def test_what_does_not_fit_the_network_is_named() -> None:
    model = jax.eval_shape(lambda: TINY.build(nnx.Rngs(0)))
    with pytest.raises(LayerError, match=r"^images have shape \(2, 8, 8, 1\): the network takes \[B, Y, X, 3\]"):
        jax.eval_shape(lambda model: model.encode(jnp.zeros((2, 8, 8, 1))), model)
    with pytest.raises(
        LayerError, match=r"^images are 9 x 8, which 2 levels do not halve evenly: choose multiples of 2"
    ):
        jax.eval_shape(lambda model: model.encode(jnp.zeros((2, 9, 8, 3))), model)
    with pytest.raises(LayerError, match=r"^latents have shape \(2, 8, 8, 3\): the network takes \[B, y, x, 2\]"):
        jax.eval_shape(lambda model: model.decode(jnp.zeros((2, 8, 8, 3))), model)


PUBLISHED = TINY.to_published()


def test_a_config_is_read_as_it_was_written() -> None:
    assert models.published_config(PUBLISHED) == TINY
    assert models.published_config({"_class_name": "AutoencoderKL", "down_block_types": ["DownEncoderBlock2D"]}) == (
        AutoencoderConfig(channels=(64,), blocks_per_level=1, sample_size=32)
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"act_fn": "mish"}, "act_fn 'mish', and a KL autoencoder here has 'silu' alone"),
        ({"out_channels": 4}, "out_channels 4, and a KL autoencoder here has 3 alone"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types"),
        ({"block_out_channels": "many"}, "block_out_channels 'many': the model needs numbers there"),
        ({"block_out_channels": [8, 0]}, "block_out_channels 0: the model needs a whole number from 1 there"),
        ({"sample_size": [8, 8]}, r"sample_size \[8, 8\]: the model needs a whole number from 1 there"),
        ({"shift_factor": "no"}, r"shift_factor \['no'\]: the model needs numbers there"),
        ({"use_quant_conv": 1}, "use_quant_conv 1: the model needs true or false there"),
    ],
)
def test_a_published_config_that_cannot_be_is_refused_by_name(fields, message) -> None:
    with pytest.raises(PublishedError, match=f"^config.json has {message}"):
        models.published_config(PUBLISHED | fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": ()}, r"channels \(\) make no level"),
        ({"channels": (8, 0)}, r"channels\[1\] 0 is too small"),
        ({"latent_channels": 0}, "latent_channels 0 is too small"),
        ({"scaling_factor": 0.0}, "scaling_factor 0.0 scales nothing"),
        ({"latent_mean": (0.0, 0.0)}, r"latent_mean \(0.0, 0.0\) and latent_deviation None are not both of 2 channels"),
        (
            {"latent_mean": (0.0, 0.0), "latent_deviation": (1.0, 1.0), "shift_factor": 0.1},
            "latent_mean is given with shift_factor 0.1: give one of them",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(changes, message) -> None:
    with pytest.raises(LayerError, match=f"^{message}"):
        dataclasses.replace(TINY, **changes)
