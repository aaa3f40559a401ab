"""What benchmarks.digits counts, on models whose samples are known; and, large, the whole proof."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import digits
from zoo import cli
from zoo.diffusion import schedules
from zoo.models.noising import Noising
from zoo.train.caption_sampler import CaptionSampler
from zoo.train.image_sampler import ImageSampler
from zoo.train.latent_sampler import LatentSampler


@jax.tree_util.register_static
class Shades:
    """The exact noise predictor of images of one shade, -0.5, 0 and 0.5 for classes 0, 1 and 2, and 0.5 for none."""

    config = SimpleNamespace(noising=Noising("cosine", 100), num_classes=3, null_class=True)

    def __call__(self, x: jax.Array, t: jax.Array, classes: jax.Array) -> jax.Array:
        signal, sigma = map(schedules.over_images, schedules.make(self.config.noising).at(t))
        return (x - signal * schedules.over_images(jnp.array([-0.5, 0.0, 0.5, 0.5])[classes])) / sigma


def test_samples_of_classes_and_of_none_are_drawn() -> None:
    sampler = ImageSampler(rows=1, columns=1, steps=5, guidance=1.5)
    found = digits.drawn(Shades(), sampler, SimpleNamespace(example_shape=(4, 4, 1)), jax.random.key(0), each=2)
    assert found.asked.tolist() == [0, 1, 2] * 2 and found.blank is not None
    # Guidance leads away from 0.5.
    np.testing.assert_allclose(found.images.mean((1, 2, 3)), [-1, -0.25, 0.5] * 2, atol=1e-3)
    np.testing.assert_allclose(found.blank, np.full((6, 4, 4, 1), 0.5), atol=1e-3)
    np.testing.assert_array_equal(digits.shares(np.array([1, 1, 9, 1])), [0, 0.75, *[0] * 7, 0.25])


class Decoder:
    """Latents that are the images."""

    example_shape = (4, 4, 1)

    def decoded(self, latents: np.ndarray) -> np.ndarray:
        return latents


def test_samples_of_latents_are_decoded() -> None:
    found = digits.drawn(Shades(), LatentSampler(steps=5), Decoder(), jax.random.key(0), each=2)
    assert found.asked.tolist() == [0, 1, 2] * 2 and found.blank is None
    np.testing.assert_allclose(found.images.mean((1, 2, 3)), [-0.5, 0, 0.5] * 2, atol=1e-3)


@jax.tree_util.register_static
class Told(Shades):
    """The same, of the first token of a text."""

    config = SimpleNamespace(noising=Noising("cosine", 100), image_size=(4, 4), image_channels=1, blank=(3, 3))

    def encode(self, tokens: jax.Array) -> jax.Array:
        return tokens[:, 0]

    def __call__(self, x: jax.Array, t: jax.Array, context: jax.Array) -> jax.Array:
        return Shades.__call__(self, x, t, context)


def test_samples_of_captions_are_of_those_held_out() -> None:
    tokens, labels = np.array([[2, 3], [0, 3], [1, 3]]), np.array([8, 0, 1])
    split = SimpleNamespace(images=SimpleNamespace(labels=labels), batch=lambda step, rows: {"tokens": tokens[rows]})
    data = SimpleNamespace(open=lambda name, **_: {"validation": split}[name])
    found = digits.drawn(Told(), CaptionSampler(steps=5, guidance=1.0), data, jax.random.key(0), each=1)
    assert found.asked.tolist() == [8] * 4 + [0] * 4 + [1] * 4
    np.testing.assert_allclose(found.images.mean((1, 2, 3)), [0.5] * 4 + [-0.5] * 4 + [0] * 4, atol=1e-3)


def test_distances_are_to_the_nearest() -> None:
    images = np.stack([np.full((2, 2, 1), shade) for shade in (0.0, 0.5, 1.0)])
    among = np.stack([np.full((2, 2, 1), shade) for shade in (-1.0, 0.125, 1.0)])
    np.testing.assert_allclose(digits.nearest(images, among), [0.125, 0.375, 0], atol=1e-7)


@pytest.mark.large
def test_the_recipe_draws_the_digits_it_is_asked_for(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli.main(["train", "ddpm-digits", "--run", str(run)]) == 0
    figures = digits.measure(run)
    assert figures.known >= 0.95 and figures.asked >= 0.9 and figures.each.min() >= 0.03
    assert (run / "samples.png").is_file() and (run / "denoising.png").is_file()
