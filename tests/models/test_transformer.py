import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo import models, sharding
from zoo.beam_search import beam_search
from zoo.generation import GenerationError, generate
from zoo.kernels import linear_cross_entropy
from zoo.layers.linear import LayerError, Precision
from zoo.layers.positions import SequenceError
from zoo.models.encoder_decoder import Encoded
from zoo.models.published import PublishedError, SpecialTokens
from zoo.models.transformer import POSITIONS, Transformer, TransformerConfig

TINY = TransformerConfig(
    vocab_size=200,
    max_length=32,
    num_layers=2,
    num_decoder_layers=3,
    width=32,
    num_heads=4,
    num_decoder_heads=2,
    mlp_width=48,
    decoder_mlp_width=40,
    logits_bias=True,
    dropout=0.0,
    special_tokens=SpecialTokens(eos=(2,), pad=0, start=1),
)
SOURCES = jax.random.randint(jax.random.key(1), (4, 12), 3, 200)
TOKENS = jax.random.randint(jax.random.key(2), (4, 10), 3, 200)
REAL = jnp.arange(12) < jnp.array([12, 7, 1, 9])[:, None]


@functools.cache
def lively(config: TransformerConfig = TINY) -> Transformer:
    return jax.jit(lambda: moved(config.build(nnx.Rngs(0))))()


def moved(model: Transformer) -> Transformer:
    """Vectors are not all 0 or 1, but for what pads."""
    leaves, structure = jax.tree.flatten(model, is_leaf=sharding.is_variable)
    values = []
    for seed, leaf in enumerate(leaves):
        real = leaf.get_metadata().get("rows", leaf.shape[0])
        noise = 0.1 * jax.random.normal(jax.random.key(seed), leaf.shape).at[real:].set(0)
        values.append(leaf[...] + noise)
    return jax.tree.unflatten(structure, [leaf.replace(x) for leaf, x in zip(leaves, values, strict=True)])


@jax.jit
def logits_of(model: Transformer, sources: jax.Array, tokens: jax.Array, **arguments: Any) -> jax.Array:
    return model(sources, tokens, **arguments).logits


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # Table 3 of the paper has 65 and 213 million, and says neither what it rounds nor what its vocabulary is.
        ("transformer-base", 63_045_632),
        ("transformer-big", 214_171_648),
        # Counted with Hugging Face's classes, the bias of logits included, and Marian's constants left out.
        ("opus-mt-en-de", 73_886_208 + 58_101),
        ("bart-base", 139_420_416 + 50_265),
        ("bart-large", 406_291_456 + 50_265),
    ],
)
def test_the_published_parameters(name, count) -> None:
    assert models.parameter_count(models.preset(name)) == count


def test_flops_are_those_of_kernels_and_scores() -> None:
    model = jax.eval_shape(lambda: TINY.build(nnx.Rngs(0)))
    encoder, decoder = model.encoder.blocks[0], model.decoder.blocks[0]

    def kernels(*modules: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(modules) if leaf.ndim > 2)

    cross = decoder.cross_attention
    flops = 2 * 12 * kernels(encoder) + 2 * 12 * kernels(cross.key, cross.value)
    flops += 2 * 10 * kernels(decoder.attention, decoder.feedforward, cross.query, cross.out) + 2 * 10 * 32 * 200
    flops += 4 * 32 * (2 * 12 * 12 + 3 * (10 * 10 // 2 + 10 * 12))
    assert TINY.forward_flops((12, 10)) == flops
    assert TINY.forward_flops((10,)) == TINY.forward_flops((10, 10))


def test_the_two_orders_of_sinusoids_are_one_model_with_its_features_in_another_order() -> None:
    model = lively()
    order = np.concatenate([np.arange(0, 32, 2), np.arange(1, 32, 2)])

    def reordered(path: Any, leaf: nnx.Variable) -> nnx.Variable:
        value = leaf[...]
        for axis, name in enumerate(sharding.logical_axes(leaf)):
            value = jnp.take(value, order, axis) if name in ("embed", "norm") else value
        return leaf.replace(value)

    halves = lively(dataclasses.replace(TINY, positions="halves"))
    leaves = jax.tree_util.tree_map_with_path(reordered, model, is_leaf=sharding.is_variable)
    values = jax.tree.leaves(leaves, is_leaf=sharding.is_variable)
    structure = jax.tree.structure(halves, is_leaf=sharding.is_variable)
    halves = jax.tree.unflatten(structure, values)
    np.testing.assert_allclose(logits_of(halves, SOURCES, TOKENS), logits_of(model, SOURCES, TOKENS), atol=1e-4)


def test_sinusoids_go_on_for_ever() -> None:
    model = dataclasses.replace(TINY, max_length=None).build(nnx.Rngs(0))
    assert jnp.isfinite(model(jnp.tile(SOURCES, 4), jnp.tile(TOKENS, 5)).logits).all()
    assert len(generate(model, sources=[[5] * 40], max_new_tokens=40, stop_tokens=()).tokens[0]) == 40


def test_padding_and_what_comes_later_change_nothing() -> None:
    model = lively()
    expected = logits_of(model, SOURCES, TOKENS, source_segments=REAL)
    noisy = jnp.where(REAL, SOURCES, 5)
    np.testing.assert_allclose(logits_of(model, noisy, TOKENS, source_segments=REAL), expected, atol=1e-5)
    np.testing.assert_allclose(logits_of(model, SOURCES[1:2, :7], TOKENS[1:2]), expected[1:2], atol=1e-5)
    np.testing.assert_allclose(
        logits_of(model, SOURCES, TOKENS.at[:, 6:].set(9), source_segments=REAL)[:, :6], expected[:, :6], atol=1e-5
    )


def test_packed_texts_see_their_own_source_alone() -> None:
    model = lively()
    packed = model(
        jnp.concatenate([SOURCES[:1, :5], SOURCES[1:2, :7]], 1),
        jnp.concatenate([TOKENS[:1, :6], TOKENS[1:2, :3]], 1),
        source_segments=jnp.repeat(jnp.array([1, 2]), jnp.array([5, 7]))[None],
        segments=jnp.repeat(jnp.array([1, 2]), jnp.array([6, 3]))[None],
    ).logits
    np.testing.assert_allclose(packed[:, :6], logits_of(model, SOURCES[:1, :5], TOKENS[:1, :6]), atol=1e-5)
    np.testing.assert_allclose(packed[:, 6:], logits_of(model, SOURCES[1:2, :7], TOKENS[1:2, :3]), atol=1e-5)


@pytest.mark.numbers
@pytest.mark.parametrize("positions", POSITIONS)
def test_cached_decoding_equals_one_pass_for_prompts_and_sources_of_any_length(positions) -> None:
    model = lively(dataclasses.replace(TINY, positions=positions))
    expected = logits_of(model, SOURCES, TOKENS, source_segments=REAL)
    lengths = jnp.array([6, 1, 3, 4])
    step = jax.jit(lambda model, tokens, cache: model(None, tokens, cache=cache)[:2])
    cache = jax.jit(lambda model: model.init_cache(model.encode(SOURCES, segments=REAL), 16))(model)
    logits, cache = step(model, TOKENS[:, :6], cache)
    rows, cache = jnp.arange(4), cache.cut(lengths)
    np.testing.assert_allclose(logits[rows, lengths - 1], expected[rows, lengths - 1], atol=1e-5)
    for at in range(4):
        logits, cache = step(model, TOKENS[rows, lengths + at][:, None], cache)
        np.testing.assert_allclose(logits[:, 0], expected[rows, lengths + at], atol=1e-5)


def test_rows_of_one_source_share_its_keys() -> None:
    model = lively()
    cache = model.init_cache(model.encode(SOURCES, segments=REAL), 16)
    _, cache, *_ = model(None, TOKENS[:, :3], cache=cache)
    beams = cache.repeated(3)
    assert beams.source is cache.source and beams.own.keys.shape[1] == 12
    tokens = jax.random.randint(jax.random.key(5), (12, 2), 3, 200)
    out = model(None, tokens, cache=beams, return_intermediates=True)
    order = jnp.array([2, 2, 0, 3, 4, 5, 8, 7, 6, 10, 11, 10])
    swapped = out.cache.rows(order)
    assert swapped.source is cache.source
    last = model(None, tokens[:, :1], cache=swapped).logits[:, 0]
    whole = jnp.concatenate([jnp.repeat(TOKENS[:, :3], 3, 0), tokens], 1)
    sources, real = jnp.repeat(SOURCES, 3, 0), jnp.repeat(REAL, 3, 0)
    found = model(sources, whole, source_segments=real, return_intermediates=True)
    np.testing.assert_allclose(out.logits, found.logits[:, 3:], atol=1e-5)
    np.testing.assert_allclose(
        out.intermediates.cross_attention, found.intermediates.cross_attention[..., 3:, :], atol=1e-5
    )
    grown = jnp.concatenate([whole[order], tokens[:, :1]], 1)
    np.testing.assert_allclose(last, logits_of(model, sources, grown, source_segments=real)[:, -1], atol=1e-5)


def test_logits_are_those_of_head_and_hidden() -> None:
    model = lively()
    hidden, head = model.hidden(SOURCES, TOKENS), model.head()
    logits = model(SOURCES, TOKENS).logits
    assert logits.shape == (4, 10, 200) and logits.dtype == jnp.float32
    np.testing.assert_allclose(hidden @ head.kernel[:, :200] + head.bias[:200], logits, atol=1e-4)
    assert np.isneginf(model.logits(hidden)[..., 200:]).all()


@pytest.mark.numbers
@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "mlp_dropout"])
def test_each_dropout_is_by_key(rate) -> None:
    model = lively(dataclasses.replace(TINY, **{rate: 0.3}))
    kept, dropped = logits_of(model, SOURCES, TOKENS), logits_of(model, SOURCES, TOKENS, key=jax.random.key(3))
    np.testing.assert_array_equal(dropped, logits_of(model, SOURCES, TOKENS, key=jax.random.key(3)))
    for other in (kept, logits_of(model, SOURCES, TOKENS, key=jax.random.key(4))):
        assert jnp.abs(dropped - other).max() > 1e-2


def test_bfloat16_is_close_to_float32() -> None:
    low = lively(dataclasses.replace(TINY, precision=Precision(compute="bfloat16")))
    expected, found = logits_of(lively(), SOURCES, TOKENS), low(SOURCES, TOKENS)
    assert found.encoded.hidden.dtype == jnp.bfloat16 and found.logits.dtype == jnp.float32
    assert float(jnp.sqrt(jnp.mean((found.logits - expected) ** 2))) < 0.03 * float(expected.std())


DROPPING = dataclasses.replace(TINY, positions="learned", embed_norm=True, attention_bias=True, dropout=0.1)


def loss_of_logits(model: Transformer, sources: jax.Array, tokens: jax.Array) -> jax.Array:
    logits = model(sources, tokens[:, :-1], source_segments=sources > 20, key=jax.random.key(3)).logits
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()


def loss_of_hidden(model: Transformer, sources: jax.Array, tokens: jax.Array) -> jax.Array:
    """The same, without the logits of all words being held."""
    hidden = model.hidden(sources, tokens[:, :-1], source_segments=sources > 20, key=jax.random.key(3))
    head, weights = model.head(), jnp.full(hidden.shape[:2], 1 / hidden[..., 0].size)
    total, _ = linear_cross_entropy(
        hidden, head.kernel, tokens[:, 1:], weights, bias=head.bias, vocabulary=head.vocabulary, chunk=5
    )
    return total


@pytest.fixture(scope="module")
def unsharded() -> tuple[jax.Array, Transformer]:
    return jax.jit(jax.value_and_grad(loss_of_logits))(lively(DROPPING), SOURCES, TOKENS)


@pytest.mark.numbers
@pytest.mark.parametrize("loss", [loss_of_logits, loss_of_hidden])
def test_sharded_equals_unsharded_with_dropout(loss, unsharded) -> None:
    expected, gradient = unsharded
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    model = sharding.initialize(lambda: moved(DROPPING.build(nnx.Rngs(0))), mesh=mesh)
    for variable in (model.encoder.blocks[0].feedforward.up.kernel, model.words.bias, model.embed.table):
        assert not variable[...].sharding.is_fully_replicated
    with sharding.use(mesh):
        placed = jax.device_put((SOURCES, TOKENS), sharding.batch_sharding(mesh))
        value, sharded_gradient = jax.jit(jax.value_and_grad(loss))(model, *placed)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(sharded_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.numbers
def test_beams_are_the_same_on_a_mesh() -> None:
    sources = [row[:n].tolist() for row, n in zip(SOURCES, (12, 7, 1, 9), strict=True)]
    expected = beam_search(lively(), sources=sources, num_beams=3, max_new_tokens=5)
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    model = sharding.initialize(lambda: moved(TINY.build(nnx.Rngs(0))), mesh=mesh)
    with sharding.use(mesh):
        found = beam_search(model, sources=sources, num_beams=3, max_new_tokens=5)
    assert found.tokens == expected.tokens
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


RULED = dataclasses.replace(TINY, special_tokens=SpecialTokens(eos=(2,), pad=0, start=1, first=7, last=2, banned=(9,)))


@pytest.mark.numbers
def test_tokens_are_forced_and_banned() -> None:
    model, sources = lively(RULED), SOURCES[:2].tolist()
    drawn = generate(model, sources=sources, max_new_tokens=6, temperature=5.0, key=jax.random.key(0))
    assert all(row[0] == 7 and len(row) < 6 and 9 not in row for row in drawn.tokens) and all(drawn.stopped)
    # A prompt says what the decoder begins with, and no token is forced behind it.
    free = lively(dataclasses.replace(RULED, special_tokens=dataclasses.replace(RULED.special_tokens, first=None)))
    prompted = generate(model, [[1], [1]], sources=sources, max_new_tokens=6)
    assert prompted.tokens == generate(free, sources=sources, max_new_tokens=6).tokens
    assert [row[0] for row in prompted.tokens] != [7, 7]
    # Room for one token is room for the last alone, so that there is but one text.
    assert beam_search(model, sources=sources, num_beams=2, max_new_tokens=1) == ([[[]], [[]]], [[0.0], [0.0]])


def test_a_model_with_two_vocabularies_says_which_one_a_token_is_outside_of() -> None:
    model = dataclasses.replace(TINY, source_vocab_size=250, tied=False).build(nnx.Rngs(0))
    assert len(generate(model, sources=[[249]], max_new_tokens=2, stop_tokens=()).tokens[0]) == 2
    with pytest.raises(GenerationError, match="source 0 has token 250: the vocabulary is 0 to 249"):
        generate(model, sources=[[250]])
    with pytest.raises(GenerationError, match="prompt 0 has token 249: the vocabulary is 0 to 199"):
        generate(model, [[249]], sources=[[249]], max_new_tokens=2)


PRESETS = ("opus-mt-en-de", "bart-base", "bart-large")


@pytest.mark.parametrize("name", PRESETS)
def test_configs_come_back(name) -> None:
    config = models.preset(name)
    found = TransformerConfig.from_published(config.to_published())
    sizes = {"num_decoder_layers": config.num_layers, "num_decoder_heads": config.num_heads}
    assert found == dataclasses.replace(config, decoder_mlp_width=config.mlp_width, **sizes)


PUBLISHED = {name: models.preset(name).to_published() for name in PRESETS}


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("bart-base", {"model_type": "mbart"}, "model_type 'mbart'"),
        ("bart-base", {"model_type": "pegasus"}, "model_type 'pegasus'"),
        ("bart-base", {"model_type": "blenderbot"}, "model_type 'blenderbot'"),
        ("bart-base", {"architectures": ["BartForQuestionAnswering"], "num_labels": 3}, "3 labels, and a BART that"),
        ("bart-base", {"architectures": ["BartForSequenceClassification"], "problem_type": "?"}, "problem_type '?'"),
        ("bart-base", {"architectures": ["BartForCausalLM"]}, "BART here is one of BartForConditionalGeneration, Bar"),
        ("bart-base", {"normalize_before": True}, "normalize_before True"),
        ("bart-base", {"normalize_embedding": False}, "normalize_embedding False"),
        ("bart-base", {"static_position_embeddings": True}, "static_position_embeddings True"),
        ("bart-base", {"add_final_layer_norm": True}, "add_final_layer_norm True"),
        ("bart-base", {"tie_word_embeddings": False}, "tie_word_embeddings False"),
        ("bart-base", {"encoder_layerdrop": 0.1}, "encoder_layerdrop 0.1"),
        ("bart-base", {"activation_function": "tanh"}, "activation_function 'tanh'"),
        ("bart-base", {"d_model": None}, "d_model None"),
        ("bart-base", {"scale_embedding": 1}, "scale_embedding 1"),
        ("opus-mt-en-de", {"architectures": ["MarianModel"]}, r"architectures \['MarianModel'\]"),
        ("opus-mt-en-de", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings False"),
        ("opus-mt-en-de", {"decoder_vocab_size": 99}, "decoder_vocab_size 99, and a Marian with vocab_size 58101"),
        ("opus-mt-en-de", {"normalize_embedding": True}, "normalize_embedding True"),
        ("opus-mt-en-de", {"bad_words_ids": [[1, 2]]}, r"bad_words_ids \[\[1, 2\]\]"),
        ("opus-mt-en-de", {"bad_words_ids": 5}, "bad_words_ids 5"),
        ("opus-mt-en-de", {"forced_eos_token_id": [0, 1]}, r"special token \[0, 1\]"),
        ("opus-mt-en-de", {"is_decoder": True}, "is_decoder True"),
    ],
)
def test_a_published_config_that_is_none_of_these_is_refused_by_name(name, fields, message) -> None:
    with pytest.raises(PublishedError, match=message) as refused:
        models.published_config(PUBLISHED[name] | fields)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("transformer-base", {}, "model_type 'transformer' has no published form: marian, bart have"),
        ("opus-mt-en-de", {"positions": "interleaved"}, "positions 'interleaved': a published marian has 'halves'"),
        ("opus-mt-en-de", {"final_norm": True}, "final_norm True: a published marian has False"),
        ("opus-mt-en-de", {"logits_bias": False}, "logits_bias False: a published marian has True"),
        ("bart-base", {"norm_epsilon": 1e-6}, "norm_epsilon 1e-06: a published bart has 1e-05"),
        ("bart-base", {"tied": False}, "tied False: a published bart has True"),
        ("bart-base", {"source_vocab_size": 9}, "source_vocab_size 9: a published bart has None"),
    ],
)
def test_a_model_that_no_published_class_is_has_no_config_of_one(name, changes, message) -> None:
    with pytest.raises(PublishedError, match=message):
        dataclasses.replace(models.preset(name), **changes).to_published()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "rotary"}, "positions 'rotary' are unknown: choose one of interleaved, halves, learned"),
        ({"positions": "learned", "max_length": None}, "positions 'learned' with max_length None"),
        ({"width": 33}, "width 33 is odd, and sines need cosines: choose 34"),
        ({"model_type": "mbart"}, "model_type 'mbart' is none of transformer, marian, bart"),
        ({"num_decoder_heads": 0}, "num_decoder_heads 0 is too small"),
        ({"source_vocab_size": 0}, "source_vocab_size 0 is too small"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(changes, message) -> None:
    with pytest.raises(LayerError, match=message):
        dataclasses.replace(TINY, **changes)


def test_calls_that_do_not_fit_are_answered_in_one_line() -> None:
    model = lively()
    cache = model.init_cache(Encoded(jnp.zeros((4, 12, 32)), jnp.ones((4, 12), jnp.int32)), 32)
    for message, call in (
        ("a sequence of 33 tokens", lambda: model(jnp.ones((1, 33), jnp.int32), TOKENS[:1])),
        ("a sequence of 33 tokens", lambda: model(SOURCES[:1], jnp.ones((1, 33), jnp.int32))),
        ("a cache of 33 tokens", lambda: model.init_cache(model.encode(SOURCES), 33)),
        ("give one of sources, encoded and cache", lambda: model(None, TOKENS)),
        ("segments given with a cache", lambda: model(None, TOKENS, cache=cache, segments=TOKENS)),
    ):
        with pytest.raises(SequenceError, match=rf"^{message}.*$"):
            call()
