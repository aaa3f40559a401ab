import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from zoo.train.data.tokenizers import END_OF_TEXT, ByteTokenizer, FileTokenizer, _pieces, train_bpe
from zoo.train.experiment import UserError

TEXTS = ["the cat sat on the mat, the cat sat\n" * 20, "naïve café 中文 \U0001f600 tail\r\n\t x  y", "\x00\x01 zero"]
text_strategy = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(TEXTS, 300, path)
    return FileTokenizer(path)


@settings(deadline=None)
@given(text_strategy)
def test_bytes_come_back(text):
    tokenizer = ByteTokenizer()
    (tokens,) = tokenizer.encode([text])
    assert tokenizer.decode(tokens) == text
    assert tokenizer.byte_lengths[tokens].sum() == len(text.encode())
    assert tokenizer.decode([*tokens, tokenizer.end_of_text]) == text


@settings(deadline=None)
@given(text=text_strategy)
def test_a_trained_encoding_is_exact(bpe, text):
    (tokens,) = bpe.encode([text])
    assert bpe.decode(tokens) == text
    assert bpe.byte_lengths[tokens].sum() == len(text.encode())


def test_a_text_that_spells_the_end_is_text(bpe):
    text = f"a {END_OF_TEXT} b"
    (tokens,) = bpe.encode([text])
    assert bpe.end_of_text not in tokens
    assert bpe.decode(tokens) == text
    assert bpe.byte_lengths[bpe.end_of_text] == 0


def test_training_compresses_and_repeats_itself(tmp_path):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        train_bpe(iter(TEXTS), 300, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    tokenizer = FileTokenizer(paths[0])
    assert 257 < tokenizer.vocab_size <= 300
    assert len(tokenizer.encode(TEXTS[:1])[0]) < len(TEXTS[0]) / 3


def test_truncation_and_padding_of_the_file_are_left_out(bpe, tmp_path):
    library = Tokenizer.from_str(bpe._content.decode())
    library.enable_truncation(4)
    library.enable_padding(length=4)
    library.save(str(tmp_path / "tokenizer.json"))
    short = FileTokenizer(tmp_path / "tokenizer.json")
    for mine, theirs in zip(short.encode(TEXTS), bpe.encode(TEXTS), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_long_documents_are_encoded_in_pieces(bpe, monkeypatch):
    monkeypatch.setattr("zoo.train.data.tokenizers._PIECE", 100)
    text = TEXTS[0] * 3 + "x" * 250
    assert "".join(_pieces(text)) == text and max(map(len, _pieces(text))) <= 100
    (tokens,) = bpe.encode([text])
    assert bpe.decode(tokens) == text


def test_sentencepiece_with_bytes_to_fall_back_to(tmp_path):
    """The format of Llama 2: blanks as U+2581, unknown characters as bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "é"]
    vocabulary = {word: i for i, word in enumerate(words)}
    specials = [
        {"id": i, "content": words[i], "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i in range(3)
    ]  # fmt: skip
    content = {
        "version": "1.0",
        "added_tokens": specials,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [["▁", "a"]],
            "byte_fallback": True,
            "unk_token": "<unk>",
        },
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    tokenizer = FileTokenizer(path)
    assert tokenizer.end_of_text == 2
    text = "a b aé中</s>"
    (tokens,) = tokenizer.encode([text])
    assert 2 not in tokens and tokenizer.decode(tokens) == text
    assert tokenizer.byte_lengths[tokens].sum() == len(text.encode())


def test_a_lossy_tokenizer_is_estimated_and_its_truncation_left_out(tmp_path):
    """The format of BERT: lower case, word pieces, cut at 4 tokens."""
    words = ["[UNK]", "[CLS]", "[SEP]", "the", "cat", "##s", "sat"]
    library = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    library.add_special_tokens(["[CLS]", "[SEP]"])
    library.enable_truncation(4)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
    (tokens,) = tokenizer.encode(["The Cats sat the cat sat"])
    assert tokens.tolist() == [3, 4, 5, 6, 3, 4, 6] and tokenizer.end_of_text == 2
    assert tokenizer.byte_lengths[tokens].tolist() == [3, 3, 1, 3, 3, 3, 3]
    assert tokenizer.decode(tokens) == "the cats sat the cat sat"


def test_wrong_files(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        FileTokenizer(tmp_path / "absent.json")
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    with pytest.raises(UserError, match="not a Hugging Face"):
        FileTokenizer(bad)
    bad.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a Hugging Face"):
        FileTokenizer(bad)
    library = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(bad))
    with pytest.raises(UserError, match="no special token that ends a text"):
        FileTokenizer(bad)
    with pytest.raises(UserError, match="257"):
        train_bpe(TEXTS, 256, tmp_path / "small.json")
