"""Samplers: what a trained model shows at the end of a run, and again with `zoo sample`."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from zoo.diffusion import schedules
from zoo.diffusion.samplers import DDIM, METHODS, Sampler
from zoo.diffusion.sampling import Callback, guided, sample
from zoo.generation import Sampling, generate
from zoo.sharding import constrain
from zoo.train import pictures
from zoo.train.data.vocabulary import Vocabulary
from zoo.train.experiment import UserError
from zoo.train.progress import Quiet, waiting

PICTURE_WIDTH = 640
MOMENTS = 8  # of a denoising strip


@dataclass(frozen=True)
class TextSampler:
    """Continuations of a prompt, which stands at the beginning of a document.

    samples: how many.  tokens: new ones, at most; the model's positions bound them too.  temperature: 0 takes the
    likeliest token, 1 draws from the model's distribution.  top_k, top_p: draw among the likeliest alone.
    """

    prompt: str = ""
    samples: int = 1
    tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None

    def check(self, model: Any, data: Any) -> None:
        """`model`: a config with `vocab_size` and `max_length`, or None. Raises UserError or GenerationError."""
        if min(self.samples, self.tokens) < 1:
            raise UserError(f"{self.samples} samples of {self.tokens} tokens are none: choose both from 1")
        Sampling(self.temperature, self.top_k, self.top_p).check(model.vocab_size)
        length = len(self._tokens(data.load_tokenizer()))
        if model.max_length is not None and length >= model.max_length:
            raise UserError(
                f"a prompt of {length} tokens leaves no room in the model's {model.max_length} positions: shorten it"
            )

    def sample(
        self, model: Any, data: Any, key: jax.Array, folder: Path, emit: Callable[[str], None] | None = None
    ) -> str:
        """The texts, prompts included, parted by lines of dashes. A single one is also emitted while it is made."""
        self.check(model.config, data)
        tokenizer = data.load_tokenizer()
        prompt, limit = self._tokens(tokenizer), model.config.max_length
        stream = TextStream(tokenizer.decode, emit) if emit is not None and self.samples == 1 else None
        if emit is not None and self.prompt and stream is not None:
            emit(self.prompt)
        made = generate(
            model,
            [prompt] * self.samples,
            max_new_tokens=self.tokens if limit is None else max(1, min(self.tokens, limit - len(prompt))),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stop_tokens=(tokenizer.end_of_text,),
            key=key,
            callback=None if stream is None else lambda _, token: stream.add(token),
        )
        if stream is not None:
            stream.close()
        return "\n----\n".join(self.prompt + tokenizer.decode(tokens) for tokens in made.tokens)

    def _tokens(self, tokenizer: Any) -> list[int]:
        return [tokenizer.end_of_text, *map(int, tokenizer.encode([self.prompt])[0])]


class TextStream:
    """Emits the text of tokens as they come; a character whose bytes are not all there yet waits for them."""

    def __init__(self, decode: Callable[[list[int]], str], emit: Callable[[str], None]):
        self._decode, self._emit = decode, emit
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, token: int) -> None:
        self._tokens.append(token)
        text = self._decode(self._tokens)
        self._show(text.rstrip("\ufffd"))

    def close(self) -> None:
        self._show(self._decode(self._tokens))

    def _show(self, text: str) -> None:
        if len(text) > self._shown:
            self._emit(text[self._shown :])
            self._shown = len(text)


@dataclass(frozen=True)
class MaskSampler:
    """Held-out rows as a masked language model sees them, as it fills them, each mask by its likeliest token, and as
    they were.

    rows: how many.  columns: characters of each that are shown.
    """

    rows: int = 3
    columns: int = 100

    def check(self, model: Any, data: Any) -> None:
        """`model`: a config whose `kind` has words. Raises UserError."""
        if min(self.rows, self.columns) < 1:
            raise UserError(f"{self.rows} rows of {self.columns} characters show nothing: choose both from 1")
        if not model.kind.words:
            raise UserError(f"a model with head {model.head!r} fills no masks: give --model.head pretraining")

    def sample(
        self, model: Any, data: Any, key: jax.Array, folder: Path, emit: Callable[[str], None] | None = None
    ) -> str:
        """Three lines a row. Masks are _, and what begins or parts texts is |."""
        self.check(model.config, data)
        dataset, tokenizer = data.open("validation", batch_size=self.rows, seed=0), data.load_tokenizer()
        batch = dataset.batch(0, range(self.rows))

        @jax.jit
        def likeliest(model: Any, batch: Any) -> jax.Array:
            hidden = model.hidden(batch["tokens"], token_types=batch.get("token_types"), segments=batch["segments"])
            hidden = jnp.take_along_axis(hidden, batch["places"][..., None], axis=1)
            return jnp.argmax(constrain(model.logits(hidden), None, None, None), axis=-1)

        guesses, shown = np.asarray(likeliest(model, batch)), []
        for row in np.flatnonzero(batch["weights"].any(axis=1)):
            real = batch["weights"][row] > 0
            seen = batch["tokens"][row]
            filled, clean = seen.copy(), seen.copy()
            filled[batch["places"][row][real]] = guesses[row][real]
            clean[batch["places"][row][real]] = batch["targets"][row][real]
            for name, tokens in {"seen": seen, "filled": filled, "text": clean}.items():
                shown.append(f"{name:<8}{readable(tokens, tokenizer, dataset.vocabulary)[: self.columns]}")
            shown.append("")
        return "\n".join(shown).rstrip()


@dataclass(frozen=True)
class TargetSampler:
    """Held-out sources, and what a model of sequences to sequences makes of them, token by token, beside their targets.

    rows: how many.  columns: characters of each that are shown.
    """

    rows: int = 3
    columns: int = 100

    def check(self, model: Any, data: Any) -> None:
        """Raises UserError."""
        if min(self.rows, self.columns) < 1:
            raise UserError(f"{self.rows} rows of {self.columns} characters show nothing: choose both from 1")

    def sample(
        self, model: Any, data: Any, key: jax.Array, folder: Path, emit: Callable[[str], None] | None = None
    ) -> str:
        """Three lines a row. Masks and sentinels are _, and what begins, ends or parts texts is |."""
        self.check(model.config, data)
        dataset, tokenizer = data.open("validation", batch_size=self.rows, seed=0), data.load_tokenizer()
        batch = dataset.batch(0, range(self.rows))
        rows = np.flatnonzero(batch["weights"].any(axis=1))
        real = batch.get("source_segments", np.ones_like(batch["sources"])) > 0
        sources = [batch["sources"][row][real[row]].tolist() for row in rows]
        made = generate(model, sources=sources, max_new_tokens=batch["targets"].shape[1] - 1)
        shown = []
        for row, source, written in zip(rows, sources, made.tokens, strict=True):
            for name, tokens in {"source": source, "made": written, "target": batch["targets"][row]}.items():
                shown.append(f"{name:<8}{readable(tokens, tokenizer, dataset.vocabulary)[: self.columns]}")
            shown.append("")
        return "\n".join(shown).rstrip()


def readable(tokens: Sequence[int] | np.ndarray, tokenizer: Any, vocabulary: Vocabulary) -> str:
    """A line of text: _ for each mask or sentinel, | for other special tokens, nothing for padding."""
    roles = vocabulary.roles
    signs = {roles.get("pad"): ""}
    signs |= {token: "_" for role, token in roles.items() if role == "mask" or role.startswith("sentinel")}
    special, pieces, run = vocabulary.is_special(), [], []
    for token in [*map(int, tokens), vocabulary.end_of_text]:
        if not special[token]:
            run.append(token)
            continue
        pieces += [tokenizer.decode(run), signs.get(token, "|")]
        run = []
    return " ".join("".join(pieces[:-1]).split())


@dataclass(frozen=True)
class ImageSampler:
    """A grid of images from a denoising network, as PNG, and a strip of how some of them come out of noise.

    columns: None: as many as there are classes asked for, where those are 2 to 16, else 8.
    classes: of a model of classes, each in turn: "all", or such as "3", "0-9", "0,2,5", or "none", which is no class.
    method: see zoo.diffusion.samplers.  steps: along the schedule; each is a network evaluation (plms has one more).
    eta: fresh noise of DDIM, 0 (none) to 1 (as much as ancestral).
    guidance: scale of classifier-free guidance towards each image's class, 1 is none.
    strip: how many of the first images are shown from noise on; 0 makes no strip.
    scale: pixels a side that one pixel is drawn with (None: so many that the grid is about 640 wide).
    """

    rows: int = 8
    columns: int | None = None
    classes: str = "all"
    method: Literal["ddpm", "ddim", "euler", "dpmpp_2m", "plms"] = "ddim"
    steps: int = 100
    eta: float = 0.0
    guidance: float = 1.0
    strip: int = 5
    scale: int | None = None

    def check(self, model: Any, data: Any) -> None:
        """`model`: a config with `noising`. Raises UserError, or ScheduleError for what its schedule cannot do."""
        timesteps = model.noising.timesteps
        if not 1 <= self.steps <= timesteps:
            raise UserError(f"{self.steps} sampling steps are not in the model's 1 to {timesteps}: choose one")
        if self.guidance != 1.0 and not getattr(model, "null_class", False):
            raise UserError(
                f"guidance {self.guidance} needs a model of classes with one for none (null_class): leave it at 1"
            )
        if self.strip < 0:
            raise UserError(f"a strip of {self.strip} images is none: choose a whole number from 0")
        self._table(model)
        _check_grid(self.rows, self._width(model), self.scale)

    def sample(
        self, model: Any, data: Any, key: jax.Array, folder: Path, emit: Callable[[str], None] | None = None
    ) -> str:
        """Writes folder/samples.png and folder/denoising.png, and returns their paths, each a line.

        Every process takes part; the first one writes. With `emit`, which says that a person waits, a terminal shows
        how far sampling is.
        """
        self.check(model.config, data)
        columns = self._width(model.config)
        watch = _Watch(self._table(model.config).path.steps, min(self.strip, self.rows * columns), shown=bool(emit))
        with watch:
            images = self.draw(model, data.example_shape, key, callback=watch if self.strip or emit else None)
        made = {"samples": (images, columns)}
        # Steps call back on the first process alone.
        if self.strip and jax.process_index() == 0:
            made["denoising"] = (watch.strip(), MOMENTS)
        paths = []
        for name, (drawn, width) in made.items():
            paths.append(folder.absolute() / f"{name}.png")
            if jax.process_index() == 0:
                scale = self.scale or max(1, PICTURE_WIDTH // (width * (drawn.shape[2] + 1)))
                pictures.write_png(pictures.grid(drawn, width, scale=scale), paths[-1])
        return "\n".join(map(str, paths))

    def draw(
        self, model: Any, shape: tuple[int, ...], key: jax.Array, *, callback: Callback | None = None
    ) -> np.ndarray:
        """rows * columns images of `shape` (Y, X, C), float32 in [-1, 1]. callback: see zoo.diffusion.sampling."""
        self.check(model.config, None)
        table, asked = self._table(model.config), self._asked(model.config)
        count = self.rows * self._width(model.config)

        @jax.jit
        def images(model: Any, key: jax.Array) -> jax.Array:
            denoise = model
            if asked:
                none = model.config.num_classes
                given, blank = jnp.arange(count) % len(asked), jnp.full(count, none)
                given = jnp.array(asked)[given]
                scale = 1.0 if asked == [none] else self.guidance
                denoise = guided(lambda x, t, c: model(x, t, classes=c), given, blank, scale=scale)
            drawn = sample(denoise, table, (count, *shape), key, callback=callback)
            return constrain(jnp.clip(drawn, -1, 1), None, None, None, None)

        return np.asarray(images(model, key))

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

    def _table(self, config: Any) -> Sampler:
        method = METHODS[self.method]
        method = replace(method, eta=self.eta) if isinstance(method, DDIM) else method
        return method.sampler(schedules.make(config.noising), self.steps)


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
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r" *([0-9]+)(?:-([0-9]+))? *", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"classes {text!r} are no numbers and rising ranges: write 3, 0-9, 0,2,5, all or none")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= count:
            raise UserError(f"class {last} of {count}: choose from 0 to {count - 1}")
        found += range(first, last + 1)
    return found


class _Watch:
    """A callback of `sample` that keeps the first `images` at MOMENTS moments, and shows on a terminal how far it is.

    As a context it ends once every step has called back, which steps do in no order that is promised.
    """

    def __init__(self, steps: int, images: int, *, shown: bool):
        self._images, self._display = images, waiting(steps) if shown else Quiet()
        self._moments = np.round(np.linspace(0, steps - 1, MOMENTS)).astype(int)
        self._kept: dict[int, np.ndarray] = {}
        self._ended, self._began = 0, 0.0

    def __call__(self, step: int, x: np.ndarray) -> None:
        if int(step) in self._moments:
            self._kept[int(step)] = np.asarray(x)[: self._images].copy()
        # What is left is told by the steps after the first, which waited for the compiler.
        now = time.perf_counter()
        self._began = self._began or now
        self._ended += 1
        if self._ended > 1:
            self._display.update(self._ended, {"step_seconds": (now - self._began) / (self._ended - 1)})

    def __enter__(self) -> "_Watch":
        return self

    def __exit__(self, *_: object) -> None:
        jax.effects_barrier()
        self._display.close()

    def strip(self) -> np.ndarray:
        """A row for each image, from noise to itself: [images * MOMENTS, Y, X, C]."""
        moments = np.stack([self._kept[step] for step in self._moments], 1)
        return moments.reshape(-1, *moments.shape[2:])


@dataclass(frozen=True)
class ClassSampler:
    """A grid of held-out images as PNG, each with the class that the model finds, and the true one where it errs.

    scale: pixels a side that one pixel is drawn with (None: so many that the grid is about 640 wide).
    """

    rows: int = 4
    columns: int = 10
    scale: int | None = None

    def check(self, model: Any, data: Any) -> None:
        """`model`: a config with `head`. Raises UserError."""
        if model.head != "classification":
            raise UserError(f"--model.head {model.head} scores no classes: choose classification")
        _check_grid(self.rows, self.columns, self.scale)

    def sample(
        self, model: Any, data: Any, key: jax.Array, folder: Path, emit: Callable[[str], None] | None = None
    ) -> str:
        """Writes folder/samples.png, and returns its path. Every process takes part; the first one writes."""
        self.check(model.config, data)
        images, captions = self.classify(model, data, key)
        scale = self.scale or max(1, PICTURE_WIDTH // (self.columns * (images.shape[2] + 1)))
        path = folder.absolute() / "samples.png"
        if jax.process_index() == 0:
            pictures.write_png(pictures.captioned(images, captions, self.columns, scale=scale), path)
        return str(path)

    def classify(self, model: Any, data: Any, key: jax.Array) -> tuple[np.ndarray, list[str]]:
        """Images [N, Y, X, C] that the key picks among those held out, and what is said of each."""
        held_out = data.open("validation", batch_size=1, seed=0)
        count = min(held_out.info.examples, self.rows * self.columns)
        chosen = np.asarray(jax.random.permutation(key, held_out.info.examples)[:count])
        batch = held_out.batch(0, chosen.tolist())

        @jax.jit
        def classes(model: Any, images: jax.Array) -> jax.Array:
            return constrain(model(images).logits.argmax(-1), None)

        names, found = model.config.labels, np.asarray(classes(model, batch["images"]))
        said = [
            names[guess] if guess == label else f"{names[guess]}, not {names[label]}"
            for guess, label in zip(found, batch["labels"], strict=True)
        ]
        return batch["images"], said


@dataclass(frozen=True)
class ReconstructionSampler:
    """A grid of held-out images as PNG: rows of them, each above a row of what the autoencoder makes of their latents.

    rows: pairs of rows.  scale: pixels a side that one pixel is drawn with (None: so many that the grid is about 640
    wide).
    """

    rows: int = 3
    columns: int = 10
    scale: int | None = None

    def check(self, model: Any, data: Any) -> None:
        """Raises UserError."""
        _check_grid(self.rows, self.columns, self.scale)

    def sample(
        self, model: Any, data: Any, key: jax.Array, folder: Path, emit: Callable[[str], None] | None = None
    ) -> str:
        """Writes folder/samples.png, and returns its path. Every process takes part; the first one writes."""
        self.check(model.config, data)
        images = self.paired(model, data, key)
        scale = self.scale or max(1, PICTURE_WIDTH // (self.columns * (images.shape[2] + 1)))
        path = folder.absolute() / "samples.png"
        if jax.process_index() == 0:
            pictures.write_png(pictures.grid(images, self.columns, scale=scale), path)
        return str(path)

    def paired(self, model: Any, data: Any, key: jax.Array) -> np.ndarray:
        """Rows of images that the key picks among those held out, and behind each row theirs, [N, Y, X, C]."""
        held_out = data.open("validation", batch_size=1, seed=0)
        count = min(self.rows, max(1, held_out.info.examples // self.columns)) * self.columns
        chosen = np.asarray(jax.random.permutation(key, max(held_out.info.examples, count))[:count])
        images = held_out.batch(0, chosen.tolist())["images"]

        @jax.jit
        def reconstructed(model: Any, images: jax.Array) -> jax.Array:
            return constrain(jnp.clip(model(images).images, -1, 1), None, None, None, None)

        pairs = np.stack([images, np.asarray(reconstructed(model, images))])
        pairs = pairs.reshape(2, -1, self.columns, *images.shape[1:])
        return pairs.swapaxes(0, 1).reshape(-1, *images.shape[1:])


def _check_grid(rows: int, columns: int, scale: int | None) -> None:
    if rows < 1 or columns < 1:
        raise UserError(f"a grid of {rows} x {columns} images is empty: choose both sides from 1")
    if scale is not None and scale < 1:
        raise UserError(f"a scale of {scale} pixels shows nothing: choose a whole number from 1, or None")
