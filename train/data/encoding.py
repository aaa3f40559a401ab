"""Images encoded as latents by any number of processes, in pieces: files whose bits do not depend on who wrote them.

A piece is whole or not there, so that a preparation that was killed goes on where it was, with as many processes as
there are then.
"""

import hashlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from zoo import sharding
from zoo.models.autoencoder import LOG_VARIANCES, Autoencoder
from zoo.train.data.splits import SPLITS

ROWS = 64  # images that a device encodes at once
_BLOCKS = 16  # such blocks in a piece
_SHOW = 10  # seconds between lines that say how far it is


class Piece(NamedTuple):
    """Images `first` to `last` of a split, as they are or mirrored."""

    split: str
    mirrored: bool
    first: int
    last: int

    @property
    def blocks(self) -> int:
        return -(-(self.last - self.first) // ROWS)

    @property
    def file_name(self) -> str:
        return f"{self.split}-{'mirrored-' if self.mirrored else ''}{self.first}"


class Joined(NamedTuple):
    """sha256: of each split's moments.  power: of training latents drawn, how many numbers, their sum, and the sum of
    their squares as it is expected."""

    sha256: dict[str, str]
    power: np.ndarray


@dataclass(frozen=True)
class Encoding:
    """pixels: of each split, uint8 [images, Y, X, C].  flip: training images are encoded mirrored, too, behind those as
    they are.  folder: for the pieces."""

    model: Autoencoder
    pixels: Mapping[str, np.ndarray]
    flip: bool
    folder: Path

    @property
    def pieces(self) -> list[Piece]:
        """In the order in which they are joined."""
        runs = [(split, mirrored) for split in SPLITS for mirrored in (False, True)[: 1 + self._mirrors(split)]]
        size, counts = _BLOCKS * ROWS, {split: len(images) for split, images in self.pixels.items()}
        return [
            Piece(split, mirrored, first, min(first + size, counts[split]))
            for split, mirrored in runs
            for first in range(0, counts[split], size)
        ]

    def _mirrors(self, split: str) -> bool:
        return self.flip and split == "train"

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """(y, x, 2 C) of a latent's moments."""
        images = jax.ShapeDtypeStruct((1, *self.pixels["train"].shape[1:]), np.float32)
        return jax.eval_shape(self.model.moments, images).shape[1:]

    def encode(self, pieces: Sequence[Piece], enough: Callable[[], bool]) -> None:
        """Writes those of the pieces that are not there, on all devices of this process.

        enough: whether they are needed no more, for another program has joined its own, and removed the folder.
        """
        missing = [piece for piece in pieces if not self._is_whole(piece)]
        total, done, shown = sum(piece.last - piece.first for piece in missing), 0, time.monotonic()
        for piece in missing:
            if enough():
                return
            with sharding.use(self._mesh):
                blocks = list(self._encoded(piece))
            power = np.array([_power(block.astype(np.float64)) for block in blocks])
            try:
                self._save(piece, b"".join([block.tobytes() for block in blocks] + [power.tobytes()]))
            except FileNotFoundError:
                if not enough():
                    raise
                return
            done += piece.last - piece.first
            if time.monotonic() > shown + _SHOW:
                shown = time.monotonic()
                print(f"{done:,} of {total:,} images of this host encoded", file=sys.stderr)

    def join(self, target: Path) -> Joined:
        """Writes {split}.moments of all the pieces, which are there, to the folder `target`."""
        sums, power = {}, []
        for split in SPLITS:
            digest = hashlib.sha256()
            with open(target / f"{split}.moments", "wb") as file:
                for piece in self.pieces:
                    if piece.split != split:
                        continue
                    content = (self.folder / piece.file_name).read_bytes()
                    end = len(content) - 24 * piece.blocks
                    digest.update(content[:end])
                    file.write(content[:end])
                    if split == "train":
                        power.append(np.frombuffer(content[end:], np.float64).reshape(-1, 3))
            sums[split] = digest.hexdigest()
        return Joined(sums, np.concatenate(power).sum(0))

    def _is_whole(self, piece: Piece) -> bool:
        size = 2 * (piece.last - piece.first) * int(np.prod(self.shape)) + 24 * piece.blocks
        try:
            return (self.folder / piece.file_name).stat().st_size == size
        except FileNotFoundError:
            return False

    def _save(self, piece: Piece, content: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{piece.file_name}.{uuid.uuid4().hex}.partial"
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self.folder / piece.file_name)

    def _encoded(self, piece: Piece) -> Iterator[np.ndarray]:
        """Mean and log variance of each block's images, float16 [ROWS or less, y, x, 2 C]."""
        model, moments, rows = self._on_devices
        for first in range(piece.first, piece.last, rows):
            end = min(first + rows, piece.last)
            images = self.pixels[piece.split][first:end, :, :: -1 if piece.mirrored else 1]
            mean, log_variance = np.split(np.asarray(moments(model, _filled(images, rows)))[: end - first], 2, axis=-1)
            made = np.concatenate([mean, np.clip(log_variance, *LOG_VARIANCES)], -1).astype(np.float16)
            for block in range(0, len(made), ROWS):
                yield made[block : block + ROWS]

    @cached_property
    def _mesh(self) -> Mesh:
        return sharding.make_mesh(None, jax.local_devices())

    @cached_property
    def _on_devices(self) -> tuple[Autoencoder, Callable[[Autoencoder, np.ndarray], jax.Array], int]:
        """The model on each of this process's devices, a function of images [rows, Y, X, C] there, and those rows.

        A device is given ROWS of them however many devices there are, so that it runs the same program on the same.
        """
        mesh, whole, cut = self._mesh, PartitionSpec(), PartitionSpec("data")
        moments = jax.jit(
            jax.shard_map(
                lambda model, images: model.moments(images),
                mesh=mesh,
                in_specs=(whole, cut),
                out_specs=cut,
                check_vma=False,
            )
        )
        return jax.device_put(self.model, NamedSharding(mesh, whole)), moments, ROWS * mesh.size


def _filled(rows: np.ndarray, count: int) -> np.ndarray:
    """Pixels as the encoder takes them, and as many rows as it was compiled for."""
    images = rows.astype(np.float32) / 127.5 - 1
    return np.pad(images, ((0, count - len(rows)), (0, 0), (0, 0), (0, 0)))


def _power(moments: np.ndarray) -> np.ndarray:
    """Of latents drawn: how many numbers, their sum, and the sum of their squares as it is expected."""
    mean, log_variance = np.split(moments, 2, axis=-1)
    return np.array([mean.size, mean.sum(), (mean**2 + np.exp(log_variance)).sum()])
