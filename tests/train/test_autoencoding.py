"""Autoencoders: what is summed and reported, what is shown, and that one learns digits."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from zoo import sharding
from zoo.models import preset
from zoo.models.autoencoder import Posterior, Reconstruction
from zoo.train.data.images import ImageData, Images
from zoo.train.experiment import DataInfo, Experiment, Optimizer, UserError
from zoo.train.objectives import Autoencoding
from zoo.train.samplers import ReconstructionSampler
from zoo.train.step import eval_step, init_state, train_step


@jax.tree_util.register_pytree_node_class
class Darker:
    """Gives images back darker by 0.5, from latents that are 3 everywhere."""

    config = SimpleNamespace()

    def __call__(self, images: jax.Array, *, key: Any = None) -> Reconstruction:
        latents = jnp.full((len(images), 1, 2, 1), 3.0)
        return Reconstruction(images - 0.5, latents, Posterior(latents, jnp.zeros_like(latents)))

    def tree_flatten(self) -> tuple:
        return (), None

    @classmethod
    def tree_unflatten(cls, _, __) -> "Darker":
        return cls()


@pytest.mark.parametrize(("error", "expected"), [("absolute", 0.5), ("squared", 0.25)])
def test_error_and_divergence_are_weighed(error, expected) -> None:
    """The divergence is 9 nats an image, two entries of a mean of 3; an image has 24 values."""
    batch = {"images": jnp.zeros((3, 2, 4, 3)), "weights": jnp.array([1.0, 1.0, 0.0])}
    objective = Autoencoding(kl_weight=0.1, error=error)
    loss = objective.loss(Darker(), batch, None)
    assert float(loss.weight) == 2
    figures = objective.summary(float(loss.total), 2.0, {name: float(x) for name, x in loss.metrics.items()})
    assert figures == pytest.approx(
        {"loss": expected + 0.1 * 9 / 24, "error": expected, "kl": 9.0, "latent_rms": 3.0}, rel=1e-6
    )


class Data:
    """Seven held-out images, told apart by their brightness."""

    def open(self, split: str, *, batch_size: int, seed: int) -> Images:
        assert split == "validation"
        pixels = np.broadcast_to(np.arange(7, dtype=np.uint8)[:, None, None, None] * 40, (7, 3, 4, 1))
        return Images(DataInfo("test", "", 7, 0), pixels, np.zeros(7, np.int32), batch_size, None)


def test_reconstructions_stand_below_their_images(tmp_path) -> None:
    sampler = ReconstructionSampler(rows=5, columns=3, scale=2)
    images = sampler.paired(Darker(), Data(), jax.random.key(0)).reshape(2, 2, 3, 3, 4, 1)
    np.testing.assert_allclose(images[:, 1], np.clip(images[:, 0] - 0.5, -1, 1), atol=1e-6)
    assert len(np.unique(images[:, 0])) == 6
    path = sampler.sample(Darker(), Data(), jax.random.key(0), tmp_path)
    assert path == str(tmp_path / "samples.png")
    assert Image.open(path).size == ((3 * 5 + 1) * 2, (4 * 4 + 1) * 2)
    with pytest.raises(UserError, match="a grid of 0 x 3 images is empty"):
        ReconstructionSampler(rows=0, columns=3).check(None, Data())


def test_more_columns_than_images_show_some_as_blank() -> None:
    images = ReconstructionSampler(rows=1, columns=9).paired(Darker(), Data(), jax.random.key(0))
    assert images.shape == (18, 3, 4, 1)


def test_digits_it_has_not_seen_come_through_its_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far nearer than the median of all digits is, the best that can be said of none in particular."""
    monkeypatch.setenv("FLAXZOO_CACHE", str(tmp_path))
    model = dataclasses.replace(preset("autoencoder-digits"), channels=(8, 16, 16), groups=4)
    experiment = Experiment(
        "tiny",
        model,
        ImageData(source="digits", size=16),
        Autoencoding(kl_weight=1e-3),
        ReconstructionSampler(),
        Optimizer(learning_rate=1e-2, warmup_steps=10, b2=0.99, weight_decay=0.0),
        steps=120,
        batch_size=32,
    )
    training: Any = experiment.data.open("train", batch_size=32, seed=0)
    batch: Any = experiment.data.open("validation", batch_size=128, seed=0).batch(0, range(128))
    mesh = sharding.make_mesh("", jax.devices()[:1])
    with sharding.use(mesh):
        step, state = train_step(experiment, mesh), init_state(experiment, mesh)
        for i in range(experiment.steps):
            state, _ = step(state, training.batch(i, range(32)))
        _, weight, metrics = eval_step(experiment, mesh)(state.model, batch)
    error = float(metrics["error"] / weight)
    ignorant = np.abs(batch["images"] - np.median(training.pixels / 127.5 - 1, 0)).mean()
    assert error < 0.4 * ignorant, (error, ignorant)
