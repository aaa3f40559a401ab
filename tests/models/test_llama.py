import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo import models, sharding
from zoo.generation import generate
from zoo.layers.linear import LayerError
from zoo.layers.positions import DynamicScaling, LinearScaling, Llama3Scaling, SequenceError, YarnScaling
from zoo.models import published_config
from zoo.models.llama import Llama, LlamaConfig
from zoo.models.published import PublishedError
from zoo.train.objectives import NextToken

TINY = LlamaConfig(
    vocab_size=200,
    max_length=64,
    num_layers=4,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
    mlp_width=24,
    windows=(None, 5),
    rope_theta=500.0,
    rope_scaling=Llama3Scaling(4.0, original_length=16),
    qkv_bias=True,
    qk_norm=True,
)
TOKENS = jax.random.randint(jax.random.key(1), (4, 16), 0, 200)

# What the released weights hold.
COUNTS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}


@functools.cache
def lively(config: LlamaConfig = TINY) -> Llama:
    """A model whose logits vary: six times the usual weights, and vectors that are not all 0 or 1."""
    return jax.jit(lambda: moved(config.build(nnx.Rngs(0))))()


def moved(model: Llama) -> Llama:
    leaves, structure = jax.tree.flatten(model, is_leaf=sharding.is_variable)
    values = [
        6 * leaf[...]
        if sharding.decays(sharding.logical_axes(leaf))
        else leaf[...] + 0.1 * jax.random.normal(jax.random.key(seed), leaf.shape)
        for seed, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, [leaf.replace(x) for leaf, x in zip(leaves, values, strict=True)])


@jax.jit
def logits_of(model: Llama, tokens: jax.Array) -> jax.Array:
    return model(tokens).logits


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_presets_have_the_published_parameters(name, count) -> None:
    assert models.parameter_count(models.preset(name)) == count


def test_a_tied_head_is_no_second_table() -> None:
    tied = dataclasses.replace(TINY, tied=True)
    assert models.parameter_count(TINY) - models.parameter_count(tied) == 200 * 32
    model = lively()
    assert model.head().vocabulary == 200 and model.head().kernel.shape == (32, 256)
    np.testing.assert_array_equal(model.head().kernel, model.unembed.table[...].T)
    assert np.abs(model.unembed.table[...] - model.embed.table[...]).max() > 0.1


def test_flops_are_the_published_convention() -> None:
    config = LlamaConfig(
        vocab_size=11, num_layers=6, width=8, num_heads=6, num_kv_heads=2, head_dim=4, mlp_width=20, windows=(None, 3)
    )
    weights = 2 * 8 * 24 + 2 * 8 * 8 + 3 * 8 * 20
    dense, banded = 10 * 10 / 2, 10 * 3 - 3 * 3 / 2
    expected = 2 * 10 * 8 * 11 + 6 * 2 * 10 * weights + 3 * 4 * 24 * (dense + banded)
    assert config.forward_flops((10,)) == expected


@pytest.mark.numbers
def test_cached_decoding_equals_the_full_pass_in_rows_of_any_length() -> None:
    model = lively()
    expected = logits_of(model, TOKENS)
    assert expected.shape == (4, 16, 200) and expected.dtype == jnp.float32 and float(expected.std()) > 0.5
    lengths = jnp.array([3, 9, 1, 6])
    run = jax.jit(lambda model, tokens, cache: model(tokens, cache=cache))
    logits, cache, *_ = run(
        model, jnp.where(jnp.arange(9) < lengths[:, None], TOKENS[:, :9], 0), model.init_cache(4, 32)
    )
    for row, length in enumerate(lengths.tolist()):
        np.testing.assert_allclose(logits[row, :length], expected[row, :length], atol=1e-5)
    cache = cache.cut(lengths)
    for step in range(7):
        place = (lengths + step)[:, None]
        logits, cache, *_ = run(model, jnp.take_along_axis(TOKENS, place, axis=1), cache)
        np.testing.assert_allclose(
            logits[:, 0], jnp.take_along_axis(expected, place[..., None], axis=1)[:, 0], atol=1e-5
        )


def test_generation_takes_the_likeliest_token_of_the_full_pass_beyond_a_window() -> None:
    model = lively()
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
    for prompt, made in zip(prompts, generate(model, prompts, max_new_tokens=25, stop_tokens=()).tokens, strict=True):
        assert len(made) == 25 and len(set(made)) > 5
        whole = jnp.array([prompt + made + [0] * (32 - len(prompt) - 25)])
        assert np.asarray(logits_of(model, whole))[0, len(prompt) - 1 :].argmax(-1)[:25].tolist() == made


def batch_of(tokens: jax.Array, segments: jax.Array, positions: jax.Array) -> dict[str, jax.Array]:
    ones = jnp.ones(tokens.shape)
    targets = jnp.roll(tokens, -1, axis=1)
    return {
        "tokens": tokens,
        "targets": targets,
        "segments": segments,
        "positions": positions,
        "weights": ones,
        "bytes": ones,
    }


def test_packed_documents_are_trained_on_as_if_alone() -> None:
    lengths = (5, 8, 3)
    segments = jnp.repeat(jnp.arange(1, 4), jnp.array(lengths), total_repeat_length=16)[None]
    positions = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
    batch, model = batch_of(TOKENS[:1], segments, positions), lively()
    loss = jax.jit(lambda model: NextToken().loss(model, batch, None).total)(model)
    start, total = 0, 0.0
    for n in lengths:
        logits = logits_of(model, jnp.pad(TOKENS[:1, start : start + n], ((0, 0), (0, 16 - n))))[0, :n]
        targets = batch["targets"][0, start : start + n, None]
        total -= jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1).sum()
        start += n
    np.testing.assert_allclose(loss, total, rtol=1e-5)


def loss(model: Llama, tokens: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return NextToken().loss(model, batch_of(tokens, jnp.ones_like(tokens), positions), jax.random.key(3)).total


@pytest.mark.numbers
def test_sharded_equals_unsharded() -> None:
    tokens, mesh = jnp.tile(TOKENS, (2, 1)), sharding.make_mesh("data=2,fsdp=2,tensor=2")
    expected, gradient = jax.jit(jax.value_and_grad(loss))(lively(), tokens)
    model = sharding.initialize(lambda: moved(TINY.build(nnx.Rngs(0))), mesh=mesh)
    assert not model.unembed.table[...].sharding.is_fully_replicated
    with sharding.use(mesh):
        placed = jax.device_put(tokens, sharding.batch_sharding(mesh))
        value, sharded_gradient = jax.jit(jax.value_and_grad(loss))(model, placed)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(sharded_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * float(jnp.abs(b).max()))


def explicit(config: LlamaConfig) -> LlamaConfig:
    """The config, without what None stands for."""
    return dataclasses.replace(config, head_dim=config.head_size, num_kv_heads=config.kv_heads)


@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_is_what_its_published_config_says(name) -> None:
    config = models.preset(name)
    assert explicit(published_config(config.to_published())) == explicit(config)


def fields(name: str, **changes: Any) -> dict[str, Any]:
    return models.preset(name).to_published() | changes


def older(name: str, **changes: Any) -> dict[str, Any]:
    """As transformers 4 wrote them."""
    found = fields(name, **changes)
    return {field: value for field, value in found.items() if field not in ("rope_parameters", "layer_types")}


def test_older_configs_say_the_same() -> None:
    def read(name: str, **changes: Any) -> LlamaConfig:
        return explicit(published_config(older(name, **changes)))

    llama3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 8192
    assert read("llama-3.1-8b", rope_theta=5e5, rope_scaling=llama3) == explicit(models.preset("llama-3.1-8b"))
    assert read("llama-2-7b", rope_scaling={"rope_type": "linear", "factor": 2}).rope_scaling == LinearScaling(2)
    assert read("llama-2-7b", rope_scaling={"type": "dynamic", "factor": 2}).rope_scaling == DynamicScaling(2)
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert read("qwen2.5-7b", rope_theta=1e6, rope_scaling=yarn).rope_scaling == YarnScaling(4.0, original_length=32768)
    assert read("qwen3-8b", rope_theta=1e6, rope_scaling=None) == explicit(models.preset("qwen3-8b"))
    # Qwen 2's window is there where it is used alone, from max_window_layers on.
    qwen = {"rope_theta": 1e6, "sliding_window": 9, "max_window_layers": 28}
    assert read("qwen2.5-7b", **qwen) == explicit(models.preset("qwen2.5-7b"))
    qwen["use_sliding_window"] = True
    assert read("qwen2.5-7b", **qwen).windows == (None,)
    assert read("qwen2.5-7b", **qwen | {"max_window_layers": 0}).windows == (9,)
    qwen |= {"num_hidden_layers": 3, "max_window_layers": 2}
    assert read("qwen2.5-7b", **qwen).windows == (None, None, 9)


SWITCHED = {"use_sliding_window": True, "sliding_window": 5}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (fields("llama-2-7b", model_type="gemma"), "model_type 'gemma'"),
        (
            fields("llama-2-7b", architectures=["LlamaForQuestionAnswering"]),
            r"\['LlamaForQuestionAnswering'\], and a Llama",
        ),
        (fields("llama-2-7b", mlp_bias=True), "mlp_bias True"),
        (fields("llama-2-7b", attention_bias=1), "attention_bias 1"),
        (fields("llama-2-7b", hidden_act="mish"), "hidden_act 'mish'"),
        (fields("llama-2-7b", quantization_config={"quant_method": "gptq"}), "quantization_config"),
        (fields("llama-2-7b", num_key_value_heads=0), "num_key_value_heads 0"),
        (fields("llama-2-7b", head_dim=127), "head_dim 127 is odd"),
        (fields("llama-2-7b", partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
        (fields("llama-2-7b", rope_parameters={"rope_type": "longrope"}), "rope_parameters of type 'longrope'"),
        (fields("llama-2-7b", rope_scaling={"type": "su", "factor": 2.0}), "rope_scaling of type 'su'"),
        (fields("llama-2-7b", rope_parameters={"rope_type": "yarn"}), "factor None"),
        (fields("llama-2-7b", rope_parameters={"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}), "mscale 1.0"),
        (fields("llama-2-7b", rope_parameters={"rope_type": "yarn", "factor": 4.0, "beta_slow": 40}), "fast 32.0 is"),
        (fields("llama-2-7b", rope_parameters={"rope_type": "dynamic", "factor": 0.0}), "factor 0.0"),
        (fields("llama-2-7b", rope_parameters={"rope_type": ["linear"]}), r"of type \['linear'\]"),
        (fields("llama-2-7b", rope_parameters={"rope_type": "linear"}), "factor None"),
        (fields("llama-2-7b", rope_parameters={"rope_theta": 0}), "rope_theta 0"),
        (fields("llama-2-7b", rope_parameters={"mrope_section": [1]}), r"mrope_section \[1\]"),
        (fields("llama-2-7b", rope_parameters="default"), "rope_parameters 'default'"),
        (fields("mistral-7b-v0.1", sliding_window="4096"), "sliding_window '4096'"),
        (fields("mistral-7b-v0.1", layer_types=["full_attention"] * 32), "layer_types"),
        (older("qwen2.5-7b", **SWITCHED, max_window_layers=20), "max_window_layers 20"),
        (fields("qwen2.5-7b", layer_types=["full_attention"] * 27), "num_hidden_layers 28"),
        (fields("qwen2.5-7b", layer_types=["chunked_attention"] * 28), "chunked_attention"),
        (fields("qwen3-8b", layer_types=["sliding_attention"] * 36), "it names no window"),
        (
            fields("qwen3-8b", **SWITCHED, layer_types=["full_attention"] * 35 + ["sliding_attention"]),
            "repeat a period of at most 8",
        ),
    ],
)
def test_a_config_that_no_llama_can_be_is_refused_by_name(config, message) -> None:
    with pytest.raises((PublishedError, LayerError), match=message) as refused:
        published_config(config)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama-2-7b", {"windows": (64,)}, "windows (64,): Llama's published layout has (None,) alone"),
        ("llama-2-7b", {"qk_norm": True}, "qk_norm True: Llama's published layout has False alone"),
        ("llama-2-7b", {"qkv_bias": True}, "out_bias False: Llama's published layout has True alone"),
        ("llama-2-7b", {"num_heads": 24, "head_dim": 128}, "width 4096: Llama's published layout has multiples of "
         "num_heads 24 alone"),
        ("mistral-7b-v0.1", {"windows": (64, None)}, "windows (64, None): Mistral's published layout has (64, 64) "
         "alone"),
        ("qwen2.5-7b", {"qkv_bias": False}, "qkv_bias False: Qwen2's published layout has True alone"),
        ("qwen3-8b", {"windows": (64, 32)}, "windows (64, 32): Qwen3's published layout has one width in all layers"),
    ],
)  # fmt: skip
def test_what_has_no_published_form_is_refused(name, changes, message) -> None:
    with pytest.raises(PublishedError, match=f"^{re.escape(message)}$"):
        dataclasses.replace(models.preset(name), **changes).to_published()


def test_what_cannot_be_built_is_refused_in_one_line() -> None:
    for changes, message in (
        ({"mlp_width": 0}, "mlp_width 0 is too small"),
        ({"windows": ()}, r"windows \(\) is no period"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"published": "llama4"}, "published 'llama4' is unknown"),
    ):
        with pytest.raises(LayerError, match=f"^{message}"):
            dataclasses.replace(TINY, **changes)
    model = jax.eval_shape(lambda: TINY.build(nnx.Rngs(0)))
    with pytest.raises(SequenceError, match=r"^a sequence of 65 tokens exceeds the model's max_length 64: cut it.*$"):
        model(jnp.zeros((1, 65), jnp.int32))
    with pytest.raises(SequenceError, match=r"^segments given with a cache"):
        model(TOKENS, segments=jnp.ones_like(TOKENS), cache=model.init_cache(4, 16))
