"""Latents of images, encoded once by a trained autoencoder: what a latent diffusion model learns to draw.

The encoder says of each latent a mean and a variance. Both are kept, so that training draws anew at every step
(Rombach et al. 2022, arXiv 2112.10752, appendix G, scale latents to unit deviation as here).
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.autoencoder import Autoencoder
from zoo.train import processes, run_folder
from zoo.train.data.cache import cache_dir, map_file, prepared, writable
from zoo.train.data.encoding import ROWS, Encoding
from zoo.train.data.files import files_fingerprint
from zoo.train.data.images import ImageData, Images, image_head, open_images
from zoo.train.data.splits import SPLITS
from zoo.train.experiment import DataInfo, Placement, UserError

_FORMAT = 1


@dataclass(frozen=True)
class LatentData(ImageData):
    """Latents of images, of about unit deviation; `autoencoder` makes them."""

    autoencoder: str = "./autoencoder-digits"
    """A run that trained one, or a folder of published weights (AutoencoderKL)."""

    def prepare(self) -> None:
        """Writes pixels and latents to the cache, unless they are there."""
        self._latents()

    def prepare_together(self) -> None:
        """`prepare`, by all processes of a run: each encodes its share, and the first of each disk joins them."""
        processes.on_first(lambda: ImageData.prepare(self))
        missing = processes.on_each(lambda: self._folder() and not _complete(self._target()))
        if any(missing):
            # A run's checkpoint is read by all at once, and they agree on what is wrong with it by themselves.
            _ = self._autoencoder if self._is_run else processes.on_each(lambda: bool(self._autoencoder))
            rank, count = processes.beside(cache_dir())
            processes.on_each(lambda: self._encode(rank, count))
            processes.on_each(lambda: rank == 0 and self.prepare())
            # A disk of a network remembers for a while that a folder was not there, until a file is made beside it.
            processes.on_each(lambda: writable(self._target().parent))

    def open(self, split: str, *, batch_size: int, seed: int) -> "Latents":
        """`split` is "train" or "validation"; prepares first what is missing (a host with a disk of its own)."""
        folder = self._latents()
        head = _head(folder)
        images = open_images(self._folder(), split, batch_size=batch_size, seed=seed, flip=self.flip)
        moments = map_file(folder / f"{split}.moments", np.float16).reshape(-1, *head["shape"])
        y, x, channels = head["shape"]
        info = DataInfo(
            name=f"latents of {images.info.name}",
            sha256=head["sha256"][split],
            examples=images.info.examples,
            bytes=moments.nbytes,
            detail=f"{images.info.detail}, as latents of {y} x {x} x {channels // 2}",
        )
        return Latents(
            info, images, moments, np.array(head["offset"], np.float32), np.array(head["factor"], np.float32)
        )

    @property
    def example_shape(self) -> tuple[int, ...]:
        """(Y, X, C) of latents."""
        y, x, channels = _head(self._latents())["shape"]
        return y, x, channels // 2

    def fit(self, model: Any) -> Any:
        """`model` with the channels and the size of the latents, and with the classes of the images if it has any."""
        y, x, channels = self.example_shape
        size: Any = (y, x)
        if isinstance(model.image_size, int):
            if y != x:
                raise UserError(f"latents are {y} x {x}, and the model takes square ones: give one size by --data.size")
            size = y
        known: dict[str, Any] = {"image_channels": channels, "image_size": size}
        if getattr(model, "num_classes", None) is not None:
            known["num_classes"] = image_head(self._folder())["classes"]
        return replace(model, **known)

    def decoded(self, latents: np.ndarray) -> np.ndarray:
        """Latents [N, y, x, C], as batches have them, to images [N, Y, X, C], float32 in [-1, 1]."""
        head, model = _head(self._latents()), self._autoencoder
        unscaled = (latents - np.array(head["offset"], np.float32)) / np.array(head["factor"], np.float32)
        parts = [_decode(model, unscaled[i : i + ROWS]) for i in range(0, len(unscaled), ROWS)]
        return np.clip(np.concatenate([np.asarray(part) for part in parts]), -1, 1)

    @property
    def _path(self) -> Path:
        return Path(self.autoencoder).expanduser()

    @property
    def _is_run(self) -> bool:
        return run_folder.is_run(self._path) and not run_folder.is_published(self._path)

    @cached_property
    def _autoencoder(self) -> Autoencoder:
        """On the first device of this process, in float32."""
        from zoo import pretrained, sharding
        from zoo.train import session as sessions  # knows the recipes, and those know this file

        if self._is_run:
            session = sessions.reopen(self._path, Placement())
            mesh = sharding.make_mesh(None, jax.local_devices()[:1])
            model, _ = sessions.trained_model(self._path, sessions.Session(session.experiment, mesh))
            model = jax.device_put(model, jax.local_devices()[0])
        else:
            model = pretrained.from_pretrained(self._path)
        if not isinstance(model, Autoencoder):
            raise UserError(f"--data.autoencoder {self.autoencoder} is a {type(model).__name__}, and no autoencoder")
        return model

    def _fingerprint(self) -> str:
        """Changes with the weights."""
        path = self._path
        if not path.is_dir():
            raise UserError(
                f"no folder {self.autoencoder!r}: train one by `zoo train autoencoder-digits --run "
                f"{self.autoencoder}`, or give another by --data.autoencoder"
            )
        weights = path
        if self._is_run:
            # Here, because their library is large, and recipes are imported for less.
            from zoo.train import checkpoints, manifest

            taken = checkpoints.steps(path / run_folder.CHECKPOINTS)
            if not taken:
                raise UserError(f"--data.autoencoder {self.autoencoder} is a run without a checkpoint: train it first")
            weights = path / run_folder.CHECKPOINTS / manifest.folder_name(taken[-1])
        return files_fingerprint(path, {"": sorted(file for file in weights.rglob("*") if file.is_file())})

    def _target(self) -> Path:
        name = f"{_FORMAT} {self._folder().name} {self._fingerprint()} {self.flip}"
        return cache_dir() / "latents" / hashlib.sha256(name.encode()).hexdigest()[:24]

    def _latents(self) -> Path:
        folder = prepared(self._target(), _complete, self._write)
        shutil.rmtree(_pieces(folder), ignore_errors=True)
        return folder

    @cached_property
    def _encoding(self) -> Encoding:
        pixels = {split: self.pixels(split) for split in SPLITS}
        return Encoding(self._autoencoder, pixels, self.flip, _pieces(self._target()))

    def _encode(self, rank: int = 0, count: int = 1) -> None:
        """This process's share of the pieces, one of `count`; those that are there are left as they are."""
        target = self._target()
        if not _complete(target):
            self._encoding.encode(self._encoding.pieces[rank::count], lambda: _complete(target))

    def _write(self, folder: Path) -> None:
        """Writes {split}.moments and latents.json: mean and log variance, of mirrored images behind those as they are.

        Those of training have unit deviation after `latents * factor + offset`: so measured for a run, and for
        published weights as their config says.
        """
        self._encode()
        shape = self._encoding.shape
        joined, channels = self._encoding.join(folder), shape[-1] // 2
        if self._is_run:
            count, total, squares = joined.power
            mean = total / count
            factor = np.full(channels, (squares / count - mean**2) ** -0.5)
            offset = -mean * factor
        else:
            # An affine map is known by what it makes of 0 and of 1.
            scaled = self._autoencoder.config.scaled
            offset, end = (np.asarray(scaled(jnp.full(channels, x, jnp.float32))) for x in (0, 1))
            factor = end - offset
        head = {"shape": shape, "sha256": joined.sha256, "offset": offset.tolist(), "factor": factor.tolist()}
        (folder / "latents.json").write_text(json.dumps(head, indent=2))


@dataclass(frozen=True)
class Latents:
    """A split of latents; a Dataset. images: the order.  moments: float16 [images, or twice as many, y, x, 2 C]."""

    info: DataInfo
    images: Images
    moments: np.ndarray
    offset: np.ndarray
    factor: np.ndarray

    @property
    def batches(self) -> int:
        return self.images.batches

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Rows `rows` of global batch `step`: as Images has them, `images` being latents, drawn anew in training.

        In validation they are the means.
        """
        index, chosen, real = self.images.choose(step, rows)
        count = len(self.images.labels)
        mean, log_variance = np.split(
            self.moments[chosen + count * self.images.mirrored(index)].astype(np.float32), 2, axis=-1
        )
        if (seed := self.images.seed) is not None:
            draws = [np.random.Generator(np.random.Philox(key=[seed, i])) for i in index.tolist()]
            noise = np.stack([draw.standard_normal(mean.shape[1:], np.float32) for draw in draws])
            mean = mean + np.exp(0.5 * log_variance) * noise
        latents = mean * self.factor + self.offset
        return {
            "images": np.where(real[:, None, None, None], latents, 0).astype(np.float32),
            "labels": np.where(real, self.images.labels[chosen], 0).astype(np.int32),
            "weights": real.astype(np.float32),
        }


@jax.jit
def _decode(model: Autoencoder, latents: jax.Array) -> jax.Array:
    return model.decode(latents)


def _pieces(folder: Path) -> Path:
    return folder.with_suffix(".pieces")


def _head(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "latents.json").read_text())


def _complete(folder: Path) -> bool:
    try:
        size = 2 * int(np.prod(_head(folder)["shape"]))
        sizes = [(folder / f"{split}.moments").stat().st_size for split in SPLITS]
        return all(found and found % size == 0 for found in sizes)
    except (OSError, ValueError, KeyError, TypeError):
        return False
