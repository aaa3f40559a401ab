"""ViT and DINOv2 against Hugging Face's, class by class, from the golden files that make_vit.py wrote."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close, assert_gradients_close
from safetensors.numpy import load_file

from zoo.models.vit import FORMS, ViT, ViTOutput
from zoo.pretrained import from_pretrained, save_pretrained

FOLDER = Path(__file__).parent / "vit"
CASES = (
    "vit",
    "vit_classification",
    "dinov2",
    "dinov2_classification",
    "registers",
    "registers_classification",
)


def loss(out: ViTOutput, golden: dict[str, Any]) -> jax.Array:
    """As make_vit.py computes it."""
    if out.logits is not None:
        return -jnp.take_along_axis(jax.nn.log_softmax(out.logits), golden["labels"][:, None], -1).mean()
    return (out.hidden * golden["along_hidden"]).mean() + (out.pooled * golden["along_pooled"]).mean()


@pytest.mark.parametrize("case", CASES)
def test_outputs_loss_and_gradients_agree(case) -> None:
    model, golden = from_pretrained(FOLDER / case), dict(np.load(FOLDER / case / "golden.npz"))
    assert isinstance(model, ViT)

    @jax.jit
    def run(model: ViT) -> Any:
        def of(model: ViT) -> tuple[jax.Array, ViTOutput]:
            out = model(golden["images"], masked=golden.get("masked"), return_intermediates=True)
            return loss(out, golden), out

        return jax.value_and_grad(of, has_aux=True)(model)

    (value, out), gradient = run(model)
    assert_close(out.intermediates.hidden, golden["out_states"], "states")
    for name in ("hidden", "pooled", "logits"):
        if f"out_{name}" in golden:
            assert_close(getattr(out, name), golden[f"out_{name}"], name)
    assert_close(value, golden["loss"], "loss")
    assert_gradients_close(gradient, FOLDER / case)


MEANS_NOTHING_HERE = {"initializer_range", "transformers_version"}
VIT = MEANS_NOTHING_HERE | {"encoder_stride", "pooler_act", "pooler_output_size"}
DINO = MEANS_NOTHING_HERE | {
    "apply_layernorm", "drop_path_rate", "out_features", "out_indices", "reshape_hidden_states", "stage_names"
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_was_read_is_written_back_bit_for_bit(case, tmp_path) -> None:
    model = from_pretrained(FOLDER / case)
    assert isinstance(model, ViT)
    save_pretrained(model, tmp_path)
    found, expected = (load_file(place / "model.safetensors") for place in (tmp_path, FOLDER / case))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].tobytes() == value.tobytes(), name
    theirs, ours = (json.loads((place / "config.json").read_text()) for place in (FOLDER / case, tmp_path))
    assert ours == {name: theirs[name] for name in ours}
    without_meaning = (VIT if case.startswith("vit") else DINO) | ({"hidden_act"} if model.config.gated else set())
    assert theirs.keys() - ours.keys() == without_meaning


def test_every_published_class_is_here() -> None:
    classes = [json.loads((FOLDER / case / "config.json").read_text())["architectures"][0] for case in CASES]
    assert classes == [form.name for form in FORMS]
