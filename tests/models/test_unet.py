import dataclasses
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo import models, sharding
from zoo.layers.linear import Precision
from zoo.models.unet import UNet, UNetConfig

TINY = UNetConfig(
    image_channels=3, width=8, multipliers=(1, 2), blocks_per_level=1, attention_levels=(1,), num_heads=2, groups=4
)
IMAGES = jax.random.normal(jax.random.key(1), (8, 8, 12, 3))
TIME = jnp.arange(8) * 100


def lively(config: UNetConfig = TINY) -> UNet:
    """A network that predicts something: no parameter is left at zero, and products keep the scale of their inputs."""
    draw = np.random.default_rng(0)

    def drawn(leaf: nnx.Variable) -> nnx.Variable:
        if sharding.decays(sharding.logical_axes(leaf)):
            return leaf.replace(
                jnp.asarray(draw.normal(size=leaf.shape) * (math.prod(leaf.shape[:-1])) ** -0.5, jnp.float32)
            )
        return leaf.replace(jnp.asarray(draw.normal(1.0, 0.1, leaf.shape), jnp.float32))

    model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
    return jax.tree.map(drawn, model, is_leaf=sharding.is_variable)


@jax.jit
def predicted(model: UNet, images: jax.Array, time: jax.Array, key: jax.Array | None = None) -> jax.Array:
    return model(images, time, key=key)


def test_cifar10_has_the_published_parameters() -> None:
    """35.7M in Ho et al. 2020, appendix B; 35,746,307 in the released weights."""
    assert models.parameter_count(models.preset("ddpm-cifar10")) == 35_746_307


def test_cifar10_costs_the_published_flops() -> None:
    """6.1 G multiply-adds for a 32 x 32 image, as Fang et al. 2023 (table 1) count them."""
    flops = models.preset("ddpm-cifar10").forward_flops((32, 32, 3))
    assert flops / 2 == pytest.approx(6.1e9, rel=0.03)


@pytest.mark.parametrize(
    "config", [TINY, dataclasses.replace(TINY, blocks_per_level=2, multipliers=(1, 2, 2), attention_levels=(0, 2))]
)
def test_flops_are_those_of_the_compiled_products(config) -> None:
    """Every product of the traced network, counted from its jaxpr."""
    model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
    jaxpr = jax.make_jaxpr(lambda m, x, t: m(x, t))(model, IMAGES[:1], TIME[:1])
    assert config.forward_flops((8, 12, 3)) == pytest.approx(product_flops(jaxpr.jaxpr), rel=1e-9)


def product_flops(jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            total += 2.0 * np.prod(eqn.outvars[0].aval.shape) * np.prod(kernel[:3])
        elif eqn.primitive.name == "dot_general":
            ((contracted, _), _) = eqn.params["dimension_numbers"]
            sizes = [eqn.invars[0].aval.shape[axis] for axis in contracted]
            total += 2.0 * np.prod(eqn.outvars[0].aval.shape) * np.prod(sizes)
        elif eqn.primitive.name == "cond":  # one branch for each platform: any one of them runs
            total += product_flops(eqn.params["branches"][0].jaxpr)
        else:
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                total += product_flops(inner)
    return total


def test_prediction_starts_at_zero_in_float32() -> None:
    config = dataclasses.replace(TINY, precision=Precision(compute="bfloat16"))
    rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))  # compiles faster
    out = jax.jit(lambda rngs: config.build(rngs)(IMAGES, TIME))(rngs)
    assert out.shape == IMAGES.shape and out.dtype == jnp.float32
    assert not out.any()


@jax.jit
def gradient_and_prediction(model: UNet, images: jax.Array, time: jax.Array) -> tuple[UNet, jax.Array]:
    def loss(model: UNet) -> tuple[jax.Array, jax.Array]:
        out = model(images, time)
        return jnp.square(out).mean(), out

    return jax.grad(loss, has_aux=True)(model)


@pytest.fixture(scope="module")
def unsharded() -> tuple[UNet, jax.Array]:
    return gradient_and_prediction(lively(), IMAGES, TIME)


def test_every_parameter_is_used(unsharded) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(unsharded[0]):
        name = jax.tree_util.keystr(path)
        # A key's bias shifts all scores of a query alike: softmax does not see it.
        assert jnp.abs(leaf).max() > 1e-7 or ".attention.key.bias" in name, name


@pytest.mark.numbers
def test_images_of_a_batch_do_not_meet() -> None:
    model = lively()
    out = predicted(model, IMAGES, TIME)
    other = predicted(model, IMAGES.at[1:].multiply(-1.0), TIME.at[1:].set(999))
    np.testing.assert_array_equal(other[0], out[0])
    assert (jnp.abs(other - out)[1:].max((1, 2, 3)) > 1e-2).all()


def test_dropout_is_by_key() -> None:
    model = lively(dataclasses.replace(TINY, dropout=0.5))
    plain = predicted(model, IMAGES, TIME)
    one, again, other = (predicted(model, IMAGES, TIME, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert abs(one - other).max() > 1e-2 and abs(one - plain).max() > 1e-2


def test_bfloat16_is_close_to_float32() -> None:
    exact = predicted(lively(), IMAGES, TIME)
    rough = predicted(lively(dataclasses.replace(TINY, precision=Precision(compute="bfloat16"))), IMAGES, TIME)
    assert jnp.sqrt(jnp.square(rough - exact).mean() / jnp.square(exact).mean()) < 0.03


def test_sharded_equals_unsharded(unsharded) -> None:
    """Prediction and gradients on data=2, fsdp=2, tensor=2, to 2e-5 of the largest value."""
    model, mesh = lively(), sharding.make_mesh("data=2,fsdp=2,tensor=2")
    placed = jax.device_put(model, sharding.shardings(model, mesh))
    for conv, cut in ((placed.conv_out, 2), (placed.middle_in.conv_in, 4)):
        assert conv.kernel[...].addressable_shards[0].data.size * cut == conv.kernel[...].size
    rows = sharding.batch_sharding(mesh)
    with sharding.use(mesh):
        found = gradient_and_prediction(placed, jax.device_put(IMAGES, rows), jax.device_put(TIME, rows))
    for wanted, got in zip(jax.tree.leaves(unsharded), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5 * max(1, float(jnp.abs(wanted).max())))


def test_images_that_do_not_fit_are_named() -> None:
    model = jax.eval_shape(lambda: TINY.build(nnx.Rngs(0)))
    call = lambda shape: jax.eval_shape(lambda m: m(jnp.zeros(shape), jnp.zeros(shape[0])), model)  # noqa: E731
    with pytest.raises(ValueError, match=r"shape \(2, 8, 8, 1\): the network takes \[B, Y, X, 3\]"):
        call((2, 8, 8, 1))
    with pytest.raises(ValueError, match="9 x 8, which 2 levels do not halve evenly: choose multiples of 2"):
        call((2, 9, 8, 3))
