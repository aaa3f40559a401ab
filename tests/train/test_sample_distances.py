"""Distances of a run's samples: what is compared, that a model which knows the images is nearer, and refusals."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo import models, sharding
from zoo.diffusion import schedules
from zoo.models.noising import Noising
from zoo.train import checkpoints, run_folder, sample_distances
from zoo.train.data.images import ImageData
from zoo.train.experiment import Placement, UserError
from zoo.train.feature_network import FeatureNetwork
from zoo.train.image_sampler import ImageSampler
from zoo.train.recipes import RECIPES
from zoo.train.sample_distances import compared, distances

VIT = dataclasses.replace(models.preset("vit-digits"), num_layers=1, width=16, num_heads=2, mlp_width=16)
UNET = dataclasses.replace(models.preset("ddpm-digits"), channels=(4, 8), groups=2)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLAXZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def a_run(folder: Path, recipe: str, config: Any) -> Path:
    """As training leaves it, with the model it began with."""
    experiment = dataclasses.replace(RECIPES[recipe](), model=config)
    info = experiment.data.open("train", batch_size=1, seed=0).info
    run_folder.create(folder, experiment, config, info)
    kept = checkpoints.Checkpoints(folder / run_folder.CHECKPOINTS, keep_last=1)
    kept.save(1, {"ema": jax.jit(lambda: config.build(nnx.Rngs(0)))()}, meta={})
    kept.wait()
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of a U-Net, and of a ViT."""
    folder = tmp_path_factory.mktemp("runs")
    return a_run(folder / "ddpm", "ddpm-digits", UNET), a_run(folder / "vit", "vit-digits", VIT)


def test_samples_and_training_images_are_compared_with_real_ones(runs: tuple[Path, Path]) -> None:
    unet, vit = runs
    asked: dict[str, Any] = {"samples": 150, "real": 400, "changes": {"steps": 2, "guidance": 1.0}}
    found = distances(unet, Placement(), str(vit), **asked)
    assert (found.network, found.width) == (f"vit-digits ({vit}, step 1)", 16)
    assert [(row.of, row.to) for row in found.rows] == [
        ("150 samples", "178 held out"),
        ("150 training", "178 held out"),
        ("150 samples", "400 training"),
        ("150 training", "250 others"),
    ]
    assert {row.kernel.size for row in found.rows} == {75}
    # A network of zeros draws noise: real images are nearer to one another.
    for samples, floor in (found.rows[:2], found.rows[2:]):
        assert samples.frechet > 3 * floor.frechet and samples.kernel.value > 5 * abs(floor.kernel.value)
    again = distances(unet, Placement(mesh="data=4,tensor=2"), str(vit), **asked)
    assert [row.frechet for row in again.rows] == pytest.approx([row.frechet for row in found.rows], rel=1e-3)


@jax.tree_util.register_static
class Knowing:
    """The exact noise predictor of given images, and one that takes their mean for all it sees."""

    config = SimpleNamespace(noising=Noising("cosine", 100))

    def __init__(self, images: np.ndarray, *, blind: bool):
        self.images, self.blind = images, blind

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        signal, sigma = map(schedules.over_images, schedules.make(self.config.noising).at(t))
        known = jnp.asarray(self.images)
        squares = jnp.square(x[:, None] - signal[:, None] * known).sum((2, 3, 4))
        weights = jax.nn.softmax(-squares / (2 * jnp.square(sigma[:, 0, 0])))
        clean = known.mean(0) if self.blind else jnp.einsum("bn,nyxc->byxc", weights, known)
        return (x - signal * clean) / sigma


def test_a_model_that_knows_the_images_is_nearer_than_one_that_knows_their_mean() -> None:
    pixels = ImageData().pixels("train")[:400]
    model = jax.jit(lambda: VIT.build(nnx.Rngs(0)))()
    mesh = sharding.make_mesh(None, jax.devices()[:1])
    network = FeatureNetwork("random", model, (8, 8), 1, lambda model, x: model(x).pooled, mesh)
    held_out, train = network.features(pixels[200:]), network.features(pixels[:200])
    found = []
    for blind in (False, True):
        known = Knowing(pixels[:200] / np.float32(127.5) - 1, blind=blind)
        sampler, data = ImageSampler(steps=10), SimpleNamespace(example_shape=(8, 8, 1))
        drawn = sampler.draws(known, data, jax.random.key(0), 120, 40)
        samples = np.concatenate([network.features(sample_distances._as_stored(batch)) for batch in drawn])
        found.append(compared(network, samples, held_out, train).rows[0])
    knowing, blind = found
    assert blind.frechet > 5 * knowing.frechet and blind.kernel.value > 5 * abs(knowing.kernel.value)


def test_what_cannot_be_compared_is_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    unet, vit = runs

    def refused(run: Path, samples: int = 100, real: int = 200, **changes: Any) -> str:
        with pytest.raises(UserError) as raised:
            distances(run, Placement(), str(vit), samples=samples, real=real, changes=changes)
        return str(raised.value)

    assert "--features is of runs that draw images, and vit-digits draws none: leave it out" in refused(vit)
    assert "--samples 99 are too few for a distance: it takes 100 or more" in refused(unet, samples=99)
    assert "--real-images 199 are too few" in refused(unet, real=199)
    assert "0 sampling steps are not in the model's 1 to 1000" in refused(unet, steps=0)
    with pytest.raises(UserError, match="samples are not finite: the run did not learn to draw"):
        sample_distances._as_stored(np.full((1, 2, 2, 1), np.nan))
