"""What a diffusion model of images shows: a grid of images, and how some of them come out of noise."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from zoo.diffusion import schedules
from zoo.diffusion.samplers import SAMPLERS, Table
from zoo.diffusion.sampling import Callback, Denoiser, guided, sample
from zoo.sharding import constrain
from zoo.train import pictures
from zoo.train.experiment import UserError
from zoo.train.progress import sampling

MOMENTS = 8  # of a denoising strip

SamplerName = Literal["ddpm", "ddim", "euler", "dpmpp_2m", "plms"]


def table(config: Any, name: SamplerName, steps: int, **changes: Any) -> Table:
    """The table of so many steps for a config with `noising`. Raises UserError, or what the sampler does.

    changes: to fields of the sampler, where it has them. One that adds noise of its own adds as much as a network says.
    """
    timesteps = config.noising.timesteps
    if not 1 <= steps <= timesteps:
        raise UserError(f"{steps} sampling steps are not in the model's 1 to {timesteps}: choose one")
    sampler: Any = SAMPLERS[name]
    if getattr(config, "learned_sigma", False):
        changes["variance"] = "learned"
    sampler = replace(sampler, **{field: value for field, value in changes.items() if hasattr(sampler, field)})
    made = sampler.table(schedules.make(config.noising), steps)
    signal = made.path.begin.signal.min()
    if config.noising.target == "noise" and made.clip is None and signal <= schedules.LEAST_SIGNAL:
        raise UserError(
            f"a network that predicts noise says nothing of the image where its share is {signal:.2g}, and {name} sets "
            "no bound to it here: predict velocity (--model.noising.target), or draw pixels by ddim or ddpm"
        )
    return made


def check_guidance(scale: float, *, none: bool) -> None:
    """Raises UserError for a scale that leads nowhere. none: whether the model knows what it is to be told nothing."""
    if not 0 <= scale < float("inf"):
        raise UserError(f"guidance {scale} does not lead to what is asked for: choose a number from 0, 1 is none")
    if scale != 1.0 and not none:
        raise UserError(f"guidance {scale} needs a model of classes with one for none (null_class): leave it at 1")


def of_classes(model: Any, asked: Sequence[int], count: int, guidance: float, first: jax.Array | int = 0) -> Denoiser:
    """A model of classes as asked for `count` images, of these classes in turn; guidance: its scale, 1 is none.

    first: how many images came before them.
    """
    none = model.config.num_classes
    given = jnp.array(asked)[(first + jnp.arange(count)) % len(asked)]
    scale = 1.0 if list(asked) == [none] else guidance
    return guided(lambda x, t, c: model(x, t, classes=c), given, jnp.full(count, none), scale=scale)


@dataclass(frozen=True)
class ImageSampler:
    """A grid of images from a denoising network, as PNG, and a strip of how some of them come out of noise.

    columns: None: as many as there are classes asked for, where those are 2 to 16, else 8.
    classes: of a model of classes, each in turn: "all", or such as "3", "0-9", "0,2,5", or "none", which is no class.
    sampler: see zoo.diffusion.samplers.  steps: along the schedule; each is a network evaluation (plms has one more).
    eta: fresh noise of DDIM, 0 (none) to 1 (as much as ancestral).
    guidance: scale of classifier-free guidance towards each image's class, 1 is none.
    strip: how many of the first images are shown from noise on; 0 makes no strip.
    scale: pixels a side that one pixel is drawn with (None: so many that the grid is about 640 wide).
    """

    rows: int = 8
    columns: int | None = None
    classes: str = "all"
    sampler: SamplerName = "ddim"
    steps: int = 100
    eta: float = 0.0
    guidance: float = 1.0
    strip: int = 5
    scale: int | None = None

    def check(self, model: Any, data: Any) -> None:
        """`model`: a config with `noising`. Raises UserError, or ScheduleError for what its schedule cannot do."""
        self._table(model)
        check_guidance(self.guidance, none=getattr(model, "null_class", False))
        if self.strip < 0:
            raise UserError(f"a strip of {self.strip} images is none: choose a whole number from 0")
        pictures.check_grid(self.rows, self._width(model), self.scale)

    def sample(
        self, model: Any, data: Any, key: jax.Array, folder: Path, emit: Callable[[str], None] | None = None
    ) -> str:
        """Writes folder/samples.png and folder/denoising.png, and returns their paths, each a line.

        Every process takes part; the first one writes. With `emit`, which says that a person waits, a terminal shows
        how far sampling is.
        """
        self.check(model.config, data)
        columns = self._width(model.config)
        steps = self._table(model.config).path.steps
        with sampling(steps, shown=emit is not None) as told:
            moments = _Moments(steps, min(self.strip, self.rows * columns), told)
            images = self.draw(model, data.example_shape, key, callback=moments if self.strip else told)
            jax.effects_barrier()
        made = {"samples": (images, columns)}
        # Steps call back on the first process alone.
        if self.strip and jax.process_index() == 0:
            made["denoising"] = (moments.strip(), MOMENTS)
        return "\n".join(
            pictures.save(drawn, width, folder, name, scale=self.scale) for name, (drawn, width) in made.items()
        )

    def draw(
        self, model: Any, shape: tuple[int, ...], key: jax.Array, *, callback: Callback | None = None
    ) -> np.ndarray:
        """rows * columns images of `shape` (Y, X, C), float32 in [-1, 1]. callback: see zoo.diffusion.sampling."""
        self.check(model.config, None)
        count = self.rows * self._width(model.config)
        return np.asarray(self._drawn(model.config, (count, *shape), callback)(model, key, 0))

    def draws(self, model: Any, data: Any, key: jax.Array, count: int, rows: int) -> Iterator[np.ndarray]:
        """`count` images, `rows` at a time, as `draw` has them: of a model of classes, each in turn."""
        self.check(model.config, data)
        drawn = self._drawn(model.config, (rows, *data.example_shape))
        for first in range(0, count, rows):
            yield np.asarray(drawn(model, jax.random.fold_in(key, first), first))[: count - first]

    def _drawn(
        self, config: Any, shape: tuple[int, ...], callback: Callback | None = None
    ) -> Callable[[Any, jax.Array, int], jax.Array]:
        """The compiled function of a model, a key and how many images came before to images of `shape`."""
        steps, asked = self._table(config), self._asked(config)

        @jax.jit
        def images(model: Any, key: jax.Array, first: jax.Array) -> jax.Array:
            denoise = of_classes(model, asked, shape[0], self.guidance, first) if asked else model
            drawn = sample(denoise, steps, shape, key, callback=callback)
            return constrain(jnp.clip(drawn, -1, 1), None, None, None, None)

        return images

    def _asked(self, config: Any) -> list[int]:
        """The classes that take turns; empty where the model is told none."""
        count = getattr(config, "num_classes", None)
        if count is None:
            if self.classes not in ("all", "none"):
                raise UserError(f"classes {self.classes} are asked of a model that is told none: leave them out")
            return []
        return chosen_classes(self.classes, count, none=config.null_class)

    def _width(self, config: Any) -> int:
        if self.columns is not None:
            return self.columns
        classes = len(self._asked(config))
        return classes if 2 <= classes <= 16 else 8

    def _table(self, config: Any) -> Table:
        return table(config, self.sampler, self.steps, eta=self.eta)


def chosen_classes(text: str, count: int, *, none: bool) -> list[int]:
    """Class numbers, in their order, of "all", "none" or such as "3", "0-9", "0,2,5"; raises UserError.

    count: of classes there are.  none: whether there is one more, numbered `count`, that stands for no class.
    """
    if text == "all":
        return list(range(count))
    if text == "none":
        if not none:
            raise UserError("classes none is asked of a model without a class for none (null_class): name some")
        return [count]
    ranges = class_ranges(text)
    for each in ranges:
        if each[-1] >= count:
            raise UserError(f"class {each[-1]} of {count}: choose from 0 to {count - 1}")
    return [number for each in ranges for number in each]


def class_ranges(text: str) -> list[range]:
    """The numbers that `text` names, whatever classes there are; none of "all" and "none". Raises UserError."""
    found = []
    for part in text.split(",") if text not in ("all", "none") else ():
        match = re.fullmatch(r" *([0-9]{1,18})(?:-([0-9]{1,18}))? *", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"classes {text!r} are no numbers and rising ranges: write 3, 0-9, 0,2,5, all or none")
        found.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    return found


class _Moments:
    """A callback of `sample` that keeps the first `images` at MOMENTS moments, and tells `other` of every step."""

    def __init__(self, steps: int, images: int, other: Callback | None):
        self._images, self._other = images, other
        self._moments = np.round(np.linspace(0, steps - 1, MOMENTS)).astype(int)
        self._kept: dict[int, np.ndarray] = {}

    def __call__(self, step: int, x: np.ndarray) -> None:
        if int(step) in self._moments:
            self._kept[int(step)] = np.asarray(x)[: self._images].copy()
        if self._other is not None:
            self._other(step, x)

    def strip(self) -> np.ndarray:
        """A row for each image, from noise to itself: [images * MOMENTS, Y, X, C]."""
        moments = np.stack([self._kept[step] for step in self._moments], 1)
        return moments.reshape(-1, *moments.shape[2:])
