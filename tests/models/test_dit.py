import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo import models, sharding
from zoo.layers.linear import LayerError, Precision
from zoo.layers.positions import grid_sinusoids
from zoo.models.dit import PRESETS, DiT, DiTConfig
from zoo.models.published import PublishedError

TINY = DiTConfig(image_size=8, image_channels=3, num_layers=2, width=32, num_heads=4, num_classes=5)
OWN = dataclasses.replace(TINY, shared_embedding=False)
IMAGES = jax.random.normal(jax.random.key(1), (8, 8, 12, 3))
TIME = jnp.arange(8) * 100
CLASSES = jnp.arange(8) % 6


@functools.cache
def lively(config: DiTConfig = TINY) -> DiT:
    """A network whose gates are open: no parameter is left at zero."""
    draw = np.random.default_rng(0)

    def drawn(leaf: nnx.Variable) -> nnx.Variable:
        return leaf.replace(jnp.asarray(draw.normal(0.0, 0.2, leaf.shape), jnp.float32))

    model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
    return jax.tree.map(drawn, model, is_leaf=sharding.is_variable)


@jax.jit
def predicted(model: DiT, images: jax.Array, time: jax.Array, classes: jax.Array) -> jax.Array:
    return model(images, time, classes=classes)


@jax.jit
def gradient_and_prediction(
    model: DiT, images: jax.Array, time: jax.Array, classes: jax.Array
) -> tuple[DiT, jax.Array]:
    def loss(model: DiT) -> tuple[jax.Array, jax.Array]:
        out = model(images, time, classes=classes)
        return jnp.square(out).mean(), out

    return jax.grad(loss, has_aux=True)(model)


PAPER = {
    "dit-s-2": (33, 6.06),
    "dit-s-4": (33, 1.41),
    "dit-s-8": (33, 0.36),
    "dit-b-2": (130, 23.01),
    "dit-b-4": (130, 5.56),
    "dit-b-8": (131, 1.42),
    "dit-l-2": (458, 80.71),
    "dit-l-4": (458, 19.70),
    "dit-l-8": (459, 5.01),
    "dit-xl-2": (675, 118.64),
    "dit-xl-4": (675, 29.05),
    "dit-xl-8": (676, 7.39),
    "dit-xl-2-512": (675, 524.60),
}
"""Millions of parameters and Gflops of tables 4 and 6, which count a multiply-add once."""


@pytest.mark.parametrize("name", PAPER)
def test_presets_have_the_papers_parameters_and_flops(name) -> None:
    config, (millions, gflops) = PRESETS[name], PAPER[name]
    assert round(models.parameter_count(config) / 1e6) == millions
    flops = config.forward_flops((config.image_size, config.image_size, 4))
    assert flops / 2e9 == pytest.approx(gflops, abs=0.005, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "count"), [("dit-s-8", 40_082_048), ("dit-b-4", 147_550_592), ("dit-xl-2", 749_826_464)]
)
def test_with_an_embedding_in_each_block_they_have_those_of_diffusers(name, count) -> None:
    """Counted from diffusers 0.42.1 on torch's meta device."""
    assert models.parameter_count(dataclasses.replace(PRESETS[name], shared_embedding=False)) == count


@pytest.mark.parametrize("config", [TINY, dataclasses.replace(OWN, learned_sigma=False, patch_size=4)])
def test_flops_are_those_that_xla_counts(config) -> None:
    """Wide enough that products are nearly all; one layer, because XLA counts the body of a loop once."""
    config = dataclasses.replace(config, num_layers=1, width=256)
    model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((1, 16, 16, 3), (1,))]
    lowered = jax.jit(lambda m, x, t, c: m(x, t, classes=c)).lower(model, *shapes, jnp.zeros(1, int))
    counted = lowered.compile().cost_analysis()["flops"]
    assert config.forward_flops((16, 16, 3)) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("config", [TINY, OWN])
def test_blocks_begin_as_the_identity_and_the_prediction_at_zero(config) -> None:
    config = dataclasses.replace(config, precision=Precision(compute="bfloat16"))
    model = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    out = predicted(model, IMAGES, TIME, CLASSES)
    assert out.shape == (8, 8, 12, 6) and out.dtype == jnp.float32
    assert not out.any()
    x = jax.random.normal(jax.random.key(2), (8, 24, 32))
    condition = (TIME, CLASSES) if model.embedding is None else model.embedding(TIME, CLASSES)
    np.testing.assert_array_equal(model.stack(x, condition=condition).x, x)


def test_every_parameter_is_used() -> None:
    gradient, _ = gradient_and_prediction(lively(OWN), IMAGES, TIME, CLASSES)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        # A key's bias shifts all scores of a query alike: softmax does not see it.
        assert jnp.abs(leaf).max() > 1e-7 or ".attention.key.bias" in name, name


def test_images_of_a_batch_do_not_meet_and_each_has_its_time_and_class() -> None:
    out = predicted(lively(), IMAGES, TIME, CLASSES)
    other = predicted(lively(), IMAGES.at[1:3].multiply(-1.0), TIME.at[3:5].set(999), CLASSES.at[5:].add(1) % 6)
    np.testing.assert_array_equal(other[0], out[0])
    assert (jnp.abs(other - out)[1:].max((1, 2, 3)) > 1e-2).all()


def test_the_last_class_is_none_and_what_is_beyond_it_is_no_number() -> None:
    out = predicted(lively(), IMAGES, TIME, CLASSES.at[0].set(6).at[1].set(-1).at[2].set(5))
    assert jnp.isnan(out[:2]).all() and jnp.isfinite(out[2:]).all()


def test_one_embedding_is_the_same_in_every_block() -> None:
    """A model with an embedding in each block, all the same, predicts what the one with a single embedding does."""
    shared, each = lively(), lively(OWN)
    same = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, *x.shape)), shared.embedding)
    places, structure = jax.tree_util.tree_flatten_with_path(each)
    values = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(shared)}
    values |= {
        f".stack.blocks[0].modulation.embedding{jax.tree_util.keystr(path)}": x
        for path, x in jax.tree_util.tree_leaves_with_path(same)
    }
    each = jax.tree.unflatten(structure, [values[jax.tree_util.keystr(path)] for path, _ in places])
    out, expected = (predicted(model, IMAGES, TIME, CLASSES) for model in (each, shared))
    np.testing.assert_allclose(out, expected, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("config", [TINY, OWN])
def test_sharded_equals_unsharded(config) -> None:
    """Prediction and gradients on data=2, fsdp=2, tensor=2, to 2e-5 of the largest value."""
    model, mesh = lively(config), sharding.make_mesh("data=2,fsdp=2,tensor=2")
    wanted = gradient_and_prediction(model, IMAGES, TIME, CLASSES)
    placed = jax.device_put(model, sharding.shardings(model, mesh))
    kernel = placed.stack.blocks[0].modulation.modulation.linear.kernel[...]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    rows = sharding.batch_sharding(mesh)
    with sharding.use(mesh):
        found = gradient_and_prediction(placed, *(jax.device_put(x, rows) for x in (IMAGES, TIME, CLASSES)))
    for expected, got in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5 * max(1, float(jnp.abs(expected).max())))


def test_remat_changes_no_number() -> None:
    model = lively()
    again = jax.tree.unflatten(
        jax.tree.structure(jax.eval_shape(lambda: dataclasses.replace(TINY, remat="full").build(nnx.Rngs(0)))),
        jax.tree.leaves(model),
    )
    for expected, got in zip(
        *(jax.tree.leaves(gradient_and_prediction(m, IMAGES, TIME, CLASSES)) for m in (model, again)), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-6 * max(1, float(jnp.abs(expected).max())))


def test_bfloat16_is_close_to_float32() -> None:
    exact = predicted(lively(), IMAGES, TIME, CLASSES)
    rough = predicted(lively(dataclasses.replace(TINY, precision=Precision(compute="bfloat16"))), IMAGES, TIME, CLASSES)
    assert jnp.sqrt(jnp.square(rough - exact).mean() / jnp.square(exact).mean()) < 0.03


def test_positions_of_any_grid_span_the_same_range() -> None:
    whole, finer = grid_sinusoids((4, 4), 16, side=4), grid_sinusoids((8, 2), 16, side=4)
    assert whole.shape == finer.shape == (16, 16)
    np.testing.assert_array_equal(whole.reshape(4, 4, 16)[:, ::2], finer.reshape(8, 2, 16)[::2])
    # Place (1, 2): its column is 2, its row 1, and the slowest of four pairs turns 10000^(-3/4) radians a place.
    np.testing.assert_allclose(whole[6, [0, 4, 8, 3]], [np.sin(2), np.cos(2), np.sin(1), np.sin(2e-3)], rtol=1e-6)


def call(shape: tuple[int, ...], config: DiTConfig = TINY, **given) -> None:
    model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
    jax.eval_shape(lambda m: m(jnp.zeros(shape), jnp.zeros(shape[0]), **given), model)


@pytest.mark.parametrize(
    ("shape", "given", "message"),
    [
        ((2, 8, 8, 4), {}, r"shape \(2, 8, 8, 4\): the network takes \[B, Y, X, 3\]"),
        ((2, 8, 7, 3), {}, "8 x 7, not whole patches of 2 x 2: choose multiples of 2"),
        ((2, 8, 8, 3), {}, r"classes were left out, .* give \[B\] of them \(5 for none\)"),
        ((2, 8, 8, 3), {"classes": np.zeros(2, int), "context": 1}, "context was given, and a DiT reads none"),
    ],
)
def test_what_does_not_fit_is_named(shape, given, message) -> None:
    with pytest.raises(LayerError, match=message):
        call(shape, **given)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 34}, "width 34 has no sinusoids of two axes"),
        ({"image_size": 1}, "an image of 1 x 1 pixels is smaller than a patch of 2 x 2"),
        ({"num_classes": 0}, "num_classes 0 is too small"),
    ],
)
def test_sizes_that_make_no_model_are_named(fields, message) -> None:
    with pytest.raises(LayerError, match=message):
        dataclasses.replace(TINY, **fields)


PUBLISHED = TINY.to_published()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_type": "ada_norm_single"}, "norm_type 'ada_norm_single'"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine True"),
        ({"upcast_attention": True}, "upcast_attention True"),
        ({"dropout": 0.1}, "dropout 0.1"),
        ({"activation_fn": "geglu"}, "activation_fn 'geglu', which is none of gelu-approximate, gelu"),
        ({"out_channels": 5}, "out_channels 5, and a DiT here has as many as in_channels 3, or twice that"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm None"),
        ({"_class_name": "Transformer2DModel", "cross_attention_dim": 7}, "cross_attention_dim 7"),
    ],
)
def test_published_configs_that_a_dit_cannot_be_are_refused_by_name(fields, message) -> None:
    with pytest.raises(PublishedError, match=message):
        models.published_config(PUBLISHED | fields)


def test_an_older_class_name_is_read_and_its_defaults_are_its_own() -> None:
    older = PUBLISHED | {"_class_name": "Transformer2DModel", "num_vector_embeds": None}
    assert models.published_config(older) == OWN
    del older["attention_bias"]
    assert not models.published_config(older).qkv_bias
    del older["norm_type"]
    with pytest.raises(PublishedError, match="norm_type 'layer_norm', and a DiT here has 'ada_norm_zero' alone"):
        models.published_config(older)


def test_what_has_no_published_form_is_refused() -> None:
    with pytest.raises(PublishedError, match="null_class False has no published form"):
        dataclasses.replace(TINY, null_class=False).to_published()


def test_epsilons_are_those_of_the_published_module() -> None:
    """Too small to be seen in its outputs: 1e-6 everywhere but before feed-forward networks, which norm_eps names."""
    config = models.published_config({"_class_name": "DiTTransformer2DModel"})
    assert config.feedforward_epsilon == 1e-5 and config.width == 1152
    model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
    block = model.stack.blocks[0]
    assert (block.attention_norm.epsilon, block.feedforward_norm.epsilon, model.norm.epsilon) == (1e-6, 1e-5, 1e-6)
