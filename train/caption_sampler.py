"""What a trained model of texts and images shows: a grid of images, each above the text that it was drawn from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.diffusion.sampling import Callback, guided, sample
from zoo.sharding import constrain
from zoo.train import pictures
from zoo.train.experiment import UserError
from zoo.train.image_sampler import SamplerName, check_guidance, table
from zoo.train.progress import sampling


@dataclass(frozen=True)
class CaptionSampler:
    """A grid of images from a text-to-image network, as PNG, with their texts below them.

    prompt: the texts.  columns: images of each text, which are a row.
    sampler: see zoo.diffusion.samplers.  steps: along the schedule.  guidance: scale of classifier-free guidance
    towards the text, 1 is none.  scale: pixels a side that one pixel is drawn with (None: so many that a row is about
    640 wide).
    """

    prompt: tuple[str, ...] = ()
    columns: int = 4
    sampler: SamplerName = "ddim"
    steps: int = 50
    guidance: float = 3.0
    scale: int | None = None

    def check(self, model: Any, data: Any) -> None:
        """`model`: a config with `noising`. Raises UserError, or ScheduleError for what its schedule cannot do."""
        if not self.prompt:
            raise UserError('no text to draw: give some, as --prompt "a three" "a bold four"')
        table(model, self.sampler, self.steps)
        check_guidance(self.guidance, none=True)
        if self.columns < 1 or (self.scale is not None and self.scale < 1):
            raise UserError(f"{self.columns} columns at scale {self.scale} show nothing: choose both from 1")

    def sample(
        self, model: Any, data: Any, key: jax.Array, folder: Path, emit: Callable[[str], None] | None = None
    ) -> str:
        """Writes folder/samples.png, and returns its path. Every process takes part; the first one writes."""
        self.check(model.config, data)
        tokens = data.rows(self.prompt)
        with sampling(table(model.config, self.sampler, self.steps).path.steps, shown=emit is not None) as told:
            images = self.draw(model, tokens, key, callback=told)
        said = [prompt for prompt in self.prompt for _ in range(self.columns)]
        return pictures.save(images, self.columns, folder, scale=self.scale, captions=said)

    def draw(self, model: Any, tokens: np.ndarray, key: jax.Array, *, callback: Callback | None = None) -> np.ndarray:
        """`columns` images of each text of tokens [N, S]: [N * columns, Y, X, C], float32 in [-1, 1].

        callback: see zoo.diffusion.sampling.
        """
        return np.asarray(self._drawn(model.config, callback)(model, key, tokens.repeat(self.columns, 0)))

    def draws(self, model: Any, data: Any, key: jax.Array, count: int, rows: int) -> Iterator[np.ndarray]:
        """`count` images, float32 in [-1, 1], `rows` at a time, of the captions of held-out images in turn."""
        self.check(model.config, data)
        drawn, held_out = self._drawn(model.config), data.open("validation", batch_size=1, seed=0)
        for first in range(0, count, rows):
            given = held_out.batch(0, [i % held_out.info.examples for i in range(first, first + rows)])["tokens"]
            yield np.asarray(drawn(model, jax.random.fold_in(key, first), given))[: count - first]

    def _drawn(
        self, config: Any, callback: Callback | None = None
    ) -> Callable[[Any, jax.Array, np.ndarray], jax.Array]:
        """The compiled function of a model, a key and texts [N, S] to an image of each."""
        steps = table(config, self.sampler, self.steps)

        @jax.jit
        def images(model: Any, key: jax.Array, given: jax.Array) -> jax.Array:
            # The texts are read once, and asked about at every step.
            blank = jnp.broadcast_to(jnp.array(config.blank, jnp.int32), given.shape)
            context, nothing = model.encode(given), model.encode(blank)
            denoise = guided(lambda x, t, c: model(x, t, context=c), context, nothing, scale=self.guidance)
            shape = (len(given), *config.image_size, config.image_channels)
            drawn = sample(denoise, steps, shape, key, callback=callback)
            return constrain(jnp.clip(drawn, -1, 1), None, None, None, None)

        return images
