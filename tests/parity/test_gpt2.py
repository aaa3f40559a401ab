"""GPT against Hugging Face's GPT-2, from the golden files that make_gpt2.py wrote."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo import sharding
from zoo.generation import generate
from zoo.layers.transformer import Block
from zoo.models.gpt import GPT, GPTConfig

FOLDER = Path(__file__).parent / "gpt2"


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """float32 tensors: 8 bytes of header length, a JSON header of names, shapes and offsets, and the data."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(raw[start:][slice(*entry["data_offsets"])], np.float32).reshape(entry["shape"])
        for name, entry in header.items()
    }


def read_config(path: Path) -> GPTConfig:
    sizes = json.loads(path.read_text())
    return GPTConfig(
        vocab_size=sizes["vocab_size"],
        max_length=sizes["n_positions"],
        num_layers=sizes["n_layer"],
        width=sizes["n_embd"],
        num_heads=sizes["n_head"],
        mlp_width=sizes["n_inner"],
        norm_epsilon=sizes["layer_norm_epsilon"],
    )


def fill(variable: nnx.Variable, value: np.ndarray) -> nnx.Variable:
    return variable.replace(jnp.asarray(value).reshape(variable.shape))


def fill_block(block: Block, saved: dict[str, np.ndarray], num_layers: int) -> None:
    def stacked(name: str) -> np.ndarray:
        return np.stack([saved[f"transformer.h.{layer}.{name}"] for layer in range(num_layers)])

    for norm, name in ((block.attention_norm, "ln_1"), (block.feedforward_norm, "ln_2")):
        norm.scale, norm.bias = fill(norm.scale, stacked(f"{name}.weight")), fill(norm.bias, stacked(f"{name}.bias"))
    for part in ("weight", "bias"):
        ours = "kernel" if part == "weight" else "bias"
        # Query, key and value stand side by side in c_attn, whose weight is [in, out] like ours.
        side_by_side = np.split(stacked(f"attn.c_attn.{part}"), 3, axis=-1)
        linears = zip((block.attention.query, block.attention.key, block.attention.value), side_by_side, strict=True)
        rest = (
            (block.attention.out, stacked(f"attn.c_proj.{part}")),
            (block.feedforward.up, stacked(f"mlp.c_fc.{part}")),
            (block.feedforward.down, stacked(f"mlp.c_proj.{part}")),
        )
        for linear, value in (*linears, *rest):
            setattr(linear, ours, fill(getattr(linear, ours), value))


def load(folder: Path) -> GPT:
    saved = read_safetensors(folder / "model.safetensors")
    config = read_config(folder / "config.json")
    model = config.build(nnx.Rngs(0))
    rows = np.zeros(model.embed.table.shape, np.float32)
    rows[: config.vocab_size] = saved["transformer.wte.weight"]
    model.embed.table = fill(model.embed.table, rows)
    model.positions.table = fill(model.positions.table, saved["transformer.wpe.weight"])
    model.norm.scale = fill(model.norm.scale, saved["transformer.ln_f.weight"])
    model.norm.bias = fill(model.norm.bias, saved["transformer.ln_f.bias"])
    fill_block(model.stack.blocks[0], saved, config.num_layers)
    assert sum(value.size for value in saved.values()) == sharding.parameter_count(model)
    return model


@pytest.fixture(scope="module")
def model() -> GPT:
    return load(FOLDER)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / "golden.npz"))


def test_logits_agree(model, golden) -> None:
    run = jax.jit(lambda tokens, segments: model(tokens, segments=segments).logits)
    logits = run(golden["tokens"], golden["mask"].astype(np.int32))
    expected, real = golden["logits"], golden["mask"]
    tolerance = 2e-5 * max(1.0, float(np.abs(expected[real]).max()))
    np.testing.assert_allclose(np.asarray(logits)[real], expected[real], rtol=0, atol=tolerance)


def test_greedy_continuations_agree(model, golden) -> None:
    made = generate(model, golden["prompts"].tolist(), max_new_tokens=golden["greedy"].shape[1])
    assert made.tokens == golden["greedy"].tolist()
