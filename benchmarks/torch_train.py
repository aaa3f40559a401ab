"""Training steps in torch, the other side of `benchmarks.train_step`; runs under an interpreter that has torch.

Hugging Face's models with the settings that are fastest on a CPU: scaled-dot-product attention, no dropout, the fused
AdamW, gradients freed at each step. Run by its path, which `sides` explains.
"""

import argparse

import sides
import torch
import transformers

NO_DROPOUT = {
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "use_cache": False},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0, "use_cache": False},
}
KINDS = {
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "bert": (transformers.BertConfig, transformers.BertForPreTraining),
    "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
}


def build(options: argparse.Namespace) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The model in its published initialisation, and AdamW that decays matrices alone."""
    config, kind = KINDS[options.model]
    model = kind(config(**NO_DROPOUT[options.model], attn_implementation="sdpa")).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}[options.adamw]
    return model, torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), **adamw)


def loss(name: str, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean nats a predicted token, and of a pair with BERT."""
    cross_entropy = torch.nn.functional.cross_entropy
    if name == "gpt2":
        logits = model(batch["tokens"]).logits
    elif name == "t5":
        logits = model(input_ids=batch["sources"], decoder_input_ids=batch["tokens"]).logits
    else:
        out = model(batch["tokens"], token_type_ids=batch["token_types"])
        rows = torch.arange(len(batch["places"]))[:, None]
        words = cross_entropy(
            out.prediction_logits[rows, batch["places"]].float().flatten(0, 1), batch["targets"].flatten()
        )
        return words + cross_entropy(out.seq_relationship_logits.float(), batch["next_sentence"])
    return cross_entropy(logits.float().flatten(0, 1), batch["targets"].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=KINDS, default="gpt2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--adamw", choices=("fused", "foreach", "loop"), default="fused")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, optimizer = build(options)
    given = sides.batch(options.model, options.batch, options.length)
    batch = {name: torch.tensor(rows) for name, rows in given.items()}

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.dtype == "bfloat16"):
            value = loss(options.model, model, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    sides.serve(step)


if __name__ == "__main__":
    main()
