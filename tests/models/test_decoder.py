"""Heads of decoders: none, and classes of a text."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo import models, sharding
from zoo.layers.linear import LayerError
from zoo.models import published_config
from zoo.models.gpt import GPTConfig
from zoo.models.llama import LlamaConfig
from zoo.models.published import PublishedError, SpecialTokens

SIZES = {"vocab_size": 200, "max_length": 32, "num_layers": 2, "width": 32, "num_heads": 4, "mlp_width": 48}
TINY = {
    kind: kind(**SIZES, labels=("a", "b", "c", "d"), special_tokens=SpecialTokens(pad=0))
    for kind in (GPTConfig, LlamaConfig)
}
TOKENS = jax.random.randint(jax.random.key(1), (8, 16), 1, 200)


def with_head(kind: type, head: str, **changes) -> GPTConfig | LlamaConfig:
    return dataclasses.replace(TINY[kind], head=head, **changes)


@pytest.mark.parametrize("kind", TINY)
def test_a_bare_model_gives_states_and_scores_no_words(kind) -> None:
    model = with_head(kind, "none").build(nnx.Rngs(0))
    out = jax.jit(lambda model: model(TOKENS))(model)
    assert out.logits is None and out.hidden.shape == (8, 16, 32)
    np.testing.assert_allclose(out.hidden, jax.jit(lambda model: model.features(TOKENS).hidden)(model), atol=1e-6)
    for scores in (model.head, lambda: model.logits(out.hidden)):
        with pytest.raises(LayerError, match=r"^head 'none' scores no words: build the model with head 'lm'$"):
            scores()


@pytest.mark.parametrize(("kind", "table"), [(GPTConfig, 0), (LlamaConfig, 200 * 32)])
def test_heads_hold_what_they_score_with(kind, table) -> None:
    counts = {head: models.parameter_count(with_head(kind, head)) for head in ("lm", "none", "sequence_classification")}
    assert counts["lm"] - counts["none"] == table
    assert counts["sequence_classification"] - counts["none"] == 32 * 4


def test_flops_are_those_of_the_head() -> None:
    lm, none, classes = (
        with_head(GPTConfig, head).forward_flops((16,)) for head in ("lm", "none", "sequence_classification")
    )
    assert lm - none == 2 * 16 * 32 * 200 and classes - none == 2 * 32 * 4


@pytest.mark.numbers
@pytest.mark.parametrize("kind", TINY)
def test_classes_are_scored_from_the_last_real_token(kind) -> None:
    model = with_head(kind, "sequence_classification").build(nnx.Rngs(0))
    run = jax.jit(lambda model, tokens, segments: model(tokens, segments=segments).logits)
    lengths = jnp.array([16, 3, 1, 9, 16, 2, 7, 5])
    real = jnp.arange(16) < lengths[:, None]
    found = run(model, TOKENS, real.astype(jnp.int32))
    assert found.shape == (8, 4) and found.dtype == jnp.float32
    np.testing.assert_allclose(run(model, jnp.where(real, TOKENS, 0), None), found, atol=1e-5)
    for row, length in enumerate(lengths.tolist()):
        np.testing.assert_allclose(model(TOKENS[row : row + 1, :length]).logits[0], found[row], atol=1e-5)


@pytest.mark.numbers
@pytest.mark.parametrize("head", ["none", "sequence_classification"])
def test_sharded_equals_unsharded(head) -> None:
    config, mesh = with_head(LlamaConfig, head), sharding.make_mesh("data=2,fsdp=2,tensor=2")

    def run(model):
        out = model(TOKENS)
        return (jnp.square(out.hidden if head == "none" else 10 * out.logits)).sum()

    expected, gradient = jax.jit(jax.value_and_grad(run))(config.build(nnx.Rngs(0)))
    model = sharding.initialize(lambda: config.build(nnx.Rngs(0)), mesh=mesh)
    with sharding.use(mesh):
        value, sharded_gradient = jax.jit(jax.value_and_grad(run))(model)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(sharded_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("head", ["none", "sequence_classification"])
@pytest.mark.parametrize("name", ["gpt2", "llama-3.2-1b", "mistral-7b-v0.1", "qwen2.5-0.5b", "qwen3-0.6b"])
def test_configs_come_back_from_their_published_form(name, head) -> None:
    config = dataclasses.replace(models.preset(name), head=head)
    if head == "sequence_classification":
        config = dataclasses.replace(config, labels=("one", "two", "three"), problem_type="regression")
    back = published_config(config.to_published())
    assert (back.head, back.labels, back.problem_type) == (head, config.labels, config.problem_type)
    assert back.to_published() == config.to_published()


def test_what_is_no_head_is_refused_in_one_line() -> None:
    for changes, message in (
        ({"head": "words"}, "head 'words' is unknown: choose one of lm, none, sequence_classification"),
        ({"labels": ()}, "labels () are none: name each class"),
        ({"problem_type": "ranking"}, "problem_type 'ranking' is unknown"),
    ):
        with pytest.raises(LayerError, match=f"^{re.escape(message)}"):
            dataclasses.replace(TINY[GPTConfig], **changes)
    fields = with_head(GPTConfig, "sequence_classification").to_published()
    for changes, message in (
        ({"id2label": {"1": "a"}}, "id2label {'1': 'a'}"),
        ({"problem_type": "ranking"}, "problem_type 'ranking'"),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, "GPT2LMHeadModel, GPT2Model, GPT2ForSequenceClassification"),
    ):
        with pytest.raises(PublishedError, match=re.escape(message)):
            published_config(fields | changes)
