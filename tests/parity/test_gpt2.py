"""GPT against Hugging Face's GPT-2, from the golden files that make_gpt2.py wrote."""

from pathlib import Path

import jax
import numpy as np
import pytest

from zoo.beam_search import beam_search
from zoo.generation import generate
from zoo.models.gpt import GPT
from zoo.pretrained import from_pretrained

FOLDER = Path(__file__).parent / "gpt2"
STOPS = [57, 158]


@pytest.fixture(scope="module")
def model() -> GPT:
    return from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / "golden.npz"))


def test_logits_agree(model, golden) -> None:
    run = jax.jit(lambda tokens, segments: model(tokens, segments=segments).logits)
    logits = run(golden["tokens"], golden["mask"].astype(np.int32))
    expected, real = golden["logits"], golden["mask"]
    tolerance = 2e-5 * max(1.0, float(np.abs(expected[real]).max()))
    np.testing.assert_allclose(np.asarray(logits)[real], expected[real], rtol=0, atol=tolerance)


def test_greedy_continuations_agree(model, golden) -> None:
    made = generate(model, golden["prompts"].tolist(), max_new_tokens=golden["greedy"].shape[1])
    assert made.tokens == golden["greedy"].tolist()


@pytest.mark.parametrize(("penalty", "early"), [(1.0, False), (0.0, False), (2.0, True)])
def test_beams_agree(model, golden, penalty, early) -> None:
    found = beam_search(
        model,
        golden["prompts"].tolist(),
        num_beams=4,
        max_new_tokens=12,
        length_penalty=penalty,
        early_stopping=early,
        stop_tokens=STOPS,
    )
    name = f"beams_{penalty:g}_{early}"
    np.testing.assert_allclose(found.scores, golden[f"{name}_scores"], rtol=2e-5)
    for ours, theirs in zip(found.tokens, golden[f"{name}_tokens"].tolist(), strict=True):
        assert ours == [cut(tokens) for tokens in theirs]


def cut(tokens: list[int]) -> list[int]:
    """What stands before the first stop token."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in STOPS), len(tokens))]
