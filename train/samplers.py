"""Samplers: what a trained model shows at the end of a run, and again with `zoo sample`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.generation import Sampling, generate
from zoo.sharding import constrain
from zoo.train import pictures
from zoo.train.data.vocabulary import Vocabulary
from zoo.train.experiment import UserError


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
        pictures.check_grid(self.rows, self.columns, self.scale)

    def sample(
        self, model: Any, data: Any, key: jax.Array, folder: Path, emit: Callable[[str], None] | None = None
    ) -> str:
        """Writes folder/samples.png, and returns its path. Every process takes part; the first one writes."""
        self.check(model.config, data)
        images, captions = self.classify(model, data, key)
        return pictures.save(images, self.columns, folder, scale=self.scale, captions=captions)

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
        pictures.check_grid(self.rows, self.columns, self.scale)

    def sample(
        self, model: Any, data: Any, key: jax.Array, folder: Path, emit: Callable[[str], None] | None = None
    ) -> str:
        """Writes folder/samples.png, and returns its path. Every process takes part; the first one writes."""
        self.check(model.config, data)
        images = self.paired(model, data, key)
        return pictures.save(images, self.columns, folder, scale=self.scale)

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
