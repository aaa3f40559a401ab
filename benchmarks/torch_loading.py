"""Loading GPT-2 in torch, the other side of `benchmarks.loading`; runs under an interpreter that has torch."""

import json
import sys
import time

import sides
import torch
from transformers import GPT2LMHeadModel


def main() -> None:
    torch.ones(3).sum()
    before, begun = sides.resident("VmRSS"), time.perf_counter()
    model = GPT2LMHeadModel.from_pretrained(sys.argv[1])
    there = time.perf_counter() - begun
    for x in model.parameters():
        x.detach().numpy().sum()
    read = time.perf_counter() - begun
    print(json.dumps({"there": there, "read": read, "before_mib": before, "peak_mib": sides.resident("VmHWM")}))


if __name__ == "__main__":
    main()
