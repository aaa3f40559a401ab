import gzip
import struct

import numpy as np
import pytest

from zoo.train.data.images import ImageData
from zoo.train.experiment import UserError

RNG = np.random.default_rng(0)
IMAGES = {"train": RNG.integers(0, 256, (12, 6, 4), np.uint8), "t10k": RNG.integers(0, 256, (5, 6, 4), np.uint8)}
LABELS = {name: (np.arange(len(images)) % 3).astype(np.uint8) for name, images in IMAGES.items()}


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.fixture(params=["", ".gz"])
def folder(request, tmp_path):
    pack = gzip.compress if request.param else bytes
    for name in IMAGES:
        (tmp_path / f"{name}-images-idx3-ubyte{request.param}").write_bytes(pack(idx(IMAGES[name])))
        (tmp_path / f"{name}-labels-idx1-ubyte{request.param}").write_bytes(pack(idx(LABELS[name])))
    return tmp_path


def test_its_splits_are_those_published(folder):
    data = ImageData(str(folder))
    assert data.example_shape == (6, 4, 1)
    for split, name in (("train", "train"), ("validation", "t10k")):
        found = data.open(split, batch_size=4, seed=0)
        np.testing.assert_array_equal(found.pixels[..., 0], IMAGES[name])
        np.testing.assert_array_equal(found.labels, LABELS[name])
    assert ImageData(str(folder), size=8).example_shape == (8, 8, 1)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-images-idx3", lambda b: b[:-1], "has 303 bytes, and its head announces 304|ends within image 11 of 12"),
        ("train-images-idx3", lambda b: b + b"0", "has 305 bytes|is longer than the 12"),
        ("train-images-idx3", lambda b: b[:9], "ends within its head"),
        ("t10k-images-idx3", lambda b: b"\0\0\x0d" + b[3:], "begins with 00000d03, and they with 00000803"),
        ("t10k-images-idx3", lambda b: b[:4] + b"\xff" * 12, "announces 4294967295 x 4294967295 x"),
        ("t10k-labels-idx1", lambda b: idx(LABELS["train"]), "has 5 images and .* 12 classes"),
        ("t10k-labels-idx1", lambda b: b"", "is no IDX file of labels"),
    ],
)
def test_damage_is_answered_in_one_line(folder, name, change, message):
    (file,) = folder.glob(f"{name}-ubyte*")
    packed = file.suffix == ".gz"
    content = change(gzip.decompress(file.read_bytes()) if packed else file.read_bytes())
    file.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(UserError, match=message) as raised:
        ImageData(str(folder)).prepare()
    assert "\n" not in str(raised.value) and file.name in str(raised.value)


def test_a_packed_file_that_was_cut_and_one_that_is_missing(folder):
    (file,) = folder.glob("train-images-idx3-ubyte*")
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match="train-images-idx3-ubyte"):
        ImageData(str(folder)).prepare()
    file.unlink()
    with pytest.raises(UserError, match=r"and no train-images-idx3-ubyte\[.gz\]: add it"):
        ImageData(str(folder)).prepare()
