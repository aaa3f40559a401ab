import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from products import product_flops

from zoo import models, sharding
from zoo.layers.linear import LayerError, Precision
from zoo.models.noising import Noising
from zoo.models.published import PublishedError
from zoo.models.unet import UNet, UNetConfig

TINY = UNetConfig(image_channels=3, channels=(8, 16), blocks_per_level=1, attention_levels=(1,), num_heads=2, groups=4)
TOLD = dataclasses.replace(
    TINY,
    out_channels=4,
    attention_levels=(0,),
    num_heads=(2, 4),
    context_width=10,
    num_classes=5,
    null_class=True,
    downsample_padding=(1, 1),
    cosines_first=True,
    frequency_shift=0,
)
IMAGES = jax.random.normal(jax.random.key(1), (8, 8, 12, 3))
TIME = jnp.arange(8) * 100
WORDS = {
    "classes": jnp.array([0, 1, 2, 3, 4, 5, 1, 0]),
    "context": jax.random.normal(jax.random.key(2), (8, 7, 10)),
}


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
def predicted(
    model: UNet,
    images: jax.Array,
    time: jax.Array,
    key: jax.Array | None = None,
    told: dict[str, jax.Array] = {},  # noqa: B006
) -> jax.Array:
    return model(images, time, key=key, **told)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("ddpm-cifar10", 35_746_307),
        ("ddpm-celebahq-256", 113_673_219),
        ("stable-diffusion-v1-5", 859_520_964),
        ("stable-diffusion-2-1", 865_910_724),
    ],
)
def test_presets_have_the_published_parameters(name, count) -> None:
    """As diffusers 0.42.1 counts them on torch's meta device; Ho et al. 2020, appendix B, has 35.7M and 114M."""
    assert models.parameter_count(models.preset(name)) == count


def test_cifar10_costs_the_published_flops() -> None:
    """6.1 G multiply-adds for a 32 x 32 image, as Fang et al. 2023 (table 1) count them."""
    flops = models.preset("ddpm-cifar10").forward_flops((32, 32, 3))
    assert flops / 2 == pytest.approx(6.1e9, rel=0.03)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (TINY, {}),
        (dataclasses.replace(TINY, blocks_per_level=2, channels=(8, 16, 24), attention_levels=(0, 2)), {}),
        (TOLD, WORDS),
    ],
)
def test_flops_are_those_of_the_compiled_products(config, told) -> None:
    """Every product of the traced network, counted from its jaxpr."""
    model, one = jax.eval_shape(lambda: config.build(nnx.Rngs(0))), {name: value[:1] for name, value in told.items()}
    jaxpr = jax.make_jaxpr(lambda m, x, t: m(x, t, **one))(model, IMAGES[:1], TIME[:1])
    assert config.forward_flops((8, 12, 3), 7) == pytest.approx(product_flops(jaxpr.jaxpr), rel=1e-9)


def test_prediction_starts_at_zero_in_float32() -> None:
    config = dataclasses.replace(TINY, precision=Precision(compute="bfloat16"))
    rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))  # compiles faster
    out = jax.jit(lambda rngs: config.build(rngs)(IMAGES, TIME))(rngs)
    assert out.shape == IMAGES.shape and out.dtype == jnp.float32
    assert not out.any()


@jax.jit
def gradient_and_prediction(
    model: UNet, images: jax.Array, time: jax.Array, told: dict[str, jax.Array]
) -> tuple[UNet, jax.Array]:
    def loss(model: UNet) -> tuple[jax.Array, jax.Array]:
        out = model(images, time, **told)
        return jnp.square(out).mean(), out

    return jax.grad(loss, has_aux=True)(model)


KINDS = {"plain": (TINY, {}), "told": (TOLD, WORDS)}


@pytest.fixture(scope="module")
def unsharded() -> dict[str, tuple[UNet, jax.Array]]:
    return {kind: gradient_and_prediction(lively(config), IMAGES, TIME, told) for kind, (config, told) in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_used(kind, unsharded) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(unsharded[kind][0]):
        name = jax.tree_util.keystr(path)
        # A key's bias shifts all scores of a query alike: softmax does not see it.
        assert jnp.abs(leaf).max() > 1e-7 or ".attention.key.bias" in name, name


@pytest.mark.numbers
def test_what_the_network_is_told_it_hears() -> None:
    """Each image its own class and text; the order of a text's states alone tells nothing."""
    model = lively(TOLD)
    out = predicted(model, IMAGES, TIME, None, WORDS)
    classes = predicted(model, IMAGES, TIME, None, WORDS | {"classes": WORDS["classes"].at[0].set(3)})
    context = predicted(model, IMAGES, TIME, None, WORDS | {"context": WORDS["context"].at[0].multiply(-1.0)})
    for other in (classes, context):
        assert jnp.abs(other - out)[0].max() > 1e-3
        np.testing.assert_array_equal(other[1:], out[1:])
    turned = predicted(model, IMAGES, TIME, None, WORDS | {"context": WORDS["context"][:, ::-1]})
    np.testing.assert_allclose(turned, out, atol=2e-5)
    beyond = predicted(model, IMAGES, TIME, None, WORDS | {"classes": WORDS["classes"].at[0].set(6)})
    assert jnp.isnan(beyond[0]).all() and not jnp.isnan(beyond[1:]).any()


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


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_equals_unsharded(kind, unsharded) -> None:
    """Prediction and gradients on data=2, fsdp=2, tensor=2, to 2e-5 of the largest value."""
    config, told = KINDS[kind]
    model, mesh = lively(config), sharding.make_mesh("data=2,fsdp=2,tensor=2")
    placed = jax.device_put(model, sharding.shardings(model, mesh))
    for conv, cut in ((placed.conv_out, 2), (placed.middle_in.conv_in, 4)):
        assert conv.kernel[...].addressable_shards[0].data.size * cut == conv.kernel[...].size
    batch = jax.device_put((IMAGES, TIME, told), sharding.batch_sharding(mesh))
    with sharding.use(mesh):
        found = gradient_and_prediction(placed, *batch)
    for wanted, got in zip(jax.tree.leaves(unsharded[kind]), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5 * max(1e-3, float(jnp.abs(wanted).max())))


@pytest.mark.parametrize(
    ("config", "images", "told", "message"),
    [
        (TINY, (2, 8, 8, 1), {}, r"shape \(2, 8, 8, 1\): the network takes \[B, Y, X, 3\]"),
        (TINY, (2, 9, 8, 3), {}, "9 x 8, which 2 levels do not halve evenly: choose multiples of 2"),
        (
            TINY,
            (2, 8, 8, 3),
            {"classes": (2,)},
            "classes is given to a network that is not told it: leave it out, or choose num_classes",
        ),
        (TOLD, (2, 8, 8, 3), {"classes": (2,)}, "context is missing: a network with context_width 10 is told it"),
        (TOLD, (2, 8, 8, 3), {"context": (2, 7, 10)}, "classes is missing: a network with num_classes 5 is told it"),
        (TOLD, (2, 8, 8, 3), {"classes": (1,), "context": (2, 7, 10)}, r"classes have shape \(1,\): .* takes \[2\]"),
        (TOLD, (2, 8, 8, 3), {"classes": (2,), "context": (2, 7, 9)}, r"context has shape \(2, 7, 9\): .*\[2, S, 10\]"),
    ],
)
def test_what_does_not_fit_is_named(config, images, told, message) -> None:
    model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
    with pytest.raises(LayerError, match=message):
        jax.eval_shape(
            lambda m: m(jnp.zeros(images), jnp.zeros(2), **{name: jnp.zeros(x, int) for name, x in told.items()}), model
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": ()}, "channels .* make no level"),
        ({"channels": (9, 18)}, r"channels\[0\] 9 and frequency_shift 1 make no sinusoids of time"),
        ({"frequency_shift": 4}, r"channels\[0\] 8 and frequency_shift 4 make no sinusoids of time"),
        ({"num_heads": (1, 2, 2)}, "num_heads .* is for 3 levels, not 2: give one for each"),
        ({"attention_levels": (2,)}, "attention_levels names 2, and the levels are 0 to 1"),
        ({"downsample_padding": (1, 0)}, r"downsample_padding \(1, 0\) does not halve"),
        ({"null_class": True}, "null_class is one class more, and num_classes is None"),
        ({"num_classes": 0}, "num_classes 0 is too small"),
        ({"num_heads": 0}, r"heads\[0\] 0 is too small"),
    ],
)
def test_configs_that_make_no_network_are_named(fields, message) -> None:
    with pytest.raises(LayerError, match=message):
        dataclasses.replace(TINY, **fields)


PLAIN, CONDITIONAL = {"_class_name": "UNet2DModel"}, {"_class_name": "UNet2DConditionModel"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "UNet3DConditionModel"}, "_class_name 'UNet3DConditionModel', and a U-Net here is one of"),
        (PLAIN | {"add_attention": False}, "add_attention False"),
        (PLAIN | {"attention_head_dim": 5}, "attention_head_dim 5, which does not divide the 448 channels of level 1"),
        (PLAIN | {"attn_norm_num_groups": 4}, "attn_norm_num_groups 4"),
        (PLAIN | {"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
        (PLAIN | {"down_block_types": ["DownBlock2D"]}, "down_block_types .*: the 4 levels of a UNet2DModel here"),
        (PLAIN | {"downsample_padding": 2}, "downsample_padding 2"),
        (PLAIN | {"downsample_type": "resnet"}, "downsample_type 'resnet'"),
        (PLAIN | {"freq_shift": -1}, "freq_shift -1"),
        (PLAIN | {"mid_block_type": None}, "mid_block_type None"),
        (PLAIN | {"norm_num_groups": None}, "norm_num_groups None"),
        (PLAIN | {"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift 'scale_shift'"),
        (PLAIN | {"sample_size": [8, 8, 8]}, r"sample_size \[8, 8, 8\]"),
        (PLAIN | {"time_embedding_type": "fourier"}, "time_embedding_type 'fourier'"),
        (
            PLAIN | {"up_block_types": ["UpBlock2D"] * 4},
            "up_block_types .* attention at the levels of down_block_types",
        ),
        (CONDITIONAL | {"act_fn": "gelu"}, "act_fn 'gelu'"),
        (CONDITIONAL | {"addition_embed_type": "text_time"}, "addition_embed_type 'text_time'"),
        (CONDITIONAL | {"cross_attention_dim": [4, 4, 8, 8]}, "cross_attention_dim"),
        (CONDITIONAL | {"down_block_types": ["AttnDownBlock2D"] * 4}, "CrossAttnDownBlock2D"),
        (CONDITIONAL | {"dual_cross_attention": True}, "dual_cross_attention True"),
        (CONDITIONAL | {"encoder_hid_dim": 8}, "encoder_hid_dim 8"),
        (CONDITIONAL | {"layers_per_block": [1, 2, 2, 2]}, "layers_per_block"),
        (CONDITIONAL | {"mid_block_type": "UNetMidBlock2D"}, "mid_block_type 'UNetMidBlock2D'"),
        (CONDITIONAL | {"only_cross_attention": True}, "only_cross_attention True"),
        (CONDITIONAL | {"time_cond_proj_dim": 256}, "time_cond_proj_dim 256"),
        (CONDITIONAL | {"transformer_layers_per_block": [1, 2, 10]}, "transformer_layers_per_block"),
    ],
)
def test_published_configs_that_are_not_here_are_named(fields, message) -> None:
    with pytest.raises(PublishedError, match=message):
        UNetConfig.from_published(fields)


def test_configs_without_a_published_form_are_named() -> None:
    config = dataclasses.replace(TINY, attention_levels=(0, 1), num_heads=(2, 2))
    with pytest.raises(PublishedError, match="heads 2 of 8 channels, 2 of 16 channels has no published form"):
        config.to_published()


@pytest.mark.parametrize("name", ["ddpm-cifar10", "ddpm-celebahq-256", "stable-diffusion-v1-5", "stable-diffusion-2-1"])
def test_presets_are_what_their_published_configs_say(name) -> None:
    config = dataclasses.replace(models.preset(name), noising=Noising())  # Which a pipeline's scheduler says.
    assert UNetConfig.from_published(config.to_published()) == config


def test_the_null_class_is_published_as_one_of_the_classes() -> None:
    """Its number is told in a field that diffusers passes over (a UNet2DModel knows of none)."""
    fields = TOLD.to_published()
    assert fields["num_class_embeds"] == 6 and fields["_null_class"] == 5
    read = UNetConfig.from_published(fields)
    assert (read.num_classes, read.null_class) == (5, True)
    assert "_null_class" not in dataclasses.replace(TOLD, null_class=False).to_published()
    with pytest.raises(PublishedError, match="_null_class 3 and num_class_embeds 6: the class for none is the last"):
        UNetConfig.from_published(fields | {"_null_class": 3})


def test_fields_that_older_files_leave_out_are_as_diffusers_takes_them() -> None:
    left_out = {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64}  # Of Stable Diffusion 1's.
    preset = dataclasses.replace(models.preset("stable-diffusion-v1-5"), noising=Noising())
    assert UNetConfig.from_published(CONDITIONAL | left_out) == preset


def test_gradient_keeps_little_of_what_it_can_make_again() -> None:
    """On a CPU, in activations of the first level: 38, and 56 where a norm keeps what it centres, and attention all."""
    config = UNetConfig(channels=(64, 64), attention_levels=(1,), blocks_per_level=1, groups=8)
    model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
    images, time = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)
    gradient = jax.jit(jax.grad(lambda model, x, t: jnp.square(model(x, t)).sum()))
    memory = gradient.lower(model, images, time).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 45 * (4 * 32 * 32 * 64 * 4)
