"""Makes tests/parity/encoder_decoder_heads/: tiny T5s and BARTs that score no words, and torch's answers.

    pip install torch==2.13.0 transformers==5.23.0 && python tests/parity/make_encoder_decoder_heads.py

Weights are random. There are bare classes, encoders alone, and those that score classes of texts or of tokens, or
where an answer starts and ends.
Sources are padded at their ends and hold the word that ends a text twice, one at the place that classes are scored at.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from randomise import randomise

FOLDER = Path(__file__).parent / "encoder_decoder_heads"
VOCABULARY, SOURCE, TARGET = 89, 17, 13
T5 = {
    "d_model": 22,
    "num_heads": 3,
    "d_kv": 8,
    "d_ff": 26,
    "num_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
BART = {
    "max_position_embeddings": 21,
    "d_model": 20,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 5,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 26,
    "decoder_ffn_dim": 30,
}
GATED = {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 1, "tie_word_embeddings": False}
NAMES = {0: "contradiction", 1: "neutral", 2: "entailment"}
NAMED = {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}
CASES = {
    "t5": ("T5Model", T5),
    "t5_encoder": ("T5EncoderModel", T5 | GATED),
    "t5_classes": (
        "T5ForSequenceClassification",
        T5 | NAMED | {"classifier_dropout": 0.2, "problem_type": "single_label_classification"},
    ),
    "t5_token_classes": ("T5ForTokenClassification", T5 | {"num_labels": 4}),
    "t5_answers": ("T5ForQuestionAnswering", T5 | GATED),
    "mt5": ("MT5Model", T5),
    "mt5_encoder": ("MT5EncoderModel", T5),
    "mt5_classes": ("MT5ForSequenceClassification", T5 | {"num_labels": 1}),
    "mt5_token_classes": ("MT5ForTokenClassification", T5 | NAMED),
    "mt5_answers": ("MT5ForQuestionAnswering", T5),
    "bart_classes": ("BartForSequenceClassification", BART | {"classifier_dropout": 0.1, "num_labels": 5}),
    "bart_answers": ("BartForQuestionAnswering", BART | {"scale_embedding": True}),
}
"""The class, and fields of its config."""


def build(name: str, fields: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    config = kind.config_class(vocab_size=VOCABULARY, **fields)
    config._attn_implementation = "eager"
    return randomise(kind(config).eval())


def inputs(rng: np.random.Generator, end: int) -> dict[str, np.ndarray]:
    lengths = np.array([SOURCE, 11, 5])
    real = np.arange(SOURCE) < lengths[:, None]
    sources = np.where(real, rng.integers(3, VOCABULARY, real.shape), 0)
    sources[np.arange(3), lengths - 1] = sources[np.arange(3), lengths // 2] = end
    return {"sources": sources, "real": real}


def make(case: str) -> None:
    rng, model = np.random.default_rng(0), build(*CASES[case])
    given = inputs(rng, model.config.eos_token_id)
    arguments = {"input_ids": torch.tensor(given["sources"]), "attention_mask": torch.tensor(given["real"]).long()}
    kind = case.partition("_")[2]
    if kind in ("", "answers"):
        tokens = rng.integers(3, VOCABULARY, (3, TARGET))
        given |= {"tokens": tokens, "counted": np.ones_like(tokens, bool)}
        arguments["decoder_input_ids"] = torch.tensor(tokens)
    if kind in ("encoder", "token_classes"):
        given["counted"] = given["real"]
    if kind in ("", "encoder"):
        out = model(**arguments, output_hidden_states=True)
        states = torch.stack(out.decoder_hidden_states if kind == "" else out.hidden_states)
        along = rng.standard_normal(out.last_hidden_state.shape) * given["counted"][..., None]
        given["along"] = along.astype(np.float32)
        loss, found = (out.last_hidden_state * torch.tensor(given["along"])).mean(), {"hidden_states": states}
    elif kind == "answers":
        wanted = {"start_positions": rng.integers(0, 9, 3), "end_positions": np.array([3, TARGET, 12])}
        out = model(**arguments, **{name: torch.tensor(value) for name, value in wanted.items()})
        given |= wanted
        loss, found = out.loss, {"logits": torch.stack([out.start_logits, out.end_logits], -1)}
    else:
        count = model.config.num_labels
        labels = rng.integers(0, count, 3) if count > 1 else rng.standard_normal(3).astype(np.float32)
        if kind == "token_classes":
            labels = np.where(given["real"], rng.integers(0, count, given["real"].shape), -100)
        out = model(**arguments, labels=torch.tensor(labels))
        given["labels"] = labels
        loss, found = out.loss, {"logits": out.logits}
    loss.backward()
    folder = FOLDER / case
    model.save_pretrained(folder)
    norms = {path: float(p.grad.norm()) for path, p in model.named_parameters() if p.grad is not None}
    (folder / "gradients.json").write_text(json.dumps(norms, indent=1) + "\n")
    outputs = {f"out_{name}": x.detach().numpy() for name, x in found.items()}
    np.savez_compressed(folder / "golden.npz", **given, loss=loss.detach().numpy(), **outputs)


if __name__ == "__main__":
    for case in CASES:
        make(case)
