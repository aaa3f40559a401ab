"""Text samplers: what they draw, how it streams, and where a sequence ends."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest
from flax import nnx

from zoo.models.bert import BertConfig
from zoo.models.gpt import GPTConfig
from zoo.train.data.masked_text import MaskedTextData
from zoo.train.data.text import TextData
from zoo.train.data.tokenizers import ByteTokenizer
from zoo.train.experiment import UserError
from zoo.train.samplers import MaskSampler, TextSampler, TextStream


@pytest.fixture(scope="module")
def model():
    config = GPTConfig(vocab_size=257, max_length=32, num_layers=1, width=16, num_heads=2)
    return config.build(nnx.Rngs(0))


def draw(model, sampler: TextSampler, seed: int = 0, emit=None) -> str:
    return sampler.sample(model, TextData(), jax.random.key(seed), Path("unused"), emit)


def test_samples_begin_with_the_prompt_and_follow_the_key(model):
    sampler = TextSampler(prompt="Once", tokens=8, temperature=1.0)
    assert draw(model, sampler).startswith("Once")
    assert draw(model, sampler) == draw(model, sampler) != draw(model, sampler, seed=1)


def test_what_is_emitted_is_the_sample(model):
    """Also where bytes that are no UTF-8 end it."""
    for seed in range(3):
        pieces: list[str] = []
        text = draw(model, TextSampler(prompt="äh", tokens=12, temperature=1.5), seed, pieces.append)
        assert "".join(pieces) == text and len(pieces) > 2


def test_the_positions_of_the_model_bound_a_sample(model):
    text = draw(model, TextSampler(prompt="x" * 20, tokens=1000, temperature=1.0))
    assert text.startswith("x" * 20)


def test_several_samples_are_parted(model):
    texts = draw(model, TextSampler(samples=3, tokens=6, temperature=1.0)).split("\n----\n")
    assert len(texts) == 3 and len(set(texts)) > 1


def test_a_character_waits_for_all_of_its_bytes():
    shown: list[str] = []
    stream = TextStream(ByteTokenizer().decode, shown.append)
    for token in "a€b".encode():
        stream.add(token)
    assert shown == ["a", "€", "b"]
    stream.add(0xE2)
    assert shown == ["a", "€", "b"]
    stream.close()
    assert shown[3:] == ["\ufffd"]


@pytest.fixture(scope="module")
def masks(tmp_path_factory) -> MaskedTextData:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(6):
        (folder / f"{i}.txt").write_text("".join(f"Line {i} of {j}, and more.\n" for j in range(40)))
    return MaskedTextData(source=str(folder), length=64, validation_fraction=0.4)


@pytest.mark.parametrize("pairs", [True, False])
def test_masks_are_filled_and_nothing_else_changes(masks: MaskedTextData, pairs: bool, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FLAXZOO_CACHE", str(tmp_path))
    data = replace(masks, pairs=pairs, replaced=0.0, kept=0.0)
    config = data.fit(BertConfig(head="pretraining", num_layers=1, width=16, num_heads=2, mlp_width=16, max_length=64))
    shown = MaskSampler(rows=2, columns=200).sample(config.build(nnx.Rngs(0)), data, jax.random.key(0), Path("unused"))
    for row in shown.split("\n\n"):
        lines = dict(line.split(None, 1) for line in row.splitlines())
        assert list(lines) == ["seen", "filled", "text"]
        assert "_" in lines["seen"] and "_" not in lines["text"] and "Line" in shown


def test_what_fills_no_masks_is_refused(masks: MaskedTextData) -> None:
    with pytest.raises(UserError, match=r"a model with head 'none' fills no masks: give --model.head"):
        MaskSampler().check(BertConfig(), masks)
    with pytest.raises(UserError, match=r"0 rows of 100 characters show nothing"):
        MaskSampler(rows=0).check(BertConfig(head="pretraining"), masks)
