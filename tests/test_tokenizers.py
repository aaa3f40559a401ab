"""Tokenizers of published folders. The ids expected here are those of transformers 5.23."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

import zoo
from zoo.published_folder import PretrainedError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "##es", "cafe", "café", "The", ",", "中", "'", "s"]
MERGES = ["t h", "th e", "Ġ the", "Ġ f", "o x", "Ġf ox"]
SENTENCES = ["the quick brown fox jumps over the lazy dog", "dogs and foxes run away from 123 other dogs", "hello"] * 40


def write(folder: Path, **files: Any) -> Path:
    """A folder with files by their names, in which __ stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(
            content if isinstance(content, str) else json.dumps(content)
        )
    return folder


def byte_pair_files(special: Sequence[str]) -> dict[str, Any]:
    """vocab.json and merges.txt with six merges."""
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    merges = "\n".join(["#version: 0.2", *MERGES, ""])
    return {"vocab__json": {token: i for i, token in enumerate(tokens)}, "merges__txt": merges}


def train(**options: Any) -> bytes:
    from sentencepiece import SentencePieceTrainer

    made = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=made, hard_vocab_limit=False, minloglevel=2, **options
    )
    return made.getvalue()


@pytest.fixture(scope="module")
def t5_model() -> bytes:
    return train(model_type="unigram", vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


@pytest.fixture(scope="module")
def llama_model() -> bytes:
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    return train(model_type="bpe", vocab_size=340, byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, **plain)


def test_word_pieces(tmp_path) -> None:
    folder = write(tmp_path, vocab__txt="\n".join(WORDS) + "\n", config__json={"model_type": "bert"})
    found = zoo.tokenizer(folder)
    texts = ["The foxes, CAFÉ", "the[MASK]fox's 中中", "", " dog"]
    assert found.encode(texts) == [
        [2, 5, 6, 7, 11, 8, 3],
        [2, 5, 4, 6, 13, 14, 12, 12, 3],
        [2, 3],
        [2, 1, 3],
    ]
    assert found.encode(["the fox"], special=False) == [[5, 6]]
    assert found.decode([2, 5, 6, 7, 11, 3]) == "the foxes,"
    assert found.decode([2, 5, 3], special=True) == "[CLS] the [SEP]"
    assert (found.vocab_size, found.special_ids["mask_token"]) == (15, 4)


def test_word_pieces_by_their_configuration(tmp_path) -> None:
    added = {"15": {"content": "foxy", "single_word": True}, "16": {"content": "[E]", "lstrip": True, "special": True}}
    told = {"do_lower_case": False, "clean_up_tokenization_spaces": True, "added_tokens_decoder": added}
    folder = write(
        tmp_path, vocab__txt="\n".join(WORDS), tokenizer_config__json={"tokenizer_class": "BertTokenizerFast", **told}
    )
    found = zoo.tokenizer(folder)
    assert found.encode(["The café foxy [E]the"]) == [[2, 10, 9, 15, 16, 5, 3]]
    assert found.encode(["foxyfox"], special=False) == [[1]]
    assert found.decode([2, 10, 6, 7, 11, 3]) == "The foxes,"
    assert found.vocab_size == 17


@pytest.mark.parametrize(
    ("kind", "special", "ids"),
    [
        ("gpt2", ["<|endoftext|>"], [[258, 262, 259, 0], [128, 103, 199, 199, 258], []]),
        ("qwen2", ["<|endoftext|>"], [[258, 262, 259, 0], [128, 103, 199, 199, 258], []]),
        (
            "roberta",
            ["<s>", "</s>", "<unk>", "<|endoftext|>", "<mask>"],
            [[0, 262, 266, 263, 3, 1], [0, 132, 107, 203, 203, 262, 1], [0, 1]],
        ),
    ],
)
def test_byte_pairs(tmp_path, kind: str, special: list[str], ids: list[list[int]]) -> None:
    found = zoo.tokenizer(write(tmp_path, **byte_pair_files(special), config__json={"model_type": kind}))
    if kind == "roberta":
        found.library.add_special_tokens(["<|endoftext|>"])
    texts = ["the fox the<|endoftext|>", "é\n\nthe", ""]
    assert found.encode(texts) == ids
    assert [found.decode(row) for row in ids] == ["the fox the", "é\n\nthe", ""]


CLIP_MERGES = ["t h", "th e</w>", "f o", "fo x</w>", "c a", "ca t</w>", "' s</w>", "Ã ©</w>"]


def clip_files() -> dict[str, Any]:
    """As those of openai/clip-vit-large-patch14, but for the merges, which are eight."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in CLIP_MERGES)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    bos = {"__type": "AddedToken", "content": "<|startoftext|>", "normalized": True, "lstrip": False}
    return {
        "vocab__json": {token: i for i, token in enumerate(tokens)},
        "merges__txt": "\n".join(["#version: 0.2", *CLIP_MERGES, ""]),
        "tokenizer_config__json": {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "bos_token": bos},
    }


@pytest.mark.parametrize(
    ("text", "ids", "decoded"),
    [
        (
            "The FOX's  cat,\n the 42 cafés Café",
            [513, 515, 518, 517, 267, 513, 275, 273, 516, 69, 127, 102, 338, 516, 69, 519],
            "the fox 's cat , the 4 2 cafés café",
        ),
        ("", [], ""),
        ("<|startoftext|>fox<|endoftext|>", [520, 515, 521], "fox"),
        ("中 the!? ...", [160, 116, 511, 513, 0, 286, 13, 13, 269], "中 the !? ..."),
        ("x<|STARTOFTEXT|>y", [343, 520, 344], "x y"),
    ],
)
def test_byte_pairs_of_clip(tmp_path, text: str, ids: list[int], decoded: str) -> None:
    found = zoo.tokenizer(write(tmp_path, **clip_files()))
    assert found.encode([text]) == [[520, *ids, 521]] and found.encode([text], special=False) == [ids]
    assert found.decode([520, *ids, 521]) == decoded
    assert found.special_ids == {"bos_token": 520, "eos_token": 521, "unk_token": 521, "pad_token": 521}
    written = write(tmp_path / "new", tokenizer__json=found.library.to_str())
    write(written, config__json={"model_type": "clip_text_model"})
    again = zoo.tokenizer(written)
    assert again.encode([text]) == [[520, *ids, 521]] and again.decode(ids) == decoded


def test_what_clip_cannot_spell_is_unknown(tmp_path) -> None:
    files = clip_files()
    del files["vocab__json"]["q"], files["vocab__json"]["q</w>"]
    assert zoo.tokenizer(write(tmp_path, **files)).encode(["the q fox"], special=False) == [[513, 521, 515]]


def test_special_tokens_are_matched_as_their_objects_say(tmp_path) -> None:
    """The mask takes the blank before it."""
    mask = {"content": "<mask>", "lstrip": True, "normalized": True}
    told = {"tokenizer_class": "RobertaTokenizer", "mask_token": mask}
    files = byte_pair_files(["<s>", "</s>", "<unk>", "<pad>", "<mask>"])
    assert zoo.tokenizer(write(tmp_path, **files, tokenizer_config__json=told)).encode(["the <mask> fox"]) == [
        [0, 262, 4, 266, 1]
    ]


def test_byte_pairs_by_their_configuration(tmp_path) -> None:
    told = {"add_prefix_space": True, "add_bos_token": True, "pad_token": "[PAD]"}
    config = {"tokenizer_class": "GPT2Tokenizer", **told}
    found = zoo.tokenizer(write(tmp_path, **byte_pair_files(["<|endoftext|>"]), tokenizer_config__json=config))
    assert found.encode(["the fox the<|endoftext|>"]) == [[0, 259, 262, 259, 0]]
    assert found.encode(["the"], special=False) == [[259]]
    assert found.special_ids == {"unk_token": 0, "bos_token": 0, "eos_token": 0, "pad_token": 263}
    assert found.vocab_size == 264


def test_tokens_of_transformers_3_are_added(tmp_path) -> None:
    files = byte_pair_files(["<|endoftext|>"])
    legacy = {"special_tokens_map__json": {"pad_token": {"content": "<pad>"}}}
    found = zoo.tokenizer(write(tmp_path, **files, **legacy, added_tokens__json={"abc": 264, "<pad>": 263}))
    assert found.encode(["the abc<pad>"]) == [[258, 221, 264, 263]]
    assert found.decode([258, 221, 264, 263]) == "the abc"


def test_tokenizer_json_says_what_stands_around_a_text(tmp_path) -> None:
    made = zoo.tokenizer(write(tmp_path / "a", vocab__txt="\n".join(WORDS), config__json={"model_type": "bert"}))
    made.library.enable_truncation(3)
    made.library.enable_padding(length=20)
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": ["<new>"], "add_bos_token": True}
    written = write(tmp_path / "b", tokenizer__json=made.library.to_str(), tokenizer_config__json=told)
    found = zoo.tokenizer(written)
    assert found.encode(["The foxes, CAFÉ<new>"]) == [[2, 5, 6, 7, 11, 8, 15, 3]]
    (written / "tokenizer_config.json").write_text(json.dumps(told | {"do_lower_case": False, "strip_accents": False}))
    assert zoo.tokenizer(written).encode(["The café"]) == [[2, 10, 9, 3]]


def test_sentence_pieces_of_t5(tmp_path, t5_model: bytes) -> None:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_proto=t5_model)
    size = model.get_piece_size()
    found = zoo.tokenizer(write(tmp_path, spiece__model=t5_model, config__json={"model_type": "t5"}))
    expected = [*model.encode("the foxes"), size + 99, *model.encode("dog"), size, 1]
    assert found.encode(["the foxes <extra_id_0> dog<extra_id_99>", ""]) == [expected, [1]]
    assert found.encode(["hello  中"], special=False) == [[*model.encode("hello"), *model.encode("中")]]
    assert found.decode(expected) == "the foxes dog"
    assert found.decode(expected, special=True) == "the foxes<extra_id_0> dog<extra_id_99></s>"
    assert found.vocab_size == size + 100 and found.special_ids == {"eos_token": 1, "unk_token": 2, "pad_token": 0}
    fields = {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": 0,
        "added_tokens_decoder": {size + 3: {"content": "<far>"}},
    }
    found = zoo.tokenizer(write(tmp_path, tokenizer_config__json=fields))
    assert found.decode([*model.encode("the"), size + 1, size + 3]) == "the<far>"  # nothing is size + 1


def test_sentence_pieces_of_llama(tmp_path, llama_model: bytes) -> None:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_proto=llama_model)
    files = {"tokenizer__model": llama_model, "tokenizer_config__json": {"tokenizer_class": "LlamaTokenizer"}}
    found = zoo.tokenizer(write(tmp_path, **files))
    ids = found.encode(["the fox</s>the é\n"])[0]
    pieces = [model.id_to_piece(i) for i in ids]
    assert pieces[:2] == ["<s>", "▁the"] and pieces[pieces.index("</s>") + 1] == "the"  # no blank after a token
    assert pieces[-3:] == ["<0xC3>", "<0xA9>", "<0x0A>"]
    assert found.decode(ids) == "the foxthe é\n" and found.decode(ids, special=True) == "<s> the fox</s>the é\n"
    assert found.encode(["  the"], special=False)[0] == model.encode("  the")
    legacy = files["tokenizer_config__json"] | {"legacy": True, "add_bos_token": False, "add_eos_token": True}
    found = zoo.tokenizer(write(tmp_path, tokenizer_config__json=legacy))
    assert found.encode(["</s>the"]) == [[2, model.piece_to_id("▁the"), 2]]


def test_sentence_pieces_of_marian(tmp_path, t5_model: bytes) -> None:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_proto=t5_model)
    pieces = model.encode("the dogs", out_type=str)
    tokens = ["</s>", "<unk>", ">>fra<<", "<pad>", *sorted({*pieces})]
    ids = {token: i for i, token in enumerate(tokens)}
    found = zoo.tokenizer(write(tmp_path, source__spm=t5_model, vocab__json=ids, config__json={"model_type": "marian"}))
    expected = [ids[piece] for piece in pieces]
    assert found.encode([">>fra<< the dogs", ">>deu<<the dogs"]) == [[2, *expected, 0], [1, *expected, 0]]
    assert found.decode([2, *expected, 0]) == ">>fra<< the dogs"
    found = zoo.tokenizer(write(tmp_path, vocab__json=ids | {"<far>": 99}))
    assert found.decode([98, *expected]) == "the dogs"  # nothing is 98


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "has no tokenizer: none of tokenizer.json, vocab.txt"),
        ({"tokenizer__json": {"model": {}}}, "tokenizer.json is no tokenizer ("),
        ({"tokenizer__json": "{"}, "tokenizer.json is no JSON"),
        ({"vocab__txt": "a\nb\n"}, "the vocabulary has no [CLS]: tokenizer_config.json names cls_token"),
        (
            {"vocab__txt": "a", "config__json": {"model_type": "gpt2"}},
            "is of GPT2Tokenizer, and such a file is read of",
        ),
        ({"vocab__json": {"a": 0, "b": 0}, "merges__txt": ""}, "does not give each token an id of its own"),
        ({"vocab__json": {"a": 0}, "merges__txt": "a b\n"}, "vocab.json and merges.txt do not fit"),
        ({"vocab__json": {"a": 0}, "merges__txt": ""}, "vocab.json has no token for 255 of the 256 bytes"),
        ({"vocab__json": {"a": 0}, "merges__txt": b"\xff"}, "merges.txt is no UTF-8 text"),
        ({"spiece__model": b"junk", "config__json": {"model_type": "t5"}}, "is no sentencepiece model"),
        ({"spiece__model": b""}, "is of a class that no tokenizer_config.json names"),
        (
            {"spiece__model": b"", "tokenizer_config__json": {"tokenizer_class": "XLNetTokenizer"}},
            "is of XLNetTokenizer, and sentencepiece models are read of T5Tokenizer and LlamaTokenizer",
        ),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, files: dict[str, Any], words: str) -> None:
    with pytest.raises(PretrainedError) as error:
        zoo.tokenizer(write(tmp_path, **files))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"added_tokens_decoder": [1]}, "is no added token with its id and content"),
        ({"added_tokens_decoder": {"90": {"content": "x"}}}, "'x' is 90 by tokenizer_config.json and 15 by"),
        ({"added_tokens_decoder": {"15": {"content": "x", "lstrip": 1}}}, "lstrip of 'x' is neither true nor false"),
        ({"do_lower_case": "yes"}, "do_lower_case 'yes' of tokenizer_config.json is neither true nor false"),
        ({"cls_token": 3}, "3 is no special token: tokenizer_config.json names them as text"),
        ({"cls_token": ""}, "'' is no special token"),
        ({"cls_token": None}, "leaves a BertTokenizer without cls_token"),
        ({"extra_special_tokens": 3}, "extra_special_tokens 3 of tokenizer_config.json is no list"),
    ],
)
def test_configurations_that_cannot_be_are_refused(tmp_path, told: dict[str, Any], words: str) -> None:
    with pytest.raises(PretrainedError) as error:
        zoo.tokenizer(write(tmp_path, vocab__txt="\n".join(WORDS), tokenizer_config__json=told))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_pieces_that_contradict_the_configuration_are_refused(tmp_path, t5_model: bytes) -> None:
    for added in (
        {"5": {"content": "x"}},
        {"200": {"content": "</s>"}},
        {"200": {"content": "x", "single_word": True}},
    ):
        told = {"tokenizer_class": "T5Tokenizer", "added_tokens_decoder": added}
        with pytest.raises(PretrainedError, match=r"sentencepiece model says|single_word, which is not read"):
            zoo.tokenizer(write(tmp_path, spiece__model=t5_model, tokenizer_config__json=told))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda found: found.encode("the"), "encode takes a list of texts, and got 'the'"),
        (lambda found: found.encode([3]), r"encode takes a list of texts, and got \[3\]"),
        (lambda found: found.encode(["a\ud800"]), "has half of a surrogate pair"),
        (lambda found: found.decode([5, 15]), "15 is no token: ids of this tokenizer are 0 to 14"),
        (lambda found: found.decode([-1]), "-1 is no token"),
        (lambda found: found.decode([[5]]), r"decode takes the ids of one text, and got \[\[5\]\]"),
        (lambda found: found.decode("the"), "decode takes the ids of one text, and got 'the'"),
    ],
)
def test_wrong_inputs_are_told(tmp_path, call: Any, words: str) -> None:
    found = zoo.tokenizer(write(tmp_path, vocab__txt="\n".join(WORDS)))
    with pytest.raises(PretrainedError, match=words):
        call(found)
