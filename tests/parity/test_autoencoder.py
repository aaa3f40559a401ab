"""The KL autoencoder against diffusers', from the golden files that make_autoencoder.py wrote."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close, assert_gradients_close, assert_same
from safetensors.numpy import load_file, save_file

from zoo.models.autoencoder import Autoencoder
from zoo.pretrained import by_path, from_pretrained, save_pretrained

FOLDER = Path(__file__).parent / "autoencoder"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CASES = ("plain", "bare")


@functools.cache
def read(case: str) -> tuple[Autoencoder, dict[str, Any]]:
    model = from_pretrained(FOLDER / case)
    assert isinstance(model, Autoencoder)
    return model, dict(np.load(FOLDER / case / "golden.npz"))


@pytest.mark.parametrize("case", CASES)
def test_outputs_loss_and_gradients_agree(case) -> None:
    model, golden = read(case)

    @jax.jit
    def run(model: Autoencoder) -> Any:
        def loss(model: Autoencoder) -> Any:
            out = model(golden["images"])
            squared = jnp.square(out.images - golden["target"]).mean()
            return squared + 0.01 * out.posterior.kl().mean(), out

        value, gradient = jax.value_and_grad(loss, has_aux=True)(model)
        mean, log_variance = value[1].posterior
        return value, gradient, model.decode(mean + jnp.exp(0.5 * log_variance) * golden["noise"])

    (value, out), gradient, decoded = run(model)
    assert_close(out.posterior.mean, golden["out_mean"], "mean")
    assert_close(out.posterior.log_variance, golden["out_log_variance"], "log_variance")
    assert_close(out.posterior.kl(), golden["out_kl"], "kl")
    assert_close(out.images, golden["out_images"], "images")
    assert_close(decoded, golden["out_decoded"], "decoded")
    assert_close(value, golden["loss"], "loss")
    assert_gradients_close(gradient, FOLDER / case)


@pytest.mark.parametrize("case", CASES)
def test_tiles_agree(case) -> None:
    model, golden = read(case)
    posterior = model.encode_tiled(golden["large"])
    assert_close(posterior.mean, golden["out_tiled_mean"], "mean")
    assert_close(posterior.log_variance, golden["out_tiled_log_variance"], "log_variance")
    assert_close(model.decode_tiled(golden["out_tiled_mean"]), golden["out_tiled_decoded"], "decoded")


@pytest.mark.parametrize("case", CASES)
def test_what_was_read_is_written_back_bit_for_bit(case, tmp_path) -> None:
    save_pretrained(read(case)[0], tmp_path)
    assert_same(*(load_file(place / WEIGHTS) for place in (tmp_path, FOLDER / case)))
    theirs, ours = (json.loads((place / "config.json").read_text()) for place in (FOLDER / case, tmp_path))
    assert ours == {name: value for name, value in theirs.items() if name != "_diffusers_version"}


def test_attention_has_other_names_in_older_files(tmp_path) -> None:
    """Those of sd-vae-ft-mse, whose config.json does not have the newer fields either."""
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(FOLDER / "plain" / WEIGHTS)
    for new, old in older.items():
        tensors = {name.replace(f".{new}.", f".{old}."): value for name, value in tensors.items()}
    save_file(tensors, tmp_path / WEIGHTS)
    newer = {
        "force_upcast", "latents_mean", "latents_std", "mid_block_add_attention", "scaling_factor", "shift_factor",
        "use_post_quant_conv", "use_quant_conv",
    }  # fmt: skip
    fields = json.loads((FOLDER / "plain" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if k not in newer}))
    found = from_pretrained(tmp_path)
    assert (found.config.scaling_factor, found.config.shift_factor) == (0.18215, None)
    for path, variable in by_path(read("plain")[0]).items():
        np.testing.assert_array_equal(by_path(found)[path][...], variable[...], err_msg=path)
