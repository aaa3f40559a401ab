"""Greedy generation in torch, the other side of `benchmarks.generation`; runs under an interpreter that has torch.

Hugging Face's generate with its cache and scaled-dot-product attention, prompts padded on the left.
"""

import argparse
import time

import sides
import torch
import transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, default=2)
    for name in ("batch", "prompt", "new"):
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = transformers.AutoConfig.from_pretrained(options.folder)
    kind = getattr(transformers, config.architectures[0])
    model = kind.from_pretrained(options.folder, attn_implementation="sdpa").eval()
    given = sides.rows(options.batch, options.prompt)
    tokens = torch.tensor([[0] * (options.prompt - len(row)) + row for row in given])
    mask = torch.tensor([[0] * (options.prompt - len(row)) + [1] * len(row) for row in given])
    settings = {"max_new_tokens": options.new, "min_new_tokens": options.new, "do_sample": False, "pad_token_id": 0}
    weights = torch.ones(sum(p.numel() for p in model.parameters()))
    start = 1 if config.is_encoder_decoder else options.prompt

    def read_rate() -> float:
        begun = time.perf_counter()
        weights.sum()
        return weights.nbytes / (time.perf_counter() - begun)

    def turn() -> dict:
        with torch.inference_mode():
            made = model.generate(input_ids=tokens, attention_mask=mask, **settings)
        return {"tokens": made[:, start:].tolist(), "compilations": 0, "read_rate": 0.0}

    rate = max(read_rate() for _ in range(5))

    def timed() -> dict:
        return turn() | {"read_rate": rate}

    sides.serve(timed)


if __name__ == "__main__":
    main()
