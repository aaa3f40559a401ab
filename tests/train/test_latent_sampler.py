"""Pictures of models of latents and of texts: what is drawn, what is written, what is refused."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from zoo import models
from zoo.models.noising import Noising
from zoo.train.caption_sampler import CaptionSampler
from zoo.train.experiment import Sampler, UserError
from zoo.train.latent_sampler import LatentSampler

DIT = dataclasses.replace(models.preset("dit-digits"), num_layers=1, width=16, num_heads=2)
TEXT = models.preset("text-to-digits")
TEXT = dataclasses.replace(
    TEXT,
    text=dataclasses.replace(TEXT.text, num_layers=1, width=8, num_heads=2, mlp_width=8),
    network=dataclasses.replace(TEXT.network, channels=(8,), attention_levels=(), context_width=8, num_heads=2),
)


class Data:
    """Latents that are decoded to twice their size, and words that are their letters' numbers."""

    example_shape = (4, 4, 4)

    def decoded(self, latents: np.ndarray) -> np.ndarray:
        return np.clip(latents[..., :1], -1, 1).repeat(2, 1).repeat(2, 2)

    def rows(self, prompts: tuple[str, ...]) -> np.ndarray:
        return np.array([[320, *map(ord, f"{prompt:<14}"), 0] for prompt in prompts], np.int32)


def test_latents_are_drawn_unbounded_and_shown_decoded(tmp_path: Path, shown: list):
    model = jax.jit(lambda: DIT.build(nnx.Rngs(0)))()
    sampler: Sampler = LatentSampler(rows=2, columns=3, steps=3, guidance=2.0, scale=1)
    path = sampler.sample(model, Data(), jax.random.key(0), tmp_path, print)
    assert shown == [3, 2, 3, "closed"]
    assert Image.open(path).size == (3 * 9 + 1, 2 * 9 + 1)
    latents = LatentSampler(rows=2, columns=3, steps=3).draw(model, (4, 4, 4), jax.random.key(0))
    assert latents.shape == (6, 4, 4, 4) and np.abs(latents).max() > 1


def test_many_latents_are_drawn_in_batches_and_decoded():
    model = jax.jit(lambda: DIT.build(nnx.Rngs(0)))()
    drawn = list(LatentSampler(steps=2).draws(model, Data(), jax.random.key(0), 5, 4))
    assert [batch.shape for batch in drawn] == [(4, 8, 8, 1), (1, 8, 8, 1)]
    assert np.abs(np.concatenate(drawn)).max() <= 1 and (drawn[0][0] != drawn[1][0]).any()


def test_each_prompt_is_a_row(tmp_path: Path, shown: list):
    draw = np.random.default_rng(0)
    # What begins at zero would hide the text.
    build = jax.jit(lambda: TEXT.build(nnx.Rngs(0)))
    model = jax.tree.map(lambda x: x + 0.2 * draw.standard_normal(x.shape, np.float32), build())
    sampler: Sampler = CaptionSampler(prompt=("one", "two"), columns=3, steps=2, scale=4)
    path = sampler.sample(model, Data(), jax.random.key(0), tmp_path, print)
    assert shown == [2, 2, "closed"]
    assert Image.open(path).size == (3 * (32 + 4) + 4, 2 * (32 + 15 + 4) + 4)
    one, other = (
        CaptionSampler(prompt=("x",), columns=2, steps=2).draw(model, Data().rows((word,)), jax.random.key(0))
        for word in ("one", "two")
    )
    assert one.shape == (2, 8, 8, 1) and np.abs(one - other).max() > 1e-4


def test_what_a_network_says_of_the_variance_is_sampled_with():
    config = dataclasses.replace(DIT, learned_sigma=True, null_class=False)
    for name, learned in (("ddpm", True), ("ddim", False)):
        sampler = LatentSampler(rows=2, columns=2, steps=3, sampler=name)
        assert (sampler._table(config).learned is not None) == learned
        assert sampler._table(DIT).learned is None
    build = jax.jit(lambda: config.build(nnx.Rngs(0)))
    latents = LatentSampler(rows=1, columns=2, steps=2, sampler="ddpm").draw(build(), (4, 4, 4), jax.random.key(0))
    assert latents.shape == (2, 4, 4, 4)


@pytest.mark.parametrize(
    ("sampler", "config", "message"),
    [
        (CaptionSampler(), TEXT, "no text to draw"),
        (CaptionSampler(prompt=("a",), steps=0), TEXT, "0 sampling steps are not in"),
        (CaptionSampler(prompt=("a",), columns=0), TEXT, "0 columns"),
        (CaptionSampler(prompt=("a",), guidance=-1.0), TEXT, "guidance -1.0 does not lead"),
        (LatentSampler(steps=1001), DIT, "1001 sampling steps are not in"),
        (LatentSampler(rows=0), DIT, "0 x 10 images"),
        (LatentSampler(), dataclasses.replace(DIT, noising=Noising("cosine")), "and ddim sets no bound to it here"),
        (
            LatentSampler(guidance=3.0),
            dataclasses.replace(DIT, null_class=False),
            "needs a model of classes with one for none",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(sampler, config, message):
    with pytest.raises(UserError, match=message):
        sampler.check(config, None)
