import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from products import product_flops

from zoo import models, sharding
from zoo.generation import generate
from zoo.kernels import linear_cross_entropy
from zoo.layers.linear import LayerError, Precision
from zoo.layers.positions import SequenceError
from zoo.models.published import PublishedError, SpecialTokens
from zoo.models.xlnet import ATTENTION, HEADS, XLNet, XLNetConfig

TINY = XLNetConfig(
    vocab_size=200, num_layers=2, width=32, num_heads=4, mlp_width=48, head="lm", dropout=0.0, summary_dropout=0.0
)
TOKENS = jax.random.randint(jax.random.key(1), (4, 16), 1, 200)
TYPES = jax.random.randint(jax.random.key(2), (4, 16), 0, 3)
RANKS = jnp.stack([jax.random.permutation(jax.random.key(row), 16) for row in range(4)])
ORDER = jnp.maximum(RANKS - 10, 0)
"""Five tokens of each row become known one by one, after all others together."""
TARGETS = jnp.argsort(RANKS, axis=1)[:, 11:]


@functools.cache
def lively(config: XLNetConfig = TINY) -> XLNet:
    return jax.jit(lambda: moved(config.build(nnx.Rngs(0))))()


def moved(model: XLNet) -> XLNet:
    """Scores vary: eight times the usual weights, and vectors that are not all 0 or 1, but for what pads."""
    leaves, structure = jax.tree.flatten(model, is_leaf=sharding.is_variable)
    values = []
    for seed, leaf in enumerate(leaves):
        real = leaf.get_metadata().get("rows", leaf.shape[0])
        noise = 0.1 * jax.random.normal(jax.random.key(seed), leaf.shape).at[real:].set(0)
        values.append(8 * leaf[...] if sharding.decays(sharding.logical_axes(leaf)) else leaf[...] + noise)
    return jax.tree.unflatten(structure, [leaf.replace(x) for leaf, x in zip(leaves, values, strict=True)])


@jax.jit
def outputs(model: XLNet, tokens: jax.Array, **arguments: Any) -> Any:
    return model(tokens, **arguments)


# Counted with transformers 5.23.0 on torch's meta device.
@pytest.mark.parametrize(
    ("name", "head", "count"),
    [
        ("xlnet-base-cased", "none", 116_718_336),
        ("xlnet-base-cased", "lm", 116_750_336),
        ("xlnet-base-cased", "sequence_classification", 117_310_466),
        ("xlnet-base-cased", "multiple_choice", 117_309_697),
        ("xlnet-base-cased", "token_classification", 116_719_874),
        ("xlnet-base-cased", "question_answering", 116_719_874),
        ("xlnet-large-cased", "none", 360_268_800),
        ("xlnet-large-cased", "lm", 360_300_800),
        ("xlnet-large-cased", "sequence_classification", 361_320_450),
    ],
)
def test_parameters_are_as_many_as_published(name, head, count) -> None:
    assert models.parameter_count(dataclasses.replace(models.preset(name), head=head)) == count


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(
    ("head", "shape"),
    [
        ("lm", (10,)),
        ("lm", (10, 3)),
        ("none", (10, 3)),
        ("token_classification", (10,)),
        ("sequence_classification", (10,)),
        ("multiple_choice", (10,)),
    ],
)
def test_flops_are_those_of_the_products(attention, head, shape) -> None:
    config = dataclasses.replace(TINY, attention=attention, head=head, vocab_size=256)
    arguments = {"order": ORDER[:1, :10], "targets": TARGETS[:1, : shape[1]]} if len(shape) > 1 else {}
    model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
    run = jax.make_jaxpr(lambda model: tuple(model(TOKENS[:1, :10], **arguments)[:2]))
    shared = config.num_layers * 2 * (20 if attention == "two_way" else 11) * 32**2  # Keys of distances.
    assert config.forward_flops(shape) == product_flops(run(model).jaxpr) - shared


def test_initialisation_is_as_published() -> None:
    model = jax.jit(dataclasses.replace(TINY, width=256, num_heads=8).build)(nnx.Rngs(0))
    attention = model.stack.blocks[0].attention
    for variable in (model.embed.table[:200], attention.out.kernel, attention.segments, attention.to_segment.bias):
        assert float(jnp.std(variable[...])) == pytest.approx(0.02, rel=0.1)
    assert model.bias is not None and not model.bias[...].any()


def test_an_order_is_a_pattern_of_who_sees_whom() -> None:
    model, given = lively(), {"token_types": TYPES, "targets": TARGETS}
    memories = jax.random.normal(jax.random.key(5), (2, 4, 3, 32))
    by_order = outputs(model, TOKENS, order=ORDER, memories=memories, **given)
    later = (ORDER[:, :, None] < ORDER[:, None]) | ((ORDER[:, :, None] == ORDER[:, None]) & (ORDER > 0)[:, None])
    by_pattern = outputs(model, TOKENS, perm_mask=later, memories=memories, **given)
    np.testing.assert_allclose(by_order.logits, by_pattern.logits, atol=1e-5)
    np.testing.assert_allclose(by_order.memories, by_pattern.memories, atol=1e-5)


def test_a_target_depends_on_what_its_order_lets_it_see_alone() -> None:
    model = lively()
    logits = outputs(model, TOKENS, order=ORDER, targets=TARGETS).logits
    for place in range(4):
        changed = TOKENS.at[jnp.arange(4), TARGETS[:, place]].set(7)
        differs = jnp.abs(outputs(model, changed, order=ORDER, targets=TARGETS).logits - logits).max(-1) > 1e-4
        # Targets are in order: those up to the changed one do not see it, those behind do.
        np.testing.assert_array_equal(differs, jnp.broadcast_to(jnp.arange(5) > place, (4, 5)))


def test_padding_in_front_changes_nothing() -> None:
    model = lively()
    real = jnp.arange(16) >= jnp.array([0, 3, 9, 15])[:, None]
    padded = outputs(model, jnp.where(real, TOKENS, 5), token_types=TYPES, real=real).logits
    for row, start in enumerate((0, 3, 9, 15)):
        alone = outputs(model, TOKENS[row : row + 1, start:], token_types=TYPES[row : row + 1, start:]).logits
        np.testing.assert_allclose(padded[row : row + 1, start:], alone, atol=1e-5)


def test_segments_are_known_by_being_the_same_alone() -> None:
    model = lively()
    plain = outputs(model, TOKENS).logits
    np.testing.assert_allclose(outputs(model, TOKENS, token_types=TYPES * 0 + 4).logits, plain, atol=1e-5)
    typed = outputs(model, TOKENS, token_types=TYPES).logits
    np.testing.assert_allclose(outputs(model, TOKENS, token_types=9 - TYPES).logits, typed, atol=1e-5)
    assert jnp.abs(typed - plain).max() > 1e-2


def test_a_causal_text_in_segments_is_the_text_whole() -> None:
    model = lively(dataclasses.replace(TINY, attention="causal"))
    whole, memories = outputs(model, TOKENS).logits, model.init_memories(4)
    for start, end in ((0, 5), (5, 6), (6, 16)):
        out = outputs(model, TOKENS[:, start:end], memories=memories)
        memories = out.memories
        np.testing.assert_allclose(out.logits, whole[:, start:end], atol=1e-5)
    assert memories.shape == (2, 4, 16, 32)


def test_memories_are_cut_and_carry_no_gradient() -> None:
    config = dataclasses.replace(TINY, memory_length=6, reuse_length=4)
    model = lively(config)
    first = outputs(model, TOKENS, memories=model.init_memories(4)).memories
    assert first.shape == (2, 4, 4, 32)
    np.testing.assert_array_equal(first[0], model.embed(TOKENS[:, :4]))
    second = outputs(model, TOKENS[:, 4:], memories=first).memories
    np.testing.assert_array_equal(second[:, :, :2], first[:, :, 2:])

    def loss(model: XLNet) -> jax.Array:
        return model(TOKENS, memories=model.init_memories(4)).memories.sum()

    assert not any(x.any() for x in jax.tree.leaves(jax.jit(jax.grad(loss))(model)))


def test_distances_count_up_to_the_longest() -> None:
    near = lively(dataclasses.replace(TINY, longest_distance=3))
    far, cut = (outputs(model, TOKENS[:, :8]).logits for model in (lively(), near))
    assert jnp.abs(far - cut).max() > 1e-3
    np.testing.assert_allclose(*(outputs(model, TOKENS[:, :4]).logits for model in (lively(), near)), atol=1e-5)


@jax.jit
def step(model: XLNet, token: jax.Array, cache: Any) -> Any:
    return model.features(token[:, None], cache=cache)


@pytest.mark.parametrize(("attention", "remembers"), [("causal", True), ("causal", False), ("two_way", False)])
def test_generation_sees_what_the_full_pass_sees(attention, remembers) -> None:
    """Rows of different length; causal contents are the same whether they are kept or computed anew."""
    model = lively(dataclasses.replace(TINY, attention=attention, remembers=remembers))
    rows, lengths = jnp.arange(4), jnp.array([3, 1, 7, 4])
    last, cache = jax.jit(functools.partial(model.read, slots=12))(TOKENS[:, :8], lengths)
    cache = cache.cut(lengths)
    for length in (lengths + more for more in range(4)):
        unknown = jnp.broadcast_to(jnp.arange(12) >= length[:, None, None], (4, 12, 12))
        expected = outputs(model, TOKENS[:, :12], perm_mask=unknown, targets=length[:, None]).hidden
        np.testing.assert_allclose(last, expected[:, 0], atol=1e-5)
        features = step(model, TOKENS[rows, length], cache)
        last, cache = features.hidden[:, 0], features.cache


@pytest.mark.numbers
@pytest.mark.parametrize("memory_length", [None, 4])
def test_rows_of_different_length_continue_as_each_alone(memory_length) -> None:
    model = lively(dataclasses.replace(TINY, memory_length=memory_length))
    prompts = [TOKENS[row, :length].tolist() for row, length in enumerate((3, 1, 7))]
    together = generate(model, prompts, max_new_tokens=5, stop_tokens=())
    for prompt, made in zip(prompts, together.tokens, strict=True):
        assert generate(model, [prompt], max_new_tokens=5, stop_tokens=()).tokens == [made]


def test_intermediates_are_of_both_streams() -> None:
    model, given = lively(), {"order": ORDER, "targets": TARGETS}
    out = jax.jit(lambda model: model(TOKENS, **given, return_intermediates=True))(model)
    np.testing.assert_allclose(out.logits, outputs(model, TOKENS, **given).logits, atol=1e-5)
    contents, targets = out.intermediates, out.target_intermediates
    assert contents.hidden.shape == (3, 4, 16, 32) and targets.hidden.shape == (3, 4, 5, 32)
    np.testing.assert_array_equal(targets.hidden[-1], out.hidden)
    assert contents.attention.shape == (2, 4, 4, 16, 16) and targets.attention.shape == (2, 4, 4, 5, 16)
    np.testing.assert_allclose(targets.attention.sum(-1), 1, atol=1e-5)
    unseen = jnp.take_along_axis(ORDER, TARGETS, 1)[:, :, None] <= ORDER[:, None]
    assert not jnp.where(unseen[:, None], targets.attention, 0).any()


@pytest.mark.parametrize("rate", ["dropout", "summary_dropout"])
def test_each_dropout_is_by_key(rate) -> None:
    model = lively(dataclasses.replace(TINY, head="sequence_classification", **{rate: 0.3}))
    key = jax.random.key(3)
    kept, dropped = outputs(model, TOKENS, key=None), outputs(model, TOKENS, key=key)
    np.testing.assert_array_equal(dropped.logits, outputs(model, TOKENS, key=key).logits)
    assert jnp.abs(dropped.logits - outputs(model, TOKENS, key=jax.random.key(4)).logits).max() > 1e-3
    assert jnp.array_equal(dropped.hidden, kept.hidden) == (rate == "summary_dropout")


def test_bfloat16_is_close_to_float32() -> None:
    low = lively(dataclasses.replace(TINY, precision=Precision(compute="bfloat16")))
    expected, found = (outputs(model, TOKENS, order=ORDER, targets=TARGETS) for model in (lively(), low))
    assert found.hidden.dtype == jnp.bfloat16 and found.logits.dtype == jnp.float32
    for name in ("hidden", "logits"):
        a, b = (jnp.asarray(getattr(out, name), jnp.float32) for out in (found, expected))
        assert float(jnp.sqrt(jnp.mean((a - b) ** 2))) < 0.05 * float(b.std()), name


DROPPING = dataclasses.replace(TINY, dropout=0.1)


def loss_of_targets(model: XLNet, tokens: jax.Array, order: jax.Array, targets: jax.Array) -> jax.Array:
    arguments = {"token_types": tokens % 3, "real": tokens > 9, "key": jax.random.key(3)}
    hidden, head = model.hidden(tokens, order=order, targets=targets, **arguments), model.head()
    words = jnp.take_along_axis(tokens, targets, axis=1)
    weights = jnp.full(words.shape, 1 / words.size)
    return linear_cross_entropy(hidden, head.kernel, words, weights, bias=head.bias, vocabulary=head.vocabulary)[0]


@pytest.fixture(scope="module")
def unsharded() -> tuple[jax.Array, XLNet]:
    return jax.jit(jax.value_and_grad(loss_of_targets))(lively(DROPPING), TOKENS, ORDER, TARGETS)


@pytest.mark.numbers
def test_sharded_equals_unsharded_with_dropout(unsharded) -> None:
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    model = sharding.initialize(lambda: moved(DROPPING.build(nnx.Rngs(0))), mesh=mesh)
    attention = model.stack.blocks[0].attention
    for variable in (model.bias, attention.position.kernel, attention.segments, attention.to_position.bias):
        assert not variable[...].sharding.is_fully_replicated
    with sharding.use(mesh):
        placed = jax.device_put((TOKENS, ORDER, TARGETS), sharding.batch_sharding(mesh))
        found = jax.jit(jax.value_and_grad(loss_of_targets))(model, *placed)
    assert_same(found, unsharded)


def test_what_the_backward_pass_keeps_changes_nothing(unsharded) -> None:
    model = lively(dataclasses.replace(DROPPING, remat="attention"))
    assert_same(jax.jit(jax.value_and_grad(loss_of_targets))(model, TOKENS, ORDER, TARGETS), unsharded)


def assert_same(found: tuple[jax.Array, XLNet], expected: tuple[jax.Array, XLNet]) -> None:
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


PUBLISHED = TINY.to_published()


@pytest.mark.parametrize("head", HEADS)
def test_configs_come_back(head) -> None:
    config = dataclasses.replace(
        TINY,
        head=head,
        attention="causal",
        memory_length=7,
        reuse_length=3,
        longest_distance=9,
        remembers=False,
        labels=("no", "yes"),
        problem_type="regression",
        activation="silu",
        summary_dropout=0.25,
        special_tokens=SpecialTokens(bos=3, eos=(4, 9)),
    )
    assert XLNetConfig.from_published(config.to_published()) == config


def test_what_a_config_leaves_out_is_as_published() -> None:
    names = ("vocab_size", "d_model", "n_layer", "n_head", "d_inner", "architectures")
    few = {name: models.preset("xlnet-base-cased").to_published()[name] for name in names}
    assert XLNetConfig.from_published(few) == models.preset("xlnet-base-cased")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["XLNetForQuestionAnswering"]}, r"architectures \['XLNetForQuestionAnswering'\]"),
        ({"architectures": ["XLNetForMultipleChoice"], "summary_use_proj": False}, "summary_use_proj False"),
        ({"architectures": None}, "architectures None"),
        ({"attn_type": "both"}, "attn_type 'both'"),
        ({"bi_data": True}, "bi_data True"),
        ({"same_length": True}, "same_length True"),
        ({"untie_r": False}, "untie_r False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False"),
        ({"d_head": 16}, "d_head 16"),
        ({"n_head": 5}, "n_head 5, which does not divide d_model 32"),
        ({"mem_len": 0}, "mem_len 0"),
        ({"clamp_len": 0}, "clamp_len 0"),
        ({"use_mems_eval": 1}, "use_mems_eval 1"),
        ({"ff_activation": "mish"}, "ff_activation 'mish'"),
        ({"problem_type": "ranking"}, "problem_type 'ranking'"),
        ({"architectures": ["XLNetForSequenceClassification"], "summary_type": "first"}, "summary_type 'first'"),
        ({"architectures": ["XLNetForSequenceClassification"], "summary_activation": None}, "summary_activation None"),
        ({"architectures": ["XLNetForQuestionAnsweringSimple"], "num_labels": 3}, "3 labels"),
    ],
)
def test_a_published_config_that_is_none_of_these_is_refused_by_name(fields, message) -> None:
    with pytest.raises(PublishedError, match=message) as refused:
        XLNetConfig.from_published(PUBLISHED | fields)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "words"}, "head 'words' is unknown: choose one of none, lm"),
        ({"attention": "bi"}, "attention 'bi' is unknown: choose one of two_way, causal"),
        ({"num_heads": 5}, "width 32 is no multiple of num_heads 5"),
        ({"memory_length": 0}, "memory_length 0 is too small"),
        ({"labels": ()}, r"labels \(\) are none"),
        ({"head": "question_answering", "labels": ("a",)}, "start and the end"),
        ({"problem_type": "ranking"}, "problem_type 'ranking' is unknown"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(changes, message) -> None:
    with pytest.raises(LayerError, match=message):
        dataclasses.replace(TINY, **changes)


def test_calls_that_do_not_fit_are_answered_in_one_line() -> None:
    model = TINY.build(nnx.Rngs(0))
    with pytest.raises(SequenceError, match=r"^targets given without order or perm_mask: each would see.*$"):
        model(TOKENS, targets=TARGETS)
    _, cache = model.read(TOKENS, jnp.full(4, 16), 32)
    with pytest.raises(SequenceError, match=r"^a cache takes one token a row, and no other argument.*$"):
        model.features(TOKENS, cache=cache)
    forgetful = dataclasses.replace(TINY, reuse_length=3).build(nnx.Rngs(0))
    with pytest.raises(SequenceError, match=r"^reuse_length 3 forgets the end of what is written.*$"):
        forgetful.read(TOKENS, jnp.full(4, 16), 32)
    bare = dataclasses.replace(TINY, head="none").build(nnx.Rngs(0))
    with pytest.raises(LayerError, match=r"^head 'none' scores no words: build the model with head 'lm'$"):
        bare.head()
