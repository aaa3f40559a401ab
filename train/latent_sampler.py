"""What a diffusion model of latents shows: a grid of images, which the autoencoder of its data makes of its latents."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zoo.diffusion.samplers import Table
from zoo.diffusion.sampling import Callback, sample
from zoo.sharding import constrain
from zoo.train import pictures
from zoo.train.image_sampler import SamplerName, check_guidance, of_classes, table
from zoo.train.progress import sampling


@dataclass(frozen=True)
class LatentSampler:
    """A grid of images from a denoising network of latents, as PNG; of a model of classes, each in turn.

    sampler: see zoo.diffusion.samplers.  steps: along the schedule.  guidance: scale of classifier-free guidance
    towards each image's class, 1 is none.  scale: pixels a side that one pixel is drawn with (None: so many that the
    grid is about 640 wide).
    """

    rows: int = 6
    columns: int = 10
    sampler: SamplerName = "ddim"
    steps: int = 50
    guidance: float = 1.0
    scale: int | None = None

    def check(self, model: Any, data: Any) -> None:
        """`model`: a config with `noising`. Raises UserError, or ScheduleError for what its schedule cannot do."""
        self._table(model)
        check_guidance(self.guidance, none=getattr(model, "null_class", False))
        pictures.check_grid(self.rows, self.columns, self.scale)

    def sample(
        self, model: Any, data: Any, key: jax.Array, folder: Path, emit: Callable[[str], None] | None = None
    ) -> str:
        """Writes folder/samples.png, and returns its path. Every process takes part; the first one writes."""
        self.check(model.config, data)
        with sampling(self._table(model.config).path.steps, shown=emit is not None) as told:
            latents = self.draw(model, data.example_shape, key, callback=told)
        images = data.decoded(latents)
        return pictures.save(images, self.columns, folder, scale=self.scale)

    def draw(
        self, model: Any, shape: tuple[int, ...], key: jax.Array, *, callback: Callback | None = None
    ) -> np.ndarray:
        """rows * columns latents of `shape` (y, x, C), float32. callback: see zoo.diffusion.sampling."""
        count = self.rows * self.columns
        return np.asarray(self._drawn(model.config, (count, *shape), callback)(model, key, 0))

    def draws(self, model: Any, data: Any, key: jax.Array, count: int, rows: int) -> Iterator[np.ndarray]:
        """`count` images, float32 in [-1, 1], decoded, `rows` at a time; of a model of classes, each in turn."""
        self.check(model.config, data)
        drawn = self._drawn(model.config, (rows, *data.example_shape))
        for first in range(0, count, rows):
            yield data.decoded(np.asarray(drawn(model, jax.random.fold_in(key, first), first)))[: count - first]

    def _drawn(
        self, config: Any, shape: tuple[int, ...], callback: Callback | None = None
    ) -> Callable[[Any, jax.Array, int], jax.Array]:
        """The compiled function of a model, a key and how many latents came before to latents of `shape`."""
        steps, classes = self._table(config), getattr(config, "num_classes", None)

        @jax.jit
        def latents(model: Any, key: jax.Array, first: jax.Array) -> jax.Array:
            denoise = model if classes is None else of_classes(model, range(classes), shape[0], self.guidance, first)
            return constrain(sample(denoise, steps, shape, key, callback=callback), None, None, None, None)

        return latents

    def _table(self, config: Any) -> Table:
        # Latents are of no bounded range, as pixels are.
        return table(config, self.sampler, self.steps, clip=None)
