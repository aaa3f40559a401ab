"""Networks that look at images: which features they give, of which images, and what is none."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import zoo
from zoo import models
from zoo.layers.linear import Precision
from zoo.train import checkpoints, run_folder
from zoo.train.data.images import ImageData
from zoo.train.experiment import DataInfo, Placement, UserError
from zoo.train.feature_network import open_network
from zoo.train.recipes import RECIPES

PUBLISHED = Path(__file__).parents[1] / "parity" / "vit" / "vit"
VIT = dataclasses.replace(models.preset("vit-digits"), num_layers=1, width=16, num_heads=2, mlp_width=16)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAXZOO_CACHE", str(tmp_path / "cache"))


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_those_of_a_run_are_what_its_vit_pools(tmp_path: Path) -> None:
    model = jax.jit(lambda: VIT.build(nnx.Rngs(0)))()
    trained_in_bfloat16 = dataclasses.replace(VIT, precision=Precision(compute="bfloat16"))
    experiment = dataclasses.replace(RECIPES["vit-digits"](), model=trained_in_bfloat16)
    run_folder.create(tmp_path / "run", experiment, trained_in_bfloat16, DataInfo("digits", "", 0, 0))
    kept = checkpoints.Checkpoints(tmp_path / "run" / run_folder.CHECKPOINTS, keep_last=1)
    kept.save(7, {"ema": model}, meta={})
    kept.wait()
    ImageData().prepare()
    network, images = open_network(str(tmp_path / "run"), Placement()), pixels(70, 8, 8, 1)
    assert network.name == f"vit-digits ({tmp_path / 'run'}, step 7)"
    expected = model(images / np.float32(127.5) - 1).pooled
    found = network.features(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(network.features(images[66:]), expected[66:], atol=1e-5)
    with pytest.raises(UserError, match=r"images of 3 channels are shown to vit-digits .*, which takes 1"):
        network.features(pixels(2, 8, 8, 3))


def test_published_ones_see_images_in_their_size_and_colours(tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    shutil.copytree(PUBLISHED, folder)
    mean, deviation = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    told = {"do_normalize": True, "image_mean": mean, "image_std": deviation}
    images = pixels(3, 8, 10, 1)
    grey = jax.image.resize(images.astype(np.float32), (3, 20, 20, 1), "cubic") / 255
    model = zoo.from_pretrained(folder)
    expected = [model(2 * grey.repeat(3, -1) - 1).pooled, model((grey - np.array(mean)) / np.array(deviation)).pooled]
    plain = open_network(str(folder), Placement()).features(images)
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    normalised = open_network(str(folder), Placement()).features(images)
    for found, own in zip((plain, normalised), expected, strict=True):
        np.testing.assert_allclose(found, own, atol=1e-5)
    for changes in ({"do_normalize": False}, {"image_std": None}, {"image_mean": [0.5], "image_std": ["x"]}):
        (folder / "preprocessor_config.json").write_text(json.dumps(told | changes))
        with pytest.raises(UserError, match=r"preprocessor_config.json has image_mean .* and image_std"):
            open_network(str(folder), Placement())


def test_what_is_no_network_of_features_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--features nothing is not there: name a run of vit-digits or another ViT, a"):
        open_network("nothing", Placement())
    with pytest.raises(UserError, match=r"--features tests/nothing is not there"):
        open_network("tests/nothing", Placement())
    with pytest.raises(UserError, match=r"is a GPT, which is no ViT: name a run of"):
        open_network(str(PUBLISHED.parents[1] / "gpt2"), Placement())
    recipe = RECIPES["gpt-nano"]()
    run_folder.create(tmp_path / "run", recipe, recipe.model, DataInfo("texts", "", 0, 0))
    with pytest.raises(UserError, match=r"is a run of gpt-nano, which is no ViT: name a run of"):
        open_network(str(tmp_path / "run"), Placement())
