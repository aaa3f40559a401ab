"""Where words and sentences begin, by each kind of tokenizer."""

import json
from pathlib import Path

import numpy as np
import pytest

from zoo.train.data.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer, train_bpe
from zoo.train.data.vocabulary import vocabulary
from zoo.train.data.words import Boundaries

TEXT = "Unaffable 1918 words. Are\nthey? e.g. naïve"


def byte_pairs(folder: Path) -> Tokenizer:
    train_bpe([TEXT * 5], 280, folder / "tokenizer.json")
    return FileTokenizer(folder / "tokenizer.json")


def word_pieces(folder: Path) -> Tokenizer:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "una", "##ffable", "19", "##18", "words", "naive"]
    pieces += ["are", "they", "e", "g", ".", "?"]
    from tokenizers import Tokenizer as Library
    from tokenizers import models, normalizers, pre_tokenizers

    made = Library(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(pieces[:5])
    (folder / "tokenizer.json").write_text(made.to_str())
    return FileTokenizer(folder / "tokenizer.json")


def parts(tokenizer: Tokenizer, tokens: np.ndarray, starts: np.ndarray) -> list[str]:
    texts = tokenizer.texts
    pieces = np.split(tokens, np.flatnonzero(starts)[1:])
    return ["".join(texts[token] for token in piece) for piece in pieces]


@pytest.mark.parametrize("make", [lambda folder: ByteTokenizer(), byte_pairs, word_pieces], ids=["bytes", "bpe", "wp"])
def test_words_and_sentences(make, tmp_path: Path) -> None:
    tokenizer = make(tmp_path)
    (tokens,) = tokenizer.encode([TEXT])
    boundaries = Boundaries.of(tokenizer.texts, tokenizer.vocab_size)
    words = [word.strip() for word in parts(tokenizer, tokens, boundaries.word_starts(tokens))]
    naive = "naive" if make is word_pieces else "naïve".encode().decode("latin-1")
    spelled = ["unaffable" if make is word_pieces else "Unaffable", "1918", "words", "they", "e", "g", naive]
    assert [word for word in words if word in spelled] == spelled
    sentences = ["".join(part.split()) for part in parts(tokenizer, tokens, boundaries.sentence_starts(tokens))]
    # WordPieces keep no ends of lines, and do not say that no blank parts "e.g.".
    apart = ["arethey?", "e.", "g.", naive] if make is word_pieces else ["Are", "they?", "e.g.", naive]
    assert [sentence for sentence in sentences if sentence][1:] == apart


def test_texts_are_the_bytes(tmp_path: Path) -> None:
    tokenizer = byte_pairs(tmp_path)
    (tokens,) = tokenizer.encode([TEXT])
    assert "".join(tokenizer.texts[token] for token in tokens).encode("latin-1").decode() == TEXT
    assert [len(text) for text in tokenizer.texts] == tokenizer.byte_lengths.tolist()


def test_special_tokens_are_the_tokenizers_where_it_has_them(tmp_path: Path) -> None:
    tokenizer = word_pieces(tmp_path)
    known = vocabulary(tokenizer, ("pad", "classify", "separate", "mask"))
    assert known.size == tokenizer.vocab_size
    assert known.roles == {"pad": 0, "classify": 2, "separate": 3, "mask": 4}
    assert np.flatnonzero(known.is_special()).tolist() == [0, 2, 3, 4]
    added = vocabulary(ByteTokenizer(), ("pad", "end"), sentinels=3)
    assert added.size == 262 and added.text == 257
    assert added.roles == {"pad": 257, "end": 258, "sentinel 0": 261, "sentinel 1": 260, "sentinel 2": 259}
    assert np.flatnonzero(added.is_special()).tolist() == [256, 257, 258, 259, 260, 261]


def test_sentinels_of_a_published_tokenizer(tmp_path: Path) -> None:
    tokenizer = word_pieces(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for i in range(2):
        special = {"id": 18 - i, "content": f"<extra_id_{i}>", "single_word": False, "lstrip": False, "rstrip": False}
        content["added_tokens"].append({**special, "normalized": False, "special": True})
    content["added_tokens"].sort(key=lambda token: token["id"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
    found = vocabulary(tokenizer, (), sentinels=2)
    assert found.size == tokenizer.vocab_size == 19
    assert found.roles == {"sentinel 0": 18, "sentinel 1": 17}
