import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo.layers.unet import (
    ClassEmbedding,
    Downsample,
    ResidualBlock,
    SpatialAttention,
    SpatialTransformer,
    TimeEmbedding,
    Upsample,
    sinusoidal_time,
)

IMAGES = jax.random.normal(jax.random.key(0), (2, 4, 6, 8))
TIME = jax.random.normal(jax.random.key(1), (2, 16))


def lively(module: nnx.Module) -> nnx.Module:
    """The module with every parameter moved, so that nothing starts at zero."""
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.3 * draw.normal(size=x.shape).astype(np.float32), module)


def test_time_is_written_in_sines_then_cosines() -> None:
    found = sinusoidal_time(jnp.array([0, 7]), 6)
    frequencies = np.array([1.0, 1e-2, 1e-4])
    expected = [[0, 0, 0, 1, 1, 1], [*np.sin(7 * frequencies), *np.cos(7 * frequencies)]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_time_is_written_in_other_orders_and_with_another_last_frequency() -> None:
    found = sinusoidal_time(jnp.array([7.5]), 4, shift=0, cosines_first=True)
    np.testing.assert_allclose(found, [[*np.cos([7.5, 0.075]), *np.sin([7.5, 0.075])]], atol=1e-6)


def test_time_embedding_tells_neighbouring_times_apart() -> None:
    embedding = TimeEmbedding(32, 64, rngs=nnx.Rngs(0))
    out = embedding(jnp.array([0, 1, 998, 999]))
    assert out.shape == (4, 64)
    gaps = jnp.linalg.norm(out[1::2] - out[::2], axis=-1)
    assert (gaps > 0.05).all()


@pytest.mark.parametrize("outputs", [8, 12])
def test_residual_block_starts_as_its_shortcut(outputs) -> None:
    block = ResidualBlock(8, outputs, time_width=16, groups=4, rngs=nnx.Rngs(0))
    expected = IMAGES if outputs == 8 else block.shortcut(IMAGES)
    np.testing.assert_array_equal(block(IMAGES, TIME), expected)


def test_residual_block_hears_the_time_of_each_image() -> None:
    block = lively(ResidualBlock(8, 12, time_width=16, groups=4, rngs=nnx.Rngs(0)))
    y = block(IMAGES, TIME)
    changed = block(IMAGES, TIME.at[0].add(1.0))
    assert y.shape == (2, 4, 6, 12)
    assert abs(changed[0] - y[0]).max() > 1e-2
    np.testing.assert_array_equal(changed[1], y[1])


def test_residual_block_drops_by_key_alone() -> None:
    block = lively(ResidualBlock(8, 8, time_width=16, groups=4, dropout=0.5, rngs=nnx.Rngs(0)))
    one, again, other = (block(IMAGES, TIME, key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert abs(one - other).max() > 1e-2
    assert abs(one - block(IMAGES, TIME)).max() > 1e-2


def test_attention_starts_as_nothing_and_then_sees_every_pixel() -> None:
    block = SpatialAttention(8, num_heads=2, groups=4, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(block(IMAGES), IMAGES)
    block = lively(block)
    # Without the normalisation, whose statistics are of all pixels as well.
    change = jax.jacobian(lambda pixel: block.attention(pixel.reshape(1, -1, 8)).output[0, 0, 0])(IMAGES[:1])
    assert (jnp.abs(change).max((0, 3)) > 0).all()


def test_attention_does_not_mind_the_order_of_pixels() -> None:
    block = lively(SpatialAttention(8, num_heads=2, groups=4, rngs=nnx.Rngs(0)))
    np.testing.assert_allclose(block(IMAGES[:, ::-1])[:, ::-1], block(IMAGES), atol=2e-5)


def test_a_transformer_starts_as_nothing_and_then_hears_its_context() -> None:
    block = SpatialTransformer(8, num_heads=2, context_width=5, groups=4, rngs=nnx.Rngs(0))
    context = jax.random.normal(jax.random.key(2), (2, 3, 5))
    np.testing.assert_array_equal(block(IMAGES, context), IMAGES)
    block = lively(block)
    y, changed = block(IMAGES, context), block(IMAGES, context.at[0].multiply(-1.0))
    assert y.shape == IMAGES.shape and abs(changed[0] - y[0]).max() > 1e-2
    np.testing.assert_array_equal(changed[1], y[1])


def test_a_class_that_there_is_none_of_becomes_nan() -> None:
    found = ClassEmbedding(3, 4, rngs=nnx.Rngs(0))(jnp.array([0, 2, 3, -1]))
    np.testing.assert_array_equal(jnp.isnan(found).all(-1), [False, False, True, True])


def test_zeros_stand_after_an_image_or_on_both_sides() -> None:
    for padding, first in (((0, 1), 1), ((1, 1), 0)):
        down = Downsample(8, padding=padding, rngs=nnx.Rngs(0))
        # A kernel that copies its centre shows where it stands.
        down.conv.kernel[...] = jnp.zeros((3, 3, 8, 8)).at[1, 1].set(jnp.eye(8))
        np.testing.assert_array_equal(down(IMAGES), IMAGES[:, first::2, first::2])


def test_resampling_halves_and_doubles() -> None:
    down, up = Downsample(8, rngs=nnx.Rngs(0)), Upsample(8, rngs=nnx.Rngs(0))
    assert down(IMAGES).shape == (2, 2, 3, 8)
    assert up(IMAGES).shape == (2, 8, 12, 8)
    # A kernel that copies its centre shows what is convolved: every pixel four times.
    up.conv.kernel[...] = jnp.zeros((3, 3, 8, 8)).at[1, 1].set(jnp.eye(8))
    np.testing.assert_array_equal(up(IMAGES)[:, 1::2, ::2], IMAGES)
    np.testing.assert_array_equal(up(IMAGES)[:, ::2, 1::2], IMAGES)
