"""Tokenizers of published folders: what a model's tokenizer.json, or the files older than it, make of text.

tokenizer.json, vocab.txt (BERT's WordPiece) and vocab.json with merges.txt (byte-level BPE: GPT-2, RoBERTa, BART,
Qwen 2, CLIP) go through the library `tokenizers`; zoo.sentencepieces has sentencepiece's models: T5, Llama, Marian.
tokenizer_config.json says which class it is and which tokens are special; none of a folder's code is ever run.
"""

import json
import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.published_folder import PretrainedError, find, read_json
from zoo.tokenizer_settings import PROPERTIES, Settings

FILES = ("*.json", "*.txt", "*.model", "*.spm", "*.jinja")
FLAGGED = ("GPT2Tokenizer", "Qwen2Tokenizer")
"""Classes whose older files leave it to add_bos_token and add_eos_token what stands around a text."""

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CLIP_WORD_END = "</w>"
"""How tokens of CLIP end that end a word: blanks are not told otherwise."""

TIDIED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
"""What clean_up_tokenization_spaces writes without its blanks, in this order."""


class Tokenizer:
    """Text to token ids and back.

    special_tokens: text of each special token that has a role ("eos_token": "</s>"); special_ids: its id.
    vocab_size: one above the largest id, added tokens included; a model may have more rows, for padding.
    """

    special_tokens: dict[str, str]
    special_ids: dict[str, int]
    vocab_size: int
    settings: Settings
    frame: tuple[list[int], list[int]] | None = None
    """Ids before and after a text; None where the library adds them."""

    def encode(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Ids of each text, with the special tokens that the model expects around it unless `special` is False.

        A text that spells a special token gives that token. Nothing is cut and nothing padded.
        """
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise PretrainedError(f"encode takes a list of texts, and got {texts!r:.60}: put the text into a list")
        for text in texts:
            if not text.isascii() and re.search("[\ud800-\udfff]", text):
                raise PretrainedError(f"{text!r:.60} has half of a surrogate pair, which is no text: leave it out")
        if self.frame is None:
            return self.pieces(texts, special)
        before, after = self.frame if special else ([], [])
        return [[*before, *ids, *after] for ids in self.pieces(texts, False)]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of ids; special tokens are left out unless `special`, and ids in a gap of the vocabulary always."""
        try:
            known = [operator.index(i) for i in ids]
        except TypeError:
            raise PretrainedError(
                f"decode takes the ids of one text, and got {ids!r:.60}: give a list of ids"
            ) from None
        wrong = [i for i in known if not 0 <= i < self.vocab_size]
        if wrong:
            raise PretrainedError(f"{wrong[0]} is no token: ids of this tokenizer are 0 to {self.vocab_size - 1}")
        return self.text(known, special)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Ids of messages, each {"role": ..., "content": ...}, by the chat template of the folder.

        tools: JSON schemas. add_generation_prompt: ends where the assistant is to go on. variables: what else the
        template reads.
        """
        given = {"tools": tools, "add_generation_prompt": add_generation_prompt, **variables}
        return self.encode([self.chat_text(messages, **given)], special=False)[0]

    def chat_text(self, messages: Sequence[Mapping[str, Any]], *, tools: Any = None, **variables: Any) -> str:
        """What `chat` gives the ids of."""
        from zoo.chat_template import render

        if not messages or isinstance(messages, str | Mapping) or not all(isinstance(m, Mapping) for m in messages):
            raise PretrainedError(f'{messages!r:.60} is no chat: give a list of {{"role": "user", "content": "..."}}')
        name, template = self.settings.chat_template("tool_use" if tools else "default")
        given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": False}
        return render(template, self.special_tokens | given | variables, name)

    def pieces(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        raise NotImplementedError

    def text(self, ids: list[int], special: bool) -> str:
        raise NotImplementedError


class FastTokenizer(Tokenizer):
    """One that the library `tokenizers` runs."""

    def __init__(self, library: Any, settings: Settings):
        from tokenizers import AddedToken

        self.settings, self.library = settings, library
        library.no_truncation()
        library.no_padding()
        here = {token.content for token in library.get_added_tokens_decoder().values()}
        named, extra = settings.named(), settings.extra()
        for i, fields in settings.added().items():
            if fields["content"] not in here:
                properties = {k: v for k, v in fields.items() if k in PROPERTIES}
                properties["special"] = properties.get("special", False) or fields["content"] in named.values()
                library.add_tokens([AddedToken(fields["content"], **properties)])
            if library.token_to_id(fields["content"]) != i:
                raise PretrainedError(
                    f"{settings.folder}: {fields['content']!r} is {i} by tokenizer_config.json and "
                    f"{library.token_to_id(fields['content'])} by the vocabulary: fetch both again"
                )
        wanted = [
            token for role, token in named.items() if role in settings.fields or library.token_to_id(token) is not None
        ]
        new = [token for token in dict.fromkeys([*wanted, *extra]) if token not in here]
        library.add_special_tokens([AddedToken(token, special=True, **settings.properties(token)) for token in new])
        ids = {role: library.token_to_id(token) for role, token in named.items()}
        self.special_ids = {role: i for role, i in ids.items() if i is not None}
        self.special_tokens = {role: named[role] for role in self.special_ids}
        self.vocab_size = max(library.get_vocab().values(), default=-1) + 1
        if settings.kind in FLAGGED and not (settings.folder / "tokenizer.json").exists():
            self.frame = bos_and_eos(self, False)
        # Of byte pairs it would take blanks that a text has.
        is_bpe = type(library.model).__name__ == "BPE"
        self.tidy = settings.flag("clean_up_tokenization_spaces", False) and not is_bpe

    def pieces(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        return [found.ids for found in self.library.encode_batch_fast(list(texts), add_special_tokens=special)]

    def text(self, ids: list[int], special: bool) -> str:
        text = self.library.decode(ids, skip_special_tokens=not special)
        if self.settings.kind == "CLIPTokenizer":
            text = text.replace(CLIP_WORD_END, " ").strip()
        for spaced in TIDIED if self.tidy else ():
            text = text.replace(spaced, spaced.strip())
        return text


def tokenizer(source: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a folder, or of a hub id, of which the small files alone are downloaded.

    Raises PretrainedError where there is none, or one that cannot be what it is published as.
    """
    from zoo.sentencepieces import MarianTokenizer, PieceTokenizer

    folder = find(source, FILES)
    settings = Settings(folder)
    if (folder / "tokenizer.json").exists():
        return FastTokenizer(from_json(folder / "tokenizer.json", settings), settings)
    if (folder / "source.spm").exists():
        return MarianTokenizer(settings)
    for name in ("spiece.model", "tokenizer.model"):
        if (folder / name).exists():
            if settings.kind not in ("T5Tokenizer", "LlamaTokenizer"):
                raise PretrainedError(
                    f"{folder / name} is of {settings.kind or 'a class that no tokenizer_config.json names'}, and "
                    "sentencepiece models are read of T5Tokenizer and LlamaTokenizer: fetch a tokenizer.json"
                )
            return PieceTokenizer(folder / name, settings)
    if (folder / "vocab.txt").exists():
        return FastTokenizer(word_pieces(folder / "vocab.txt", settings), settings)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        make = clip_byte_pairs if settings.kind == "CLIPTokenizer" else byte_pairs
        return FastTokenizer(make(folder, settings), settings)
    raise PretrainedError(
        f"{folder} has no tokenizer: none of tokenizer.json, vocab.txt, vocab.json with merges.txt, spiece.model, "
        "tokenizer.model, or source.spm with vocab.json"
    )


def from_json(path: Path, settings: Settings) -> Any:
    """The library's tokenizer of a tokenizer.json; what tokenizer_config.json says of lower case wins."""
    from tokenizers import Tokenizer as Library

    fields = read_json(path)
    normalizer = fields.get("normalizer")
    if isinstance(normalizer, dict) and normalizer.get("type") == "BertNormalizer":
        names = {"do_lower_case": "lowercase", "strip_accents": "strip_accents"}
        for name, own in (names | {"tokenize_chinese_chars": "handle_chinese_chars"}).items():
            normalizer[own] = settings.flag(name, normalizer.get(own))
    try:
        return Library.from_str(json.dumps(fields))
    except Exception as problem:  # the library raises plain Exception
        raise PretrainedError(f"{path} is no tokenizer ({str(problem).splitlines()[0]}): fetch it again") from None


def word_pieces(path: Path, settings: Settings) -> Any:
    """BERT's: words and signs, then the longest pieces of each from the left."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    settings.kind = expected(settings, ("BertTokenizer",), path)
    ids = {token: i for i, token in enumerate(lines(path))}
    cls, sep, unknown = (known(settings, role, ids) for role in ("cls_token", "sep_token", "unk_token"))
    made = Library(models.WordPiece(ids, unk_token=unknown[0]))
    made.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.flag("tokenize_chinese_chars", True),
        strip_accents=settings.flag("strip_accents", None),
        lowercase=settings.flag("do_lower_case", True),
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##")
    made.post_processor = processors.BertProcessing(sep, cls)
    return made


def byte_pairs(folder: Path, settings: Settings) -> Any:
    """Byte-level BPE, cut into words as GPT-2 does, or as Qwen 2."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Library

    kinds = ("GPT2Tokenizer", "RobertaTokenizer", "Qwen2Tokenizer", "CLIPTokenizer")
    settings.kind = expected(settings, kinds, folder / "merges.txt")
    ids = vocabulary(folder / "vocab.json")
    made = Library(merged(folder, ids))
    lost = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - ids.keys())
    if lost:
        raise PretrainedError(f"{folder / 'vocab.json'} has no token for {len(lost)} of the 256 bytes: fetch it again")
    blank = settings.flag("add_prefix_space", False)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=blank)
    made.decoder = decoders.ByteLevel()
    if settings.kind == "Qwen2Tokenizer":
        made.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
        bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=blank, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_alone])
    if settings.kind == "RobertaTokenizer":
        cls, sep = (known(settings, role, ids) for role in ("cls_token", "sep_token"))
        made.post_processor = processors.RobertaProcessing(sep, cls, add_prefix_space=blank)
    return made


def clip_byte_pairs(folder: Path, settings: Settings) -> Any:
    """CLIP's: words in lower case, whose last tokens say that they are; what it cannot spell is unknown."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Library

    ids = vocabulary(folder / "vocab.json")
    bos, eos, unknown = (known(settings, role, ids) for role in ("bos_token", "eos_token", "unk_token"))
    made = Library(merged(folder, ids, end_of_word_suffix=CLIP_WORD_END, unk_token=unknown[0]))
    blanks = normalizers.Replace(Regex(r"\s+"), " ")
    made.normalizer = normalizers.Sequence([normalizers.NFC(), blanks, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.RobertaProcessing(eos, bos, trim_offsets=False, add_prefix_space=False)
    return made


def merged(folder: Path, ids: Mapping[str, int], **options: str) -> Any:
    """The library's BPE of a folder's merges.txt."""
    from tokenizers import models

    parted = (line.partition(" ") for line in lines(folder / "merges.txt") if line and not line.startswith("#version"))
    merges = [(left, right) for left, _, right in parted]
    try:
        return models.BPE(dict(ids), merges, **options)
    except Exception as problem:  # the library raises plain Exception
        raise PretrainedError(f"{folder}: vocab.json and merges.txt do not fit ({problem}): fetch both again") from None


def expected(settings: Settings, kinds: Sequence[str], path: Path) -> str:
    """The class of a folder, the first of `kinds` where nothing names one; raises PretrainedError for any other."""
    if (settings.kind or kinds[0]) not in kinds:
        raise PretrainedError(
            f"{path} is of {settings.kind}, and such a file is read of {', '.join(kinds)}: fetch a tokenizer.json"
        )
    return settings.kind or kinds[0]


def known(settings: Settings, role: str, ids: Mapping[str, int]) -> tuple[str, int]:
    """The token of a role that the class cannot do without, and its id."""
    token = settings.needed(role)
    if token not in ids:
        raise PretrainedError(f"{settings.folder}: the vocabulary has no {token}: tokenizer_config.json names {role}")
    return token, ids[token]


def lines(path: Path) -> list[str]:
    """The lines of a file; U+2028 and its like do not end one."""
    try:
        return path.read_bytes().decode().removesuffix("\n").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError:
        raise PretrainedError(f"{path} is no UTF-8 text: fetch it again") from None


def vocabulary(path: Path) -> dict[str, int]:
    ids = read_json(path)
    if not ids or any(type(i) is not int or i < 0 for i in ids.values()) or len({*ids.values()}) < len(ids):
        raise PretrainedError(f"{path} does not give each token an id of its own: fetch it again")
    return ids


def bos_and_eos(made: Tokenizer, bos: bool) -> tuple[list[int], list[int]]:
    """Ids around a text by add_bos_token, `bos` unless it is given, and add_eos_token."""
    frame = []
    for role, default in (("bos_token", bos), ("eos_token", False)):
        wanted = made.settings.flag(f"add_{role}", default)
        if wanted and role not in made.special_ids:
            raise PretrainedError(f"{made.settings.folder}: add_{role} is true and there is no {role}: name one")
        frame.append([made.special_ids[role]] if wanted else [])
    return frame[0], frame[1]
