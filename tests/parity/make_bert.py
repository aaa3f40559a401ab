"""Makes tests/parity/bert/: tiny BERTs of random weights, one of each head, and what Hugging Face's answer with them.

    pip install torch==2.13.0 transformers==5.23.0 && python tests/parity/make_bert.py

Sizes are awkward on purpose, biases and norms are random too, and scores spread as a trained model's do. Rows are
padded at either end and in the middle, and padding has labels wherever the published losses count it.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from randomise import randomise

FOLDER = Path(__file__).parent / "bert"
VOCABULARY, LENGTH = 101, 23
SIZES = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 31,
    "type_vocab_size": 3,
    "hidden_size": 21,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "intermediate_size": 38,
}
NAMES = {0: "contradiction", 1: "neutral", 2: "entailment"}
CASES = {
    "none": ("BertModel", {}),
    "pretraining": ("BertForPreTraining", {}),
    "masked_lm": ("BertForMaskedLM", {"hidden_act": "gelu_new", "pad_token_id": None}),
    "next_sentence": ("BertForNextSentencePrediction", {"hidden_dropout_prob": 0.2}),
    "sequence_classification": (
        "BertForSequenceClassification",
        {
            "id2label": NAMES,
            "label2id": {name: i for i, name in NAMES.items()},
            "classifier_dropout": 0.3,
            "problem_type": "single_label_classification",
        },
    ),
    "token_classification": ("BertForTokenClassification", {"num_labels": 5, "hidden_act": "relu"}),
    "question_answering": ("BertForQuestionAnswering", {"layer_norm_eps": 0.01}),
}


def build(name: str, fields: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, **fields, attn_implementation="eager")
    model = getattr(transformers, name)(config).eval()
    return randomise(model)


def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    real = np.ones((4, LENGTH), bool)
    real[1, 15:], real[2, :7], real[3, 4:9], real[3, 20:] = False, False, False, False
    tokens = np.where(real, rng.integers(0, VOCABULARY, real.shape), 0)
    return {"tokens": tokens, "real": real, "token_types": rng.integers(0, SIZES["type_vocab_size"], real.shape)}


def labels(head: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    words = np.where(rng.random((4, LENGTH)) < 0.3, rng.integers(0, VOCABULARY, (4, LENGTH)), -100)
    pairs = rng.integers(0, 2, 4)
    return {
        "none": {},
        "pretraining": {"labels": words, "next_sentence_label": pairs},
        "masked_lm": {"labels": words},
        "next_sentence": {"labels": pairs},
        "sequence_classification": {"labels": rng.integers(0, 3, 4)},
        "token_classification": {"labels": rng.integers(0, 5, (4, LENGTH))},
        "question_answering": {
            "start_positions": rng.integers(0, 15, 4),
            "end_positions": np.array([3, 14, LENGTH, 22]),  # One beyond the row, which the loss leaves out.
        },
    }[head]


def main() -> None:
    for head, (name, fields) in CASES.items():
        rng = np.random.default_rng(0)
        model, given, wanted = build(name, fields), inputs(rng), labels(head, rng)
        out = model(
            input_ids=torch.tensor(given["tokens"]),
            attention_mask=torch.tensor(given["real"]).long(),
            token_type_ids=torch.tensor(given["token_types"]),
            **{name: torch.tensor(value) for name, value in wanted.items()},
        )
        if head == "none":
            hidden, pooled = out.last_hidden_state, out.pooler_output
            found = {"hidden": hidden, "pooled": pooled}
            wanted = {name: rng.standard_normal(x.shape).astype(np.float32) for name, x in found.items()}
            loss = sum((x * torch.tensor(wanted[name])).mean() for name, x in found.items())
            wanted = {f"along_{name}": value for name, value in wanted.items()}
        else:
            loss = out.loss
            if head == "question_answering":
                found = {"logits": torch.stack([out.start_logits, out.end_logits], -1)}
            elif head == "pretraining":
                found = {"logits": out.prediction_logits, "next_sentence": out.seq_relationship_logits}
            else:
                found = {"next_sentence" if head == "next_sentence" else "logits": out.logits}
        loss.backward()
        folder = FOLDER / head
        model.save_pretrained(folder)
        norms = {path: float(p.grad.norm()) for path, p in model.named_parameters() if p.grad is not None}
        (folder / "gradients.json").write_text(json.dumps(norms, indent=1) + "\n")
        np.savez_compressed(
            folder / "golden.npz",
            **given,
            **wanted,
            loss=loss.detach().numpy(),
            **{f"out_{name}": x.detach().numpy() for name, x in found.items()},
        )


if __name__ == "__main__":
    main()
