import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import zoo
from zoo import models
from zoo.train import checkpoints, run_folder
from zoo.train.data import latents
from zoo.train.data.latents import LatentData
from zoo.train.experiment import DataConfig, DataInfo, Dataset, UserError
from zoo.train.recipes import RECIPES

TINY = dataclasses.replace(
    models.preset("autoencoder-digits"), channels=(4, 4), groups=2, sample_size=8, scaling_factor=0.5, shift_factor=0.25
)


@pytest.fixture(scope="module")
def autoencoder():
    return jax.jit(lambda: TINY.build(nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def published(autoencoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "autoencoder"
    zoo.save_pretrained(autoencoder, folder)
    return folder


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    """Of this module: latents are encoded once for its tests."""
    return tmp_path_factory.mktemp("cache")


def test_latents_are_those_of_the_published_encoder(autoencoder, published):
    data: DataConfig = LatentData(autoencoder=str(published))
    validation: Dataset = data.open("validation", batch_size=4, seed=0)
    batch, pixels = validation.batch(0, range(4)), validation.images.batch(0, range(4))
    expected = TINY.scaled(autoencoder.encode(pixels["images"]).mean)
    assert data.example_shape == (4, 4, 4) == batch["images"].shape[1:]
    np.testing.assert_allclose(batch["images"], expected, atol=2e-3)  # they are kept in half precision
    np.testing.assert_array_equal(batch["labels"], pixels["labels"])
    decoded = autoencoder.decode(TINY.unscaled(batch["images"]))
    np.testing.assert_allclose(data.decoded(batch["images"]), np.clip(decoded, -1, 1), atol=1e-5)


def test_training_draws_anew_and_a_batch_depends_on_seed_step_and_row_alone(published):
    data = LatentData(autoencoder=str(published), flip=True)
    train = data.open("train", batch_size=8, seed=3)
    whole, part = train.batch(5, range(8)), train.batch(5, [6, 1])
    for name in whole:
        np.testing.assert_array_equal(part[name], whole[name][[6, 1]])
    count = len(train.images.labels)
    assert len(train.moments) == 2 * count
    index, chosen, _ = train.images.choose(5, range(8))
    mirrored = train.images.mirrored(index)
    assert mirrored.any() and not mirrored.all()
    mean, log_variance = np.split(train.moments[chosen + count * mirrored].astype(np.float32), 2, -1)
    noise = ((whole["images"] - train.offset) / train.factor - mean) / np.exp(0.5 * log_variance)
    assert abs(noise.mean()) < 0.2 and 0.8 < noise.std() < 1.2


def test_a_run_s_latents_have_unit_deviation_and_follow_it(autoencoder, tmp_path):
    run = tmp_path / "run"
    recipe = RECIPES["autoencoder-digits"]()
    experiment = dataclasses.replace(recipe, model=TINY, data=dataclasses.replace(recipe.data, size=8))
    data = LatentData(autoencoder=str(run))
    with pytest.raises(UserError, match=r"no folder .*: train one by `zoo train autoencoder-digits --run"):
        data.prepare()
    run_folder.create(run, experiment, TINY, DataInfo("digits", "", 0, 0))
    with pytest.raises(UserError, match="is a run without a checkpoint"):
        data.prepare()
    saved(run, autoencoder, 1)
    train = data.open("train", batch_size=512, seed=0)
    drawn = np.concatenate([train.batch(step, range(512))["images"] for step in range(3)])
    assert abs(drawn.mean()) < 0.01 and abs(drawn.std() - 1) < 0.01
    before = data._latents()
    saved(run, jax.tree.map(lambda x: 1.1 * x, autoencoder), 2)
    assert data._latents() != before


def saved(run, model, step):
    kept = checkpoints.Checkpoints(run / run_folder.CHECKPOINTS, keep_last=2)
    kept.save(step, {"ema": model}, meta={})
    kept.wait()


def test_a_model_is_fitted_to_them(published):
    data = LatentData(autoencoder=str(published))
    fitted = data.fit(dataclasses.replace(models.preset("dit-digits"), image_channels=3, image_size=16, num_classes=3))
    assert (fitted.image_channels, fitted.image_size, fitted.num_classes) == (4, 4, 10)
    assert data.fit(models.preset("ddpm-digits")).image_size == (4, 4)


def test_another_model_is_no_autoencoder(tmp_path):
    folder = tmp_path / "network"
    config = models.preset("dit-digits")
    zoo.save_pretrained(jax.jit(lambda: config.build(nnx.Rngs(0)))(), folder)
    with pytest.raises(UserError, match="is a DiT, and no autoencoder"):
        LatentData(autoencoder=str(folder)).prepare()
    assert latents._complete(tmp_path) is False
