"""U-Nets against diffusers', unconditional, of classes and of texts, from the golden files that make_unet.py wrote."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close, assert_gradients_close, assert_same
from safetensors.numpy import load_file, save_file

from zoo.models.unet import UNet
from zoo.pretrained import from_pretrained, save_pretrained

FOLDER = Path(__file__).parent / "unet"
CASES = ("ddpm", "classes", "text", "text_and_classes")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("case", CASES)
def test_outputs_loss_and_gradients_agree(case) -> None:
    model, golden = from_pretrained(FOLDER / case), dict(np.load(FOLDER / case / "golden.npz"))
    assert isinstance(model, UNet)

    @jax.jit
    def run(model: UNet) -> Any:
        def of(model: UNet) -> tuple[jax.Array, jax.Array]:
            told = {name: golden.get(name) for name in ("classes", "context")}
            out = model(golden["images"], golden["time"], **told)
            return jnp.square(out - golden["target"]).mean(), out

        return jax.value_and_grad(of, has_aux=True)(model)

    (value, out), gradient = run(model)
    assert_close(out, golden["out"], "out")
    assert_close(value, golden["loss"], "loss")
    assert_gradients_close(gradient, FOLDER / case)


@pytest.mark.parametrize("case", CASES)
def test_what_was_read_is_written_back_bit_for_bit(case, tmp_path) -> None:
    save_pretrained(from_pretrained(FOLDER / case), tmp_path)
    assert_same(load_file(tmp_path / WEIGHTS), load_file(FOLDER / case / WEIGHTS))
    theirs, ours = (json.loads((place / "config.json").read_text()) for place in (FOLDER / case, tmp_path))
    assert theirs.pop("_diffusers_version") == "0.42.1"
    assert ours == theirs


def test_attention_is_read_by_its_names_in_older_files(tmp_path) -> None:
    tensors, names = load_file(FOLDER / "ddpm" / WEIGHTS), {}
    for name in tensors:
        old = name
        for now, then in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            old = old.replace(f".{now}.", f".{then}.")
        names[old] = name
    assert len(names.keys() - tensors.keys()) == 8 * 4  # of one attention down, two up, and the middle's
    save_file({old: tensors[name] for old, name in names.items()}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text((FOLDER / "ddpm" / "config.json").read_text())
    save_pretrained(from_pretrained(tmp_path), tmp_path / "again")
    assert_same(load_file(tmp_path / "again" / WEIGHTS), tensors)
