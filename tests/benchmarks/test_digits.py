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
from zoo.train.image_sampler import ImageSampler


@jax.tree_util.register_static
class Shades:
    """The exact noise predictor of images of one shade, -0.5, 0 and 0.5 for classes 0, 1 and 2, and 0.5 for none."""

    config = SimpleNamespace(noising=Noising("cosine", 100), num_classes=3, null_class=True)

    def __call__(self, x: jax.Array, t: jax.Array, classes: jax.Array) -> jax.Array:
        signal, sigma = map(schedules.over_images, schedules.make(self.config.noising).at(t))
        return (x - signal * schedules.over_images(jnp.array([-0.5, 0.0, 0.5, 0.5])[classes])) / sigma


def test_samples_are_counted_by_what_they_are() -> None:
    def classify(images: np.ndarray) -> np.ndarray:
        # It takes class 1 for class 0.
        return np.where(images.mean((1, 2, 3)) > 0.25, 2, 0)

    sampler = ImageSampler(rows=1, columns=1, steps=5)
    found = digits.counted(Shades(), sampler, (4, 4, 1), classify, jax.random.key(0), each=4)
    assert found.asked == pytest.approx(2 / 3)
    np.testing.assert_array_equal(found.each, [0, 0, 1])
    assert found.conditional.shape == (12, 4, 4, 1)


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
