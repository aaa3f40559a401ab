import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo import models, sharding
from zoo.layers.linear import LayerError
from zoo.models.published import PublishedError, SpecialTokens
from zoo.models.t5 import T5, RelativeBias, T5Config, bucket

TINY = T5Config(
    vocab_size=200,
    num_layers=2,
    num_decoder_layers=3,
    width=32,
    num_heads=4,
    head_dim=10,
    mlp_width=48,
    buckets=8,
    max_distance=6,
    activation="gelu_tanh",
    gated=True,
    tied=False,
    scaled=False,
    dropout=0.0,
)
SOURCES = jax.random.randint(jax.random.key(1), (4, 12), 2, 200)
TOKENS = jax.random.randint(jax.random.key(2), (4, 10), 2, 200)
REAL = jnp.arange(12) < jnp.array([12, 7, 1, 9])[:, None]

# Counted with Hugging Face's classes. Those tie every head, so a head of its own is added where the released weights
# have one.
COUNTS = {
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "mt5-small": 172_119_424 + 250_112 * 512,
    "mt5-base": 390_315_264 + 250_112 * 768,
    "mt5-large": 973_466_624 + 250_112 * 1024,
    "mt5-xl": 3_230_390_272 + 250_112 * 2048,
    "mt5-xxl": 11_896_598_528 + 250_112 * 4096,
    "t5-v1_1-small": 60_511_616 + 32_128 * 512,
    "t5-v1_1-base": 222_903_552 + 32_128 * 768,
    "t5-v1_1-large": 750_251_008 + 32_128 * 1024,
    "t5-v1_1-xl": 2_783_959_040 + 32_128 * 2048,
    "t5-v1_1-xxl": 11_003_736_064 + 32_128 * 4096,
}


@functools.cache
def lively(config: T5Config = TINY) -> T5:
    return jax.jit(lambda: moved(config.build(nnx.Rngs(0))))()


def moved(model: T5) -> T5:
    """Norms are not all 1."""
    leaves, structure = jax.tree.flatten(model, is_leaf=sharding.is_variable)
    values = []
    for seed, leaf in enumerate(leaves):
        real = leaf.get_metadata().get("rows", leaf.shape[0])
        noise = 0.1 * jax.random.normal(jax.random.key(seed), leaf.shape).at[real:].set(0)
        values.append(leaf[...] + noise)
    return jax.tree.unflatten(structure, [leaf.replace(x) for leaf, x in zip(leaves, values, strict=True)])


@jax.jit
def logits_of(model: T5, sources: jax.Array, tokens: jax.Array, **arguments: Any) -> jax.Array:
    return model(sources, tokens, **arguments).logits


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_presets_have_the_published_parameters(name, count) -> None:
    assert models.parameter_count(models.preset(name)) == count


def test_flan_t5_is_a_t5_1_1_trained_further() -> None:
    for size in ("small", "base", "large", "xl", "xxl"):
        assert models.preset(f"flan-t5-{size}") == models.preset(f"t5-v1_1-{size}")


def published_bucket(distance: np.ndarray, both_sides: bool, count: int, max_distance: int) -> np.ndarray:
    """Of the key's position less the query's, as Mesh TensorFlow and Hugging Face compute it, in float32."""
    start = 0
    if both_sides:
        count //= 2
        start = np.where(distance > 0, count, 0)
        distance = np.abs(distance)
    else:
        distance = -np.minimum(distance, 0)
    exact = count // 2
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    far = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(count - exact)
    far = np.minimum(exact + far.astype(np.int64), count - 1)
    return start + np.where(distance < exact, distance, far)


@pytest.mark.parametrize(("count", "max_distance"), [(32, 128), (8, 20), (64, 256), (16, 9)])
def test_buckets_are_the_published_ones(count, max_distance) -> None:
    distance = np.arange(-2000, 2001)
    config = dataclasses.replace(TINY, buckets=count, max_distance=max_distance)
    zeros = np.zeros_like(distance)
    for both_sides in (True, False):
        bias = RelativeBias(config, causal=not both_sides, rngs=nnx.Rngs(0))()
        expected = published_bucket(distance, both_sides, count, max_distance)
        assert set(expected) <= set(range(count)) and expected.max() == count - 1
        # A table whose rows are their own numbers says which one was taken.
        table = jnp.arange(count, dtype=jnp.float32)[:, None]
        np.testing.assert_array_equal(bias.function(table, 0, zeros, distance), expected)
    found = bucket(jnp.arange(2001), count, max_distance)
    np.testing.assert_array_equal(found, published_bucket(-np.arange(2001), False, count, max_distance))


def test_flops_are_those_of_kernels_and_scores() -> None:
    model = jax.eval_shape(lambda: TINY.build(nnx.Rngs(0)))
    encoder, decoder = model.encoder.blocks[0], model.decoder.blocks[0]

    def kernels(*modules: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(modules) if leaf.ndim > 2)

    cross = decoder.cross_attention
    flops = 2 * 12 * kernels(encoder) + 2 * 12 * kernels(cross.key, cross.value)
    flops += 2 * 10 * kernels(decoder.attention, decoder.feedforward, cross.query, cross.out) + 2 * 10 * 32 * 200
    # Half of the pairs of a causal mask are hidden, and not counted.
    flops += 4 * 40 * (2 * 12 * 12 + 3 * (10 * 10 / 2 + 10 * 12))
    assert TINY.forward_flops((12, 10)) == flops
    assert TINY.forward_flops((10,)) == TINY.forward_flops((10, 10))


@pytest.mark.numbers
@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY, tied=True, scaled=True, gated=False)])
def test_cached_decoding_equals_one_pass_for_prompts_and_sources_of_any_length(config) -> None:
    model = lively(config)
    expected = logits_of(model, SOURCES, TOKENS, source_segments=REAL)
    lengths = jnp.array([6, 1, 3, 4])
    step = jax.jit(lambda model, tokens, cache: model(None, tokens, cache=cache)[:2])
    cache = jax.jit(lambda model: model.init_cache(model.encode(SOURCES, segments=REAL), 16))(model)
    logits, cache = step(model, TOKENS[:, :6], cache)
    rows, cache = jnp.arange(4), cache.cut(lengths)
    scale = max(1.0, float(jnp.abs(expected).max()))
    np.testing.assert_allclose(logits[rows, lengths - 1], expected[rows, lengths - 1], atol=1e-5 * scale)
    for at in range(4):
        logits, cache = step(model, TOKENS[rows, lengths + at][:, None], cache)
        np.testing.assert_allclose(logits[:, 0], expected[rows, lengths + at], atol=1e-5 * scale)


def test_padding_and_what_comes_later_change_nothing() -> None:
    model = lively()
    expected = logits_of(model, SOURCES, TOKENS, source_segments=REAL)
    scale = 1e-5 * max(1.0, float(jnp.abs(expected).max()))
    noisy = jnp.where(REAL, SOURCES, 5)
    np.testing.assert_allclose(logits_of(model, noisy, TOKENS, source_segments=REAL), expected, atol=scale)
    np.testing.assert_allclose(logits_of(model, SOURCES[1:2, :7], TOKENS[1:2]), expected[1:2], atol=scale)
    later = logits_of(model, SOURCES, TOKENS.at[:, 6:].set(9), source_segments=REAL)
    np.testing.assert_allclose(later[:, :6], expected[:, :6], atol=scale)


def test_dropout_is_by_key() -> None:
    model = lively(dataclasses.replace(TINY, dropout=0.3))
    kept, dropped = logits_of(model, SOURCES, TOKENS), logits_of(model, SOURCES, TOKENS, key=jax.random.key(3))
    np.testing.assert_array_equal(dropped, logits_of(model, SOURCES, TOKENS, key=jax.random.key(3)))
    for other in (kept, logits_of(model, SOURCES, TOKENS, key=jax.random.key(4))):
        assert jnp.abs(dropped - other).max() > 1e-2


def loss(model: T5, sources: jax.Array, tokens: jax.Array) -> jax.Array:
    logits = model(sources, tokens[:, :-1], source_segments=sources > 20, key=jax.random.key(3)).logits
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()


@pytest.mark.numbers
def test_sharded_equals_unsharded_with_dropout() -> None:
    config = dataclasses.replace(TINY, dropout=0.1)
    expected, gradient = jax.jit(jax.value_and_grad(loss))(lively(config), SOURCES, TOKENS)
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    model = sharding.initialize(lambda: moved(config.build(nnx.Rngs(0))), mesh=mesh)
    block = model.decoder.blocks[0]
    for variable in (block.feedforward.gate.kernel, block.cross_attention.key.kernel, model.decoder_bias.table):
        assert not variable[...].sharding.is_fully_replicated
    with sharding.use(mesh):
        placed = jax.device_put((SOURCES, TOKENS), sharding.batch_sharding(mesh))
        value, sharded_gradient = jax.jit(jax.value_and_grad(loss))(model, *placed)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(sharded_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_long_texts_hold_no_scores_of_all_pairs() -> None:
    config = dataclasses.replace(TINY, num_layers=1, num_decoder_layers=1, num_heads=2)
    model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))

    def temporaries(length: int) -> int:
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        run = jax.jit(lambda model, tokens: model.features(tokens, sources=tokens).hidden)
        return run.lower(model, tokens).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(2048), temporaries(4096)
    assert long < 2.5 * short and long < 4096 * 4096


@pytest.mark.parametrize("name", ["t5-small", "t5-11b", "t5-v1_1-xl", "flan-t5-base", "mt5-small"])
def test_configs_come_back(name) -> None:
    config = models.preset(name)
    names = ["shared.weight"] if config.tied else ["shared.weight", "lm_head.weight"]
    found = models.published_config(config.to_published()).with_tensors(names)
    assert found == dataclasses.replace(config, num_decoder_layers=config.num_layers)


def test_no_field_is_taken_for_its_default() -> None:
    special = SpecialTokens(eos=(5,), pad=3, start=4)
    config = dataclasses.replace(TINY, norm_epsilon=1e-5, dropout=0.25, activation="relu", special_tokens=special)
    fields = config.to_published()
    assert (fields["layer_norm_epsilon"], fields["dropout_rate"], fields["feed_forward_proj"]) == (
        1e-5,
        0.25,
        "gated-relu",
    )
    assert models.published_config(fields).with_tensors({"lm_head.weight"}) == config
    model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
    blocks = (model.encoder.blocks[0], model.decoder.blocks[0])
    norms = [model.encoder_norm, model.decoder_norm, blocks[1].cross_norm]
    norms += [norm for block in blocks for norm in (block.attention_norm, block.feedforward_norm)]
    assert {norm.epsilon for norm in norms} == {1e-5}


PUBLISHED = {name: models.preset(name).to_published() for name in ("t5-small", "t5-v1_1-small", "mt5-small")}


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("t5-small", {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj 'gated-tanh', which is none of"),
        ("t5-small", {"feed_forward_proj": "relu-gated"}, "feed_forward_proj 'relu-gated', which is none of"),
        (
            "t5-v1_1-small",
            {"dense_act_fn": "gelu"},
            "dense_act_fn 'gelu', and a T5 with feed_forward_proj 'gated-gelu'",
        ),
        ("t5-small", {"model_type": "umt5", "architectures": ["UMT5ForConditionalGeneration"]}, "model_type 'umt5'"),
        ("t5-small", {"model_type": "longt5"}, "model_type 'longt5'"),
        ("t5-small", {"model_type": "switch_transformers"}, "model_type 'switch_transformers'"),
        ("t5-small", {"architectures": ["T5Stack"]}, r"architectures \['T5Stack'\], and a T5 here is one of T5ForCond"),
        ("t5-small", {"architectures": ["T5ForQuestionAnswering"], "num_labels": 3}, "3 labels, and a T5 that answers"),
        ("t5-small", {"architectures": ["T5ForTokenClassification"], "id2label": {"1": "a"}}, "id2label"),
        ("mt5-small", {"architectures": ["T5ForConditionalGeneration"]}, "MT5ForConditionalGeneration"),
        ("t5-small", {"is_decoder": True}, "is_decoder True"),
        ("t5-small", {"is_encoder_decoder": False}, "is_encoder_decoder False"),
        ("t5-small", {"d_model": None}, "d_model None"),
        ("t5-small", {"scale_decoder_outputs": 1}, "scale_decoder_outputs 1"),
        ("t5-small", {"decoder_start_token_id": "0"}, "special token '0'"),
    ],
)
def test_a_published_config_that_is_none_of_these_is_refused_by_name(name, fields, message) -> None:
    with pytest.raises(PublishedError, match=message) as refused:
        models.published_config(PUBLISHED[name] | fields)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("number", [6, 2, 30])
def test_published_buckets_that_do_not_fit_are_refused_by_name(number) -> None:
    with pytest.raises(LayerError, match=f"buckets {number} are no multiple of 4"):
        models.published_config(PUBLISHED["t5-small"] | {"relative_attention_num_buckets": number})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "gelu"}, "activation 'gelu' with gated: published T5s call 'gelu_tanh' by that name"),
        ({"model_type": "mt5", "scaled": True}, "scaled True: a published mT5"),
    ],
)
def test_a_model_that_no_published_class_is_has_no_config_of_one(changes, message) -> None:
    with pytest.raises(PublishedError, match=message):
        dataclasses.replace(TINY, **changes).to_published()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"buckets": 6}, "buckets 6 are no multiple of 4"),
        ({"buckets": 0}, "buckets 0 are no multiple of 4"),
        ({"max_distance": 4}, "max_distance 4 is within the exact buckets: choose one above 4"),
        ({"num_decoder_layers": 0}, "num_decoder_layers 0 is too small"),
        ({"head_dim": 0}, "head_dim 0 is too small"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(changes, message) -> None:
    with pytest.raises(LayerError, match=message):
        dataclasses.replace(TINY, **changes)
