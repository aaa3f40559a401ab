"""Marian, BART and torch.nn.Transformer, from the golden files that make_transformer.py wrote."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close, assert_same, gradient_norms
from flax import nnx
from safetensors.numpy import load_file, save_file

from zoo import sharding
from zoo.beam_search import beam_search
from zoo.generation import generate
from zoo.models.published import Layout, SpecialTokens, Weight, linear, norm
from zoo.models.transformer import Transformer, TransformerConfig
from zoo.pretrained import Tensors, from_pretrained, layouts, load, save_pretrained

FOLDER = Path(__file__).parent / "transformer"
CASES = ("marian", "bart", "bart_bare")
GENERATING = ("marian", "bart")
NEW = 12


def golden_of(case: str) -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / case / "golden.npz"))


def torch_layout() -> Layout:
    """How torch.nn.Transformer, and what make_transformer.py puts around it, names and lays out its tensors."""

    def attention(name: str, module: str) -> tuple[Weight, ...]:
        parts = tuple(f"{module}.{part}" for part in ("query", "key", "value"))
        kernels, biases = (tuple(f"{part}.{leaf}" for part in parts) for leaf in ("kernel", "bias"))
        return (
            Weight(f"{name}.in_proj_weight", kernels, "(part n h) d -> part d n h"),
            Weight(f"{name}.in_proj_bias", biases, "(part n h) -> part n h"),
            *linear(f"{name}.out_proj", f"{module}.out", "d (n h) -> n h d", "d -> d"),
        )

    def stack(name: str, side: str, branches: tuple[str, ...]) -> tuple[Weight, ...]:
        layer, block = f"core.{name}.layers.{{}}", f"{name}.blocks.*"
        weights = attention(f"{layer}.self_attn", f"{block}.attention")
        if "cross" in branches:
            weights += attention(f"{layer}.multihead_attn", f"{block}.cross_attention")
        for number, branch in enumerate(branches, start=1):
            weights += norm(f"{layer}.norm{number}", f"{block}.{branch}_norm")
        return (
            *weights,
            *linear(f"{layer}.linear1", f"{block}.feedforward.up", "f d -> d f", "f -> f"),
            *linear(f"{layer}.linear2", f"{block}.feedforward.down", "d f -> f d", "d -> d"),
            *norm(f"core.{name}.norm", f"{side}.final_norm"),
        )

    return Layout(
        (
            Weight("src_emb.weight", ("source.embed.table",), "v d -> v d"),
            Weight("tgt_emb.weight", ("embed.table",), "v d -> v d"),
            *stack("encoder", "source", ("attention", "feedforward")),
            *stack("decoder", "target", ("attention", "cross", "feedforward")),
            Weight("out.weight", ("unembed.table",), "v d -> v d"),
            Weight("out.bias", ("words.bias",), "v -> v"),
        )
    )


def from_torch(folder: Path) -> Transformer:
    fields = json.loads((folder / "config.json").read_text())
    config = TransformerConfig(
        vocab_size=fields["tgt_vocab"],
        source_vocab_size=fields["src_vocab"],
        width=fields["d_model"],
        num_heads=fields["nhead"],
        num_layers=fields["enc_layers"],
        num_decoder_layers=fields["dec_layers"],
        mlp_width=fields["dim_feedforward"],
        activation=fields["activation"],
        norm_epsilon=fields["layer_norm_eps"],
        attention_bias=True,
        final_norm=True,
        tied=False,
        logits_bias=True,
        special_tokens=SpecialTokens(pad=fields["pad_id"], start=fields["bos_id"]),
    )
    model = sharding.abstract(lambda: config.build(nnx.Rngs(0)))
    return load(model, Tensors(folder, torch_layout()), None, layouts(model, None, None))


def loss(case: str, model: Transformer, golden: dict[str, np.ndarray], **arguments: Any) -> tuple[jax.Array, Any]:
    out = model(golden["sources"], golden["tokens"], source_segments=golden["real"], **arguments)
    if case == "bart_bare":
        last = out.intermediates.hidden[-1]
        return (last * golden["along"] * golden["counted"][..., None]).sum(), out
    logp, labels = jax.nn.log_softmax(out.logits), golden["labels"]
    each = jnp.take_along_axis(logp, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    if case == "torch":  # With smoothed labels.
        each = 0.9 * each + 0.1 * logp.mean(-1)
    return -(each * (labels >= 0)).sum() / (labels >= 0).sum(), out


def assert_gradients(gradient: Any, layout: Layout, folder: Path, fixed: set[str] = frozenset()) -> None:
    expected = json.loads((folder / "gradients.json").read_text())
    norms = gradient_norms(gradient, layout)
    assert norms.keys() - expected.keys() <= fixed and expected.keys() <= norms.keys()
    for name, value in expected.items():
        assert_close(norms[name], value, name)


@pytest.mark.parametrize("case", CASES)
def test_states_attention_scores_loss_and_gradients_agree(case) -> None:
    model, golden = from_pretrained(FOLDER / case), golden_of(case)
    run = jax.jit(jax.value_and_grad(lambda m: loss(case, m, golden, return_intermediates=True), has_aux=True))
    (value, out), gradient = run(model)
    rows, length = golden["real"], golden["tokens"].shape[1]
    encoder, decoder = out.encoded.intermediates, out.intermediates
    assert encoder.cross_attention is None
    assert_close(np.asarray(encoder.hidden)[:, rows], golden["out_encoder_hidden"][:, rows], "encoder hidden")
    found, expected = (np.moveaxis(np.asarray(x), 3, 2) for x in (encoder.attention, golden["out_encoder_attention"]))
    assert_close(found[:, rows], expected[:, rows], "encoder attention")
    for name in ("hidden", "attention", "cross_attention"):
        assert getattr(decoder, name).shape == golden[f"out_{name}"].shape and length
        assert_close(getattr(decoder, name), golden[f"out_{name}"], name)
    assert_close(out.encoded.hidden[rows], golden["out_encoder_hidden"][-1][rows], "encoded")
    if case != "bart_bare":
        assert_close(out.logits, golden["out_logits"], "logits")
    assert_close(value, golden["out_loss"], "loss")
    # Hugging Face's code holds the bias of logits as it is.
    assert_gradients(gradient, model.config.published_layout(), FOLDER / case, {"final_logits_bias"})


def sources_of(golden: dict[str, np.ndarray]) -> list[list[int]]:
    return [row[real].tolist() for row, real in zip(golden["sources"], golden["real"], strict=True)]


def before_the_end(tokens: np.ndarray) -> list[int]:
    return tokens[tokens >= 0].tolist()


@pytest.fixture(scope="module", params=GENERATING)
def generating(request) -> tuple[Transformer, dict[str, np.ndarray]]:
    return from_pretrained(FOLDER / request.param), golden_of(request.param)


def test_greedy_texts_agree_with_forced_and_banned_tokens(generating) -> None:
    model, golden = generating
    special = model.config.special_tokens
    assert (special.banned, special.first) == (((130, 7), None) if special.eos == (0,) else ((), 5))
    sources, expected = sources_of(golden), [before_the_end(row) for row in golden["greedy"]]
    found = generate(model, sources=sources, max_new_tokens=NEW)
    assert found.tokens == expected and all(found.stopped)
    seen: dict[int, list[int]] = {row: [] for row in range(len(sources))}
    generate(model, sources=sources, max_new_tokens=NEW, callback=lambda row, token: seen[row].append(token))
    assert list(seen.values()) == expected


@pytest.mark.parametrize(("penalty", "early"), [(1.0, False), (0.0, False), (2.0, True)])
def test_beams_agree(generating, penalty, early) -> None:
    model, golden = generating
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


def test_what_torch_calls_a_transformer_agrees() -> None:
    model, golden = from_torch(FOLDER / "torch"), golden_of("torch")
    (value, out), gradient = jax.jit(jax.value_and_grad(lambda m: loss("torch", m, golden), has_aux=True))(model)
    assert_close(out.logits, golden["out_logits"], "logits")
    assert_close(out.encoded.hidden[golden["real"]], golden["out_memory"][golden["real"]], "memory")
    states = model.features(golden["tokens"], sources=golden["sources"], source_segments=golden["real"]).hidden
    assert_close(states, golden["out_last"], "states")
    assert_close(value, golden["out_loss"], "loss")
    assert_gradients(gradient, torch_layout(), FOLDER / "torch")
    assert generate(model, sources=sources_of(golden), max_new_tokens=NEW).tokens == golden["greedy"].tolist()


@pytest.mark.parametrize("case", CASES)
def test_what_was_read_is_written_back_bit_for_bit(case, tmp_path) -> None:
    model = from_pretrained(FOLDER / case)
    save_pretrained(model, tmp_path)
    assert_same(load_file(tmp_path / "model.safetensors"), load_file(FOLDER / case / "model.safetensors"))
    theirs, ours = (json.loads((place / "config.json").read_text()) for place in (FOLDER / case, tmp_path))
    rules = {"forced_bos_token_id", "bad_words_ids"} & ours.keys()
    assert {name: ours[name] for name in ours.keys() - rules} == {name: theirs[name] for name in ours.keys() - rules}
    means_nothing_here = {"init_std", "is_decoder", "transformers_version", "use_cache", "decoder_vocab_size"}
    means_nothing_here |= {"encoder_layerdrop", "decoder_layerdrop", "share_encoder_decoder_embeddings"}
    means_nothing_here |= {"classifier_dropout", "id2label", "label2id"}
    assert theirs.keys() - ours.keys() <= means_nothing_here
    assert from_pretrained(tmp_path).config == model.config


def test_copies_and_constants_of_older_files_are_read_and_left_out(tmp_path) -> None:
    tensors = load_file(FOLDER / "marian" / "model.safetensors")
    copies = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
    written = tensors | dict.fromkeys(copies, tensors["model.shared.weight"])
    written |= {
        f"model.{side}.embed_positions.weight": np.ones((37, 28), np.float32) for side in ("encoder", "decoder")
    }
    save_file(written, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((FOLDER / "marian" / "config.json").read_text())
    save_pretrained(from_pretrained(tmp_path), tmp_path / "back")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), tensors)


def test_a_bare_bart_with_a_bias_of_its_logits_is_a_whole_one(tmp_path) -> None:
    tensors = load_file(FOLDER / "bart" / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    fields = json.loads((FOLDER / "bart" / "config.json").read_text()) | {"architectures": ["BartModel"]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    save_pretrained(from_pretrained(tmp_path), tmp_path / "back")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == [
        "BartForConditionalGeneration"
    ]
