"""Tokenizers of published folders that the library `sentencepiece` runs: T5's, Llama's and Marian's."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.published_folder import PretrainedError
from zoo.tokenizer_settings import Settings
from zoo.tokenizers import Tokenizer, bos_and_eos, vocabulary

KEEPS_BLANKS = b"\x1a\x04\x18\x00\x20\x00"
"""ModelProto.normalizer_spec with add_dummy_prefix and remove_extra_whitespaces false: of a message that comes twice
protobuf takes the later fields."""


class PieceTokenizer(Tokenizer):
    """A sentencepiece model of T5 or Llama, and the tokens that are matched whole before it sees a text."""

    def __init__(self, path: Path, settings: Settings):
        self.settings = settings
        is_t5 = settings.kind == "T5Tokenizer"
        self.inner = sentencepiece(path, KEEPS_BLANKS)
        self.first = sentencepiece(path) if settings.flag("add_prefix_space", True) else self.inner
        self.blank_each = is_t5 or settings.flag("legacy", False)
        self.size = self.inner.get_piece_size()
        self.whole: dict[str, int] = {}
        self.special: set[int] = set()
        for i in range(self.size):
            if self.inner.is_control(i) or self.inner.is_unknown(i):
                self.add(self.inner.id_to_piece(i), i)
        if is_t5:
            count = settings.fields.get("extra_ids", 100)
            if type(count) is not int or count < 0:
                raise PretrainedError(f"{settings.folder}: extra_ids {count!r} of tokenizer_config.json is no number")
            for n in range(count):
                self.add(f"<extra_id_{n}>", self.size + count - 1 - n)
        around = self.add_configured()
        self.content = {i: token for token, i in self.whole.items()}
        self.vocab_size = max([self.size - 1, *self.whole.values()]) + 1
        longest = sorted(self.whole, key=len, reverse=True)
        patterns = [re.escape(token).join(around.get(token, ("", ""))) for token in longest]
        self.matcher = re.compile(f"({'|'.join(patterns)})")
        self.frame = ([], [self.whole[settings.needed("eos_token")]]) if is_t5 else bos_and_eos(self, True)

    def add(self, token: str, i: int, special: bool = True) -> None:
        """Makes `token` one that is matched whole, as id `i`; raises PretrainedError where either is taken."""
        known = self.inner.piece_to_id(token)
        taken = self.inner.id_to_piece(known) == token if i >= self.size else self.inner.id_to_piece(i) != token
        if taken or self.whole.get(token, i) != i:
            raise PretrainedError(f"{self.settings.folder}: {token!r} as {i} is not what its sentencepiece model says")
        self.whole[token] = i
        if special:
            self.special.add(i)

    def add_configured(self) -> dict[str, tuple[str, str]]:
        """Adds the tokens that the JSON files name; returns patterns of what some of them take before and behind."""
        settings, around = self.settings, {}
        self.special_tokens = settings.named()
        roles = self.special_tokens.values()
        for i, fields in settings.added().items():
            token = fields["content"]
            if fields.get("single_word"):
                raise PretrainedError(f"{settings.folder}: {token!r} is single_word, which is not read here")
            self.add(token, i, special=bool(fields.get("special")) or token in roles)
            around[token] = r"\s*" if fields.get("lstrip") else "", r"\s*" if fields.get("rstrip") else ""
        for token in [*roles, *settings.extra()]:
            known, end = self.inner.piece_to_id(token), max([self.size - 1, *self.whole.values()]) + 1
            self.add(token, self.whole.get(token, known if self.inner.id_to_piece(known) == token else end))
        self.special_ids = {role: self.whole[token] for role, token in self.special_tokens.items()}
        return around

    def pieces(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        return [self.one(text) for text in texts]

    def one(self, text: str) -> list[int]:
        ids: list[int] = []
        for n, part in enumerate(self.matcher.split(text)):
            if n % 2:
                ids.append(self.whole[part] if part in self.whole else self.whole[part.strip()])
            elif part:
                ids += (self.first if not ids or self.blank_each else self.inner).encode(part)
        return ids

    def text(self, ids: list[int], special: bool) -> str:
        known = (i for i in ids if i < self.size or i in self.content)
        shown = (i for i in known if special or i not in self.special)
        parts: list[str] = []
        for is_whole, group in itertools.groupby(shown, self.content.__contains__):
            run = list(group)
            parts += [self.content[i] for i in run] if is_whole else [self.inner.decode(run)]
        return "".join(parts).removeprefix("" if self.first is self.inner else " ")


class MarianTokenizer(Tokenizer):
    """source.spm cuts a text, vocab.json numbers the pieces; `>>fra<<` at its beginning is one token.

    transformers changes punctuation first where sacremoses is installed; here, as without it, texts stay as they are.
    """

    def __init__(self, settings: Settings):
        self.settings, folder = settings, settings.folder
        if settings.flag("separate_vocabs", False):
            raise PretrainedError(f"{folder}: separate_vocabs is not read here: a model with one vocab.json is")
        self.source = sentencepiece(folder / "source.spm")
        self.ids = vocabulary(folder / "vocab.json")
        self.content = {i: token for token, i in self.ids.items()}
        self.special_tokens = settings.named()
        missing = [token for token in self.special_tokens.values() if token not in self.ids]
        if missing:
            raise PretrainedError(f"{folder / 'vocab.json'} has no {missing[0]}, a special token: fetch it again")
        self.special_ids = {role: self.ids[token] for role, token in self.special_tokens.items()}
        self.vocab_size = max(self.ids.values()) + 1
        self.frame = ([], [self.ids[settings.needed("eos_token")]])
        self.unknown = self.ids[settings.needed("unk_token")]
        self.matcher = re.compile(f"({'|'.join(map(re.escape, self.special_tokens.values()))})")

    def pieces(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        return [self.one(text) for text in texts]

    def one(self, text: str) -> list[int]:
        pieces: list[str] = []
        for n, part in enumerate(self.matcher.split(text)):
            code = re.match(r">>.*?<<", part, flags=re.DOTALL)
            if n % 2:
                pieces.append(part)
            elif code:
                pieces += [code[0], *self.source.encode(part[code.end() :], out_type=str)]
            else:
                pieces += self.source.encode(part, out_type=str)
        return [self.ids.get(piece, self.unknown) for piece in pieces]

    def text(self, ids: list[int], special: bool) -> str:
        roles = set(self.special_ids.values())
        shown = (i for i in ids if i in self.content and (special or i not in roles))
        parts: list[str] = []
        for is_role, run in itertools.groupby(shown, roles.__contains__):
            pieces = [self.content[i] for i in run]
            parts += [f"{piece} " for piece in pieces] if is_role else [self.source.decode_pieces(pieces)]
        return "".join(parts).replace("▁", " ").strip()


def sentencepiece(path: Path, changes: bytes = b"") -> Any:
    """A sentencepiece model, with the fields that `changes` encodes in place of its own."""
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=path.read_bytes() + changes)
    except RuntimeError:
        raise PretrainedError(f"{path} is no sentencepiece model: fetch it again") from None
