import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo.layers.linear import LayerError
from zoo.layers.patches import ImageTokens, bicubic_matrix, cut_into_patches, patch_grid, resize_bicubic

IMAGES = jax.random.normal(jax.random.key(0), (2, 9, 14, 3))


def test_patches_times_a_kernel_are_a_convolution_of_its_stride() -> None:
    kernel = jax.random.normal(jax.random.key(1), (4, 3, 3, 5))
    patches = jnp.einsum("btyxc,yxcd->btd", cut_into_patches(IMAGES, (4, 3)), kernel)
    convolved = jax.lax.conv_general_dilated(
        IMAGES, kernel, (4, 3), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert convolved.shape[1:3] == patch_grid((9, 14), (4, 3)) == (2, 4)
    np.testing.assert_allclose(patches, convolved.reshape(2, 8, 5), atol=1e-4)


def test_an_image_smaller_than_a_patch_is_refused() -> None:
    with pytest.raises(LayerError, match=r"^an image of 3 x 14 pixels is smaller than a patch of 4 x 4: give a larger"):
        patch_grid((3, 14), (4, 4))


def test_four_nearest_samples_are_weighed_as_published() -> None:
    """By a quarter of the way between two samples, with the coefficient -0.75; an end stands for what is beyond it."""
    a, b, c, d = -0.10546875, 0.87890625, 0.26171875, -0.03515625
    expected = {1: [a + b, c, d, 0, 0, 0], 2: [d + c, b, a, 0, 0, 0], 4: [d, c, b, a, 0, 0], 5: [0, a, b, c, d, 0]}
    found = bicubic_matrix(6, 12, antialias=False)
    for row, weights in expected.items():
        np.testing.assert_allclose(found[row], weights, atol=1e-7)


@pytest.mark.parametrize("grid", [(3, 11), (9, 4), (6, 7), (1, 20)])
def test_antialiased_is_as_jax_has_it(grid) -> None:
    table = jax.random.normal(jax.random.key(2), (6, 7, 3))
    expected = jax.image.resize(table, (*grid, 3), "bicubic", antialias=True, precision="highest")
    np.testing.assert_allclose(resize_bicubic(table, grid, antialias=True), expected, atol=2e-6)


@pytest.mark.parametrize("antialias", [False, True])
def test_resampling_keeps_what_is_even_and_what_is_there(antialias) -> None:
    for old, new in ((7, 3), (3, 7), (16, 37), (5, 5)):
        np.testing.assert_allclose(bicubic_matrix(old, new, antialias=antialias).sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(bicubic_matrix(5, 5, antialias=antialias), np.eye(5))


def make_tokens(**options) -> ImageTokens:
    return ImageTokens((8, 12), (4, 4), 3, 16, rngs=nnx.Rngs(0), **options)


def test_tokens_stand_in_their_order_and_each_patch_has_its_position() -> None:
    tokens = make_tokens(registers=2)
    out = tokens(IMAGES[:, :8, :12])
    assert out.shape == (2, 1 + 2 + 6, 16)
    table = tokens.positions.table[...]
    np.testing.assert_array_equal(out[0, 0], tokens.class_tokens[0] + table[0])
    np.testing.assert_array_equal(out[1, 1:3], tokens.registers[...])
    patch = tokens.patches(IMAGES[1:, 4:8, 8:12])[0]
    np.testing.assert_allclose(out[1, -1], patch + table[6], atol=1e-6)
    assert make_tokens(class_tokens=0)(IMAGES).shape == (2, 6, 16)


def test_what_is_left_over_of_an_image_is_not_looked_at() -> None:
    tokens = make_tokens()
    np.testing.assert_array_equal(tokens(IMAGES), tokens(IMAGES[:, :8, :12]))


def test_positions_of_other_grids_follow_the_image() -> None:
    tokens = make_tokens()
    out = tokens(jnp.zeros((1, 4, 20, 3)))
    on_grid = tokens.positions.table[1:].reshape(2, 3, 16)
    np.testing.assert_allclose(out[0, 1:], resize_bicubic(on_grid, (1, 5)).reshape(5, 16), atol=1e-6)


def test_the_mask_token_stands_in_for_patches() -> None:
    tokens = make_tokens(mask_token=True)
    tokens.mask_token = tokens.mask_token.replace(jnp.full((1, 16), 0.5))
    masked = jnp.zeros((2, 6), bool).at[1, 2].set(True)
    out, plain = tokens(IMAGES, masked), tokens(IMAGES)
    np.testing.assert_allclose(out[1, 3], 0.5 + tokens.positions.table[3], atol=1e-6)
    assert ((out != plain).any(-1) == jnp.pad(masked, ((0, 0), (1, 0)))).all()


@pytest.mark.parametrize("shape", [(2, 8, 12, 1), (8, 12, 3)])
def test_images_that_do_not_fit_are_named(shape) -> None:
    with pytest.raises(LayerError, match=r"^images have shape \(.*\): the model takes \[B, Y, X, 3\]$"):
        make_tokens()(jnp.zeros(shape))
    with pytest.raises(LayerError, match="no mask token: build it with mask_token=True"):
        make_tokens()(IMAGES, jnp.zeros((2, 6), bool))
