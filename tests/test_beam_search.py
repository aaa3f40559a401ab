"""Beam search on a GPT all of whose continuations can be scored; beside torch's in tests/parity/test_gpt2.py."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo import sharding
from zoo.beam_search import _search, beam_search
from zoo.generation import GenerationError, generate
from zoo.models.gpt import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=7, max_length=48, num_layers=2, width=16, num_heads=2)
PROMPTS = [[1, 2, 3, 4, 5], [6], [2, 2]]


@pytest.fixture(scope="module")
def model() -> GPT:
    return jax.jit(lambda: jax.tree.map(lambda x: 8 * x, CONFIG.build(nnx.Rngs(0))))()


def log_probabilities(model: GPT, prompt: list[int], continuations: list[tuple[int, ...]]) -> np.ndarray:
    """The sum over each continuation, without a cache."""
    rows = jnp.array([prompt + list(tokens) for tokens in continuations])
    logp = jax.nn.log_softmax(jax.jit(lambda m, x: m(x).logits)(model, rows))[:, len(prompt) - 1 : -1]
    return np.asarray(jnp.take_along_axis(logp, rows[:, len(prompt) :, None], axis=2).sum((1, 2)))


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_as_many_beams_as_tokens_find_the_best_of_all_pairs(model, penalty) -> None:
    stop, beams = 0, 7
    found = beam_search(model, PROMPTS, num_beams=beams, max_new_tokens=2, length_penalty=penalty, stop_tokens=[stop])
    pairs = [(first, second) for first, second in itertools.product(range(7), repeat=2) if first != stop]
    for row, prompt in enumerate(PROMPTS):
        scored = []
        for group in ([(stop,)], pairs):
            sums = log_probabilities(model, prompt, group)
            scored += [(total / len(tokens) ** penalty, tokens) for total, tokens in zip(sums, group, strict=True)]
        best = sorted(scored, reverse=True)[:beams]
        np.testing.assert_allclose(found.scores[row], [score for score, _ in best], rtol=1e-5)
        assert found.tokens[row] == [[token for token in tokens if token != stop] for _, tokens in best]


def test_one_beam_is_greedy(model) -> None:
    greedy = generate(model, PROMPTS, max_new_tokens=20).tokens
    assert [beams[0] for beams in beam_search(model, PROMPTS, num_beams=1, max_new_tokens=20).tokens] == greedy


def test_a_row_does_not_depend_on_its_neighbours(model) -> None:
    together = beam_search(model, PROMPTS, num_beams=3, max_new_tokens=10)
    for row, prompt in enumerate(PROMPTS):
        alone = beam_search(model, [prompt], num_beams=3, max_new_tokens=10)
        assert alone.tokens[0] == together.tokens[row]
        np.testing.assert_allclose(alone.scores[0], together.scores[row], rtol=1e-5)


def test_lengths_up_to_a_power_of_two_share_a_compilation(model) -> None:
    beam_search(model, [[1] * 9, [2] * 8, [3]], num_beams=2, max_new_tokens=11)
    before = _search._cache_size()
    beam_search(model, [[5], [2] * 4, [3] * 10], num_beams=2, max_new_tokens=21, length_penalty=0.5)
    assert _search._cache_size() == before


def test_sharded_beams_are_those_of_one_device(model) -> None:
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    prompts = [*PROMPTS, PROMPTS[0]]
    expected = beam_search(model, prompts, num_beams=2, max_new_tokens=8)
    with sharding.use(mesh):
        found = beam_search(
            jax.device_put(model, sharding.shardings(model, mesh)), prompts, num_beams=2, max_new_tokens=8
        )
    assert found.tokens == expected.tokens
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams 0 is no whole number within 1 and the vocabulary's 7"),
        ({"num_beams": 8}, "num_beams 8 is no whole number within"),
        ({"num_beams": 2.5}, "num_beams 2.5 is no whole number within"),
        ({"stop_tokens": 5}, "stop_tokens 5 are no whole numbers: give a list of token ids"),
        ({"length_penalty": float("nan")}, "length_penalty nan is no finite number"),
        ({"max_new_tokens": 0}, "max_new_tokens 0 is below 1"),
        ({"max_new_tokens": 60}, "more than the model's max_length 48"),
    ],
)
def test_what_cannot_be_searched_is_refused(model, options, message) -> None:
    with pytest.raises(GenerationError, match=message):
        beam_search(model, PROMPTS, **({"max_new_tokens": 4} | options))
