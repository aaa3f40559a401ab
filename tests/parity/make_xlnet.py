"""Makes tests/parity/xlnet/: tiny XLNets of random weights, one of each head, and what Hugging Face's answer with them.

    pip install torch==2.13.0 transformers==5.23.0 && python tests/parity/make_xlnet.py

Sizes are awkward on purpose, biases and norms are random too, and scores spread as a trained model's do. Rows are
padded at their beginning. The bare model is causal and reads a second segment with memories of the first; the language
model predicts places from random subsets of the others, with memories, and continues prompts.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from randomise import randomise

FOLDER = Path(__file__).parent / "xlnet"
VOCABULARY, LENGTH, BEFORE, PREDICTED = 61, 13, 7, 4
SIZES = {"vocab_size": VOCABULARY, "d_model": 18, "n_head": 3, "n_layer": 3, "d_inner": 34}
NAMES = {0: "contradiction", 1: "neutral", 2: "entailment"}
CASES = {
    "none": ("XLNetModel", {"attn_type": "uni", "mem_len": 9, "reuse_len": 5, "ff_activation": "relu"}),
    "lm": ("XLNetLMHeadModel", {"mem_len": 6, "bos_token_id": None, "eos_token_id": None}),
    "sequence_classification": (
        "XLNetForSequenceClassification",
        {
            "id2label": NAMES,
            "label2id": {name: i for i, name in NAMES.items()},
            "problem_type": "single_label_classification",
            "summary_last_dropout": 0.3,
            "clamp_len": 4,
        },
    ),
    "multiple_choice": ("XLNetForMultipleChoice", {"n_layer": 2}),
    "token_classification": ("XLNetForTokenClassification", {"num_labels": 5, "ff_activation": "gelu_new"}),
    "question_answering": ("XLNetForQuestionAnsweringSimple", {"layer_norm_eps": 0.01, "dropout": 0.2}),
}


def build(name: str, fields: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    model = randomise(getattr(transformers, name)(transformers.XLNetConfig(**(SIZES | fields))).eval())
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "rel_attn" in parameter_name and "norm" not in parameter_name:
                parameter.normal_(0.0, 0.4)
    return model


def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    real = np.ones((3, LENGTH), bool)
    real[1, :5], real[2, :1] = False, False
    tokens = np.where(real, rng.integers(6, VOCABULARY, real.shape), 5)
    return {"tokens": tokens, "real": real, "token_types": rng.integers(0, 3, real.shape)}


def more(head: str, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Further inputs of a head, and its labels."""
    before = {"before": rng.integers(6, VOCABULARY, (3, BEFORE))}
    places = np.stack([rng.permutation(LENGTH)[:PREDICTED] for _ in range(3)])
    perm_mask = rng.random((3, LENGTH, LENGTH)) < 0.4
    perm_mask[np.arange(3)[:, None], places, places] = True
    return {
        "none": (before, {}),
        "lm": (
            {**before, "targets": places, "perm_mask": perm_mask},
            {"labels": rng.integers(0, VOCABULARY, (3, PREDICTED))},
        ),
        "sequence_classification": ({}, {"labels": rng.integers(0, 3, 3)}),
        "multiple_choice": ({}, {"labels": rng.integers(0, 3, 1)}),
        "token_classification": ({}, {"labels": rng.integers(0, 5, (3, LENGTH))}),
        "question_answering": (
            {},
            {"start_positions": rng.integers(0, LENGTH, 3), "end_positions": np.array([3, LENGTH, LENGTH - 1])},
        ),
    }[head]


def streams(states: tuple[torch.Tensor, ...], predicted: bool) -> dict[str, torch.Tensor]:
    """Published states of contents and of what is predicted take turns."""
    if not predicted:
        return {"hidden_states": torch.stack(states)}
    return {"hidden_states": torch.stack(states[::2]), "target_states": torch.stack(states[1::2])}


def continued(model: torch.nn.Module, rng: np.random.Generator) -> dict[str, np.ndarray]:
    prompts = torch.tensor(rng.integers(6, VOCABULARY, (2, 5)))
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 5}
    made = {
        f"made_{remembers}_{beams}": model.generate(prompts, num_beams=beams, use_mems=remembers, **options)[
            :, 5:
        ].numpy()
        for remembers in (True, False)
        for beams in (1, 3)
    }
    return {"prompts": prompts.numpy(), **made}


def main() -> None:
    for head, (name, fields) in CASES.items():
        rng = np.random.default_rng(0)
        model, given = build(name, fields), inputs(rng)
        further, wanted = more(head, rng)
        arguments = {
            "input_ids": torch.tensor(given["tokens"]),
            "attention_mask": torch.tensor(given["real"]).float(),
            "token_type_ids": torch.tensor(given["token_types"]),
        }
        if head == "multiple_choice":  # Rows are answers to one question.
            arguments = {name: x[None] for name, x in arguments.items()}
        found = {}
        if head == "none":  # Causal contents and a mask of padding do not go together in transformers 5.23.0.
            del given["real"], arguments["attention_mask"]
        if "before" in further:
            first = model(torch.tensor(further["before"]), use_mems=True)
            found["first"] = first[0]
            arguments |= {"mems": first.mems, "use_mems": True}
        if "targets" in further:
            mapping = np.eye(LENGTH, dtype=np.float32)[further["targets"]]
            arguments["perm_mask"] = torch.tensor(further["perm_mask"]).float()
            arguments["target_mapping"] = torch.tensor(mapping)
        labels = {name: torch.tensor(value) for name, value in wanted.items()}
        out = model(**arguments, **labels, output_hidden_states=True)
        found |= streams(out.hidden_states, head == "lm")
        if "before" in further:
            found["memories"] = torch.stack(out.mems).transpose(1, 2)
        if head == "none":
            along = rng.standard_normal(out.last_hidden_state.shape).astype(np.float32)
            further["along"], loss = along, (out.last_hidden_state * torch.tensor(along)).mean()
        else:
            loss = out.loss
            ends = head == "question_answering"
            found["logits"] = torch.stack([out.start_logits, out.end_logits], -1) if ends else out.logits
            if head == "multiple_choice":
                found["logits"] = out.logits.T
        loss.backward()
        folder = FOLDER / head
        model.save_pretrained(folder)
        norms = {path: float(p.grad.norm()) for path, p in model.named_parameters() if p.grad is not None}
        (folder / "gradients.json").write_text(json.dumps(norms, indent=1) + "\n")
        np.savez_compressed(
            folder / "golden.npz",
            **given,
            **further,
            **wanted,
            **(continued(model, rng) if head == "lm" else {}),
            loss=loss.detach().numpy(),
            **{f"out_{name}": x.detach().numpy() for name, x in found.items()},
        )


if __name__ == "__main__":
    main()
