"""GPT-2 training steps in torch, the other side of `benchmarks.train_step`; runs under an interpreter that has torch.

It is Hugging Face's GPT2LMHeadModel with the settings that are fastest on a CPU: scaled-dot-product attention, no
dropout, the fused AdamW, gradients freed at each step. It takes as many steps as each line of standard input asks for
({"steps": n}) and answers with a line of timings and losses, so that the caller can let it take turns with another.
"""

import argparse
import json
import resource
import sys
import time

import numpy
import torch
import transformers


def build(args: argparse.Namespace) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The model of GPT-2 124M in its published initialisation, and AdamW that decays matrices alone."""
    config = transformers.GPT2Config(
        n_positions=1024, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, use_cache=False, attn_implementation="sdpa"
    )
    model = transformers.GPT2LMHeadModel(config).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    kind = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}[args.adamw]
    return model, torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), **kind)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, dtype: str) -> float:
    """One step on tokens [B, T + 1]; returns the mean loss in nats per token."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--adamw", choices=("fused", "foreach", "loop"), default="fused")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, optimizer = build(args)
    shape = (args.batch, args.length + 1)
    tokens = torch.from_numpy(numpy.random.default_rng(0).integers(50257, size=shape, dtype=numpy.int32)).long()
    for line in sys.stdin:
        answer = {"seconds": [], "cpu_seconds": [], "losses": []}
        for _ in range(json.loads(line)["steps"]):
            start, cpu = time.perf_counter(), time.process_time()
            loss = step(model, optimizer, tokens, args.dtype)
            answer["seconds"].append(time.perf_counter() - start)
            answer["cpu_seconds"].append(time.process_time() - cpu)
            answer["losses"].append(loss)
        answer["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
