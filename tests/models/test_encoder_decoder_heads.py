"""Heads of encoder-decoders: none, the encoder alone, and classes of texts and tokens."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from zoo import models, sharding
from zoo.layers.linear import LayerError
from zoo.layers.positions import SequenceError
from zoo.models import published_config
from zoo.models.encoder_decoder_heads import SOURCE_ALONE
from zoo.models.published import PublishedError
from zoo.models.t5 import HEADS, T5, T5Config
from zoo.pretrained import from_pretrained, save_pretrained

TINY = T5Config(
    vocab_size=200, num_layers=2, width=32, num_heads=4, head_dim=8, mlp_width=48, buckets=8, max_distance=20
)
SOURCES = jax.random.randint(jax.random.key(1), (8, 12), 2, 200).at[:, 5].set(1)
CLASSES = dataclasses.replace(TINY, head="sequence_classification", labels=("a", "b", "c", "d"))


@functools.cache
def tiny(head: str) -> T5:
    labels = ("a", "b") if head == "question_answering" else ("a", "b", "c", "d")
    return dataclasses.replace(TINY, head=head, labels=labels).build(nnx.Rngs(0))


@pytest.mark.parametrize("head", [head for head in HEADS if head != "lm"])
def test_what_scores_no_words_says_so(head) -> None:
    model = tiny(head)
    with pytest.raises(LayerError, match=rf"^head '{head}' scores no words: build the model with head 'lm'$"):
        model.head()
    if head in SOURCE_ALONE:
        assert model.decoder is None
        with pytest.raises(SequenceError, match=rf"^head '{head}' has no decoder: give sources, and no tokens$"):
            model(SOURCES, SOURCES)
        with pytest.raises(LayerError, match=rf"^head '{head}' has no decoder: `encode` gives what the model has$"):
            model.features(SOURCES, sources=SOURCES)
        with pytest.raises(LayerError, match=rf"^head '{head}' has no decoder, and nothing to cache$"):
            model.init_cache(model.encode(SOURCES), 4)


def test_the_encoder_alone_gives_its_states() -> None:
    out, model = tiny("encoder")(SOURCES), tiny("lm")
    assert out.logits is None and out.hidden is not None
    np.testing.assert_allclose(out.hidden, tiny("encoder").encode(SOURCES).hidden, atol=1e-6)
    count = models.parameter_count(model.config) - models.parameter_count(tiny("encoder").config)
    assert count == sum(x.size for x in jax.tree.leaves((model.decoder, model.decoder_norm, model.decoder_bias)))


def test_a_text_is_scored_where_it_ends_last() -> None:
    model = tiny("sequence_classification")
    logits = model(SOURCES).logits
    assert logits is not None and logits.shape == (8, 4) and logits.dtype == jnp.float32
    # The decoder is causal: what it reads behind the end does not count, given what the encoder saw of it.
    encoded = model.encode(SOURCES)
    tokens = jnp.pad(SOURCES[:, :-1], ((0, 0), (1, 0)))
    state = model.features(tokens, encoded=encoded).hidden[:, 5]
    np.testing.assert_allclose(model.classifier(state, None), logits, atol=1e-5)
    twice = model(SOURCES.at[:, 9].set(1)).logits
    assert np.abs(twice - logits).max() > 1e-3
    endless = model(SOURCES.at[0, 5].set(7)).logits
    assert bool(jnp.isnan(endless[0]).all()) and bool(jnp.isfinite(endless[1:]).all())
    with pytest.raises(SequenceError, match=r"^states \(8, 4\) for sources \(8, 12\): classes are scored"):
        model(SOURCES, SOURCES[:, :4])


def test_only_classes_and_answers_read_the_source_again() -> None:
    assert tiny("question_answering")(SOURCES).logits.shape == (8, 12, 2)
    for head in ("lm", "none"):
        with pytest.raises(SequenceError, match=r"^no tokens for the decoder: only with head sequence_classification"):
            tiny(head)(SOURCES)


def test_flops_are_those_of_the_head() -> None:
    flops = {head: tiny(head).config.forward_flops((12, 7)) for head in HEADS}
    assert flops["lm"] - flops["none"] == 2 * 7 * 32 * 200
    assert flops["sequence_classification"] - flops["none"] == 2 * (32 * 32 + 32 * 4)
    assert flops["question_answering"] - flops["none"] == 2 * 7 * 32 * 2
    assert flops["token_classification"] - flops["encoder"] == 2 * 12 * 32 * 4
    assert flops["encoder"] == 2 * 2 * (12 * (4 * 32 * 32 + 2 * 32 * 48) + 2 * 12**2 * 32)


@pytest.mark.numbers
@pytest.mark.parametrize("config", [CLASSES, dataclasses.replace(CLASSES, head="token_classification")])
def test_sharded_equals_unsharded(config) -> None:
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")

    def run(model):
        return jnp.square(model(SOURCES, key=jax.random.key(3)).logits).sum()

    expected, gradient = jax.jit(jax.value_and_grad(run))(config.build(nnx.Rngs(0)))
    model = sharding.initialize(lambda: config.build(nnx.Rngs(0)), mesh=mesh)
    with sharding.use(mesh):
        value, sharded_gradient = jax.jit(jax.value_and_grad(run))(model)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(sharded_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", ["t5-small", "t5-v1_1-small", "mt5-small"])
@pytest.mark.parametrize("head", HEADS)
def test_configs_come_back_from_their_published_form(name, head) -> None:
    config = dataclasses.replace(models.preset(name), head=head)
    if head != "lm":
        config = dataclasses.replace(config, tied=True)
    if head in ("sequence_classification", "token_classification"):
        config = dataclasses.replace(config, labels=("x", "y", "z"), problem_type="regression", classifier_dropout=0.3)
    assert dataclasses.replace(published_config(config.to_published()), num_decoder_layers=None) == config


def test_files_with_more_than_a_head_needs_are_read(tmp_path) -> None:
    save_pretrained(tiny("lm"), tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    for head in ("encoder", "none"):
        save_pretrained(tiny(head), tmp_path / head)
        file = tmp_path / head / "model.safetensors"
        expected = {name: tensors[name] for name in load_file(file)}
        save_file(tensors | {"lm_head.weight": np.zeros((200, 32), np.float32)}, file)
        save_pretrained(from_pretrained(tmp_path / head), tmp_path / f"{head}_back")
        found = load_file(tmp_path / f"{head}_back" / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(found[name].tobytes() == expected[name].tobytes() for name in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "words"}, "head 'words' is unknown: choose one of lm, none"),
        ({"labels": ()}, "labels () are none"),
        ({"head": "question_answering", "labels": ("a", "b", "c")}, "labels ('a', 'b', 'c'): question_answering"),
        ({"problem_type": "ranking"}, "problem_type 'ranking' is unknown"),
        (
            {"head": "sequence_classification", "special_tokens": dataclasses.replace(TINY.special_tokens, eos=())},
            "special_tokens without eos",
        ),
    ],
)
def test_what_is_no_head_is_refused_in_one_line(changes, message) -> None:
    with pytest.raises(LayerError, match=f"^{re.escape(message)}"):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize("head", ["sequence_classification", "question_answering"])
def test_heads_of_bart_come_back_and_those_of_others_have_no_published_form(head) -> None:
    config = dataclasses.replace(models.preset("bart-base"), logits_bias=False, head=head)
    back = published_config(config.to_published())
    assert back.to_published() == config.to_published() and (back.head, back.labels) == (head, config.labels)
    fields = {name: x for name, x in config.to_published().items() if name not in ("id2label", "label2id")}
    # The library gives a BART three classes unless told.
    assert len(published_config(fields).labels) == (3 if head == "sequence_classification" else 2)
    with pytest.raises(LayerError, match=rf"^logits_bias True with head '{head}', which scores no words"):
        dataclasses.replace(config, logits_bias=True)
    marian = dataclasses.replace(models.preset("opus-mt-en-de"), logits_bias=False, head=head)
    with pytest.raises(PublishedError, match=r"a published marian has"):
        marian.to_published()
