"""Tokenizers: bytes, a Hugging Face tokenizer.json, and byte-pair encodings trained on the data.

Every tokenizer tells how many bytes of text each of its tokens stands for, so that losses over different vocabularies
compare as bits per byte.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from zoo.train.experiment import UserError

END_OF_TEXT = "<|endoftext|>"
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
_PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
# The byte that each character of a byte-level vocabulary stands for: printed ones for themselves, the others from 256.
_BYTES = {chr(byte): byte for byte in _PRINTED} | {
    chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in _PRINTED)
}
_PIECE = 1 << 20  # characters; longer documents are encoded in pieces, cut after a line


class Tokenizer(Protocol):
    """Text to token ids and back. `end_of_text` is an id that `encode` never gives."""

    vocab_size: int
    end_of_text: int

    @property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of text each token stands for, int32 [V]; 0 for special tokens."""
        ...

    @property
    def special(self) -> Mapping[str, int]:
        """Special tokens, by name."""
        ...

    @property
    def texts(self) -> list[str]:
        """What each token stands for, with a blank ahead of what begins a word; byte by byte, as Latin-1, where tokens
        are of bytes. [V], "" for special tokens."""
        ...

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, without special tokens."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids; special tokens are left out, what is not UTF-8 is shown as U+FFFD."""
        ...


class ByteTokenizer:
    """The 256 bytes, and <|endoftext|> as 256."""

    vocab_size = 257
    end_of_text = 256

    @property
    def byte_lengths(self) -> np.ndarray:
        return np.array([1] * 256 + [0], np.int32)

    @property
    def special(self) -> Mapping[str, int]:
        return {END_OF_TEXT: self.end_of_text}

    @property
    def texts(self) -> list[str]:
        return [*map(chr, range(256)), ""]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(token for token in map(int, tokens) if token < 256).decode(errors="replace")


class FileTokenizer:
    """A Hugging Face tokenizer.json.

    Raises UserError where the file is missing, is not such a file, or has no special token that ends a text.
    """

    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Library

        self._content = read_tokenizer(path)
        try:
            self._tokenizer: Any = Library.from_str(self._content.decode())
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{path} is not a Hugging Face tokenizer.json: {str(error).splitlines()[0]}") from error
        self._tokenizer.encode_special_tokens = True  # a text that spells <|endoftext|> is text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        self._special = {
            token.content: index for index, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        }
        ends = [self._special[name] for name in _END_NAMES if name in self._special]
        if not ends:
            raise UserError(
                f"{path} has no special token that ends a text (looked for {', '.join(_END_NAMES)}): add {END_OF_TEXT}"
            )
        self.end_of_text = ends[0]
        self.vocab_size = max(self._vocabulary.values()) + 1

    @property
    def byte_lengths(self) -> np.ndarray:
        """Exact for byte-level vocabularies (GPT-2's, Llama 3's) and for those that fall back to bytes, but for the
        blank that some put before a text; an estimate for lossy ones, such as WordPiece in lower case."""
        byte_level, added = self._byte_level, self._added
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, index in self._vocabulary.items():
            if token in self._special:
                continue
            if byte_level and token not in added:
                lengths[index] = len(token)
            elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
                lengths[index] = 1
            else:
                lengths[index] = len(token.removeprefix("##").replace("▁", " ").encode())
        return lengths

    @property
    def special(self) -> Mapping[str, int]:
        return self._special

    @property
    def texts(self) -> list[str]:
        byte_level, added = self._byte_level, self._added
        word_pieces = json.loads(self._content)["model"].get("type") == "WordPiece"
        texts = [""] * self.vocab_size
        for token, index in self._vocabulary.items():
            if token in self._special:
                continue
            if byte_level and token not in added:
                texts[index] = "".join(chr(_BYTES[character]) for character in token)
            elif word_pieces:
                texts[index] = token[2:] if token.startswith("##") else f" {token}"
            else:
                texts[index] = token.replace("▁", " ")
        return texts

    @property
    def _byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self._content).get("decoder"))

    @property
    def _added(self) -> set[str]:
        return {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        pieces = [list(_pieces(text)) for text in texts]
        flat = self._tokenizer.encode_batch_fast([piece for text in pieces for piece in text], add_special_tokens=False)
        dtype = token_dtype(self.vocab_size)
        encodings = iter(flat)
        return [np.concatenate([np.array(next(encodings).ids, dtype) for _ in text]) for text in pieces]

    def decode(self, tokens: Iterable[int]) -> str:
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)


def read_tokenizer(path: Path) -> bytes:
    """The content of a tokenizer file; raises UserError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"tokenizer file {path}: {error.strerror}; give bytes, or the path of a tokenizer.json"
        ) from error


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type for the ids: uint16 or uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Trains a byte-level byte-pair encoding with GPT-2's pre-tokenizer and writes it as tokenizer.json.

    texts: all are held in memory as counts of words, not as text. vocab_size counts the 256 bytes and <|endoftext|>.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(f"a vocabulary of {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need 257")
    tokenizer = Library(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer=trainer)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(tokenizer.to_str(pretty=True))
    partial.rename(path)


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces of at most about `_PIECE` characters, cut after a line where there is one."""
    start = 0
    while len(text) - start > _PIECE:
        end = text.rfind("\n", start, start + _PIECE) + 1
        end = end if end > start else start + _PIECE
        yield text[start:end]
        start = end
    yield text[start:]
