"""Image data sets: the configuration that a person writes, the pixels on disk, and batches of them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from zoo.train.data.cache import cache_dir, map_file, prepared
from zoo.train.data.image_sources import ImageSource, image_source
from zoo.train.data.permutation import mix, random_bits, shuffled
from zoo.train.data.splits import SPLITS
from zoo.train.experiment import DataInfo, UserError

_FORMAT = 1


@dataclass(frozen=True)
class ImageData:
    """Images of one size, in [-1, 1]."""

    source: str = "digits"
    """digits (scikit-learn's, 8 x 8), a TFDS name[/config][:version], or a folder: of pictures, one folder a class, or
    of the IDX files of MNIST and sets like it."""
    size: int | None = None
    """Bring images to this height and width: the middle square, scaled. Needed where they differ in size."""
    flip: bool = False
    """Mirror half of the training images, left to right."""
    image_field: str = "image"
    """TFDS feature that holds the image."""
    label_field: str = "label"
    """TFDS feature that holds the class."""
    validation_fraction: float = 0.1
    """Share of the images held out where the data has no validation split of its own."""

    def prepare(self) -> None:
        """Writes the pixels to the cache, unless they are there."""
        self._folder()

    def open(self, split: str, *, batch_size: int, seed: int) -> "Images":
        """`split` is "train" or "validation"; prepares first what is missing (a host with a disk of its own)."""
        return open_images(self._folder(), split, batch_size=batch_size, seed=seed, flip=self.flip)

    def pixels(self, split: str) -> np.ndarray:
        """The images of a split, uint8 [N, Y, X, C], which are read from the disk when they are used."""
        return open_images(self._folder(), split, batch_size=1, seed=0, flip=False).pixels

    @property
    def unit(self) -> str:
        return "images"

    @property
    def example_shape(self) -> tuple[int, ...]:
        """(Y, X, C)."""
        return tuple(image_head(self._folder())["shape"])

    def fit(self, model: Any) -> Any:
        """`model` with the number of channels of the images, and with their size and classes where it has those."""
        head = image_head(self._folder())
        height, width, channels = head["shape"]
        known: dict[str, Any] = {"image_channels": channels, "image_size": (height, width)}
        if getattr(model, "num_classes", None) is not None:
            known["num_classes"] = head["classes"]
        if len(getattr(model, "labels", ())) != head["classes"]:
            known["labels"] = tuple(map(str, range(head["classes"])))
        changed = {name: value for name, value in known.items() if getattr(model, name, value) != value}
        return replace(model, **changed) if changed else model

    def _folder(self) -> Path:
        return prepared_images(
            image_source(self.source, self.size, self.image_field, self.label_field, self.validation_fraction)
        )


def prepared_images(source: ImageSource) -> Path:
    """The folder that holds the pixels of a data set, written unless it is there."""
    name = hashlib.sha256(f"{_FORMAT} {source.fingerprint()}".encode()).hexdigest()[:24]
    return prepared(cache_dir() / "images" / name, _complete, lambda partial: _write(partial, source))


def open_images(folder: Path, split: str, *, batch_size: int, seed: int, flip: bool) -> "Images":
    """A split of what `prepared_images` wrote."""
    head = image_head(folder)
    count = head["counts"][split]
    pixels = map_file(folder / f"{split}.images", np.uint8).reshape(count, *head["shape"])
    height, width, channels = head["shape"]
    info = DataInfo(
        name=head["name"],
        sha256=head["sha256"][split],
        examples=count,
        bytes=pixels.size,
        detail=f"{count:,} images of {height} x {width} x {channels}, {head['classes']} classes",
    )
    labels = map_file(folder / f"{split}.labels", np.int32)
    return Images(info, pixels, labels, batch_size, seed if split == "train" else None, flip)


@dataclass(frozen=True)
class Images:
    """A split of images; a Dataset of zoo.train.experiment.

    pixels: uint8 [examples, Y, X, C]. labels: int32 [examples]. seed: of orders and flips; None goes through the
    images once, in order, and pads the last batch (a validation split).
    """

    info: DataInfo
    pixels: np.ndarray
    labels: np.ndarray
    batch_size: int
    seed: int | None
    flip: bool = False

    @property
    def batches(self) -> int:
        """Batches of one pass; in training the last, short one is filled from the next pass and not counted."""
        whole, rest = divmod(len(self.labels), self.batch_size)
        return max(1, whole + (self.seed is None and rest > 0))

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Rows `rows` of global batch `step`.

        images: float32 in [-1, 1], [len(rows), Y, X, C]. labels: int32 [len(rows)]. weights: float32 [len(rows)], 0
        where an example pads the last batch of a validation split.
        """
        index, chosen, real = self.choose(step, rows)
        images = self.pixels[chosen].astype(np.float32) / 127.5 - 1
        mirrored = self.mirrored(index)
        images[mirrored] = images[mirrored, :, ::-1]
        return {
            "images": images * real[:, None, None, None].astype(np.float32),
            "labels": np.where(real, self.labels[chosen], 0).astype(np.int32),
            "weights": real.astype(np.float32),
        }

    def mirrored(self, index: np.ndarray) -> np.ndarray:
        """Which of the images with these numbers, as `choose` gives them, are mirrored; bool."""
        if not self.flip or self.seed is None:
            return np.zeros(index.shape, bool)
        return (mix(random_bits(self.seed, 1) ^ index.astype(np.uint64)) & np.uint64(1)).astype(bool)

    def choose(self, step: int, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of rows of a global batch: their numbers in all passes, their examples, and whether these are no padding."""
        index = step * self.batch_size + np.asarray(rows, np.int64)
        count = len(self.labels)
        if self.seed is None:
            real = index < count
            return index, np.where(real, index, 0), real
        return index, shuffled(index, count, self.seed)[1], np.ones(index.shape, bool)


def _write(folder: Path, source: ImageSource) -> None:
    """Writes {split}.images, {split}.labels and images.json; raises UserError where images differ in shape."""
    shape: tuple[int, ...] | None = None
    counts, sums, classes = {}, {}, 0
    for split in SPLITS:
        digest, labels = hashlib.sha256(), []
        with open(folder / f"{split}.images", "wb") as file:
            for image, label in source.examples(split):
                shape = image.shape if shape is None else shape
                if image.shape != shape:
                    raise UserError(
                        f"{source.name} has images of {_times(shape)} and of {_times(image.shape)}: "
                        "give one size by --data.size"
                    )
                content = image.tobytes()
                digest.update(content + np.int32(label).tobytes())
                file.write(content)
                labels.append(label)
        if not labels:
            raise UserError(f"{source.name} has no images for {split}: it is too small to hold some out")
        np.array(labels, np.int32).tofile(folder / f"{split}.labels")
        counts[split], sums[split], classes = (
            len(labels),
            digest.hexdigest(),
            max(classes, *(label + 1 for label in labels)),
        )
    head = {"name": source.name, "shape": shape, "counts": counts, "sha256": sums, "classes": classes}
    (folder / "images.json").write_text(json.dumps(head, indent=2))


def image_head(folder: Path) -> dict[str, Any]:
    """What `prepared_images` wrote of a data set: its name and, of its images, shape, counts, SHA-256 and classes."""
    return json.loads((folder / "images.json").read_text())


def _complete(folder: Path) -> bool:
    try:
        head = image_head(folder)
        size = int(np.prod(head["shape"]))
        return all(
            (folder / f"{split}.images").stat().st_size == head["counts"][split] * size
            and (folder / f"{split}.labels").stat().st_size == head["counts"][split] * 4
            for split in SPLITS
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
