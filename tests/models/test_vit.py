import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo import models, sharding
from zoo.kernels import Mask
from zoo.layers.linear import LayerError, Precision
from zoo.models.published import PublishedError
from zoo.models.vit import FORMS, POOLS, ViT, ViTConfig

TINY = ViTConfig(
    image_size=(8, 12),
    patch_size=(4, 2),
    num_layers=2,
    width=32,
    num_heads=4,
    mlp_width=48,
    head="classification",
    labels=("a", "b", "c", "d"),
)
DINO = dataclasses.replace(
    TINY,
    image_size=(8, 8),
    patch_size=(2, 2),
    pool="class_and_mean",
    mlp_width=64,
    registers=3,
    layer_scale=0.5,
    mask_token=True,
    antialias=True,
    norm_epsilon=1e-6,
)
IMAGES = jax.random.normal(jax.random.key(1), (4, 8, 12, 3))


@functools.cache
def lively(config: ViTConfig = TINY) -> ViT:
    return jax.jit(lambda: moved(config.build(nnx.Rngs(0))))()


def moved(model: ViT) -> ViT:
    """Scores vary: ten times the usual weights, and vectors that are not all 0 or 1."""
    leaves, structure = jax.tree.flatten(model, is_leaf=sharding.is_variable)
    values = []
    for seed, leaf in enumerate(leaves):
        noise = 0.1 * jax.random.normal(jax.random.key(seed), leaf.shape)
        values.append(10 * leaf[...] if sharding.decays(sharding.logical_axes(leaf)) else leaf[...] + noise)
    return jax.tree.unflatten(structure, [leaf.replace(x) for leaf, x in zip(leaves, values, strict=True)])


@jax.jit
def run(model: ViT, images: jax.Array, **arguments: Any) -> Any:
    return model(images, **arguments)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vit-small-patch16-224", 22_050_664),
        ("vit-base-patch16-224", 86_567_656),
        ("vit-base-patch16-224-in21k", 86_389_248),
        ("vit-base-patch16-384", 86_859_496),
        ("vit-large-patch16-224", 304_326_632),
        ("vit-huge-patch14-224-in21k", 632_404_480),
        ("dinov2-small", 22_056_576),
        ("dinov2-base", 86_580_480),
        ("dinov2-large", 304_368_640),
        ("dinov2-giant", 1_136_480_768),
        ("dinov2-with-registers-small", 22_058_112),
        ("dinov2-with-registers-base", 86_583_552),
        ("dinov2-with-registers-large", 304_372_736),
        ("dinov2-with-registers-giant", 1_136_486_912),
    ],
)
def test_the_published_parameters(name, count) -> None:
    """As transformers 5.23 counts them, building each model on torch's meta device."""
    assert models.parameter_count(models.preset(name)) == count


def test_base_costs_the_published_flops() -> None:
    """17.6 G multiply-adds at 224 x 224, as timm's tables count them."""
    assert models.preset("vit-base-patch16-224").forward_flops((224, 224, 3)) == pytest.approx(2 * 17.6e9, rel=0.01)


@pytest.mark.parametrize("config", [TINY, DINO, dataclasses.replace(DINO, head="pooler", gated=True, pool="mean")])
def test_flops_are_those_of_the_kernels(config) -> None:
    """Of the patches' kernel at each patch, of a layer's at each token, of a head's once, and of attention."""
    model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
    y, x = config.image_size
    patches = (y // config.patch_size[0]) * (x // config.patch_size[1])
    length = patches + config.class_tokens + config.registers
    kernels = jax.tree_util.tree_flatten_with_path(model.stack, is_leaf=sharding.is_variable)[0]
    of_layers = sum(leaf.size for path, leaf in kernels if jax.tree_util.keystr(path).endswith(".kernel"))
    head = model.classifier or model.pooler
    flops = patches * model.tokens.patches.kernel.size + length * of_layers + head.kernel.size
    assert config.forward_flops((y, x, 3)) == 2 * (flops + 2 * 2 * length**2 * 32)


def test_initialisation_is_as_published() -> None:
    model = jax.jit(dataclasses.replace(DINO, width=256).build)(nnx.Rngs(0))
    # A normal distribution cut at two deviations has 0.880 of its deviation.
    for variable in (
        model.tokens.patches.kernel,
        model.tokens.positions.table,
        model.stack.blocks[0].attention.out.kernel,
    ):
        assert float(jnp.std(variable[...])) == pytest.approx(0.88 * 0.02, rel=0.05)
        assert float(jnp.abs(variable[...]).max()) <= 0.04
    assert not model.tokens.mask_token[...].any() and 0 < float(jnp.abs(model.tokens.registers[...]).max()) < 1e-5
    assert (model.stack.blocks[0].attention_scale.scale[...] == 0.5).all()


@pytest.mark.numbers
@pytest.mark.parametrize("pool", POOLS)
def test_classes_are_scored_from_what_is_pooled(pool) -> None:
    model = lively(dataclasses.replace(TINY, pool=pool, registers=2))
    out = run(model, IMAGES)
    first = out.hidden[:, 0]
    mean = out.hidden[:, -12:].mean(1)
    pooled = {"class": first, "mean": mean, "class_and_mean": jnp.concatenate([first, mean], -1)}[pool]
    assert out.hidden.shape == (4, (pool != "mean") + 2 + 12, 32)
    np.testing.assert_allclose(out.pooled, pooled, atol=1e-6)
    np.testing.assert_allclose(out.logits, model.classifier(pooled), atol=1e-5)
    assert out.logits.dtype == jnp.float32 and run(lively(DINO), IMAGES).logits.shape == (4, 4)


def test_images_of_any_size_are_read() -> None:
    for config in (TINY, DINO):
        out = run(lively(config), IMAGES[:, :5, 3:])
        assert jnp.isfinite(out.logits).all()


def test_every_patch_sees_every_other_unless_masked_off() -> None:
    model, changed = lively(), IMAGES.at[:, 0, 0].add(3.0)
    moved_by = jnp.abs(run(model, IMAGES).hidden - run(model, changed).hidden).max(-1)
    assert (moved_by > 1e-4).all()
    hidden = run(model, IMAGES, mask=Mask(causal=True)).hidden
    unseen = jnp.abs(hidden - run(model, changed, mask=Mask(causal=True)).hidden).max(-1)
    assert (unseen[:, 0] == 0).all() and (unseen[:, 1:] > 0).all()


def test_intermediates_end_before_the_last_normalisation() -> None:
    model = lively(DINO)
    out = run(model, IMAGES)
    told = jax.jit(lambda model: model(IMAGES, return_intermediates=True))(model)
    np.testing.assert_allclose(told.hidden, out.hidden, atol=1e-6)
    np.testing.assert_allclose(model.norm(told.intermediates.hidden[-1]), out.hidden, atol=1e-5)
    np.testing.assert_allclose(told.intermediates.hidden[0], model.tokens(IMAGES), atol=1e-6)
    length = out.hidden.shape[1]
    assert told.intermediates.attention.shape == (2, 4, 4, length, length) and out.intermediates is None


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout"])
def test_each_dropout_is_by_key(rate) -> None:
    model = lively(dataclasses.replace(TINY, **{rate: 0.3}))
    key = jax.random.key(3)
    kept, dropped = run(model, IMAGES), run(model, IMAGES, key=key)
    np.testing.assert_array_equal(dropped.logits, run(model, IMAGES, key=key).logits)
    for other in (kept, run(model, IMAGES, key=jax.random.key(4))):
        assert jnp.abs(dropped.logits - other.logits).max() > 1e-3


def test_the_epsilon_is_the_configs() -> None:
    images = IMAGES * 1e-3
    plain, other = (
        run(lively(dataclasses.replace(TINY, norm_epsilon=epsilon)), images).hidden for epsilon in (1e-12, 0.1)
    )
    assert jnp.abs(plain - other).max() > 1e-2


def test_bfloat16_is_close_to_float32() -> None:
    low = lively(dataclasses.replace(DINO, precision=Precision(compute="bfloat16")))
    expected, found = run(lively(DINO), IMAGES), run(low, IMAGES)
    assert found.hidden.dtype == found.pooled.dtype == jnp.bfloat16 and found.logits.dtype == jnp.float32
    for name in ("hidden", "pooled", "logits"):
        a, b = (jnp.asarray(getattr(out, name), jnp.float32) for out in (found, expected))
        assert float(jnp.sqrt(jnp.mean((a - b) ** 2))) < 0.05 * float(b.std()), name


@pytest.mark.numbers
def test_sharded_equals_unsharded_with_dropout_at_another_size() -> None:
    config, images = dataclasses.replace(DINO, dropout=0.1), IMAGES[:, :, :6]

    def loss(model: ViT, images: jax.Array) -> jax.Array:
        logits = model(images, key=jax.random.key(3)).logits
        assert logits is not None
        return -jax.nn.log_softmax(logits)[:, 1].mean()

    expected, gradient = jax.jit(jax.value_and_grad(loss))(lively(config), images)
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    model = sharding.initialize(lambda: moved(config.build(nnx.Rngs(0))), mesh=mesh)
    for variable in (model.stack.blocks[0].feedforward.up.kernel, model.tokens.patches.kernel):
        assert not variable[...].sharding.is_fully_replicated
    with sharding.use(mesh):
        placed = jax.device_put(images, sharding.batch_sharding(mesh))
        value, sharded_gradient = jax.jit(jax.value_and_grad(loss))(model, placed)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(sharded_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def published(form) -> ViTConfig:
    """A config that has that published form."""
    base = TINY if form.model_type == "vit" else DINO
    registers = {"registers": 3 if form.traits["registers"] else 0}
    same = {name: value for name, value in form.traits.items() if name not in ("registers", "layer_scale")}
    return dataclasses.replace(base, **registers, **same)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_configs_come_back(form) -> None:
    config = dataclasses.replace(published(form), problem_type="regression", qkv_bias=False, activation="relu")
    assert ViTConfig.from_published(config.to_published()) == config
    if form.model_type != "vit":
        gated = dataclasses.replace(config, gated=True, mlp_width=48, activation="silu")
        assert gated.to_published()["mlp_ratio"] == 2 and ViTConfig.from_published(gated.to_published()) == gated


@pytest.mark.parametrize("name", ["vit-base-patch16-224-in21k", "dinov2-base", "dinov2-with-registers-giant"])
def test_what_a_config_leaves_out_is_as_published(name) -> None:
    config = models.preset(name)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")
    fields = config.to_published()
    kept = (*names, "architectures", "model_type", "use_swiglu_ffn")
    assert ViTConfig.from_published({name: fields[name] for name in kept if name in fields}) == config


@pytest.mark.parametrize(
    ("form", "fields", "message"),
    [
        (0, {"architectures": ["ViTForMaskedImageModeling"]}, r"architectures \['ViTForMaskedImageModeling'\]"),
        (0, {"architectures": ["Dinov2Model"]}, r"\['Dinov2Model'\], and a vit here is one of ViTModel, ViTForImage"),
        (2, {"architectures": ["Dinov2Backbone"]}, "Dinov2Backbone"),
        (1, {"architectures": None}, "architectures None"),
        (0, {"pooler_act": "relu"}, "pooler_act 'relu'"),
        (0, {"pooler_output_size": 7}, "pooler_output_size 7"),
        (1, {"hidden_act": "mish"}, "hidden_act 'mish'"),
        (1, {"image_size": [8, 8, 8]}, r"image_size \[8, 8, 8\]"),
        (1, {"patch_size": "4"}, "patch_size '4'"),
        (1, {"qkv_bias": "yes"}, "qkv_bias 'yes'"),
        (1, {"id2label": {"1": "a"}}, "id2label"),
        (1, {"problem_type": "ranking"}, "problem_type 'ranking'"),
        (2, {"drop_path_rate": 0.1}, "drop_path_rate 0.1"),
        (3, {"hidden_dropout_prob": 0.1}, "hidden_dropout_prob 0.1"),
        (3, {"image_size": [8, 12]}, r"image_size \[8, 12\], and a DINOv2 here has square images alone"),
        (3, {"mlp_ratio": 2.5}, "mlp_ratio 2.5"),
        (5, {"num_register_tokens": 0}, "num_register_tokens 0"),
    ],
)
def test_a_published_config_that_is_none_of_these_is_refused_by_name(form, fields, message) -> None:
    with pytest.raises(PublishedError, match=message) as refused:
        ViTConfig.from_published(published(FORMS[form]).to_published() | fields)
    assert "\n" not in str(refused.value)


def test_a_distilled_vit_is_refused_by_name() -> None:
    with pytest.raises(
        PublishedError, match=r"^config\.json has model_type 'deit', and published models here are .*vit"
    ):
        models.published_config({"model_type": "deit", "architectures": ["DeiTModel"]})


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            TINY,
            {"pool": "mean"},
            "a ViT with pool 'mean' has no published form; the nearest is ViTForImageClassification",
        ),
        (TINY, {"registers": 2}, "a ViT with registers 2 has no published form"),
        (DINO, {"antialias": False}, "a ViT with registers 3 has no published form; the nearest is Dinov2ForImageCl"),
        (DINO, {"mask_token": False}, "a ViT with mask_token False has no published form"),
        (DINO, {"dropout": 0.1}, "a DINOv2 with dropout 0.1"),
        (DINO, {"image_size": (8, 12)}, r"a DINOv2 with image_size \(8, 12\)"),
        (DINO, {"gated": True}, "a gated DINOv2 with activation 'gelu'"),
        (DINO, {"mlp_width": 50}, "a DINOv2 with mlp_width 50"),
    ],
)
def test_what_has_no_published_form_is_refused_by_name(config, changes, message) -> None:
    with pytest.raises(PublishedError, match=f"^{message}") as refused:
        dataclasses.replace(config, **changes).to_published()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "pooled"}, "head 'pooled' is unknown: choose one of none, pooler, classification"),
        ({"pool": "max"}, "pool 'max' is unknown: choose one of class, mean, class_and_mean"),
        ({"problem_type": "ranking"}, "problem_type 'ranking' is unknown"),
        ({"labels": ()}, r"labels \(\) are none"),
        ({"registers": -1}, "registers -1 is no number of tokens"),
        ({"image_channels": 0}, "image_channels 0 is too small"),
        ({"patch_size": (4, 0)}, "patch_size across 0 is too small"),
        ({"image_size": (8, 1)}, "an image of 8 x 1 pixels is smaller than a patch of 4 x 2"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(changes, message) -> None:
    with pytest.raises(LayerError, match=f"^{message}"):
        dataclasses.replace(TINY, **changes)
