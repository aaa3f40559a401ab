"""Latents of images, encoded once by a trained autoencoder: what a latent diffusion model learns to draw.

The encoder says of each latent a mean and a variance. Both are kept, so that training draws anew at every step
(Rombach et al. 2022, arXiv 2112.10752, appendix G, scale latents to unit deviation as here).
"""

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.autoencoder import LOG_VARIANCES, Autoencoder
from zoo.train import checkpoints, manifest, run_folder
from zoo.train.data.cache import cache_dir, map_file, prepared
from zoo.train.data.files import files_fingerprint
from zoo.train.data.images import ImageData, Images, image_head, open_images
from zoo.train.data.splits import SPLITS
from zoo.train.experiment import DataInfo, Placement, UserError

_FORMAT = 1
_ROWS = 64  # images encoded at once
_SHOW = 10  # seconds between lines that say how far it is


@dataclass(frozen=True)
class LatentData(ImageData):
    """Latents of images, of about unit deviation; `autoencoder` makes them."""

    autoencoder: str = "./autoencoder-digits"
    """A run that trained one, or a folder of published weights (AutoencoderKL)."""

    def prepare(self) -> None:
        """Writes pixels and latents to the cache, unless they are there."""
        self._latents()

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
        parts = [_decode(model, unscaled[i : i + _ROWS]) for i in range(0, len(unscaled), _ROWS)]
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
            taken = checkpoints.steps(path / run_folder.CHECKPOINTS)
            if not taken:
                raise UserError(f"--data.autoencoder {self.autoencoder} is a run without a checkpoint: train it first")
            weights = path / run_folder.CHECKPOINTS / manifest.folder_name(taken[-1])
        return files_fingerprint(path, {"": sorted(file for file in weights.rglob("*") if file.is_file())})

    def _latents(self) -> Path:
        pixels = self._folder()
        name = hashlib.sha256(f"{_FORMAT} {pixels.name} {self._fingerprint()} {self.flip}".encode()).hexdigest()[:24]
        return prepared(cache_dir() / "latents" / name, _complete, lambda partial: self._write(partial, pixels))

    def _write(self, folder: Path, pixels: Path) -> None:
        """Writes {split}.moments and latents.json: mean and log variance, of mirrored images behind those as they are.

        Those of training have unit deviation after `latents * factor + offset`: so measured for a run, and for
        published weights as their config says.
        """
        if jax.process_count() > 1:
            raise UserError("latents are encoded by one process: start the run once with one, then with all")
        model, sums, power = self._autoencoder, {}, []
        shape: tuple[int, ...] = (0, 0, 0)
        shown = time.monotonic()
        encode = jax.jit(lambda model, images: model.moments(images))
        for split in SPLITS:
            images = open_images(pixels, split, batch_size=1, seed=0, flip=False).pixels
            digest = hashlib.sha256()
            with open(folder / f"{split}.moments", "wb") as file:
                for mirrored in (False, True) if self.flip and split == "train" else (False,):
                    for first in range(0, len(images), _ROWS):
                        rows = images[first : first + _ROWS, :, :: -1 if mirrored else 1]
                        mean, log_variance = np.split(np.asarray(encode(model, _filled(rows)))[: len(rows)], 2, axis=-1)
                        made = np.concatenate([mean, np.clip(log_variance, *LOG_VARIANCES)], -1).astype(np.float16)
                        shape = made.shape[1:]
                        digest.update(made.tobytes())
                        file.write(made.tobytes())
                        if split == "train":
                            power.append(_power(made.astype(np.float64)))
                        if time.monotonic() > shown + _SHOW:
                            shown = time.monotonic()
                            print(f"{first + len(rows):,} of {len(images):,} {split} images encoded", file=sys.stderr)
            sums[split] = digest.hexdigest()
        channels = shape[-1] // 2
        if self._is_run:
            count, total, squares = np.sum(power, 0)
            mean = total / count
            factor = np.full(channels, (squares / count - mean**2) ** -0.5)
            offset = -mean * factor
        else:
            # An affine map is known by what it makes of 0 and of 1.
            offset, end = (np.asarray(model.config.scaled(jnp.full(channels, x, jnp.float32))) for x in (0, 1))
            factor = end - offset
        head = {"shape": shape, "sha256": sums, "offset": offset.tolist(), "factor": factor.tolist()}
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


def _filled(rows: np.ndarray) -> np.ndarray:
    """Pixels as the encoder takes them, and as many rows as it was compiled for."""
    images = rows.astype(np.float32) / 127.5 - 1
    return np.pad(images, ((0, _ROWS - len(rows)), (0, 0), (0, 0), (0, 0)))


def _power(moments: np.ndarray) -> np.ndarray:
    """Of latents drawn: how many numbers, their sum, and the sum of their squares as it is expected."""
    mean, log_variance = np.split(moments, 2, axis=-1)
    return np.array([mean.size, mean.sum(), (mean**2 + np.exp(log_variance)).sum()])


def _head(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "latents.json").read_text())


def _complete(folder: Path) -> bool:
    try:
        size = 2 * int(np.prod(_head(folder)["shape"]))
        sizes = [(folder / f"{split}.moments").stat().st_size for split in SPLITS]
        return all(found and found % size == 0 for found in sizes)
    except (OSError, ValueError, KeyError, TypeError):
        return False
