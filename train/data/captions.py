"""Images with captions: the configuration that a person writes, and batches of pixels and tokens."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from zoo.train.data.caption_sources import CaptionSource, caption_source
from zoo.train.data.images import Images, image_head, open_images, prepared_images
from zoo.train.data.text import TokenizedText
from zoo.train.experiment import DataInfo, UserError


@dataclass(frozen=True)
class CaptionedImages:
    """A split of images and captions; a Dataset.

    images: the pixels, with their order.  tokens: the captions' stream, each behind <|endoftext|>, which `starts`
    [captions + 1] points at.  begin, end: the tokens around a caption; the second one pads as well, as CLIP's does.
    """

    info: DataInfo
    images: Images
    tokens: np.ndarray
    starts: np.ndarray
    length: int
    begin: int
    end: int

    @property
    def batches(self) -> int:
        return self.images.batches

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Rows `rows` of global batch `step`: images [B, Y, X, C], weights [B], as Images has them, and tokens.

        tokens: int32 [B, S], a caption between the tokens that begin and end one, cut to S, padded.
        """
        made = self.images.batch(step, rows)
        _, chosen, _ = self.images.choose(step, rows)
        captions = [self.tokens[self.starts[i] + 1 : self.starts[i + 1]] for i in chosen]
        tokens = np.stack([caption_row(caption, self.length, self.begin, self.end) for caption in captions])
        return {"images": made["images"], "tokens": tokens, "weights": made["weights"]}


@dataclass(frozen=True)
class CaptionedImageData(TokenizedText):
    """Images of one size, in [-1, 1], each with a text."""

    source: str = "digits"
    """digits (scikit-learn's, described), or a folder of pictures with captions.jsonl or metadata.jsonl."""
    length: int = 16
    """Tokens of a caption, the two at its ends included; longer ones are cut, and a run says how many are."""
    size: int | None = None
    """Bring images to this height and width: the middle square, scaled. Needed where they differ in size."""
    flip: bool = False
    """Mirror half of the training images, left to right: not where captions tell the sides apart."""
    unpaired: float = 0.01
    """Share of pictures without a caption, and captions without a picture, that is left out; more is refused."""

    roles: ClassVar[tuple[str, ...]] = ("begin",)

    def prepare(self) -> None:
        """Writes the pixels, the tokenizer and the tokens to the cache, unless they are there."""
        prepared_images(self._source())
        super().prepare()

    def open(self, split: str, *, batch_size: int, seed: int) -> CaptionedImages:
        """`split` is "train" or "validation"; prepares first what is missing (a host with a disk of its own)."""
        folder, corpus = prepared_images(self._source()), self._corpus()
        images = open_images(folder, split, batch_size=batch_size, seed=seed, flip=self.flip)
        starts = np.append(corpus.document_starts(split), corpus.splits[split].tokens)
        if len(starts) != len(images.labels) + 1:
            raise UserError(f"{self.source} changed while it was read: delete {folder} and {corpus.folder}")
        return CaptionedImages(
            info=self._info(split, images, starts),
            images=images,
            tokens=corpus.token_file(split),
            starts=starts,
            length=self.length,
            begin=self.vocabulary.roles["begin"],
            end=self.vocabulary.end_of_text,
        )

    def pixels(self, split: str) -> np.ndarray:
        """The images of a split, uint8 [N, Y, X, C], which are read from the disk when they are used."""
        return open_images(prepared_images(self._source()), split, batch_size=1, seed=0, flip=False).pixels

    @property
    def unit(self) -> str:
        return "images"

    @property
    def example_shape(self) -> tuple[int, ...]:
        """(Y, X, C)."""
        return tuple(image_head(prepared_images(self._source()))["shape"])

    def fit(self, model: Any) -> Any:
        """`model` with the vocabulary of the captions, and with the size and channels of the images."""
        height, width, channels = self.example_shape
        text = super().fit(model.text)
        if text.max_length != self.length:
            raise UserError(
                f"captions of {self.length} tokens are for a text tower of as many, not {text.max_length}: give "
                "--data.length and --model.text.max-length the same"
            )
        network = replace(model.network, image_channels=channels, image_size=(height, width))
        return replace(model, text=text, network=network)

    def special_tokens(self) -> dict[str, Any]:
        end = self.vocabulary.end_of_text
        return {"bos": self.vocabulary.roles["begin"], "eos": (end,), "pad": end}

    def rows(self, captions: Sequence[str]) -> np.ndarray:
        """Captions as batches have them, int32 [B, S]; says of which the end is cut."""
        begin, end = self.vocabulary.roles["begin"], self.vocabulary.end_of_text
        tokenizer, longest = self.load_tokenizer(), self.length - 2
        made = tokenizer.encode(captions)
        for tokens in made:
            if len(tokens) > longest:
                lost = tokenizer.decode(tokens[longest:])
                print(
                    f"a text has {len(tokens)} tokens, and {longest} are read: it is cut before {lost!r}",
                    file=sys.stderr,
                )
        return np.stack([caption_row(tokens, self.length, begin, end) for tokens in made])

    def _source(self) -> CaptionSource:
        return self._once

    @cached_property
    def _once(self) -> CaptionSource:
        return caption_source(self.source, self.size, self.text_field, self.validation_fraction, self.unpaired)

    def _info(self, split: str, images: Images, starts: np.ndarray) -> DataInfo:
        """What a person is told; its SHA-256 is of the pixels and, behind them, of the captions."""
        text, longest = self.info(split), self.length - 2
        cut = int((np.diff(starts) - 1 > longest).sum())
        pixels = images.info.detail.rpartition(", ")[0]
        return replace(
            images.info,
            sha256=_joined(images.info.sha256, text.sha256),
            bytes=images.info.bytes + text.bytes,
            detail=f"{pixels}, {cut:,} captions cut to {longest} tokens; {text.detail.partition(', ')[2]}",
        )


def caption_row(tokens: np.ndarray, length: int, begin: int, end: int) -> np.ndarray:
    """int32 [length]: begin, as many of the tokens as fit, end, and end again to the end."""
    row = np.full(length, end, np.int32)
    row[0] = begin
    kept = tokens[: length - 2]
    row[1 : 1 + len(kept)] = kept
    return row


def _joined(*digests: str) -> str:

    return hashlib.sha256(" ".join(digests).encode()).hexdigest()
