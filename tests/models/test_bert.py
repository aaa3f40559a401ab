import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo import models, sharding
from zoo.kernels import Mask, linear_cross_entropy
from zoo.layers.linear import LayerError, Precision
from zoo.layers.positions import SequenceError
from zoo.models.bert import HEADS, Bert, BertConfig
from zoo.models.published import PublishedError

TINY = BertConfig(
    vocab_size=200, max_length=32, num_layers=2, width=32, num_heads=4, mlp_width=48, head="pretraining", dropout=0.0
)
TOKENS = jax.random.randint(jax.random.key(1), (4, 16), 1, 200)
TYPES = jax.random.randint(jax.random.key(2), (4, 16), 0, 2)


@functools.cache
def lively(config: BertConfig = TINY) -> Bert:
    return jax.jit(lambda: moved(config.build(nnx.Rngs(0))))()


def moved(model: Bert) -> Bert:
    """Scores vary: four times the usual weights, and vectors that are not all 0 or 1, but for what pads."""
    leaves, structure = jax.tree.flatten(model, is_leaf=sharding.is_variable)
    values = []
    for seed, leaf in enumerate(leaves):
        real = leaf.get_metadata().get("rows", leaf.shape[0])
        noise = 0.1 * jax.random.normal(jax.random.key(seed), leaf.shape).at[real:].set(0)
        values.append(4 * leaf[...] if sharding.decays(sharding.logical_axes(leaf)) else leaf[...] + noise)
    return jax.tree.unflatten(structure, [leaf.replace(x) for leaf, x in zip(leaves, values, strict=True)])


@pytest.mark.parametrize(
    ("name", "changes", "count"),
    [
        ("bert-base-uncased", {}, 109_482_240),
        ("bert-base-cased", {}, 108_310_272),
        ("bert-large-uncased", {}, 335_141_888),
        ("bert-large-cased", {}, 333_579_264),
        ("all-MiniLM-L6-v2", {}, 22_713_216),
        ("bert-base-uncased", {"head": "pretraining"}, 110_106_428),
        ("bert-base-uncased", {"head": "masked_lm"}, 109_514_298),
        ("bert-base-uncased", {"head": "next_sentence"}, 109_483_778),
        ("bert-base-uncased", {"head": "question_answering"}, 108_893_186),
        ("bert-base-uncased", {"head": "sequence_classification"}, 109_483_778),
        ("bert-base-cased", {"head": "token_classification", "labels": tuple("ABCDEFGHI")}, 107_726_601),
    ],
)
def test_the_published_parameters(name, changes, count) -> None:
    assert models.parameter_count(dataclasses.replace(models.preset(name), **changes)) == count


def test_base_costs_the_published_flops() -> None:
    """22.5 G for 128 tokens, as Jiao et al. 2020 ("TinyBERT", table 1) count them."""
    assert models.preset("bert-base-uncased").forward_flops((128,)) == pytest.approx(22.5e9, rel=0.01)


@pytest.mark.parametrize("head", HEADS)
def test_flops_of_heads_are_those_of_their_kernels(head) -> None:
    """A kernel of a row's state is used once, one of hidden states at each of the 10 tokens."""
    config = dataclasses.replace(TINY, head=head, labels=("a", "b"))
    model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
    once = [model.pooler, model.next_sentence, model.classifier if config.kind.classifier == "pooled" else None]
    often = [model.words and model.words.dense, model.classifier if config.kind.classifier == "hidden" else None]
    flops = 2 * sum(m.kernel.size for m in once if m) + 20 * sum(m.kernel.size for m in often if m)
    flops += 20 * 32 * 200 * config.kind.words + 2 * (20 * (4 * 32 * 32 + 2 * 32 * 48) + 4 * 10 * 10 * 32)
    assert config.forward_flops((10,)) == flops


def test_initialisation_is_as_published() -> None:
    model = jax.jit(dataclasses.replace(TINY, width=128).build)(nnx.Rngs(0))
    # A normal distribution cut at two deviations has 0.880 of its deviation.
    for variable in (model.embed.table[:200], model.stack.blocks[0].attention.out.kernel, model.pooler.kernel):
        assert float(jnp.std(variable[...])) == pytest.approx(0.88 * 0.02, rel=0.03)
        assert float(jnp.abs(variable[...]).max()) <= 0.04
    assert not model.words.bias[...].any() and (model.embed_norm.scale[...] == 1).all()


@jax.jit
def hidden_of(model: Bert, tokens: jax.Array, types: jax.Array, **arguments: Any) -> jax.Array:
    return model.features(tokens, token_types=types, **arguments).hidden


def test_padding_changes_nothing_and_may_be_said_in_three_ways() -> None:
    model, lengths = lively(), jnp.array([16, 9, 4, 1])
    real = jnp.arange(16) < lengths[:, None]
    tokens = jnp.where(real, TOKENS, 0)
    padded = hidden_of(model, tokens, TYPES, real=real)
    for ways in ({"mask": Mask(lengths=lengths)}, {"segments": real.astype(jnp.int32)}):
        np.testing.assert_allclose(hidden_of(model, tokens, TYPES, **ways)[real], padded[real], atol=1e-5)
    np.testing.assert_allclose(hidden_of(model, tokens[1:2, :9], TYPES[1:2, :9]), padded[1:2, :9], atol=1e-5)
    np.testing.assert_allclose(
        hidden_of(model, jnp.roll(tokens, 3, 1), jnp.roll(TYPES, 3, 1), real=jnp.roll(real, 3, 1),
                  positions=jnp.maximum(jnp.arange(16) - 3, 0)[None])[1:2, 3:12],
        padded[1:2, :9], atol=1e-5,
    )  # fmt: skip


def test_packed_texts_do_not_see_each_other() -> None:
    model, lengths = lively(), (5, 8, 3)
    segments = jnp.repeat(jnp.arange(1, 4), jnp.array(lengths), total_repeat_length=16)[None]
    positions = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
    packed = hidden_of(model, TOKENS[:1], TYPES[:1], segments=segments, positions=positions)
    start = 0
    for n in lengths:
        alone = hidden_of(model, TOKENS[:1, start : start + n], TYPES[:1, start : start + n])
        np.testing.assert_allclose(packed[:, start : start + n], alone, atol=1e-5)
        start += n


def test_every_token_sees_every_other() -> None:
    model = lively()
    changed = hidden_of(model, TOKENS.at[:, 9].set(7), TYPES)
    assert (jnp.abs(changed - hidden_of(model, TOKENS, TYPES)).max(-1) > 1e-3).all()


def test_types_are_looked_up_and_unknown_ones_are_no_number() -> None:
    model = lively()
    np.testing.assert_allclose(hidden_of(model, TOKENS, None), hidden_of(model, TOKENS, jnp.zeros_like(TOKENS)))
    assert jnp.isnan(hidden_of(model, TOKENS, TYPES.at[0, 3].set(2))[0]).all()


def test_scores_of_masked_words_alone() -> None:
    model = lively()
    out, hidden = model(TOKENS), model.hidden(TOKENS)
    assert out.logits is not None and out.logits.shape == (4, 16, 200) and out.logits.dtype == jnp.float32
    some = model.logits(hidden[:, 3:5])
    assert some.shape == (4, 2, 256) and np.isneginf(some[..., 200:]).all()
    np.testing.assert_allclose(some[..., :200], out.logits[:, 3:5], atol=1e-5)


@pytest.mark.numbers
@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "classifier_dropout"])
def test_each_dropout_is_by_key(rate) -> None:
    rates = {"dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0} | {rate: 0.3}
    model = lively(dataclasses.replace(TINY, head="sequence_classification", **rates))
    run = jax.jit(lambda model, key: model(TOKENS, key=key))
    key = jax.random.key(3)
    kept, dropped = run(model, None), run(model, key)
    np.testing.assert_array_equal(dropped.logits, run(model, key).logits)
    assert jnp.abs(dropped.logits - run(model, jax.random.key(4)).logits).max() > 1e-3
    assert jnp.array_equal(dropped.hidden, kept.hidden) == (rate == "classifier_dropout")


@pytest.mark.parametrize("head", ["token_classification", "question_answering"])
def test_classes_drop_what_everything_else_does_unless_told_and_answers_nothing(head) -> None:
    model = lively(dataclasses.replace(TINY, head=head, dropout=0.3))
    out = model(TOKENS, key=jax.random.key(3))
    assert jnp.allclose(out.logits, model.classifier(out.hidden), atol=1e-5) == (head == "question_answering")


def test_bfloat16_is_close_to_float32() -> None:
    low = lively(dataclasses.replace(TINY, precision=Precision(compute="bfloat16")))
    expected, found = (jax.jit(lambda model: model(TOKENS))(model) for model in (lively(), low))
    assert found.hidden.dtype == found.pooled.dtype == jnp.bfloat16
    assert found.logits.dtype == found.next_sentence.dtype == jnp.float32
    for name in ("hidden", "pooled", "logits", "next_sentence"):
        a, b = (jnp.asarray(getattr(out, name), jnp.float32) for out in (found, expected))
        assert float(jnp.sqrt(jnp.mean((a - b) ** 2))) < 0.03 * float(b.std()), name


DROPPING = dataclasses.replace(TINY, dropout=0.1)
KEY = jax.random.key(3)


def loss_of_logits(model: Bert, tokens: jax.Array, types: jax.Array) -> jax.Array:
    out = model(tokens, token_types=types, real=tokens > 9, key=KEY)
    words = jnp.take_along_axis(jax.nn.log_softmax(out.logits), tokens[..., None], axis=-1)
    return -words.mean() - jax.nn.log_softmax(out.next_sentence)[:, 0].mean()


def loss_of_hidden(model: Bert, tokens: jax.Array, types: jax.Array) -> jax.Array:
    """The same, without the logits of all words being held."""
    arguments = {"token_types": types, "real": tokens > 9, "key": KEY}
    hidden, head = model.hidden(tokens, **arguments), model.head()
    weights = jnp.full(tokens.shape, 1 / tokens.size)
    total, _ = linear_cross_entropy(
        hidden, head.kernel, tokens, weights, bias=head.bias, vocabulary=head.vocabulary, chunk=5
    )
    return total - jax.nn.log_softmax(model.next_sentence(model.features(tokens, **arguments).pooled))[:, 0].mean()


@pytest.fixture(scope="module")
def unsharded() -> tuple[jax.Array, Bert]:
    return jax.jit(jax.value_and_grad(loss_of_logits))(lively(DROPPING), TOKENS, TYPES)


@pytest.mark.numbers
@pytest.mark.parametrize("loss", [loss_of_logits, loss_of_hidden])
def test_sharded_equals_unsharded_with_dropout(loss, unsharded) -> None:
    expected, gradient = unsharded
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    model = sharding.initialize(lambda: moved(DROPPING.build(nnx.Rngs(0))), mesh=mesh)
    for variable in (model.stack.blocks[0].feedforward.up.kernel, model.words.bias, model.pooler.kernel):
        assert not variable[...].sharding.is_fully_replicated
    with sharding.use(mesh):
        placed = jax.device_put((TOKENS, TYPES), sharding.batch_sharding(mesh))
        value, sharded_gradient = jax.jit(jax.value_and_grad(loss))(model, *placed)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(sharded_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


PUBLISHED = TINY.to_published()


@pytest.mark.parametrize("head", HEADS)
def test_configs_come_back(head) -> None:
    config = dataclasses.replace(
        TINY, head=head, labels=("no", "yes"), problem_type="regression", classifier_dropout=0.25, activation="silu"
    )
    assert BertConfig.from_published(config.to_published()) == config


def test_what_a_config_leaves_out_is_as_published() -> None:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    fields = models.preset("bert-base-uncased").to_published()
    few = {name: fields[name] for name in (*names, "max_position_embeddings", "architectures")}
    assert BertConfig.from_published(few) == models.preset("bert-base-uncased")
    assert BertConfig.from_published(few | {"num_labels": 3}).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert BertConfig.from_published(few | {"id2label": {"0": "a", "1": "a"}}).labels == ("a", "a")
    with pytest.raises(PublishedError, match="architectures None"):
        BertConfig.from_published({name: few[name] for name in few if name != "architectures"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["BertForMultipleChoice"]}, r"architectures \['BertForMultipleChoice'\]"),
        ({"architectures": ["BertLMHeadModel"]}, "BertLMHeadModel"),
        ({"architectures": None}, "architectures None"),
        ({"is_decoder": True}, "is_decoder True"),
        ({"add_cross_attention": True}, "add_cross_attention True"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"hidden_act": "mish"}, "hidden_act 'mish'"),
        ({"hidden_size": 0}, "hidden_size 0"),
        ({"classifier_dropout": "some"}, "classifier_dropout 'some'"),
        ({"problem_type": "ranking"}, "problem_type 'ranking'"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label"),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 1, "b": 0}}, "label2id"),
        ({"architectures": ["BertForQuestionAnswering"], "num_labels": 3}, "3 labels"),
    ],
)
def test_a_published_config_that_is_none_of_these_is_refused_by_name(fields, message) -> None:
    with pytest.raises(PublishedError, match=message) as refused:
        BertConfig.from_published(PUBLISHED | fields)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "masked"}, "head 'masked' is unknown: choose one of none, pretraining"),
        ({"labels": ()}, "labels"),
        ({"head": "question_answering", "labels": ("a",)}, "start and the end"),
        ({"problem_type": "ranking"}, "problem_type 'ranking' is unknown"),
        ({"token_types": 0}, "token_types 0 is too small"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(changes, message) -> None:
    with pytest.raises(LayerError, match=message):
        dataclasses.replace(TINY, **changes)


def test_calls_that_do_not_fit_are_answered_in_one_line() -> None:
    model = TINY.build(nnx.Rngs(0))
    with pytest.raises(SequenceError, match=r"^a sequence of 33 tokens exceeds the model's max_length 32: cut it.*$"):
        model(jnp.ones((1, 33), jnp.int32))
    with pytest.raises(SequenceError, match=r"^real given with segments"):
        model(TOKENS, real=TOKENS > 0, segments=TOKENS)
    bare = dataclasses.replace(TINY, head="none").build(nnx.Rngs(0))
    with pytest.raises(
        LayerError, match=r"^head 'none' scores no words: build the model with one of pretraining, mask"
    ):
        bare.head()
