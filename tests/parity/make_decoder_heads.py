"""Makes tests/parity/decoder_heads/: tiny decoders of random weights that score no words, and Hugging Face's answers.

    pip install torch==2.13.0 transformers==5.23.0 && python tests/parity/make_decoder_heads.py

The bare classes, and those that score classes from a text's last real token. Rows are padded at their ends, one from
its second token on, with a token that no text has.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from randomise import randomise

FOLDER = Path(__file__).parent / "decoder_heads"
VOCABULARY, PAD, LENGTH = 97, 3, 19
GPT2 = {"n_positions": 31, "n_embd": 21, "n_head": 3, "n_layer": 2}
LLAMA = {
    "max_position_embeddings": 31,
    "hidden_size": 20,
    "intermediate_size": 34,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "head_dim": 6,
}
NAMES = {0: "contradiction", 1: "neutral", 2: "entailment"}
NAMED = {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}
CASES = {
    "gpt2": ("GPT2Model", GPT2),
    "gpt2_classes": (
        "GPT2ForSequenceClassification",
        GPT2 | NAMED | {"problem_type": "single_label_classification"},
    ),
    "llama": ("LlamaModel", LLAMA),
    "llama_classes": ("LlamaForSequenceClassification", LLAMA | NAMED),
    "mistral": ("MistralModel", LLAMA | {"sliding_window": 7}),
    "mistral_classes": ("MistralForSequenceClassification", LLAMA | {"sliding_window": None, "num_labels": 4}),
    "qwen2": ("Qwen2Model", LLAMA | {"tie_word_embeddings": True}),
    "qwen2_classes": ("Qwen2ForSequenceClassification", LLAMA | {"num_labels": 1}),
    "qwen3": ("Qwen3Model", LLAMA),
    "qwen3_classes": ("Qwen3ForSequenceClassification", LLAMA | {"tie_word_embeddings": True}),
}
"""The class, and fields of its config; two classes, without names of their own, unless told."""


def build(name: str, fields: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    common = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None}
    return randomise(kind(kind.config_class(**common, **fields, attn_implementation="eager")).eval())


def main() -> None:
    for case, (name, fields) in CASES.items():
        rng, model = np.random.default_rng(0), build(name, fields)
        mask = np.arange(LENGTH)[None] < np.array([LENGTH, 11, 1])[:, None]
        tokens = np.where(mask, rng.integers(PAD + 1, VOCABULARY, mask.shape), PAD)
        given = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask).long()}
        if case.endswith("_classes"):
            count = model.config.num_labels
            labels = rng.integers(0, count, 3) if count > 1 else rng.standard_normal(3).astype(np.float32)
            out = model(**given, labels=torch.tensor(labels))
            loss, wanted, found = out.loss, {"labels": labels}, {"logits": out.logits}
        else:
            hidden = model(**given).last_hidden_state
            along = np.where(mask[..., None], rng.standard_normal(hidden.shape), 0).astype(np.float32)
            loss, wanted, found = (hidden * torch.tensor(along)).mean(), {"along": along}, {"hidden": hidden}
        loss.backward()
        folder = FOLDER / case
        model.save_pretrained(folder)
        norms = {path: float(p.grad.norm()) for path, p in model.named_parameters()}
        (folder / "gradients.json").write_text(json.dumps(norms, indent=1) + "\n")
        np.savez_compressed(
            folder / "golden.npz",
            tokens=tokens.astype(np.int32),
            mask=mask,
            **wanted,
            loss=loss.detach().numpy(),
            **{f"out_{name}": x.detach().numpy() for name, x in found.items()},
        )


if __name__ == "__main__":
    main()
