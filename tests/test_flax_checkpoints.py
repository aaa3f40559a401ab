"""Checkpoints of transformers' former Flax classes: what they give, and files that are not what they say."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import msgpack
import numpy as np
import pytest
from flax import serialization

import zoo
from zoo.cli import main
from zoo.flax_checkpoints import WEIGHTS, convert
from zoo.published_folder import PretrainedError

FOLDER = Path(__file__).parent / "parity" / "flax"
CASES = sorted(path.name for path in FOLDER.iterdir())


@pytest.mark.parametrize("case", CASES)
def test_what_was_converted_gives_what_flax_gave(case, tmp_path, capsys) -> None:
    assert main(["convert", str(FOLDER / case), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'} holds a ")
    model, golden = zoo.from_pretrained(tmp_path / "out"), np.load(FOLDER / case / "golden.npz")
    tokens = golden["tokens"]
    given = (tokens, tokens[:, :5]) if case.startswith("t5") and case != "t5_encoder" else (tokens,)
    out = jax.jit(lambda model: model(*given))(model)
    bare = case.endswith(("_none", "_encoder"))
    np.testing.assert_allclose(out.hidden if bare else out.logits, golden["found"], atol=2e-5)


def changed(folder: Path, change: Any) -> Path:
    """A copy of the GPT-2 whose tree of arrays `change` changed."""
    shutil.copytree(FOLDER / "gpt2", folder)
    tree = serialization.msgpack_restore((folder / WEIGHTS).read_bytes())
    content = change(tree)
    (folder / WEIGHTS).write_bytes(content if isinstance(content, bytes) else serialization.msgpack_serialize(tree))
    return folder


def extension(shape: Any, dtype: Any, content: Any) -> bytes:
    return msgpack.packb({"wte": msgpack.ExtType(1, msgpack.packb((shape, dtype, content)))})


BAD = {
    "pieces": (lambda tree: msgpack.packb({"wte": {"__msgpack_chunked_array__": True, "chunks": {}}}), "make no array"),
    "cut short": (lambda tree: serialization.msgpack_serialize(tree)[:-9], "no whole MessagePack file"),
    "more behind": (lambda tree: serialization.msgpack_serialize(tree) + b"x", "no whole MessagePack file"),
    "empty": (lambda tree: b"", "no whole MessagePack file"),
    "a huge list": (lambda tree: b"\xdd\xff\xff\xff\xff", "no whole MessagePack file"),
    "a huge map": (lambda tree: b"\xdf\xff\xff\xff\xff", "no whole MessagePack file"),
    "deep": (lambda tree: b"\x81\xa1a" * 100_000 + b"\xc0", "no whole MessagePack file"),
    "an absurd shape": (lambda tree: extension([2**40, 2**40], "float32", b""), "whose bytes are another number"),
    "a negative shape": (lambda tree: extension([-1, -4], "float32", b"abcd"), "whose bytes are another number"),
    "a shape of text": (lambda tree: extension("ab", "float32", b"abcd"), "whose bytes are another number"),
    "objects": (lambda tree: extension([1], "object", b"abcdefgh"), "dtype 'object', and weights are"),
    "no triple": (lambda tree: msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb([1]))}), "without shape, dtype"),
    "another type": (lambda tree: msgpack.packb({"a": msgpack.ExtType(42, b"x")}), "type 42, which is no array"),
    "no map": (lambda tree: msgpack.packb([1, 2]), "holds a list: a model's tree is a map of names"),
    "a number": (lambda tree: msgpack.packb({"a": 3}), "holds a int at 'a'"),
    "numbers as names": (lambda tree: msgpack.packb({1: {}}), "no whole MessagePack file"),
    "one missing": (lambda tree: tree["transformer"].pop("wpe") and None, "missing: transformer.wpe.weight"),
    "one left over": (
        lambda tree: tree["transformer"].update(x=tree["transformer"]["wpe"]),
        "left over: transformer.x",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_a_line(name, tmp_path) -> None:
    change, message = BAD[name]
    folder = changed(tmp_path / "bad", change)
    with pytest.raises(PretrainedError, match=re.escape(message)) as error:
        convert(folder, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_large_arrays_in_pieces(tmp_path, monkeypatch) -> None:
    def in_pieces(tree: Any) -> None:
        monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 400)

    folder = changed(tmp_path / "pieces", in_pieces)
    assert b"__msgpack_chunked_array__" in (folder / WEIGHTS).read_bytes()
    convert(folder, tmp_path / "out")
    convert(FOLDER / "gpt2", tmp_path / "whole")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_what_a_person_gets_wrong(tmp_path, capsys) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    for arguments, message in (
        ([], "usage"),
        ([str(FOLDER / "gpt2")], "zoo: zoo convert takes a folder to read and one to write, and got 1 arguments"),
        ([str(tmp_path / "none"), "out"], "is not there: a published model's folder holds one"),
        ([str(tmp_path / "t"), "out"], "has model_type 'roberta', and what is converted is bert, gpt2, t5"),
        ([str(FOLDER / "gpt2"), str(FOLDER / "bert_none")], "is there and not an empty folder: name another"),
    ):
        assert main(["convert", *arguments]) == (2 if arguments else 0)
        told = capsys.readouterr()
        assert message in (told.err if arguments else told.out)
