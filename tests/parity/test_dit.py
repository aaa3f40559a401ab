"""DiT against diffusers', from the golden files that make_dit.py wrote."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close, assert_gradients_close, assert_same
from einops import rearrange
from safetensors.numpy import load_file

from zoo.models.dit import DiT
from zoo.pretrained import from_pretrained, save_pretrained

FOLDER = Path(__file__).parent / "dit"
CASES = ("each", "shared")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def pixels_last(images: np.ndarray) -> np.ndarray:
    return rearrange(images, "b c y x -> b y x c")


@pytest.mark.parametrize("case", CASES)
def test_outputs_loss_and_gradients_agree(case) -> None:
    model, golden = from_pretrained(FOLDER / case), dict(np.load(FOLDER / case / "golden.npz"))
    assert isinstance(model, DiT) and model.config.shared_embedding == (case == "shared")

    @jax.jit
    def run(model: DiT) -> Any:
        def of(model: DiT) -> tuple[jax.Array, jax.Array]:
            out = model(pixels_last(golden["images"]), golden["time"], classes=golden["classes"])
            return jnp.square(out - pixels_last(golden["target"])).mean(), out

        return jax.value_and_grad(of, has_aux=True)(model)

    (value, out), gradient = run(model)
    assert_close(out, pixels_last(golden["out"]), "out")
    assert_close(value, golden["loss"], "loss")
    assert_gradients_close(gradient, FOLDER / case)


@pytest.mark.parametrize("case", CASES)
def test_what_was_read_is_written_back_bit_for_bit(case, tmp_path) -> None:
    save_pretrained(from_pretrained(FOLDER / case), tmp_path)
    assert_same(load_file(tmp_path / WEIGHTS), load_file(FOLDER / case / WEIGHTS))
    theirs, ours = (json.loads((place / "config.json").read_text()) for place in (FOLDER / case, tmp_path))
    assert ours == {name: value for name, value in theirs.items() if name != "_diffusers_version"}
