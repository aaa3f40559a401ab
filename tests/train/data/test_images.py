import dataclasses

import numpy as np
import pytest
from PIL import Image

from zoo.train.data.images import ImageData, Images
from zoo.train.experiment import DataConfig, DataInfo, Dataset, UserError

INFO = DataInfo("test", "", 0, 0)


def numbered(count: int, batch_size: int, seed: int | None, flip: bool = False) -> Images:
    pixels = np.zeros((count, 2, 2, 1), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(count)
    return Images(INFO, pixels, np.arange(count, dtype=np.int32), batch_size, seed, flip)


def test_digits():
    data: DataConfig = ImageData()
    train: Dataset = data.open("train", batch_size=128, seed=0)
    validation = data.open("validation", batch_size=128, seed=0)
    assert data.example_shape == (8, 8, 1) and data.unit == "images"
    assert train.info.examples + validation.info.examples == 1797
    assert 0.09 < validation.info.examples / 1797 <= 0.1
    assert "10 classes" in train.info.detail
    batch = train.batch(0, range(128))
    assert batch["images"].dtype == np.float32 and batch["images"].min() == -1 and batch["images"].max() == 1
    assert set(batch["labels"].tolist()) == set(range(10))
    grey = np.unique(np.concatenate([train.batch(s, range(128))["images"].ravel() for s in range(12)]))
    np.testing.assert_allclose(grey, np.arange(17) / 8 - 1, atol=1.01 / 255)


def test_held_out_images_are_not_in_the_training_set():
    data = ImageData()
    one, other = (data.open(split, batch_size=1, seed=0).pixels for split in ("train", "validation"))
    train = {image.tobytes() for image in one}
    assert not train & {image.tobytes() for image in other}


def test_validation_walks_every_image_once_in_order():
    data = numbered(10, 4, None)
    batches = [data.batch(step, range(4)) for step in range(data.batches)]
    labels = np.concatenate([b["labels"][b["weights"] > 0] for b in batches])
    assert labels.tolist() == list(range(10))
    assert batches[-1]["weights"].tolist() == [1, 1, 0, 0]
    assert not batches[-1]["images"][2:].any()


def test_a_training_pass_takes_every_image_once():
    data = numbered(12, 4, seed=1)
    passes = [np.concatenate([data.batch(e * 3 + s, range(4))["labels"] for s in range(3)]).tolist() for e in range(3)]
    assert all(sorted(order) == list(range(12)) for order in passes)
    assert passes[0] != passes[1]


def test_a_batch_depends_on_seed_step_and_row_alone():
    data = numbered(50, 8, seed=3, flip=True)
    whole, part = data.batch(9, range(8)), data.batch(9, [5, 2])
    for name in whole:
        np.testing.assert_array_equal(part[name], whole[name][[5, 2]])


def test_half_of_the_training_images_are_mirrored():
    plain, flipped = numbered(200, 100, seed=0), numbered(200, 100, seed=0, flip=True)
    a, b = (np.concatenate([d.batch(s, range(100))["images"] for s in range(20)]) for d in (plain, flipped))
    mirrored = (a != b).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(b[mirrored], a[mirrored][:, :, ::-1])
    assert 0.45 < mirrored.mean() < 0.55
    np.testing.assert_array_equal(
        numbered(20, 4, None, flip=True).batch(0, range(4))["images"],
        numbered(20, 4, None).batch(0, range(4))["images"],
    )


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_a_folder_of_classes(folder):
    data = ImageData(str(folder), validation_fraction=0.2)
    train, validation = (data.open(split, batch_size=4, seed=0) for split in ("train", "validation"))
    assert data.example_shape == (6, 6, 3)
    assert len(validation.labels) == 4 and len(train.labels) == 16
    dogs = {np.asarray(Image.open(file)).tobytes() for file in (folder / "dog").iterdir()}
    for image, label in zip(train.pixels, train.labels, strict=True):
        assert label == (image.tobytes() in dogs)


def test_sizes_and_transparency(folder):
    Image.new("RGBA", (12, 20), (255, 0, 0, 0)).save(folder / "cat" / "clear.png")
    with pytest.raises(UserError, match="give one size by"):
        ImageData(str(folder)).prepare()
    data = ImageData(str(folder), size=6)
    pixels = np.concatenate([data.open(split, batch_size=1, seed=0).pixels for split in ("train", "validation")])
    assert (pixels == 255).all(axis=(1, 2, 3)).sum() == 1


def test_a_folder_with_splits_of_its_own(folder, tmp_path_factory):
    split = tmp_path_factory.mktemp("split")
    for name in ("train", "validation"):
        (split / name).mkdir()
        (folder / "cat").rename(split / name / "cat") if name == "train" else (folder / "dog").rename(
            split / name / "dog"
        )
    data = ImageData(str(split))
    assert set(data.open("train", batch_size=1, seed=0).labels) == {0}
    assert set(data.open("validation", batch_size=1, seed=0).labels) == {1}


@dataclasses.dataclass(frozen=True)
class Model:
    image_channels: int


def test_fit_sets_the_channels():
    assert ImageData().fit(Model(3)) == Model(1)


@dataclasses.dataclass(frozen=True)
class Classifier(Model):
    image_size: tuple[int, int]
    labels: tuple[str, ...]


def test_fit_sets_size_and_classes_where_a_model_has_them():
    named = tuple("abcdefghij")
    assert ImageData().fit(Classifier(1, (4, 4), named)) == Classifier(1, (8, 8), named)
    assert ImageData(size=6).fit(Classifier(3, (8, 8), ("a", "b"))) == Classifier(1, (6, 6), tuple("0123456789"))


@dataclasses.dataclass(frozen=True)
class OfClasses(Model):
    num_classes: int | None


def test_fit_counts_the_classes_of_a_model_that_is_told_them():
    assert ImageData().fit(OfClasses(1, 3)) == OfClasses(1, 10)
    assert ImageData().fit(OfClasses(1, None)) == OfClasses(1, None)


def test_wrong_input_is_answered_in_one_line(folder, tmp_path_factory):
    (folder / "cat" / "0.png").write_bytes(b"no picture")
    cases = [
        (ImageData(str(folder)), "0.png cannot be read as a picture"),
        (ImageData("./absent"), "no folder './absent'"),
        (ImageData("mnsit"), "did you mean mnist"),
        (ImageData(size=0), "image size 0"),
        (ImageData(validation_fraction=2), "between 0 and 1"),
        (ImageData(str(tmp_path_factory.mktemp("empty"))), "holds no .png"),
    ]
    for data, message in cases:
        with pytest.raises(UserError, match=message) as raised:
            data.prepare()
        assert "\n" not in str(raised.value)
