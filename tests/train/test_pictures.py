import numpy as np
import pytest
from PIL import Image

from zoo.train import pictures


def test_grid_goes_row_by_row_and_leaves_the_rest_grey() -> None:
    images = np.stack([np.full((2, 3, 1), value, np.float32) for value in (-1, 1, 0.5)])
    pixels = pictures.grid(images, 2, gap=1)
    assert pixels.shape == (7, 9, 1) and pixels.dtype == np.uint8
    assert (pixels[1:3, 1:4] == 0).all() and (pixels[1:3, 5:8] == 255).all() and (pixels[4:6, 1:4] == 191).all()
    assert (pixels[4:6, 5:8] == 128).all() and (pixels[0] == 128).all()


def test_grid_clips_and_enlarges_without_smoothing() -> None:
    image = np.array([[-9.0, 9.0], [0.0, 1.0]], np.float32)[None, :, :, None]
    pixels = pictures.grid(image, 1, scale=3, gap=0)[..., 0]
    np.testing.assert_array_equal(pixels, np.kron([[0, 255], [128, 255]], np.ones((3, 3))))


@pytest.mark.parametrize("channels", [1, 3])
def test_captions_stand_below_their_images(channels) -> None:
    pixels = pictures.captioned(np.zeros((3, 4, 5, channels), np.float32), ["8", "", "1, not 7"], 2, scale=6)
    tall, wide, line = 24, 30, pictures.CAPTION_HEIGHT
    assert pixels.shape == (2 * (tall + line + 4) + 4, 2 * (wide + 4) + 4, channels)
    first, second = (pixels[4 + tall :][:line, x : x + wide] for x in (4, 8 + wide))
    assert first.max() > 200 and first.min() == 0 and not second.any()
    assert (pixels[4 : 4 + tall, 4 : 4 + wide] == 128).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_png_reads_back_as_written(tmp_path, channels) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, channels), np.uint8)
    path = tmp_path / "new" / "picture.png"
    pictures.write_png(pixels, path)
    np.testing.assert_array_equal(np.asarray(Image.open(path)).reshape(pixels.shape), pixels)
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]


def test_failed_write_leaves_the_old_picture(tmp_path, monkeypatch) -> None:
    path = tmp_path / "picture.png"
    pictures.write_png(np.zeros((2, 2, 1), np.uint8), path)
    before = path.read_bytes()

    def fail(self: Image.Image, file, **options) -> None:
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space"):
        pictures.write_png(np.ones((2, 2, 1), np.uint8), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
