"""Makes tests/parity/gpt2/: a tiny GPT-2 of random weights, and what Hugging Face's implementation answers with it.

    pip install torch==2.13.0 transformers==5.23.0 && python tests/parity/make_gpt2.py

Sizes are awkward on purpose, biases and norms are random too, and logits spread as a trained model's do.
"""

from pathlib import Path

import numpy as np
import torch
from randomise import randomise
from transformers import GPT2Config, GPT2LMHeadModel

FOLDER = Path(__file__).parent / "gpt2"
SIZES = {"vocab_size": 211, "n_positions": 48, "n_embd": 36, "n_head": 3, "n_layer": 3, "n_inner": None}
STOPS = [57, 158]
PENALTIES = ((1.0, False), (0.0, False), (2.0, True))


def build() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(**SIZES, attn_implementation="eager", bos_token_id=None, eos_token_id=None, pad_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    return randomise(model)


def search(model: GPT2LMHeadModel, prompts: np.ndarray, length_penalty: float, early: bool) -> dict[str, np.ndarray]:
    """All beams of each prompt, and their scores. The likeliest stop tokens, so that many beams end early."""
    with torch.no_grad():
        found = model.generate(
            torch.tensor(prompts),
            attention_mask=torch.ones_like(torch.tensor(prompts)),
            max_new_tokens=12,
            do_sample=False,
            num_beams=4,
            num_return_sequences=4,
            length_penalty=length_penalty,
            early_stopping=early,
            eos_token_id=STOPS,
            return_dict_in_generate=True,
            output_scores=True,
        )
    name = f"{length_penalty:g}_{early}"
    tokens = np.zeros((8, 12), np.int32)
    tokens[:, : found.sequences.shape[1] - 7] = found.sequences[:, 7:].numpy()
    return {f"{name}_tokens": tokens.reshape(2, 4, 12), f"{name}_scores": found.sequences_scores.numpy().reshape(2, 4)}


def main() -> None:
    model = build()
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SIZES["vocab_size"], (3, 40))
    lengths = np.array([40, 23, 1])
    mask = np.arange(40)[None] < lengths[:, None]
    prompts = rng.integers(0, SIZES["vocab_size"], (2, 7))
    with torch.no_grad():
        logits = model(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits
        greedy = model.generate(
            torch.tensor(prompts), attention_mask=torch.ones(2, 7), max_new_tokens=20, do_sample=False
        )
    beams = {
        f"beams_{name}": value for penalty in PENALTIES for name, value in search(model, prompts, *penalty).items()
    }
    FOLDER.mkdir(exist_ok=True)
    model.save_pretrained(FOLDER)
    (FOLDER / "generation_config.json").unlink()
    np.savez_compressed(
        FOLDER / "golden.npz",
        tokens=tokens.astype(np.int32),
        mask=mask,
        logits=logits.numpy(),
        prompts=prompts.astype(np.int32),
        greedy=greedy[:, 7:].numpy().astype(np.int32),
        **beams,
    )


if __name__ == "__main__":
    main()
