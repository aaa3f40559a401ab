"""Training in torch on given weights and batches, the other side of `benchmarks.curves`; needs torch and transformers.

Run by its path, which `sides` explains.
"""

import json
import sys
from pathlib import Path

import numpy
import torch
import transformers

Batch = dict[str, torch.Tensor]


def next_token(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Packed rows: each document attends to itself."""
    segments = batch["segments"]
    length = segments.shape[1]
    same = (segments[:, :, None] == segments[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    logits = model(batch["tokens"], attention_mask=same[:, None], position_ids=batch["positions"]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())


def masked_words(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    out = model(batch["tokens"], token_type_ids=batch["token_types"], attention_mask=batch["segments"])
    rows = torch.arange(len(batch["places"]))[:, None]
    logits, weights = out.prediction_logits[rows, batch["places"]], batch["weights"].flatten()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
    pairs = torch.nn.functional.cross_entropy(out.seq_relationship_logits, batch["next_sentence"])
    return (losses * weights).sum() / weights.sum() + pairs


def permuted_words(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Tokens see those that become known before them, and what is known from the beginning."""
    order, places, weights = batch["order"], batch["places"], batch["weights"].flatten()
    unseen = (order[:, None, :] >= order[:, :, None]) & (order[:, None, :] > 0)
    mapping = torch.nn.functional.one_hot(places, order.shape[1]).float()
    types = batch["token_types"]
    out = model(batch["tokens"], token_type_ids=types, perm_mask=unseen.float(), target_mapping=mapping)
    targets = batch["targets"].flatten()
    losses = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


def classes(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(batch["images"].permute(0, 3, 1, 2)).logits
    return torch.nn.functional.cross_entropy(logits, batch["labels"])


def written(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Targets that a decoder writes from a source, and what pads them."""
    out = model(batch["sources"], attention_mask=batch.get("source_segments"), decoder_input_ids=batch["tokens"])
    targets, weights = batch["targets"].flatten(), batch["weights"].flatten()
    losses = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


LOSSES = {
    "GPT2LMHeadModel": next_token,
    "LlamaForCausalLM": next_token,
    "BertForPreTraining": masked_words,
    "XLNetLMHeadModel": permuted_words,
    "ViTForImageClassification": classes,
    "T5ForConditionalGeneration": written,
    "BartForConditionalGeneration": written,
    "MarianMTModel": written,
}


def main() -> None:
    folder = Path(sys.argv[1])
    name = json.loads((folder / "model" / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder / "model").train()
    if "final_logits_bias" in model._buffers:  # BART's, which the published code holds as it is.
        model.final_logits_bias = torch.nn.Parameter(model._buffers.pop("final_logits_bias"))
    given = dict(numpy.load(folder / "batches.npz"))
    rates = given.pop("rates")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses = []
    for step, rate in enumerate(rates):
        batch = {key: torch.from_numpy(rows[step]) for key, rows in given.items()}
        batch = {key: x if x.is_floating_point() else x.long() for key, x in batch.items()}
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        loss = LOSSES[name](model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
