"""T5s and BARTs that score no words against Hugging Face's; make_encoder_decoder_heads.py made the files."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close, assert_gradients_close, assert_same, cross_entropy
from safetensors.numpy import load_file

from zoo.models.encoder_decoder import EncoderDecoder, EncoderDecoderOutput
from zoo.pretrained import from_pretrained, save_pretrained

FOLDER = Path(__file__).parent / "encoder_decoder_heads"
CASES = sorted(path.parent.name for path in FOLDER.glob("*/golden.npz"))
HEADS = {
    "": "none",
    "encoder": "encoder",
    "classes": "sequence_classification",
    "token_classes": "token_classification",
    "answers": "question_answering",
}


def loss(out: EncoderDecoderOutput, golden: dict[str, np.ndarray]) -> jax.Array:
    """As transformers computes it; that of bare states is their mean product with random numbers."""
    if "along" in golden:
        return (out.hidden * golden["along"]).mean()  # pyright: ignore
    assert out.logits is not None
    if "start_positions" in golden:
        ends, beyond = (golden[f"{name}_positions"] for name in ("start", "end")), out.logits.shape[1]
        return sum(cross_entropy(out.logits[..., i], at, beyond) for i, at in enumerate(ends)) / 2  # pyright: ignore
    labels = golden["labels"]
    if labels.dtype == np.float32:
        return jnp.square(out.logits[:, 0] - labels).mean()
    return cross_entropy(out.logits, labels)


@pytest.mark.parametrize("case", CASES)
def test_outputs_loss_and_gradients_agree(case) -> None:
    model, golden = from_pretrained(FOLDER / case), dict(np.load(FOLDER / case / "golden.npz"))
    assert isinstance(model, EncoderDecoder) and model.config.head == HEADS[case.partition("_")[2]]

    def run(model: EncoderDecoder) -> tuple[jax.Array, EncoderDecoderOutput]:
        segments = golden["real"].astype(np.int32)
        out = model(golden["sources"], golden.get("tokens"), source_segments=segments, return_intermediates=True)
        return loss(out, golden), out

    (value, out), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(model)
    if "out_hidden_states" in golden:
        seen, counted = out.intermediates or out.encoded.intermediates, golden["counted"]  # pyright: ignore
        assert out.logits is None
        assert_close(np.asarray(seen.hidden)[:, counted], golden["out_hidden_states"][:, counted], "hidden states")
        assert_close(np.asarray(out.hidden)[counted], golden["out_hidden_states"][-1][counted], "hidden")
    else:
        where = golden.get("counted", ...)
        assert_close(np.asarray(out.logits)[where], golden["out_logits"][where], "logits")
    assert_close(value, golden["loss"], "loss")
    assert_gradients_close(gradient, FOLDER / case)


@pytest.mark.parametrize("case", CASES)
def test_what_was_read_is_written_back_bit_for_bit(case, tmp_path) -> None:
    save_pretrained(from_pretrained(FOLDER / case), tmp_path)
    assert_same(load_file(tmp_path / "model.safetensors"), load_file(FOLDER / case / "model.safetensors"))
    theirs, ours = (json.loads((place / "config.json").read_text()) for place in (FOLDER / case, tmp_path))
    differs = {name: (ours[name], theirs.get(name)) for name in ours if ours[name] != theirs.get(name)}
    if "answers" in case:  # The library leaves out the two names that nobody gave.
        differs = {name: pair for name, pair in differs.items() if name not in ("id2label", "label2id")}
    assert differs == {}
