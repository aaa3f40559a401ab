"""Tokenised text on disk: one memory-mapped file of tokens a split, and a table of the bytes each token stands for."""

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from zoo.train.data.cache import map_file
from zoo.train.data.splits import SPLITS
from zoo.train.data.text_sources import TextSource
from zoo.train.data.tokenizers import Tokenizer, token_dtype
from zoo.train.experiment import UserError

FORMAT = 1
_BATCH = 4 << 20  # characters encoded at once
_SHOW = 10  # seconds between lines that say how far it is


@dataclass(frozen=True)
class SplitInfo:
    """documents: those that are not empty. bytes: of their UTF-8. table_bytes: what the table of byte lengths counts.

    sha256: over each document's UTF-8 and a zero byte, in order. tokens: with one <|endoftext|> a document.
    """

    documents: int
    bytes: int
    table_bytes: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """A tokenised data set in `folder`, as `write` leaves it; `token_file` maps a split."""

    folder: Path
    vocab_size: int
    end_of_text: int
    splits: dict[str, SplitInfo]

    @classmethod
    def load(cls, folder: Path) -> "Corpus":
        """Raises OSError or ValueError where files are missing or were cut short."""
        head = json.loads((folder / "corpus.json").read_text())
        splits = {name: SplitInfo(**head["splits"][name]) for name in SPLITS}
        corpus = cls(folder, head["vocab_size"], head["end_of_text"], splits)
        itemsize = token_dtype(corpus.vocab_size).itemsize
        for name, split in splits.items():
            if (folder / f"{name}.tokens").stat().st_size != split.tokens * itemsize:
                raise ValueError(f"{folder / name}.tokens is not {split.tokens} tokens long")
            if (folder / f"{name}.documents").stat().st_size != split.documents * 8:
                raise ValueError(f"{folder / name}.documents is not of {split.documents} documents")
        if corpus.byte_lengths.shape != (corpus.vocab_size,):
            raise ValueError(f"{folder}/byte_lengths.npy is not a table of {corpus.vocab_size}")
        return corpus

    @property
    def byte_lengths(self) -> np.ndarray:
        """int32 [V]."""
        return np.load(self.folder / "byte_lengths.npy", allow_pickle=False)

    def token_file(self, split: str) -> np.ndarray:
        """Token ids, uint16 or uint32 [tokens], mapped: each document is <|endoftext|> and then its text."""
        return map_file(self.folder / f"{split}.tokens", token_dtype(self.vocab_size))

    def document_starts(self, split: str) -> np.ndarray:
        """Where in the token file each document's <|endoftext|> is, int64 [documents], mapped."""
        return map_file(self.folder / f"{split}.documents", np.int64)


def complete(folder: Path) -> bool:
    """Whether `folder` holds a whole corpus."""
    try:
        Corpus.load(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def write(folder: Path, source: TextSource, tokenizer: Tokenizer) -> None:
    """Tokenises both splits into `folder`, some megabytes of documents at a time; UserError where there is no text."""
    lengths = tokenizer.byte_lengths
    splits = {split: _write_split(folder, split, source, tokenizer, lengths) for split in SPLITS}
    np.save(folder / "byte_lengths.npy", lengths)
    head = {
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "splits": {split: asdict(info) for split, info in splits.items()},
    }
    (folder / "corpus.json").write_text(json.dumps(head, indent=2))


def _write_split(folder: Path, split: str, source: TextSource, tokenizer: Tokenizer, lengths: np.ndarray) -> SplitInfo:
    digest = hashlib.sha256()
    documents = size = table_bytes = count = 0
    shown = time.monotonic()
    end = np.array([tokenizer.end_of_text], token_dtype(tokenizer.vocab_size))
    with open(folder / f"{split}.tokens", "wb") as file, open(folder / f"{split}.documents", "wb") as starts:
        for texts in _groups(text for text in source.documents(split) if text):
            for text, tokens in zip(texts, tokenizer.encode(texts), strict=True):
                if (tokens == tokenizer.end_of_text).any():
                    raise UserError(f"the tokenizer gives its end-of-text token within a document of {source.name}")
                data = text.encode()
                digest.update(data + b"\0")
                starts.write(np.array([count], np.int64).tobytes())
                file.write(np.concatenate([end, tokens]).tobytes())
                documents, size, count = documents + 1, size + len(data), count + len(tokens) + 1
                table_bytes += int(lengths[tokens].sum())
            if time.monotonic() > shown + _SHOW:
                shown = time.monotonic()
                print(f"{source.name}: {size / 1e6:,.0f} MB of {split} text tokenised", file=sys.stderr)
    if not documents:
        raise UserError(f"{source.name} has no text for {split}: {_remedy(split)}")
    return SplitInfo(documents, size, table_bytes, count, digest.hexdigest())


def _remedy(split: str) -> str:
    return (
        "every document is empty"
        if split == "train"
        else "raise --data.validation-fraction, or give a folder that holds train and validation"
    )


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts of about `_BATCH` characters together."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= _BATCH:
            yield group
            group, size = [], 0
    if group:
        yield group
