import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo import sharding
from zoo.generation import GenerationError, Sampling, filtered, generate
from zoo.models.gpt import GPT, GPTConfig
from zoo.models.published import SpecialTokens

CONFIG = GPTConfig(vocab_size=150, max_length=64, num_layers=2, width=32, num_heads=4, windows=(None, 6))
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
KEY = jax.random.key(0)
traces: list[str] = []


class Counted(GPT):
    """Notes each time that it is traced."""

    def features(self, tokens: jax.Array, **kwargs: Any) -> Any:
        traces.append("prefill" if tokens.shape[1] > 1 else "decode")
        return super().features(tokens, **kwargs)


def build() -> Counted:
    model = Counted(CONFIG, rngs=nnx.Rngs(0))
    return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, model)


@pytest.fixture(scope="module")
def model() -> Counted:
    return build()


@pytest.fixture(scope="module")
def greedy(model) -> list[list[int]]:
    return generate(model, PROMPTS, max_new_tokens=20).tokens


def test_greedy_takes_the_likeliest_token_of_the_full_pass(model, greedy) -> None:
    run = jax.jit(lambda tokens: GPT.__call__(model, tokens).logits)
    for prompt, made in zip(PROMPTS, greedy, strict=True):
        assert len(made) == 20 and len(set(made)) > 5
        whole = jnp.array([prompt + made + [0] * (40 - len(prompt) - 20)])
        likeliest = np.asarray(run(whole))[0].argmax(-1)
        start = len(prompt) - 1
        assert likeliest[start : start + 20].tolist() == made


def test_a_row_is_continued_alike_alone_and_in_a_batch(model, greedy) -> None:
    for prompt, made in zip(PROMPTS, greedy, strict=True):
        assert generate(model, [prompt], max_new_tokens=20).tokens == [made]


def test_prompts_of_a_bucket_share_one_compilation(model, greedy) -> None:
    traces.clear()
    for lengths in ((3, 1, 7), (12, 2, 2), (30, 1, 1)):
        for new in (5, 20):
            generate(model, [[1] * length for length in lengths], max_new_tokens=new)
    # One for each total length of the cache: 32 and 64.
    assert traces.count("prefill") <= 2 and traces.count("decode") <= 2
    traces.clear()
    generate(model, [[1] * 9, [2] * 8, [3]], max_new_tokens=11, callback=lambda row, token: None)
    generate(model, [[5], [2] * 4, [3] * 10], max_new_tokens=21)
    assert not traces


def test_tokens_are_streamed_as_they_are_returned(model, greedy) -> None:
    events: list[tuple[int, int]] = []
    result = generate(model, PROMPTS, max_new_tokens=20, callback=lambda row, token: events.append((row, token)))
    assert result.tokens == greedy
    assert events == [(row, made[i]) for i in range(20) for row, made in enumerate(greedy)]


def test_a_stop_token_ends_its_row_alone(model, greedy) -> None:
    stop = next(token for i, token in enumerate(greedy[0]) if i > 4 and token not in greedy[0][:i])
    streamed: list[int] = []
    result = generate(
        model, PROMPTS, max_new_tokens=20, stop_tokens=[149, stop], callback=lambda row, token: streamed.append(row)
    )
    for row, (made, full) in enumerate(zip(result.tokens, greedy, strict=True)):
        ends = [i for i, token in enumerate(full) if token in (149, stop)]
        assert made == (full[: ends[0]] if ends else full)
        assert result.stopped[row] == bool(ends)
        assert streamed.count(row) == len(made)
    assert generate(model, PROMPTS, max_new_tokens=20, stop_tokens=[149, stop]) == result


def test_a_key_determines_what_is_drawn(model) -> None:
    options = {"max_new_tokens": 12, "temperature": 1.3, "top_k": 20, "top_p": 0.95}
    drawn = generate(model, PROMPTS, key=KEY, **options)
    assert drawn == generate(model, PROMPTS, key=KEY, **options)
    assert drawn == generate(model, PROMPTS, key=KEY, callback=lambda row, token: None, **options)
    assert drawn != generate(model, PROMPTS, key=jax.random.key(1), **options)
    # What a row draws does not depend on the rows after it.
    assert drawn.tokens[0] == generate(model, PROMPTS[:1], key=KEY, **options).tokens[0]


def test_top_k_and_top_p_keep_what_they_say() -> None:
    p = np.array([[0.5, 0.2, 0.15, 0.1, 0.05], [0.1, 0.3, 0.05, 0.3, 0.25]])
    logits = jnp.log(jnp.asarray(p))

    def kept(**options: Any) -> list[list[int]]:
        cut = filtered(logits, Sampling(temperature=options.pop("temperature", 1.0), **options))
        return [np.flatnonzero(np.isfinite(row)).tolist() for row in np.asarray(cut)]

    assert kept() == [[0, 1, 2, 3, 4]] * 2
    assert kept(top_k=2) == [[0, 1], [1, 3]]
    assert kept(top_k=1) == [[0], [1, 3]]
    assert kept(top_p=0.49) == [[0], [1, 3]]
    assert kept(top_p=0.59) == [[0, 1], [1, 3]]
    assert kept(top_p=0.84) == [[0, 1, 2], [1, 3, 4]]
    assert kept(top_p=1.0) == [[0, 1, 2, 3, 4]] * 2
    # Among 0.5, 0.2 and 0.15 alone, 0.5 has 0.588 of the probability.
    assert kept(top_k=3, top_p=0.55)[0] == [0]
    # A low temperature sharpens before top_p cuts: 0.5^4 outweighs the rest.
    assert kept(temperature=0.25, top_p=0.9)[0] == [0]


def test_draws_follow_the_distribution(model) -> None:
    prompt = [3, 4, 5]
    logits = GPT.__call__(model, jnp.array([prompt])).logits[0, -1]
    expected = jax.nn.softmax(filtered(logits[None], Sampling(0.9, top_k=10)), axis=-1)[0]
    drawn = generate(model, [prompt] * 1024, max_new_tokens=1, temperature=0.9, top_k=10, key=KEY).tokens
    share = np.bincount(np.array(drawn)[:, 0], minlength=150) / 1024
    deviations = np.sqrt(expected * (1 - expected) / 1024)
    assert (np.abs(share - expected) <= 5 * deviations + 1e-3).all()


def test_a_sharded_model_decodes_alike(greedy) -> None:
    mesh = sharding.make_mesh("data=2,tensor=4")
    sharded = sharding.initialize(build, mesh=mesh)
    with sharding.use(mesh):
        prompts = [*PROMPTS, PROMPTS[0]]
        assert generate(sharded, prompts, max_new_tokens=20).tokens == [*greedy, greedy[0]]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1] * 50], {"max_new_tokens": 15}, "prompt 0 has 50 tokens and 15 new ones make 65, more than the model's "
         "max_length 64: shorten the prompt or ask for at most 14"),
        ([[1], []], {}, "prompt 1 is empty: give at least one token, such as the end of a text"),
        ([], {}, "no prompts given: give at least one"),
        ([5, 9, 2], {}, "prompts are no rows of whole numbers: give a list of lists of token ids"),
        ([[5.7, 9]], {}, "prompts are no rows of whole numbers: give a list of lists of token ids"),
        ([[1]], {"max_new_tokens": 3.0}, "max_new_tokens 3.0 is no whole number: ask for at least one"),
        ([[1]], {"temperature": 1e-40}, "temperature 1e-40 is too small to divide by: 0 is greedy"),
        ([[1, 150]], {}, "prompt 0 has token 150: the vocabulary is 0 to 149"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens 0 is below 1: ask for at least one"),
        ([[1]], {"temperature": -1.0}, "temperature -1.0 is no finite number from 0: 0 is greedy, "
         "1 the model's distribution"),
        ([[1]], {"temperature": 1.0}, "temperature 1.0 draws at random: give a key, or temperature 0"),
        ([[1]], {"top_k": 151}, "top_k 151 is no whole number within 1 and the vocabulary's size 150"),
        ([[1]], {"top_k": 2.5}, "top_k 2.5 is no whole number within 1 and the vocabulary's size 150"),
        ([[1]], {"stop_tokens": [2.5]}, "stop_tokens [2.5] are no whole numbers: give a list of token ids"),
        ([[1]], {"top_p": 0.0}, "top_p 0.0 is not within 0 (excluded) and 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_met_is_said_in_one_line(model, prompts, options, message) -> None:
    with pytest.raises(GenerationError, match=f"^{re.escape(message)}$"):
        generate(model, prompts, **({"max_new_tokens": 4} | options))


@pytest.mark.parametrize("special", [{"last": 150}, {"banned": (3, -1)}])
def test_special_tokens_that_the_vocabulary_lacks_are_refused(special) -> None:
    model = dataclasses.replace(CONFIG, special_tokens=SpecialTokens(**special)).build(nnx.Rngs(0))
    with pytest.raises(GenerationError, match=r"^the model's config forces or bans the token (150|-1): the vocabulary"):
        generate(model, [[1]], max_new_tokens=4)
