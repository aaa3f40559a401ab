"""Decoders without a head, and those that score classes, against Hugging Face's: files of make_decoder_heads.py."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close, assert_gradients_close, assert_same, cross_entropy
from safetensors.numpy import load_file

from zoo.models.decoder import Decoder, DecoderOutput
from zoo.pretrained import from_pretrained, save_pretrained

FOLDER = Path(__file__).parent / "decoder_heads"
CASES = sorted(path.parent.name for path in FOLDER.glob("*/golden.npz"))


def loss(out: DecoderOutput, golden: dict[str, np.ndarray]) -> jax.Array:
    """As transformers computes it; that of bare states is their mean product with random numbers."""
    if "along" in golden:
        return (out.hidden * golden["along"]).mean()  # pyright: ignore
    labels = golden["labels"]
    if labels.dtype == np.float32:
        return jnp.square(out.logits[:, 0] - labels).mean()  # pyright: ignore
    return cross_entropy(out.logits, labels)  # pyright: ignore


@pytest.mark.parametrize("case", CASES)
def test_outputs_loss_and_gradients_agree(case) -> None:
    model, golden = from_pretrained(FOLDER / case), dict(np.load(FOLDER / case / "golden.npz"))
    assert isinstance(model, Decoder)
    assert model.config.head == ("sequence_classification" if case.endswith("_classes") else "none")

    def run(model: Decoder) -> tuple[jax.Array, DecoderOutput]:
        out = model(golden["tokens"], segments=jnp.asarray(golden["mask"], jnp.int32))
        return loss(out, golden), out

    (value, out), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(model)
    if "out_hidden" in golden:
        assert out.logits is None
        assert_close(np.asarray(out.hidden)[golden["mask"]], golden["out_hidden"][golden["mask"]], "hidden")
    else:
        assert_close(out.logits, golden["out_logits"], "logits")
        # Without segments padding is told by its token, as published.
        assert_close(jax.jit(lambda model: model(golden["tokens"]).logits)(model), golden["out_logits"], "by token")
    assert_close(value, golden["loss"], "loss")
    assert_gradients_close(gradient, FOLDER / case)


@pytest.mark.parametrize("case", CASES)
def test_what_was_read_is_written_back_bit_for_bit(case, tmp_path) -> None:
    save_pretrained(from_pretrained(FOLDER / case), tmp_path)
    assert_same(load_file(tmp_path / "model.safetensors"), load_file(FOLDER / case / "model.safetensors"))
    theirs, ours = (json.loads((place / "config.json").read_text()) for place in (FOLDER / case, tmp_path))
    assert ours == {name: theirs[name] for name in ours}
