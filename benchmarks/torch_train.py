"""Training steps in torch, the other side of `benchmarks.train_step`; runs under an interpreter that has torch.

Hugging Face's models with the settings that are fastest on a CPU: scaled-dot-product attention where the class has it
(transformers chooses it by itself; XLNet has none), no cache, the fused AdamW, gradients freed at each step. Run by its
path, which `sides` explains.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy
import sides
import torch
import transformers
from torch.nn.functional import cross_entropy, one_hot


def build(options: argparse.Namespace) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The model in its published initialisation, and AdamW that decays matrices alone."""
    config = transformers.AutoConfig.from_pretrained(options.folder, use_cache=False)
    model = getattr(transformers, config.architectures[0])(config).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}[options.adamw]
    return model, torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), **adamw)


def inputs(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A batch of zoo's as the arguments of Hugging Face's models."""
    if "images" in batch:
        return {"pixel_values": batch["images"].permute(0, 3, 1, 2).contiguous()}
    if "sources" in batch:
        return {"input_ids": batch["sources"], "decoder_input_ids": batch["tokens"]}
    given: dict[str, Any] = {"input_ids": batch["tokens"]}
    if "token_types" in batch:
        given["token_type_ids"] = batch["token_types"]
    if "order" in batch:  # Tokens see those that become known before them, and what is known from the beginning.
        order = batch["order"]
        given["perm_mask"] = ((order[:, None] >= order[:, :, None]) & (order[:, None] > 0)).float()
        given["target_mapping"] = one_hot(batch["places"], order.shape[1]).float()
    return given


def loss(model: torch.nn.Module, given: dict[str, Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean nats a predicted token or image, and of a pair with BERT."""
    out = model(**given)
    if "images" in batch:
        return cross_entropy(out.logits.float(), batch["labels"])
    if "next_sentence" not in batch:
        return cross_entropy(out.logits.float().flatten(0, 1), batch["targets"].flatten())
    rows = torch.arange(len(batch["places"]))[:, None]
    words = out.prediction_logits[rows, batch["places"]].float().flatten(0, 1)
    pairs = cross_entropy(out.seq_relationship_logits.float(), batch["next_sentence"])
    return cross_entropy(words, batch["targets"].flatten()) + pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of a config.json and a batch.npz")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--adamw", choices=("fused", "foreach", "loop"), default="fused")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, optimizer = build(options)
    arrays = {name: torch.from_numpy(array) for name, array in numpy.load(options.folder / "batch.npz").items()}
    batch = {name: x if x.is_floating_point() else x.long() for name, x in arrays.items()}
    given = inputs(batch)

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.dtype == "bfloat16"):
            value = loss(model, given, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    sides.serve(step)


if __name__ == "__main__":
    main()
