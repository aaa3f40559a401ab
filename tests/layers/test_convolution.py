import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from zoo import sharding
from zoo.layers.convolution import Conv, GroupNorm, convolve
from zoo.layers.linear import LayerError, Precision

IMAGE = ("act_batch", "act_y", "act_x", "act_channels")
AROUND, AFTER, NONE = ((1, 1), (1, 1)), ((0, 1), (0, 1)), ((0, 0), (0, 0))

# image size, channels in and out, kernel, stride, padding
CASES = [
    ((8, 8), 3, 5, 3, 1, AROUND),
    ((8, 6), 4, 2, 3, 2, AFTER),
    ((9, 7), 2, 3, 3, 2, AROUND),
    ((8, 8), 3, 4, 4, 4, NONE),
    ((5, 6), 2, 3, 5, 1, ((2, 2), (0, 3))),
    ((6, 6), 3, 4, 1, 1, NONE),
]


def plain(x: jax.Array, kernel: jax.Array, stride: int, padding) -> jax.Array:
    layouts = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=layouts)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_jax(case) -> None:
    size, inputs, outputs, window, stride, padding = case
    x = jax.random.normal(jax.random.key(0), (2, *size, inputs))
    kernel = jax.random.normal(jax.random.key(1), (window, window, inputs, outputs))
    y, pull = jax.vjp(lambda x, k: convolve(x, k, stride, padding, Precision()), x, kernel)
    expected, pull_plain = jax.vjp(lambda x, k: plain(x, k, stride, padding), x, kernel)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    dy = jax.random.normal(jax.random.key(2), y.shape)
    for found, wanted in zip(pull(dy), pull_plain(dy), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_gradients_are_the_same_with_inputs_outputs_and_images_sharded() -> None:
    """On three mesh axes at once, where the partitioner alone gets the gradient of x wrong."""
    x = jax.random.normal(jax.random.key(0), (8, 4, 6, 16))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 16, 16))

    def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
        y = convolve(jax.nn.silu(sharding.constrain(x, *IMAGE)), kernel, 1, AROUND, Precision())
        return jnp.sum(jnp.sin(sharding.constrain(y, *IMAGE)))

    expected = jax.grad(loss, (0, 1))(x, kernel)
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    axes = (IMAGE, ("kernel_y", "kernel_x", "conv_in", "conv_out"))
    placed = [
        jax.device_put(a, NamedSharding(mesh, sharding.partition_spec(names, a.shape, mesh)))
        for a, names in zip((x, kernel), axes, strict=True)
    ]
    with sharding.use(mesh):
        found = jax.jit(jax.grad(loss, (0, 1)))(*placed)
    for wanted, got in zip(expected, found, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_bfloat16_operands_give_float32_gradients_of_float32_kernels() -> None:
    precision = Precision(compute="bfloat16")
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 16), jnp.bfloat16)
    kernel = 0.1 * jax.random.normal(jax.random.key(1), (3, 3, 16, 16))
    loss = lambda f: lambda x, k: jnp.square(f(x, k).astype(jnp.float32)).mean()  # noqa: E731
    dx, dkernel = jax.grad(loss(lambda x, k: convolve(x, k, 1, AROUND, precision)), (0, 1))(x, kernel)
    rounded = x.astype(jnp.float32)
    _, expected = jax.grad(loss(lambda x, k: plain(x, k, 1, AROUND)), (0, 1))(rounded, kernel)
    assert convolve(x, kernel, 1, AROUND, precision).dtype == dx.dtype == jnp.bfloat16
    assert dkernel.dtype == jnp.float32
    assert abs(dkernel - expected).max() < 0.02 * abs(expected).max()


def test_gradients_in_a_loop_are_convolutions_in_the_order_that_cpus_have_fast() -> None:
    """On CPUs, every convolution of a loop's body has its channels last, kernels included: others take a slow path."""

    def body(kernel: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
        gradient = jax.grad(lambda k: jnp.square(convolve(jnp.tanh(x), k, 2, AFTER, Precision())).sum())(kernel)
        return kernel - gradient, None

    kernel, xs = jnp.ones((3, 3, 4, 4)), jnp.ones((5, 2, 8, 8, 4))
    text = jax.jit(lambda k, xs: jax.lax.scan(body, k, xs)[0]).lower(kernel, xs).as_text()
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert len(convolutions) == 2
    assert all("dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line for line in convolutions)


@pytest.mark.parametrize("stride", [1, 2])
def test_conv_keeps_or_halves_the_size(stride) -> None:
    conv = Conv(3, 4, stride=stride, in_axis=None, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 8, 6, 3))
    assert conv(x).shape == (2, 8 // stride, 6 // stride, 4)
    assert conv.kernel.get_metadata()["axes"] == ("kernel_y", "kernel_x", None, "conv_out")
    conv.bias[...] = jnp.arange(4.0)
    if stride == 2:  # zeros stand after the image, as in the published networks
        expected = plain(x, conv.kernel[...], 2, AFTER) + jnp.arange(4.0)
        np.testing.assert_allclose(conv(x), expected, atol=1e-6)


def test_group_norm_is_its_formula() -> None:
    norm = GroupNorm(6, 3, epsilon=1e-3)
    norm.scale[...], norm.bias[...] = jnp.arange(6.0), jnp.arange(6.0) / 10
    x = 3 + 2 * np.random.default_rng(0).normal(size=(2, 4, 5, 6)).astype(np.float32)
    expected = np.empty_like(x)
    for image in range(2):
        for group in range(3):
            part = x[image, :, :, 2 * group : 2 * group + 2]
            normal = (part - part.mean()) / np.sqrt(part.var() + 1e-3)
            expected[image, :, :, 2 * group : 2 * group + 2] = normal
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected * np.arange(6) + np.arange(6) / 10, atol=2e-5)


def test_group_norm_has_float32_statistics() -> None:
    norm = GroupNorm(4, 2, precision=Precision(compute="bfloat16"))
    x = (100 + jax.random.normal(jax.random.key(0), (1, 16, 16, 4))).astype(jnp.bfloat16)
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    exact = GroupNorm(4, 2)(x.astype(jnp.float32))
    assert abs(y.astype(jnp.float32) - exact).max() <= 2**-8 * abs(exact).max()


def test_group_norm_says_which_groups_do_not_fit() -> None:
    with pytest.raises(LayerError, match="6 channels do not divide into 4 groups: choose a divisor of 6"):
        GroupNorm(6, 4)
