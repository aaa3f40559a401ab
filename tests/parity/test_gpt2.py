"""GPT against Hugging Face's GPT-2, from the golden files that make_gpt2.py wrote."""

from pathlib import Path

import jax
import numpy as np
import pytest

from zoo.generation import generate
from zoo.models.gpt import GPT
from zoo.pretrained import from_pretrained

FOLDER = Path(__file__).parent / "gpt2"


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
