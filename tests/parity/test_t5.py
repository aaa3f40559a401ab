"""T5, T5 1.1 and mT5, from the golden files that make_t5.py wrote."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close, assert_gradients_close, assert_same
from safetensors.numpy import load_file, save_file

from zoo.beam_search import beam_search
from zoo.generation import generate
from zoo.models.t5 import T5
from zoo.pretrained import from_pretrained, save_pretrained

FOLDER = Path(__file__).parent / "t5"
CASES = ("t5", "t5_v1_1", "mt5")
NEW = 12


@pytest.fixture(scope="module", params=CASES)
def case(request) -> tuple[str, T5, dict[str, np.ndarray]]:
    folder = FOLDER / request.param
    return request.param, from_pretrained(folder), dict(np.load(folder / "golden.npz"))


def loss(model: T5, golden: dict[str, np.ndarray]) -> tuple[jax.Array, Any]:
    out = model(golden["sources"], golden["tokens"], source_segments=golden["real"], return_intermediates=True)
    labels = golden["labels"]
    each = jnp.take_along_axis(jax.nn.log_softmax(out.logits), jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return -(each * (labels >= 0)).sum() / (labels >= 0).sum(), out


def test_states_attention_scores_loss_and_gradients_agree(case) -> None:
    name, model, golden = case
    # As it is compiled outside of tests: without LLVM's optimizations mT5's gradients are 2.0e-5 away, with them 8e-6.
    optimized = {"xla_backend_optimization_level": "3"}
    both = jax.value_and_grad(lambda m: loss(m, golden), has_aux=True)
    (value, out), gradient = jax.jit(both, compiler_options=optimized)(model)
    rows = golden["real"]
    encoder, decoder = out.encoded.intermediates, out.intermediates
    assert_close(np.asarray(encoder.hidden)[:, rows], golden["out_encoder_hidden"][:, rows], "encoder hidden")
    found, expected = (np.moveaxis(np.asarray(x), 3, 2) for x in (encoder.attention, golden["out_encoder_attention"]))
    assert_close(found[:, rows], expected[:, rows], "encoder attention")
    for kind in ("hidden", "attention", "cross_attention"):
        assert_close(getattr(decoder, kind), golden[f"out_{kind}"], kind)
    assert_close(out.encoded.hidden[rows], golden["out_encoder_hidden"][-1][rows], "encoded")
    assert_close(out.logits, golden["out_logits"], "logits")
    assert_close(value, golden["out_loss"], "loss")
    assert_gradients_close(gradient, FOLDER / name)


def sources_of(golden: dict[str, np.ndarray]) -> list[list[int]]:
    return [row[real].tolist() for row, real in zip(golden["sources"], golden["real"], strict=True)]


def before_the_end(tokens: np.ndarray) -> list[int]:
    return tokens[tokens >= 0].tolist()


def test_greedy_texts_agree(case) -> None:
    _, model, golden = case
    found = generate(model, sources=sources_of(golden), max_new_tokens=NEW)
    expected = [before_the_end(row) for row in golden["greedy"]]
    assert found.tokens == expected
    assert list(found.stopped) == [len(row) < NEW for row in expected]


@pytest.mark.parametrize(("penalty", "early"), [(1.0, False), (0.0, False), (2.0, True)])
def test_beams_agree(case, penalty, early) -> None:
    _, model, golden = case
    found = beam_search(
        model,
        sources=sources_of(golden),
        num_beams=4,
        max_new_tokens=NEW,
        length_penalty=penalty,
        early_stopping=early,
    )
    name = f"beams_{penalty:g}_{early}"
    np.testing.assert_allclose(found.scores, golden[f"{name}_scores"], rtol=2e-5)
    assert found.tokens == [[before_the_end(row) for row in beams] for beams in golden[f"{name}_tokens"]]


def test_what_was_read_is_written_back_bit_for_bit(case, tmp_path) -> None:
    name, model, _ = case
    save_pretrained(model, tmp_path)
    assert_same(load_file(tmp_path / "model.safetensors"), load_file(FOLDER / name / "model.safetensors"))
    theirs, ours = (json.loads((place / "config.json").read_text()) for place in (FOLDER / name, tmp_path))
    assert ours == {field: theirs.get(field) for field in ours}
    means_nothing_here = {"classifier_dropout", "initializer_factor", "is_decoder", "transformers_version", "use_cache"}
    assert {field for field in theirs.keys() - ours.keys() if theirs[field] is not None} <= means_nothing_here
    assert from_pretrained(tmp_path).config == model.config


def test_copies_and_the_unread_table_of_older_files_are_left_out(tmp_path) -> None:
    tensors = load_file(FOLDER / "t5" / "model.safetensors")
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    written = tensors | dict.fromkeys(copies, tensors["shared.weight"])
    written["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.ones((8, 3), np.float32)
    save_file(written, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((FOLDER / "t5" / "config.json").read_text())
    save_pretrained(from_pretrained(tmp_path), tmp_path / "back")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), tensors)


@pytest.mark.parametrize("name", ["t5_v1_1", "mt5"])
@pytest.mark.parametrize("said", [True, False])
def test_without_a_head_in_the_file_words_are_scored_against_the_embeddings_as_they_are(name, said, tmp_path) -> None:
    tensors = load_file(FOLDER / name / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    fields = json.loads((FOLDER / name / "config.json").read_text()) | {"tie_word_embeddings": said}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model = from_pretrained(tmp_path)
    assert model.config.tied and not model.config.scaled and model.unembed is None
    tokens = np.array([[0, 5, 9]])
    hidden = model.features(tokens, sources=np.array([[4, 8, 1]])).hidden
    logits = model(np.array([[4, 8, 1]]), tokens).logits
    np.testing.assert_allclose(logits, hidden @ tensors["shared.weight"].T, rtol=1e-4, atol=1e-4)
    save_pretrained(model, tmp_path / "back")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), tensors)
    assert from_pretrained(tmp_path / "back").config == model.config
