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
from zoo.layers.positions import SequenceError
from zoo.models.clip import CLIPText, CLIPTextConfig, ends
from zoo.models.published import PublishedError, SpecialTokens

TINY = CLIPTextConfig(
    vocab_size=50,
    max_length=9,
    num_layers=2,
    width=32,
    num_heads=4,
    mlp_width=48,
    head="projection",
    projection_width=24,
    special_tokens=SpecialTokens(bos=40, eos=(41,), pad=41),
)
TOKENS = jnp.array(
    [[40, 3, 9, 5, 41, 41, 41], [40, 49, 41, 7, 7, 7, 41], [40, 1, 2, 3, 4, 5, 41], [40, 41, 0, 0, 0, 0, 0]]
)


@functools.cache
def lively(config: CLIPTextConfig = TINY) -> CLIPText:
    """Scores vary, and vectors are not all 0 or 1."""
    draw = np.random.default_rng(0)
    model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))

    def drawn(leaf: nnx.Variable) -> nnx.Variable:
        matrix = sharding.decays(sharding.logical_axes(leaf))
        return leaf.replace(jnp.asarray(draw.normal(0.0 if matrix else 0.5, 0.2, leaf.shape), jnp.float32))

    return jax.tree.map(drawn, model, is_leaf=sharding.is_variable)


@jax.jit
def run(model: CLIPText, tokens: jax.Array, **arguments: Any) -> Any:
    return model(tokens, **arguments)


@pytest.mark.parametrize(
    ("name", "count"), [("clip-vit-large-patch14-text", 123_060_480), ("stable-diffusion-2-text", 340_387_840)]
)
def test_the_published_parameters(name, count) -> None:
    """As transformers 5.23 counts them, building each model on torch's meta device."""
    assert models.parameter_count(models.preset(name)) == count


def test_flops_are_those_of_the_kernels() -> None:
    """Of a layer's kernels at each token, half of attention's scores, and the projection once."""
    model = jax.eval_shape(lambda: TINY.build(nnx.Rngs(0)))
    kernels = jax.tree_util.tree_flatten_with_path(model.stack, is_leaf=sharding.is_variable)[0]
    of_layers = sum(leaf.size for path, leaf in kernels if jax.tree_util.keystr(path).endswith(".kernel"))
    attention = 2 * 2 * (7**2 / 2) * 32
    assert TINY.forward_flops((7,)) == 2 * (7 * of_layers + attention + model.projection.kernel.size)


def test_initialisation_is_as_released() -> None:
    model = jax.jit(dataclasses.replace(TINY, width=256, vocab_size=500).build)(nnx.Rngs(0))
    block = model.stack.blocks[0]
    for kernel, deviation in (
        (model.embed.table[:500], 0.02),
        (model.positions.table[...], 0.01),
        (block.attention.query.kernel[...], 256**-0.5),
        (block.attention.out.kernel[...], (2 * 2 * 256) ** -0.5),
        (block.feedforward.up.kernel[...], (2 * 256) ** -0.5),
        (block.feedforward.down.kernel[...], (2 * 2 * 256) ** -0.5),
        (model.projection.kernel[...], 256**-0.5),
    ):
        assert float(jnp.std(kernel)) == pytest.approx(deviation, rel=0.05)


def test_texts_are_pooled_where_they_end() -> None:
    """At the first token that ends them, or with the config of old at the first of the largest."""
    model = lively()
    out = run(model, TOKENS)
    np.testing.assert_allclose(out.pooled, out.hidden[jnp.arange(4), jnp.array([4, 2, 6, 1])], atol=1e-6)
    np.testing.assert_allclose(out.projected, model.projection(out.pooled), atol=1e-5)
    np.testing.assert_array_equal(ends(TOKENS, TINY), [4, 2, 6, 1])
    old = dataclasses.replace(TINY, special_tokens=SpecialTokens(bos=0, eos=(2,), pad=1))
    np.testing.assert_array_equal(ends(TOKENS, old), [4, 1, 6, 1])


def test_what_stands_behind_is_not_seen() -> None:
    model = lively()
    out, other = run(model, TOKENS), run(model, TOKENS.at[:, 5].set(30))
    np.testing.assert_array_equal(out.hidden[:, :5], other.hidden[:, :5])
    assert (jnp.abs(out.hidden - other.hidden)[:, 5:].max((1, 2)) > 1e-3).all()
    cut = run(model, TOKENS, mask=Mask(window=2))
    assert jnp.abs(out.hidden - cut.hidden)[:, 2:].max() > 1e-3
    np.testing.assert_allclose(out.hidden[:, :2], cut.hidden[:, :2], atol=1e-6)


def test_intermediates_end_before_the_last_normalisation() -> None:
    model = lively()
    out = jax.jit(lambda model: model(TOKENS, return_intermediates=True))(model)
    np.testing.assert_allclose(out.hidden, run(model, TOKENS).hidden, atol=1e-6)
    np.testing.assert_allclose(model.norm(out.intermediates.hidden[-1]), out.hidden, atol=1e-5)
    assert out.intermediates.attention.shape == (2, 4, 4, 7, 7)


def test_dropout_is_by_key() -> None:
    model = lively(dataclasses.replace(TINY, attention_dropout=0.3))
    kept, dropped = run(model, TOKENS), run(model, TOKENS, key=jax.random.key(3))
    np.testing.assert_array_equal(dropped.pooled, run(model, TOKENS, key=jax.random.key(3)).pooled)
    assert jnp.abs(dropped.pooled - kept.pooled).max() > 1e-3


def test_bfloat16_is_close_to_float32() -> None:
    low = lively(dataclasses.replace(TINY, precision=Precision(compute="bfloat16")))
    expected, found = run(lively(), TOKENS), run(low, TOKENS)
    assert found.hidden.dtype == jnp.bfloat16
    error = jnp.asarray(found.hidden, jnp.float32) - expected.hidden
    assert float(jnp.sqrt(jnp.mean(error**2))) < 0.05 * float(expected.hidden.std())


def test_sharded_equals_unsharded() -> None:
    """Outputs and gradient on data=2, fsdp=2, tensor=2, to 2e-5 of the largest value."""

    @jax.jit
    def gradient(model: CLIPText, tokens: jax.Array) -> Any:
        def loss(model: CLIPText) -> Any:
            out = model(tokens)
            return jnp.square(out.projected).mean() + jnp.sin(out.hidden).mean(), (out.hidden, out.projected)

        return jax.grad(loss, has_aux=True)(model)

    expected = gradient(lively(), TOKENS)
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    model = jax.device_put(lively(), sharding.shardings(lively(), mesh))
    kernel = model.stack.blocks[0].feedforward.up.kernel[...]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    with sharding.use(mesh):
        found = gradient(model, jax.device_put(TOKENS, sharding.batch_sharding(mesh)))
    for wanted, got in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5 * max(1, float(jnp.abs(wanted).max())))


def test_a_text_longer_than_the_positions_is_refused() -> None:
    with pytest.raises(SequenceError, match=r"^a sequence of 10 tokens exceeds the model's max_length 9: cut it"):
        lively()(jnp.zeros((1, 10), jnp.int32))


PUBLISHED = TINY.to_published()


def test_what_files_leave_out_is_as_published() -> None:
    """OpenAI's ViT-B/32 is what transformers takes then."""
    config = CLIPTextConfig.from_published({"model_type": "clip_text_model"})
    assert config == CLIPTextConfig(
        width=512,
        num_heads=8,
        mlp_width=2048,
        projection_width=512,
        special_tokens=SpecialTokens(bos=49406, eos=(49407,), pad=1),
    )
    assert CLIPTextConfig.from_published(PUBLISHED) == TINY


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"architectures": ["CLIPModel"]},
            r"architectures \['CLIPModel'\], and a CLIP text tower here is one of CLIPT",
        ),
        ({"hidden_act": "mish"}, "hidden_act 'mish', which is none of"),
        ({"eos_token_id": None}, "eos_token_id None, and a CLIP text tower here has one"),
        ({"eos_token_id": [41, 2]}, r"eos_token_id \[41, 2\], and a CLIP text tower here has one"),
        ({"hidden_size": 0}, "hidden_size 0: the model needs a whole number from 1 there"),
    ],
)
def test_a_published_config_that_cannot_be_is_refused_by_name(fields, message) -> None:
    with pytest.raises(PublishedError, match=f"^config.json has {message}"):
        models.published_config(PUBLISHED | fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "lm"}, "head 'lm' is unknown: choose one of none, projection"),
        ({"special_tokens": SpecialTokens()}, r"special_tokens have the ends \(\): a text is pooled at one, name it"),
        ({"max_length": 0}, "max_length 0 is too small"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(changes, message) -> None:
    with pytest.raises(LayerError, match=f"^{message}"):
        dataclasses.replace(TINY, **changes)
