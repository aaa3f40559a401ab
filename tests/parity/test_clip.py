"""CLIP's text tower against Hugging Face's, class by class, from the golden files that make_clip.py wrote."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from comparing import assert_close, assert_gradients_close, assert_same
from safetensors.numpy import load_file, save_file

from zoo.models.clip import CLASSES, CLIPText
from zoo.pretrained import by_path, from_pretrained, save_pretrained

FOLDER = Path(__file__).parent / "clip"
CASES = ("text", "text_projection")


@pytest.mark.parametrize("case", CASES)
def test_outputs_loss_and_gradients_agree(case) -> None:
    model, golden = from_pretrained(FOLDER / case), dict(np.load(FOLDER / case / "golden.npz"))
    assert isinstance(model, CLIPText)
    names = [name.removeprefix("along_") for name in golden if name.startswith("along_")]

    @jax.jit
    def run(model: CLIPText) -> Any:
        def loss(model: CLIPText) -> Any:
            out = model(golden["tokens"], return_intermediates=True)
            return sum((getattr(out, name) * golden[f"along_{name}"]).mean() for name in names), out

        return jax.value_and_grad(loss, has_aux=True)(model)

    (value, out), gradient = run(model)
    assert_close(out.intermediates.hidden, golden["out_states"], "states")
    for name in names:
        assert_close(getattr(out, name), golden[f"out_{name}"], name)
    assert_close(value, golden["loss"], "loss")
    assert_gradients_close(gradient, FOLDER / case)


@pytest.mark.parametrize("case", CASES)
def test_what_was_read_is_written_back_bit_for_bit(case, tmp_path) -> None:
    save_pretrained(from_pretrained(FOLDER / case), tmp_path)
    assert_same(*(load_file(place / "model.safetensors") for place in (tmp_path, FOLDER / case)))
    theirs, ours = (json.loads((place / "config.json").read_text()) for place in (FOLDER / case, tmp_path))
    assert ours == {name: theirs[name] for name in ours}
    assert theirs.keys() - ours.keys() == {"initializer_factor", "initializer_range", "transformers_version"}


def test_older_files_of_the_bare_tower_have_a_prefix_and_keep_it(tmp_path) -> None:
    tensors = load_file(FOLDER / "text" / "model.safetensors")
    older = {f"text_model.{name}": value for name, value in tensors.items()}
    positions = {"text_model.embeddings.position_ids": np.arange(13)[None]}
    (tmp_path / "older").mkdir()
    save_file(older | positions, tmp_path / "older" / "model.safetensors")
    (tmp_path / "older" / "config.json").write_text((FOLDER / "text" / "config.json").read_text())
    found = from_pretrained(tmp_path / "older")
    for path, variable in by_path(from_pretrained(FOLDER / "text")).items():
        np.testing.assert_array_equal(by_path(found)[path][...], variable[...], err_msg=path)
    save_pretrained(found, tmp_path / "back")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), older)


def test_every_published_class_is_here() -> None:
    classes = [json.loads((FOLDER / case / "config.json").read_text())["architectures"][0] for case in CASES]
    assert classes == list(CLASSES.values())
