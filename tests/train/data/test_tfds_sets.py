"""Data sets of TFDS by name: builders that write their own data, so that nothing is downloaded."""

import io
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from zoo.train.data.images import ImageData
from zoo.train.data.text import TextData
from zoo.train.experiment import UserError


class _Sentences(tfds.core.GeneratorBasedBuilder):
    """Twelve texts for training; subclasses say which splits there are."""

    VERSION = tfds.core.Version("1.2.0")
    SPLITS = ("train", "validation")

    def _info(self):
        features = {"text": tfds.features.Text(), "number": np.int64}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.SPLITS}

    def _generate_examples(self, split):
        for i in range(12):
            yield i, {"text": f"{split}: this is text number {i}, é.", "number": i}


class ZooSplitSentences(_Sentences):
    """With a validation split."""


class ZooUndividedSentences(_Sentences):
    """With a test split alone beside the training split."""

    SPLITS = ("train", "test")


class ZooTestSentences(_Sentences):
    """Without a training split."""

    SPLITS = ("test",)


class ZooSquares(tfds.core.GeneratorBasedBuilder):
    """Twenty images of random noise, of 8 x 8 or larger."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=2),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        rng = np.random.default_rng(0)
        for i in range(20):
            png = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (8, 8 + i % 2, 3), np.uint8)).save(png, "png")
            yield i, {"image": io.BytesIO(png.getvalue()), "label": i % 2}


def texts(data: TextData, split: str) -> set[str]:
    return set(data.documents(split))


def test_splits_of_the_set():
    data = TextData("zoo_split_sentences:1.2.0", length=8)
    assert texts(data, "train") == {f"train: this is text number {i}, é." for i in range(12)}
    assert texts(data, "validation") == {f"validation: this is text number {i}, é." for i in range(12)}
    info = data.open("train", batch_size=2, seed=0).info
    assert info.name == "zoo_split_sentences/1.2.0" and info.examples == 12
    assert info.bytes == sum(len(text.encode()) for text in texts(data, "train"))


def test_training_text_is_held_out_where_there_is_no_validation_split():
    data = TextData("zoo_undivided_sentences", length=8, validation_fraction=0.25)
    train, validation = texts(data, "train"), texts(data, "validation")
    assert train | validation == {f"train: this is text number {i}, é." for i in range(12)}
    assert len(validation) == 3 and not train & validation


def test_what_is_found_is_not_written_again(cache):
    TextData("zoo_split_sentences", length=8).prepare()
    (info,) = (cache / "tfds" / "zoo_split_sentences").rglob("dataset_info.json")
    assert json.loads(info.read_text())["fileFormat"] == "array_record"
    before = info.stat().st_mtime_ns
    TextData("zoo_split_sentences", length=8, train_bpe=260).prepare()
    assert info.stat().st_mtime_ns == before


def test_the_folder_of_tfds_is_respected(tmp_path, monkeypatch, fresh_cache):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "mine"))
    TextData("zoo_split_sentences", length=8).prepare()
    assert list((tmp_path / "mine" / "zoo_split_sentences").rglob("dataset_info.json"))
    assert not (fresh_cache / "tfds").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TextData("zoo_test_sentences"), "has no split 'train': its splits are 'test'"),
        (TextData("zoo_split_sentences:9.9.9"), "cannot be prepared .* 9.9.9"),
        (
            TextData("zoo_split_sentences", text_field="body"),
            "has no feature 'body': its features are 'number', 'text'",
        ),
        (TextData("zoo_split_sentences", text_field="number"), "'number' of .* is not text"),
        (TextData("zoo_split_sentense"), "did you mean zoo_split_sentences"),
        (ImageData("zoo_squares"), "has images of 8 x . x 3 and of 8 x . x 3: give one size by --data.size"),
        (ImageData("zoo_split_sentences"), "has no feature 'image'"),
        (ImageData("zoo_split_sentences", image_field="text"), "'text' of .* is no image"),
    ],
)
def test_wrong_input_is_answered_in_one_line(data, message):
    with pytest.raises(UserError, match=message) as raised:
        data.prepare()
    assert "\n" not in str(raised.value)


def test_images_are_brought_to_one_size():
    data = ImageData("zoo_squares", size=8)
    assert data.example_shape == (8, 8, 3)
    dataset = data.open("train", batch_size=4, seed=0)
    assert dataset.info.examples == 18 and dataset.batch(0, range(4))["images"].shape == (4, 8, 8, 3)
