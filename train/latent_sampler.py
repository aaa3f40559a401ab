"""What a diffusion model of latents shows: a grid of images, which the autoencoder of its data makes of its latents."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zoo.diffusion.samplers import Sampler
from zoo.diffusion.sampling import sample
from zoo.sharding import constrain
from zoo.train import pictures
from zoo.train.experiment import UserError
from zoo.train.image_sampler import MethodName, of_classes, table


@dataclass(frozen=True)
class LatentSampler:
    """A grid of images from a denoising network of latents, as PNG; of a model of classes, each in turn.

    method: see zoo.diffusion.samplers.  steps: along the schedule.  guidance: scale of classifier-free guidance towards
    each image's class, 1 is none.  scale: pixels a side that one pixel is drawn with (None: so many that the grid is
    about 640 wide).
    """

    rows: int = 6
    columns: int = 10
    method: MethodName = "ddim"
    steps: int = 50
    guidance: float = 1.0
    scale: int | None = None

    def check(self, model: Any, data: Any) -> None:
        """`model`: a config with `noising`. Raises UserError, or ScheduleError for what its schedule cannot do."""
        self._table(model)
        if self.guidance != 1.0 and not getattr(model, "null_class", False):
            raise UserError(f"--sampler.guidance {self.guidance} needs a model with a class for none: leave it at 1")
        pictures.check_grid(self.rows, self.columns, self.scale)

    def sample(
        self, model: Any, data: Any, key: jax.Array, folder: Path, emit: Callable[[str], None] | None = None
    ) -> str:
        """Writes folder/samples.png, and returns its path. Every process takes part; the first one writes."""
        self.check(model.config, data)
        images = data.decoded(self.draw(model, data.example_shape, key))
        return pictures.save(images, self.columns, folder, scale=self.scale)

    def draw(self, model: Any, shape: tuple[int, ...], key: jax.Array) -> np.ndarray:
        """rows * columns latents of `shape` (y, x, C), float32."""
        return np.asarray(self._drawn(model.config, (self.rows * self.columns, *shape))(model, key, 0))

    def draws(self, model: Any, data: Any, key: jax.Array, count: int, rows: int) -> Iterator[np.ndarray]:
        """`count` images, float32 in [-1, 1], decoded, `rows` at a time; of a model of classes, each in turn."""
        self.check(model.config, data)
        drawn = self._drawn(model.config, (rows, *data.example_shape))
        for first in range(0, count, rows):
            yield data.decoded(np.asarray(drawn(model, jax.random.fold_in(key, first), first)))[: count - first]

    def _drawn(self, config: Any, shape: tuple[int, ...]) -> Callable[[Any, jax.Array, int], jax.Array]:
        """The compiled function of a model, a key and how many latents came before to latents of `shape`."""
        steps, classes = self._table(config), getattr(config, "num_classes", None)

        @jax.jit
        def latents(model: Any, key: jax.Array, first: jax.Array) -> jax.Array:
            denoise = model if classes is None else of_classes(model, range(classes), shape[0], self.guidance, first)
            return constrain(sample(denoise, steps, shape, key), None, None, None, None)

        return latents

    def _table(self, config: Any) -> Sampler:
        # Latents are of no bounded range, as pixels are.
        return table(config, self.method, self.steps, clip=None)
