"""What a diffusion model of latents shows: a grid of images, which the autoencoder of its data makes of its latents."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from zoo.diffusion import schedules
from zoo.diffusion.samplers import METHODS, Sampler
from zoo.diffusion.sampling import guided, sample
from zoo.sharding import constrain
from zoo.train import pictures
from zoo.train.experiment import UserError
from zoo.train.samplers import PICTURE_WIDTH


@dataclass(frozen=True)
class LatentSampler:
    """A grid of images from a denoising network of latents, as PNG; of a model of classes, each in turn.

    method: see zoo.diffusion.samplers.  steps: along the schedule.  guidance: scale of classifier-free guidance towards
    each image's class, 1 is none.  scale: pixels a side that one pixel is drawn with (None: so many that the grid is
    about 640 wide).
    """

    rows: int = 6
    columns: int = 10
    method: Literal["ddpm", "ddim", "euler", "dpmpp_2m", "plms"] = "ddim"
    steps: int = 50
    guidance: float = 1.0
    scale: int | None = None

    def check(self, model: Any, data: Any) -> None:
        """`model`: a config with `noising`. Raises UserError, or ScheduleError for what its schedule cannot do."""
        if not 1 <= self.steps <= model.noising.timesteps:
            raise UserError(
                f"{self.steps} sampling steps are not in the model's 1 to {model.noising.timesteps}: choose one"
            )
        if self.guidance != 1.0 and not getattr(model, "null_class", False):
            raise UserError(f"--sampler.guidance {self.guidance} needs a model with a class for none: leave it at 1")
        if min(self.rows, self.columns, self.scale or 1) < 1:
            raise UserError(f"{self.rows} x {self.columns} images at scale {self.scale}: choose each from 1")
        self._table(model)

    def sample(
        self, model: Any, data: Any, key: jax.Array, folder: Path, emit: Callable[[str], None] | None = None
    ) -> str:
        """Writes folder/samples.png, and returns its path. Every process takes part; the first one writes."""
        self.check(model.config, data)
        images = data.decoded(self.draw(model, data.example_shape, key))
        path = folder.absolute() / "samples.png"
        if jax.process_index() == 0:
            scale = self.scale or max(1, PICTURE_WIDTH // (self.columns * (images.shape[2] + 1)))
            pictures.write_png(pictures.grid(images, self.columns, scale=scale), path)
        return str(path)

    def draw(self, model: Any, shape: tuple[int, ...], key: jax.Array) -> np.ndarray:
        """rows * columns latents of `shape` (y, x, C), float32."""
        table, count = self._table(model.config), self.rows * self.columns
        classes = getattr(model.config, "num_classes", None)

        @jax.jit
        def latents(model: Any, key: jax.Array) -> jax.Array:
            denoise = model
            if classes is not None:
                given, blank = jnp.arange(count) % classes, jnp.full(count, classes)
                denoise = guided(lambda x, t, c: model(x, t, classes=c), given, blank, scale=self.guidance)
            return constrain(sample(denoise, table, (count, *shape), key), None, None, None, None)

        return np.asarray(latents(model, key))

    def _table(self, config: Any) -> Sampler:
        method: Any = METHODS[self.method]
        # Latents are of no bounded range, as pixels are.
        method = replace(method, clip=None) if hasattr(method, "clip") else method
        return method.sampler(schedules.make(config.noising), self.steps)
