"""Text samplers: what they draw, how it streams, and where a sequence ends."""

from pathlib import Path

import jax
import pytest
from flax import nnx

from zoo.models.gpt import GPTConfig
from zoo.train.data.text import TextData
from zoo.train.data.tokenizers import ByteTokenizer
from zoo.train.samplers import TextSampler, TextStream


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
