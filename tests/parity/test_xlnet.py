"""XLNet against Hugging Face's, head by head, from the golden files that make_xlnet.py wrote."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from comparing import assert_close, cross_entropy, gradient_norms
from safetensors.numpy import load_file

from zoo.beam_search import beam_search
from zoo.generation import generate
from zoo.models.xlnet import HEADS, XLNet, XLNetOutput
from zoo.pretrained import from_pretrained, save_pretrained

FOLDER = Path(__file__).parent / "xlnet"


def loss(out: XLNetOutput, golden: dict[str, Any]) -> jax.Array:
    """As transformers computes it."""
    if out.logits is None:
        return (out.hidden * golden["along"]).mean()
    if "start_positions" in golden:
        ends = (golden[f"{name}_positions"] for name in ("start", "end"))
        beyond = out.hidden.shape[1]
        return sum(cross_entropy(out.logits[..., i], at, beyond) for i, at in enumerate(ends)) / 2  # pyright: ignore
    answers = out.logits.shape == (3, 1)  # Rows are answers to one question.
    return cross_entropy(out.logits.T if answers else out.logits, golden["labels"])


@pytest.mark.parametrize("head", HEADS)
def test_scores_states_memories_loss_and_gradients_agree(head) -> None:
    model, golden = from_pretrained(FOLDER / head), dict(np.load(FOLDER / head / "golden.npz"))
    assert isinstance(model, XLNet) and model.config.head == head
    names = ("token_types", "real", "targets", "perm_mask")
    arguments = {name: golden[name] for name in names if name in golden}

    @jax.jit
    def run(model: XLNet) -> Any:
        first = None
        if "before" in golden:
            first = model(golden["before"], memories=model.init_memories(len(golden["before"])))
            arguments["memories"] = first.memories

        def of(model: XLNet) -> tuple[jax.Array, XLNetOutput]:
            out = model(golden["tokens"], **arguments, return_intermediates=True)
            return loss(out, golden), out

        return first, jax.value_and_grad(of, has_aux=True)(model)

    first, ((value, out), gradient) = run(model)
    found = {
        "first": None if first is None else first.hidden if first.logits is None else first.logits,
        "logits": out.logits,
        "memories": out.memories,
        "hidden_states": out.intermediates.hidden,
        "target_states": None if out.target_intermediates is None else out.target_intermediates.hidden,
    }
    # Padding too: the published losses count it.
    assert {f"out_{name}" for name, x in found.items() if x is not None} == {n for n in golden if n.startswith("out_")}
    for name, x in found.items():
        if x is not None:
            assert_close(x, golden[f"out_{name}"], name)
    assert_close(value, golden["loss"], "loss")
    expected = json.loads((FOLDER / head / "gradients.json").read_text())
    norms = gradient_norms(gradient)
    assert {name for name in norms.keys() - expected.keys() if norms[name] > 0} == set()
    for name, norm in expected.items():
        assert_close(norms[name], norm, name)


@pytest.mark.parametrize("remembers", [True, False])
def test_prompts_continue_token_for_token(remembers, tmp_path) -> None:
    golden = np.load(FOLDER / "lm" / "golden.npz")
    shutil.copy(FOLDER / "lm" / "model.safetensors", tmp_path)
    fields = json.loads((FOLDER / "lm" / "config.json").read_text()) | {"use_mems_eval": remembers}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model, prompts = from_pretrained(tmp_path), golden["prompts"].tolist()
    assert generate(model, prompts, max_new_tokens=7).tokens == golden[f"made_{remembers}_1"].tolist()
    found = beam_search(model, prompts, num_beams=3, max_new_tokens=7).tokens
    assert [beams[0] for beams in found] == golden[f"made_{remembers}_3"].tolist()


@pytest.mark.parametrize("head", HEADS)
def test_what_was_read_is_written_back_bit_for_bit(head, tmp_path) -> None:
    save_pretrained(from_pretrained(FOLDER / head), tmp_path)
    found, expected = (load_file(place / "model.safetensors") for place in (tmp_path, FOLDER / head))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].tobytes() == value.tobytes(), name
    theirs, ours = (json.loads((place / "config.json").read_text()) for place in (FOLDER / head, tmp_path))
    assert ours == {name: theirs[name] for name in ours}
    means_nothing_here = {"initializer_range", "transformers_version", "use_mems_train", "start_n_top", "end_n_top"}
    assert theirs.keys() - ours.keys() == means_nothing_here
