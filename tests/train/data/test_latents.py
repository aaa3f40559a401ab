import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import zoo
from zoo import models
from zoo.train import checkpoints, run_folder
from zoo.train.data import encoding, latents
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
    data = LatentData(autoencoder=str(run))
    with pytest.raises(UserError, match=r"no folder .*: train one by `zoo train autoencoder-digits --run"):
        data.prepare()
    created(run)
    with pytest.raises(UserError, match="is a run without a checkpoint"):
        data.prepare()
    saved(run, autoencoder, 1)
    train = data.open("train", batch_size=512, seed=0)
    drawn = np.concatenate([train.batch(step, range(512))["images"] for step in range(3)])
    assert abs(drawn.mean()) < 0.01 and abs(drawn.std() - 1) < 0.01
    before = data._latents()
    saved(run, jax.tree.map(lambda x: 1.1 * x, autoencoder), 2)
    assert data._latents() != before


def created(run):
    recipe = RECIPES["autoencoder-digits"]()
    experiment = dataclasses.replace(recipe, model=TINY, data=dataclasses.replace(recipe.data, size=8))
    run_folder.create(run, experiment, TINY, DataInfo("digits", "", 0, 0))


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


PARTS = ("train.moments", "validation.moments", "latents.json")


def files(folder):
    return {name: (folder / name).read_bytes() for name in PARTS}


def only(cache):
    (folder,) = [path for path in (cache / "latents").iterdir() if path.is_dir()]
    return files(folder)


@pytest.fixture
def saves(monkeypatch):
    """The pieces written, in turn; the one after `saves.limit` is interrupted."""

    class Saves(list):
        limit = None

    done, save = Saves(), encoding.Encoding._save

    def watched(self, piece, content):
        if done.limit is not None and len(done) >= done.limit:
            raise KeyboardInterrupt
        save(self, piece, content)
        done.append(piece.file_name)

    monkeypatch.setattr(encoding.Encoding, "_save", watched)
    return done


def test_a_killed_preparation_goes_on_where_it_was(published, tmp_path, monkeypatch, saves):
    whole = files(LatentData(autoencoder=str(published), flip=True)._latents())
    saves.clear()
    monkeypatch.setenv("FLAXZOO_CACHE", str(tmp_path))
    data = LatentData(autoencoder=str(published), flip=True)
    saves.limit = 3
    with pytest.raises(KeyboardInterrupt):
        data.prepare()
    assert saves == ["train-0", "train-1024", "train-mirrored-0"]
    (pieces,) = (tmp_path / "latents").glob("*.pieces")
    cut = pieces / "train-1024"
    cut.write_bytes(cut.read_bytes()[:-1])  # As after a crash of the whole machine.
    saves.clear()
    saves.limit = None
    data.prepare()
    assert saves == ["train-1024", "train-mirrored-1024", "validation-0"]
    assert only(tmp_path) == whole
    assert not pieces.exists()


HOST = """
import os, sys
from pathlib import Path
from zoo.train import launch, processes, session
from zoo.train.data import encoding
from zoo.train.data.latents import LatentData
from zoo.train.experiment import Placement, UserError

folder, published, run, devices, coordinator, count, index = sys.argv[1:]
launch.start(Placement(simulate_devices=int(devices), coordinator=coordinator, num_processes=int(count),
                       process_id=int(index), compile_cache=False))
save = encoding.Encoding._save

def watched(self, piece, content):
    save(self, piece, content)
    with open(Path(folder) / f"{where}-{index}.txt", "a") as file:
        print(piece.file_name, file=file)

encoding.Encoding._save = watched
for where, autoencoder in (("one", published), (f"own{index}", run)):
    os.environ["FLAXZOO_CACHE"] = str(Path(folder) / where)
    session.prepare(LatentData(autoencoder=autoencoder, flip=True))
try:
    processes.on_each(lambda: int("none") if int(index) else 0)
except UserError as error:
    print("told:", error)
"""

PARENT = """
import sys
from zoo.train import hosts
from zoo.train.experiment import Placement
def command(p):
    return [sys.executable, "-c", *sys.argv[1:], str(p.simulate_devices), p.coordinator, str(p.num_processes),
            str(p.process_id)]
sys.exit(hosts.run(command, Placement(simulate_hosts=2, simulate_devices=4)))
"""


def test_processes_share_the_work_and_make_the_same_bits(autoencoder, published, tmp_path):
    """On one disk each encodes a share; on disks of their own each encodes all. This process has other devices."""
    alone = files(LatentData(autoencoder=str(published), flip=True)._latents())
    run = tmp_path / "run"
    created(run)
    saved(run, autoencoder, 1)
    command = [sys.executable, "-c", PARENT, HOST, str(tmp_path), str(published), str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "told: invalid literal for int() with base 10: 'none'\n"
    first, second = ((tmp_path / f"one-{index}.txt").read_text().split() for index in (0, 1))
    assert first == ["train-0", "train-mirrored-0", "validation-0"]
    assert second == ["train-1024", "train-mirrored-1024"]
    for index in (0, 1):
        assert len((tmp_path / f"own{index}-{index}.txt").read_text().split()) == 5
    own = only(tmp_path / "own0")
    assert only(tmp_path / "one") == alone and only(tmp_path / "own1") == own
    assert all(own[name] == alone[name] for name in PARTS[:2])  # A run's latents are scaled as they are measured.
    assert not list(tmp_path.glob("*/latents/*.p*")) and not list((tmp_path / "one").glob("*.[01]"))
