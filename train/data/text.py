"""Text data sets: the configuration that a person writes, and what it opens."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from zoo.train.data import corpus
from zoo.train.data.cache import cache_dir, prepared
from zoo.train.data.corpus import Corpus, SplitInfo
from zoo.train.data.packing import PackedText
from zoo.train.data.text_sources import TextSource, text_source
from zoo.train.data.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer, read_tokenizer, train_bpe
from zoo.train.data.vocabulary import Vocabulary, vocabulary
from zoo.train.experiment import DataInfo, UserError

_BPE_CHARACTERS = 256 << 20  # of training text that a byte-pair encoding is trained on, at most


@dataclass(frozen=True)
class TokenizedText:
    """Text and how it is tokenised: what the data of every objective on text begins from."""

    source: str = "python_docs"
    """python_docs (the language reference of this Python), a TFDS name[/config][:version], or a file or folder of .txt
    and .jsonl."""
    length: int = 256
    """Tokens in a sequence."""
    tokenizer: str = "bytes"
    """bytes, or the path of a Hugging Face tokenizer.json, or of the folder that holds it."""
    train_bpe: int | None = None
    """Train a byte-pair encoding of this vocabulary size on the training text, and use it."""
    text_field: str = "text"
    """What holds the text in JSON lines and in TFDS features."""
    validation_fraction: float = 0.1
    """Share of the text held out where the data has no validation split of its own."""

    roles: ClassVar[tuple[str, ...]] = ()  # of special tokens, names in zoo.train.data.vocabulary

    def prepare(self) -> None:
        """Writes the TFDS data set, the tokenizer and the token files that are not in the cache yet."""
        self._corpus()

    def packed(self, split: str, *, batch_size: int, seed: int, length: int | None = None) -> PackedText:
        """A split cut into sequences of `length`, or of self.length; prepares what a host's own disk lacks."""
        found, length = self._corpus(), length or self.length
        info = found.splits[split]
        if info.tokens < length:
            raise UserError(
                f"the {split} text of {self.source} is {info.tokens} tokens, less than one sequence of {length}: "
                f"lower --data.length{', or raise --data.validation-fraction' if split == 'validation' else ''}"
            )
        return PackedText(
            info=self.info(split),
            tokens=found.token_file(split),
            byte_lengths=found.byte_lengths,
            end_of_text=found.end_of_text,
            length=length,
            batch_size=batch_size,
            seed=seed if split == "train" else None,
        )

    def info(self, split: str) -> DataInfo:
        """What a person is told of "train" or "validation"."""
        found = self._corpus()
        info = found.splits[split]
        return DataInfo(
            name=self._source().name,
            sha256=info.sha256,
            examples=info.documents,
            bytes=info.bytes,
            detail=self._detail(split, found),
        )

    def document_starts(self, split: str) -> np.ndarray:
        """Where in the split's tokens each document's <|endoftext|> is, int64 [documents]."""
        return self._corpus().document_starts(split)

    @property
    def unit(self) -> str:
        return "tokens"

    @property
    def example_shape(self) -> tuple[int, ...]:
        return (self.length,)

    def fit(self, model: Any) -> Any:
        """`model` with the vocabulary of the data; raises UserError where a sequence is longer than its positions."""
        limit = getattr(model, "max_length", None)
        if limit is not None and self.length > limit:
            raise UserError(
                f"sequence length {self.length} is longer than the model's {limit} positions: lower --data.length or "
                "raise --model.max-length"
            )
        changes: dict[str, Any] = {"vocab_size": self.vocabulary.size}
        if special := self.special_tokens():
            changes["special_tokens"] = replace(model.special_tokens, **special)
        fits = all(getattr(model, name) == value for name, value in changes.items())
        return model if fits else replace(model, **changes)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer's, with the special tokens that an objective needs beside it."""
        return vocabulary(self.load_tokenizer(), self.roles)

    def special_tokens(self) -> dict[str, Any]:
        """Fields of the model's SpecialTokens that the data decides."""
        return {}

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer; one to be trained is trained if it is not in the cache."""
        path = self.tokenizer_file()
        return ByteTokenizer() if path is None else FileTokenizer(path)

    def tokenizer_file(self) -> Path | None:
        """The tokenizer.json in use, None for bytes. A run that keeps a copy can be sampled on another machine."""
        if self.train_bpe is not None:
            return self._trained_bpe(self.train_bpe)
        if self.tokenizer == "bytes":
            return None
        path = Path(self.tokenizer).expanduser()
        return path / "tokenizer.json" if path.is_dir() else path

    def split_info(self, split: str) -> SplitInfo:
        """Sizes and SHA-256 of "train" or "validation"."""
        return self._corpus().splits[split]

    def documents(self, split: str) -> Iterator[str]:
        """The documents of "train" or "validation", read again from the source."""
        return (text for text in self._source().documents(split) if text)

    def _source(self) -> TextSource:
        return text_source(self.source, self.text_field, self.validation_fraction)

    def _corpus(self) -> Corpus:
        if self.length < 2:
            raise UserError(f"sequence length {self.length} is too short: --data.length needs at least 2")
        source = self._source()
        path = self.tokenizer_file()
        tokenizer = "bytes" if path is None else hashlib.sha256(read_tokenizer(path)).hexdigest()
        name = _digest(corpus.FORMAT, source.fingerprint(), tokenizer)
        folder = prepared(
            cache_dir() / "text" / name,
            corpus.complete,
            lambda partial: corpus.write(partial, source, self.load_tokenizer()),
        )
        return Corpus.load(folder)

    def _trained_bpe(self, vocab_size: int) -> Path:
        if self.tokenizer != "bytes":
            raise UserError(
                f"--data.train-bpe {vocab_size} and --data.tokenizer {self.tokenizer} exclude each other: give one"
            )
        source = self._source()
        folder = cache_dir() / "tokenizers" / _digest(corpus.FORMAT, source.fingerprint(), vocab_size)

        def train(partial: Path) -> None:
            train_bpe(_limited(source.documents("train")), vocab_size, partial / "tokenizer.json")

        return prepared(folder, lambda made: (made / "tokenizer.json").is_file(), train) / "tokenizer.json"

    def _detail(self, split: str, found: Corpus) -> str:
        info = found.splits[split]
        parts = [f"{info.documents:,} documents", f"{info.tokens:,} tokens of a vocabulary of {found.vocab_size:,}"]
        if info.table_bytes != info.bytes:
            parts.append(f"tokens account for {info.table_bytes / info.bytes:.2%} of the bytes")
        return ", ".join(parts)


@dataclass(frozen=True)
class TextData(TokenizedText):
    """Packed sequences of text, for the next token to be predicted."""

    def open(self, split: str, *, batch_size: int, seed: int) -> PackedText:
        """`split` is "train" or "validation"; prepares first what is missing (a host with a disk of its own)."""
        return self.packed(split, batch_size=batch_size, seed=seed)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _limited(texts: Iterable[str]) -> Iterator[str]:
    """Texts until `_BPE_CHARACTERS` are reached."""
    left = _BPE_CHARACTERS
    for text in texts:
        yield text
        left -= len(text)
        if left <= 0:
            return
