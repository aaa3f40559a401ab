"""A model of texts and images: what it is made of, what it refuses, and the same on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo import models, sharding
from zoo.layers.linear import LayerError
from zoo.models.text_to_image import PRESETS
from zoo.train.experiment import UserError
from zoo.train.objectives import Denoising

CONFIG = PRESETS["text-to-digits"]
ROWS = 8


@pytest.fixture(scope="module")
def model():
    built = jax.jit(lambda: CONFIG.build(nnx.Rngs(0)))()
    # Layers that begin at zero would hide what is behind them.
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.05 * draw.standard_normal(x.shape, np.float32), built)


@pytest.fixture(scope="module")
def batch():
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 320, (ROWS, 16)).astype(np.int32)
    tokens[:, 10:] = 0
    images = draw.uniform(-1, 1, (ROWS, 8, 8, 1)).astype(np.float32)
    return {"images": images, "tokens": tokens, "weights": np.ones(ROWS, np.float32)}


def test_its_parts_and_its_cost():
    assert models.parameter_count(CONFIG) == models.parameter_count(CONFIG.text) + models.parameter_count(
        CONFIG.network
    )
    both = CONFIG.network.forward_flops((8, 8, 1), context_length=16) + CONFIG.text.forward_flops((16,))
    assert CONFIG.forward_flops((8, 8, 1)) == both
    assert CONFIG.blank == (320, *[0] * 15)


def test_tokens_or_their_states(model, batch):
    time = jnp.arange(ROWS) * 100
    named = jax.jit(lambda m, **told: m(batch["images"], time, **told))
    by_tokens = named(model, tokens=batch["tokens"])
    np.testing.assert_allclose(named(model, context=model.encode(batch["tokens"])), by_tokens, atol=2e-5)
    assert by_tokens.shape == batch["images"].shape and by_tokens.dtype == jnp.float32
    for told in ({}, {"tokens": batch["tokens"], "context": jnp.zeros((ROWS, 16, 64))}):
        with pytest.raises(LayerError, match="give one"):
            model(batch["images"], time, **told)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(LayerError, match=r"network\.context_width 32 is not text.width 64"):
        dataclasses.replace(CONFIG, network=dataclasses.replace(CONFIG.network, context_width=32))
    with pytest.raises(LayerError, match="no classes"):
        dataclasses.replace(CONFIG, network=dataclasses.replace(CONFIG.network, num_classes=3))


def test_sharded_it_learns_the_same(model, batch):
    """The loss and its gradient, of the text tower too, with half of the captions left out."""
    objective = Denoising(caption_dropout=0.5)

    @jax.jit
    def gradient(model, batch):
        return jax.value_and_grad(lambda model: objective.loss(model, batch, jax.random.key(3)).total)(model)

    whole, slopes = gradient(model, batch)
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    with sharding.use(mesh):
        placed = jax.device_put(model, sharding.shardings(model, mesh))
        parts, cut = gradient(placed, jax.device_put(batch, sharding.batch_sharding(mesh)))
    np.testing.assert_allclose(parts, whole, rtol=2e-5)
    for a, b in zip(jax.tree.leaves(cut), jax.tree.leaves(slopes), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(np.abs(b).max())))
    assert jnp.abs(slopes.text.stack.first_block().feedforward.up.kernel[...]).max() > 0


def test_captions_are_left_out_of_models_of_texts_alone(batch):
    network = models.preset("ddpm-digits").build
    with pytest.raises(UserError, match="needs a model of texts: leave it at 0"):
        jax.eval_shape(lambda: Denoising(caption_dropout=0.5).loss(network(nnx.Rngs(0)), batch, None))


def test_a_share_of_captions_is_empty(batch):
    told = Denoising(caption_dropout=0.5)._given(CONFIG, batch, jax.random.key(0))["tokens"]
    empty = (told == np.array(CONFIG.blank)).all(1)
    assert 0 < empty.sum() < ROWS
    np.testing.assert_array_equal(told[~empty], batch["tokens"][~empty])
    np.testing.assert_array_equal(Denoising(caption_dropout=0.5)._given(CONFIG, batch, None)["tokens"], batch["tokens"])
