"""Makes tests/parity/t5/: tiny T5s of random weights, and what torch's answer with them.

    pip install torch==2.13.0 transformers==5.23.0 && python tests/parity/make_t5.py

A T5, a T5 1.1 and an mT5, the latter two with a head of their own. Sizes are awkward on purpose, norms are random too,
and scores spread as a trained model's do. Texts are longer than the last bucket of distances begins, but for mT5's,
whose buckets are the published ones. The word that ends a text is likely, so that beams end at different lengths.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from randomise import randomise

FOLDER = Path(__file__).parent / "t5"
VOCABULARY, SOURCE, TARGET, NEW = 97, 24, 23, 12
ENDS = 2.0  # Added to the mean score of the word that ends a text.
BUCKETS = ("relative_attention_num_buckets", "relative_attention_max_distance")
CASES = {
    "t5": (
        "T5",
        {"d_model": 28, "num_heads": 3, "d_kv": 10, "d_ff": 38, "num_layers": 2},
        dict(zip(BUCKETS, (8, 20), strict=True)),
    ),
    "t5_v1_1": (
        "T5",
        {"d_model": 22, "num_heads": 3, "d_kv": 8, "d_ff": 26, "num_layers": 3, "num_decoder_layers": 2},
        {"feed_forward_proj": "gated-gelu"} | dict(zip(BUCKETS, (12, 17), strict=True)),
    ),
    "mt5": (
        "MT5",
        {"d_model": 26, "num_heads": 2, "d_kv": 14, "d_ff": 34, "num_layers": 2},
        {},
    ),
}
LOUDER = ("v", "o", "wi", "wi_0", "wi_1", "wo")
PENALTIES = ((1.0, False), (0.0, False), (2.0, True))


def build(case: str) -> torch.nn.Module:
    torch.manual_seed(0)
    name, sizes, fields = CASES[case]
    fields = {"tie_word_embeddings": case == "t5", "vocab_size": VOCABULARY, "decoder_start_token_id": 0, **fields}
    config = getattr(transformers, f"{name}Config")(**sizes, **fields)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    if case != "t5":
        # The library ties whatever it makes, and the released weights are not tied.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    randomise(model)
    with torch.no_grad():
        # Words score as far apart without 1 / sqrt(D) as with it, and layers weigh as much as words do, lest one word
        # follows itself for ever.
        model.shared.weight.mul_(5.0)
        for parameter in (p for n, p in model.named_parameters() if n.split(".")[-2] in LOUDER):
            parameter.mul_(2.0)
    return model


def batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
    real = np.arange(SOURCE) < np.array([SOURCE, 11, 1])[:, None]
    counted = np.arange(TARGET) < np.array([TARGET, 6, 1])[:, None]
    tokens = rng.integers(2, VOCABULARY, counted.shape)
    tokens[:, 0] = 0
    labels = np.where(counted, rng.integers(1, VOCABULARY, tokens.shape), -100)
    sources = np.where(real, rng.integers(2, VOCABULARY, real.shape), 0)
    return {"sources": sources, "real": real, "tokens": tokens, "counted": counted, "labels": labels}


def end_sooner(model: torch.nn.Module, arguments: dict[str, torch.Tensor]) -> None:
    """Turns the row of the head for the word that ends a text towards the states there are."""
    with torch.no_grad():
        states = model(**arguments, output_hidden_states=True).decoder_hidden_states[-1].flatten(0, 1).mean(0)
        scale = states.shape[0] ** 0.5 if model.config.tie_word_embeddings else 1.0
        model.lm_head.weight[model.config.eos_token_id] += ENDS * scale * states / (states @ states)


def generation(model: torch.nn.Module, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """New tokens before the one that ends a text, padded with -1, of greedy and of beam search."""
    arguments = {"attention_mask": torch.tensor(given["real"]).long(), "max_new_tokens": NEW, "do_sample": False}
    sources = torch.tensor(given["sources"])

    def new(found: torch.Tensor) -> np.ndarray:
        made = np.pad(found[:, 1:].numpy(), ((0, 0), (0, 1 + NEW - found.shape[1])), constant_values=-1)
        ended = np.cumsum(made == model.config.eos_token_id, 1) > 0
        return np.where(ended, -1, made)

    found = {"greedy": new(model.generate(sources, **arguments))}
    for penalty, early in PENALTIES:
        out = model.generate(
            sources,
            num_beams=4,
            num_return_sequences=4,
            length_penalty=penalty,
            early_stopping=early,
            return_dict_in_generate=True,
            output_scores=True,
            **arguments,
        )
        name = f"beams_{penalty:g}_{early}"
        found[f"{name}_tokens"] = new(out.sequences).reshape(3, 4, NEW)
        found[f"{name}_scores"] = out.sequences_scores.numpy().reshape(3, 4)
    return found


def published(case: str) -> None:
    model, given = build(case), batch(np.random.default_rng(0))
    arguments = {
        "input_ids": torch.tensor(given["sources"]),
        "attention_mask": torch.tensor(given["real"]).long(),
        "decoder_input_ids": torch.tensor(given["tokens"]),
    }
    end_sooner(model, arguments)
    out = model(
        **arguments,
        labels=torch.tensor(given["labels"]),
        output_hidden_states=True,
        output_attentions=True,
    )
    out.loss.backward()
    found = {
        "encoder_hidden": torch.stack(out.encoder_hidden_states),
        "encoder_attention": torch.stack(out.encoder_attentions),
        "hidden": torch.stack(out.decoder_hidden_states),
        "attention": torch.stack(out.decoder_attentions),
        "cross_attention": torch.stack(out.cross_attentions),
        "logits": out.logits,
        "loss": out.loss,
    }
    made = generation(model, given)
    folder = FOLDER / case
    model.save_pretrained(folder)
    norms = {path: float(p.grad.norm()) for path, p in model.named_parameters() if p.grad is not None}
    (folder / "gradients.json").write_text(json.dumps(norms, indent=1) + "\n")
    outputs = {f"out_{name}": x.detach().numpy() for name, x in found.items()}
    np.savez_compressed(folder / "golden.npz", **given, **made, **outputs)


if __name__ == "__main__":
    for one in CASES:
        published(one)
