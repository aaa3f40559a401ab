"""What a trained model of texts and images shows: a grid of images, each above the text that it was drawn from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.diffusion.sampling import guided, sample
from zoo.sharding import constrain
from zoo.train import pictures
from zoo.train.experiment import UserError
from zoo.train.image_sampler import MethodName, table


@dataclass(frozen=True)
class CaptionSampler:
    """A grid of images from a text-to-image network, as PNG, with their texts below them.

    prompts: the texts.  columns: images of each text, which are a row.
    method: see zoo.diffusion.samplers.  steps: along the schedule.  guidance: scale of classifier-free guidance towards
    the text, 1 is none.  scale: pixels a side that one pixel is drawn with (None: so many that a row is about 640
    wide).
    """

    prompts: tuple[str, ...] = ()
    columns: int = 4
    method: MethodName = "ddim"
    steps: int = 50
    guidance: float = 3.0
    scale: int | None = None

    def check(self, model: Any, data: Any) -> None:
        """`model`: a config with `noising`. Raises UserError, or ScheduleError for what its schedule cannot do."""
        if not self.prompts:
            raise UserError('no text to draw: give some, as --sampler.prompts "a three" "a bold four"')
        table(model, self.method, self.steps)
        if self.columns < 1 or (self.scale is not None and self.scale < 1):
            raise UserError(f"{self.columns} columns at scale {self.scale} show nothing: choose both from 1")

    def sample(
        self, model: Any, data: Any, key: jax.Array, folder: Path, emit: Callable[[str], None] | None = None
    ) -> str:
        """Writes folder/samples.png, and returns its path. Every process takes part; the first one writes."""
        self.check(model.config, data)
        images = self.draw(model, data.rows(self.prompts), key)
        said = [prompt for prompt in self.prompts for _ in range(self.columns)]
        return pictures.save(images, self.columns, folder, scale=self.scale, captions=said)

    def draw(self, model: Any, tokens: np.ndarray, key: jax.Array) -> np.ndarray:
        """`columns` images of each text of tokens [N, S]: [N * columns, Y, X, C], float32 in [-1, 1]."""
        config = model.config
        steps = table(config, self.method, self.steps)
        given = tokens.repeat(self.columns, 0)
        blank = np.broadcast_to(np.array(config.blank, np.int32), given.shape)
        shape = (len(given), *config.image_size, config.image_channels)

        @jax.jit
        def images(model: Any, key: jax.Array) -> jax.Array:
            # The texts are read once, and asked about at every step.
            context, nothing = model.encode(jnp.array(given)), model.encode(jnp.array(blank))
            denoise = guided(lambda x, t, c: model(x, t, context=c), context, nothing, scale=self.guidance)
            return constrain(jnp.clip(sample(denoise, steps, shape, key), -1, 1), None, None, None, None)

        return np.asarray(images(model, key))
