"""Llama, Mistral, Qwen 2 and Qwen 3 against Hugging Face's, from the golden files that make_llama.py wrote."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import gradient_norms
from safetensors.numpy import load_file, save_file

from zoo.generation import generate
from zoo.layers.positions import YarnScaling
from zoo.models.llama import Llama
from zoo.pretrained import by_path, from_pretrained, save_pretrained

FOLDER = Path(__file__).parent
CASES = ("llama", "mistral", "qwen2", "qwen3", "llama_dynamic", "qwen2_yarn", "qwen3_yarn")


@pytest.fixture(scope="module", params=CASES)
def case(request) -> tuple[Path, Llama, dict[str, np.ndarray]]:
    folder = FOLDER / request.param
    return folder, from_pretrained(folder), dict(np.load(folder / "golden.npz"))


def loss(model: Llama, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean cross entropy of the next token, as Hugging Face's classes have it, and logits."""
    logits = model(tokens, segments=mask.astype(jnp.int32)).logits
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
    return (nll * mask[:, 1:]).sum() / mask[:, 1:].sum(), logits


def test_logits_loss_and_gradients_agree(case) -> None:
    _, model, golden = case
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, logits), gradient = run(model, golden["tokens"], golden["mask"])
    expected, real = golden["logits"], golden["mask"]
    tolerance = 2e-5 * max(1.0, float(np.abs(expected[real]).max()))
    np.testing.assert_allclose(np.asarray(logits)[real], expected[real], rtol=0, atol=tolerance)
    np.testing.assert_allclose(value, golden["loss"], rtol=2e-5)
    found = gradient_norms(gradient)
    assert found.keys() == set(golden["gradient_names"].tolist())
    for name, norm in zip(golden["gradient_names"].tolist(), golden["gradient_norms"], strict=True):
        assert abs(found[name] - norm) <= 2e-5 * max(1.0, norm), name


def test_greedy_continuations_agree(case) -> None:
    _, model, golden = case
    made = generate(model, golden["prompts"].tolist(), max_new_tokens=golden["greedy"].shape[1])
    assert made.tokens == golden["greedy"].tolist()


def test_rotary_frequencies_are_the_published_ones(case) -> None:
    _, model, golden = case
    frequencies = model.stack.blocks[0].attention.rotary.frequencies(model.config.head_size)
    # torch's power is one of vectors, which may be off by its last digit; YaRN's is rounded twice more.
    yarn = isinstance(model.config.rope_scaling, YarnScaling)
    np.testing.assert_array_max_ulp(frequencies, golden["frequencies"], maxulp=3 if yarn else 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_read_is_written_back_bit_for_bit(case, tmp_path, dtype) -> None:
    folder, _, _ = case
    stored = {name: x.astype(jnp.dtype(dtype)) for name, x in load_file(folder / "model.safetensors").items()}
    (tmp_path / "read").mkdir()
    save_file(stored, tmp_path / "read" / "model.safetensors")
    (tmp_path / "read" / "config.json").write_text((folder / "config.json").read_text())
    model = from_pretrained(tmp_path / "read")
    assert {str(variable.dtype) for variable in by_path(model).values()} == {dtype}
    save_pretrained(model, tmp_path / "written")
    written = load_file(tmp_path / "written" / "model.safetensors")
    assert written.keys() == stored.keys()
    for name, value in stored.items():
        assert written[name].dtype == value.dtype and written[name].tobytes() == value.tobytes(), name
    theirs, ours = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "written"))
    assert ours == {name: theirs[name] for name in ours} | {"dtype": dtype}
