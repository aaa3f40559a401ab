"""Where images come from: scikit-learn's digits, a folder of pictures or of IDX files, TFDS; each as two splits."""

import importlib.metadata
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from zoo.train.data.files import LocalFiles, files_fingerprint
from zoo.train.data.idx_files import idx_files, read_idx
from zoo.train.data.splits import Undivided, check_fraction
from zoo.train.data.tfds_sets import TfdsSet, listed, tfds_read
from zoo.train.experiment import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Example(NamedTuple):
    """image: uint8 [Y, X, C]. label: from 0; 0 where the data has none."""

    image: np.ndarray
    label: int


class ImageSource(Protocol):
    """An image data set. `examples` yields the same examples in the same order at every call."""

    @property
    def name(self) -> str: ...

    def fingerprint(self) -> str:
        """Changes when the images may have changed; cheap."""
        ...

    def examples(self, split: str) -> Iterator[Example]:
        """The examples of "train" or "validation"; raises UserError where one cannot be read."""
        ...


def image_source(source: str, size: int | None, image_field: str, label_field: str, fraction: float) -> ImageSource:
    """The data set that `source` names: "digits", a folder, or a TFDS name[/config][:version].

    size: side to which images are brought (the middle square, scaled), None to take them as they are. fraction: of a
    set without a split, to hold out.
    """
    check_fraction(fraction)
    if size is not None and size < 1:
        raise UserError(f"image size {size} is not a whole number from 1")
    if source == "digits":
        return Digits(size, fraction)
    path = Path(source).expanduser()
    if source and path.exists():
        return IdxFolder(path, size) if idx_files(path) else ImageFolder(path, size, fraction)
    if not source or path.is_absolute() or source.startswith((".", "~")):
        raise UserError(f"no folder {source!r}: give a folder of pictures or of IDX files, or a TFDS name")
    return TfdsImages(source, size, image_field, label_field, fraction)


def undivided(read: Callable[[], Iterator[Example]], fraction: float) -> Undivided[Example]:
    """Examples without a split of their own: equal images stay on one side."""
    return Undivided(read, lambda example: (example.image.tobytes(), 1), fraction)


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 (Alpaydin and Kaynak, 1998); its 17 greys spread over 0 to 255."""

    def __init__(self, size: int | None, fraction: float):
        self._size, self._fraction = size, fraction
        self._undivided = undivided(self._read, fraction)

    name = "digits"

    def fingerprint(self) -> str:
        return f"digits {importlib.metadata.version('scikit-learn')} {self._size} {self._fraction}"

    def examples(self, split: str) -> Iterator[Example]:
        return self._undivided.examples(split)

    def _read(self) -> Iterator[Example]:
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        for image, label in zip(images, digits.target, strict=True):
            yield Example(resized(image, self._size), int(label))


class ImageFolder(LocalFiles):
    """Pictures of a folder and those below it; the folder that a picture stands in is its class, in order of names.

    A folder that holds both `train` and `validation` is split by them; otherwise `fraction` is held out. Pictures are
    grey where the first one is, else RGB, on white where they are transparent.
    """

    def __init__(self, path: Path, size: int | None, fraction: float):
        super().__init__(path, SUFFIXES)
        self._size, self._fraction = size, fraction

    @cached_property
    def _undivided(self) -> Undivided[Example]:
        return undivided(lambda: self._read(self._files[""]), self._fraction)

    def fingerprint(self) -> str:
        return f"{files_fingerprint(self._path, self._files)} {self._size} {self._fraction}"

    def examples(self, split: str) -> Iterator[Example]:
        return self._undivided.examples(split) if "" in self._files else self._read(self._files[split])

    def _read(self, files: list[Path]) -> Iterator[Example]:
        classes = sorted({file.parent.name for members in self._files.values() for file in members})
        grey: bool | None = None
        for file in files:
            image, is_grey = read_picture(file, grey)
            grey = is_grey if grey is None else grey
            yield Example(resized(image, self._size), classes.index(file.parent.name))


class IdxFolder:
    """A folder of IDX files, as Fashion-MNIST is published: `train` is trained on, `t10k` held out."""

    def __init__(self, path: Path, size: int | None):
        self._path, self._size = path, size

    @property
    def name(self) -> str:
        return self._path.resolve().name

    def fingerprint(self) -> str:
        return f"idx {files_fingerprint(self._path, idx_files(self._path))} {self._size}"

    def examples(self, split: str) -> Iterator[Example]:
        for image, label in read_idx(*idx_files(self._path)[split]):
            yield Example(resized(image, self._size), label)


class TfdsImages(TfdsSet):
    """The images of one feature of a TFDS data set, and the classes of another."""

    def __init__(self, name: str, size: int | None, image_field: str, label_field: str, fraction: float):
        super().__init__(name)
        self._size, self._fraction = size, fraction
        self._image_field, self._label_field = image_field, label_field
        self._undivided = undivided(lambda: self._read("train"), fraction)

    def fingerprint(self) -> str:
        return f"{self.name} {self._image_field} {self._label_field} {self._size} {self._fraction} {self._shards}"

    def examples(self, split: str) -> Iterator[Example]:
        return self._read(split) if self._is_divided else self._undivided.examples(split)

    def _read(self, split: str) -> Iterator[Example]:
        features = self._builder.info.features
        if self._image_field not in features:
            raise UserError(
                f"{self.name} has no feature {self._image_field!r}: its features are {listed(sorted(features))}; "
                "choose by --data.image-field"
            )
        for example in tfds_read(self._builder, split):
            image = np.asarray(example[self._image_field])
            if image.dtype != np.uint8 or image.ndim != 3:
                raise UserError(
                    f"feature {self._image_field!r} of {self.name} is no image: choose by --data.image-field"
                )
            yield Example(resized(image, self._size), int(example.get(self._label_field, 0)))


def resized(image: np.ndarray, size: int | None) -> np.ndarray:
    """The middle square of a uint8 image [Y, X, C], scaled to [size, size, C]."""
    height, width, channels = image.shape
    if size is None or height == width == size:
        return image
    from PIL import Image

    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    planes = [Image.fromarray(square[..., c]).resize((size, size), Image.Resampling.BICUBIC) for c in range(channels)]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def read_picture(file: Path, grey: bool | None) -> tuple[np.ndarray, bool]:
    """uint8 [Y, X, 1] where it is to be `grey`, or is where that is None, else [Y, X, 3]; and whether the file is grey.

    What is transparent is white. Raises UserError where the file is no picture.
    """
    from PIL import Image

    try:
        with Image.open(file) as opened:
            is_grey = opened.mode in ("1", "L", "LA")
            rgba = opened.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file} cannot be read as a picture: {error}") from error
    white = Image.new("RGBA", rgba.size, "white")
    picture = Image.alpha_composite(white, rgba).convert("L" if (is_grey if grey is None else grey) else "RGB")
    pixels = np.asarray(picture)
    return (pixels[..., None] if pixels.ndim == 2 else pixels), is_grey
