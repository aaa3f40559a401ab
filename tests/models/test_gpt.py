import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo import models, sharding
from zoo.kernels import Mask
from zoo.layers.linear import Precision
from zoo.layers.positions import SequenceError
from zoo.models.gpt import GPT, GPTConfig

TINY = GPTConfig(vocab_size=200, max_length=32, num_layers=4, width=32, num_heads=4, windows=(None, 5))
DROPPING = dataclasses.replace(TINY, windows=(5,), dropout=0.1)
TOKENS = jax.random.randint(jax.random.key(1), (4, 16), 0, 200)

# Radford et al. name 117M, 345M, 762M and 1542M; these are what their released weights hold.
GPT2_COUNTS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}
GPT3_COUNTS = {
    "gpt3-125m": 125e6,
    "gpt3-350m": 350e6,
    "gpt3-760m": 760e6,
    "gpt3-1.3b": 1.3e9,
    "gpt3-2.7b": 2.7e9,
    "gpt3-6.7b": 6.7e9,
    "gpt3-13b": 13.0e9,
    "gpt3-175b": 175.0e9,
}


@functools.cache
def lively(config: GPTConfig = TINY) -> GPT:
    """A model whose logits vary: four times the usual weights, and vectors that are not all 0 or 1."""
    return jax.jit(lambda: moved(config.build(nnx.Rngs(0))))()


def moved(model: GPT) -> GPT:
    leaves, structure = jax.tree.flatten(model, is_leaf=sharding.is_variable)
    values = [
        4 * leaf[...]
        if sharding.decays(sharding.logical_axes(leaf))
        else leaf[...] + 0.1 * jax.random.normal(jax.random.key(seed), leaf.shape)
        for seed, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, [leaf.replace(x) for leaf, x in zip(leaves, values, strict=True)])


@jax.jit
def logits_of(model: GPT, tokens: jax.Array) -> jax.Array:
    return model(tokens).logits


@pytest.mark.parametrize(("name", "count"), GPT2_COUNTS.items())
def test_gpt2_has_the_published_parameters(name, count) -> None:
    assert models.parameter_count(models.preset(name)) == count


@pytest.mark.parametrize(("name", "count"), GPT3_COUNTS.items())
def test_gpt3_has_the_tables_parameters(name, count) -> None:
    # The table rounds to two or three digits; the farthest from it are 2.7B and 350M, by 1.8 and 1.7 %.
    assert abs(models.parameter_count(models.preset(name)) / count - 1) < 0.02


def test_gpt3_alternates_dense_and_banded_layers() -> None:
    config = models.preset("gpt3-175b")
    assert config.windows == (None, 256) and config.max_length == 2048
    model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
    assert model.stack.blocks[1].feedforward.up.kernel.shape == (48, 12288, 4 * 12288)


def test_flops_are_the_published_convention() -> None:
    config = GPTConfig(vocab_size=11, num_layers=6, width=8, num_heads=2, mlp_width=20, windows=(None, 3))
    weights = 4 * 8 * 8 + 2 * 8 * 20
    dense, banded = 10 * 10 / 2, 10 * 3 - 3 * 3 / 2
    expected = 2 * 10 * 8 * 11 + 6 * 2 * 10 * weights + 3 * 4 * 8 * (dense + banded)
    assert config.forward_flops((10,)) == expected
    dense_everywhere = dataclasses.replace(config, windows=(None,))
    assert dataclasses.replace(config, windows=(10,)).forward_flops((10,)) == dense_everywhere.forward_flops((10,))


def test_initialisation_is_as_published() -> None:
    model = jax.jit(GPTConfig(num_layers=8, width=128, num_heads=4, vocab_size=1000).build)(nnx.Rngs(0))
    block = model.stack.blocks[0]

    def deviation(variable):
        return float(jnp.std(variable[...]))

    for kernel in (block.attention.query.kernel, block.attention.key.kernel, block.feedforward.up.kernel):
        assert deviation(kernel) == pytest.approx(0.02, rel=0.03)
    for kernel in (block.attention.out.kernel, block.feedforward.down.kernel):
        assert deviation(kernel) == pytest.approx(0.02 / 4, rel=0.03)
    assert float(jnp.std(model.embed.table[:1000])) == pytest.approx(0.02, rel=0.03)
    assert deviation(model.positions.table) == pytest.approx(0.01, rel=0.03)
    assert not block.attention.query.bias[...].any() and not model.norm.bias[...].any()
    assert (model.norm.scale[...] == 1).all()


def test_no_token_sees_what_follows_and_a_band_ends() -> None:
    config = dataclasses.replace(TINY, windows=(3,), num_layers=2)
    model = lively(config)

    def first(x):
        return model.norm(model.stack(x, masks=[Mask(window=3)]).x)[0, :, 0]

    gradient = jax.jit(jax.jacrev(first))(jax.random.normal(jax.random.key(0), (1, 12, 32)))
    reaches = np.abs(np.asarray(gradient)[:, 0]).max(-1) > 0
    distance = np.arange(12)[:, None] - np.arange(12)[None]
    # Two layers of a band of 3 see the token itself and 2 + 2 before it.
    np.testing.assert_array_equal(reaches, (distance >= 0) & (distance <= 4))


@pytest.mark.numbers
def test_cached_decoding_equals_the_full_pass() -> None:
    model = lively()
    expected = logits_of(model, TOKENS)
    assert expected.shape == (4, 16, 200) and expected.dtype == jnp.float32 and float(expected.std()) > 0.5
    run = jax.jit(lambda model, tokens, cache: model(tokens, cache=cache))
    cache, logits = model.init_cache(4, 24), []
    for piece in jnp.split(TOKENS, [7, 8, 9, 13], axis=1):
        piece_logits, cache, *_ = run(model, piece, cache)
        logits.append(piece_logits)
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), expected, atol=1e-5)


def test_packed_documents_do_not_see_each_other() -> None:
    model = lively()
    lengths = (5, 8, 3)
    segments = jnp.repeat(jnp.arange(1, 4), jnp.array(lengths), total_repeat_length=16)[None]
    positions = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
    packed = jax.jit(lambda t: model(t, segments=segments, positions=positions).logits)(TOKENS[:1])
    start = 0
    for n in lengths:
        alone = logits_of(model, jnp.pad(TOKENS[:1, start : start + n], ((0, 3), (0, 16 - n))))[:1, :n]
        np.testing.assert_allclose(packed[:, start : start + n], alone, atol=1e-5)
        start += n


def test_hidden_states_and_logits_are_the_whole() -> None:
    model = lively()
    logits = jax.jit(lambda model: model.logits(model.hidden(TOKENS)))(model)
    assert logits.shape == (4, 16, 256) and np.isneginf(logits[..., 200:]).all()
    np.testing.assert_allclose(logits[..., :200], logits_of(model, TOKENS), atol=1e-6)


def test_the_head_is_what_logits_score_with() -> None:
    model = lively()
    hidden, head = model.hidden(TOKENS), model.head()
    assert head.kernel.shape == (32, 256) and head.vocabulary == 200
    np.testing.assert_allclose((hidden @ head.kernel)[..., :200], model.logits(hidden)[..., :200], atol=1e-5)


def test_bfloat16_is_close_to_float32() -> None:
    model = lively()
    low = lively(dataclasses.replace(TINY, precision=Precision(compute="bfloat16")))
    expected, logits = logits_of(model, TOKENS), logits_of(low, TOKENS)
    assert logits.dtype == jnp.float32 and jax.eval_shape(low.hidden, TOKENS).dtype == jnp.bfloat16
    assert low.init_cache(1, 8).keys.dtype == jnp.bfloat16
    assert float(jnp.sqrt(jnp.mean((logits - expected) ** 2))) < 0.03 * float(expected.std())


def test_dropout_is_by_key() -> None:
    model = lively(dataclasses.replace(TINY, dropout=0.2))
    run = jax.jit(lambda model, key: model(TOKENS, key=key).logits)
    key = jax.random.key(3)
    np.testing.assert_array_equal(run(model, key), run(model, key))
    assert np.abs(run(model, key) - run(model, jax.random.key(4))).max() > 0.1
    np.testing.assert_allclose(run(model, None), logits_of(lively(), TOKENS), atol=1e-5)


def loss(model: GPT, tokens: jax.Array) -> jax.Array:
    logits = model(tokens, key=jax.random.key(3)).logits
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1).mean()


@pytest.fixture(scope="module")
def unsharded() -> tuple[jax.Array, GPT]:
    return jax.jit(jax.value_and_grad(loss))(lively(DROPPING), jnp.tile(TOKENS, (2, 1)))


@pytest.mark.numbers
@pytest.mark.parametrize("layout", ["data=2,fsdp=2,tensor=2", "tensor=4,sequence=2"])
def test_sharded_equals_unsharded_with_dropout(layout, unsharded) -> None:
    expected, gradient = unsharded
    mesh = sharding.make_mesh(layout)
    model = sharding.initialize(lambda: moved(DROPPING.build(nnx.Rngs(0))), mesh=mesh)
    assert not model.stack.blocks[0].feedforward.up.kernel[...].sharding.is_fully_replicated
    with sharding.use(mesh):
        placed = jax.device_put(jnp.tile(TOKENS, (2, 1)), sharding.batch_sharding(mesh))
        value, sharded_gradient = jax.jit(jax.value_and_grad(loss))(model, placed)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(sharded_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_sequences_beyond_the_positions_are_refused_in_one_line() -> None:
    model = TINY.build(nnx.Rngs(0))
    with pytest.raises(SequenceError, match=r"^a sequence of 33 tokens exceeds the model's max_length 32: cut it.*$"):
        model(jnp.zeros((1, 33), jnp.int32))
    with pytest.raises(SequenceError, match=r"^a cache of 33 tokens exceeds the model's max_length 32$"):
        model.init_cache(1, 33)
    with pytest.raises(SequenceError, match=r"^segments given with a cache"):
        model(TOKENS, segments=jnp.ones_like(TOKENS), cache=model.init_cache(4, 16))
