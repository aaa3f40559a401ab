"""Makes tests/parity/clip/: tiny CLIP text towers of random weights, and what Hugging Face's make of texts.

    pip install torch==2.13.0 transformers==5.23.0 && python tests/parity/make_clip.py

Sizes are awkward on purpose, biases and norms are random too. Texts end at different places, with the token that the
config names, or with the largest where the config is of the older kind.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from randomise import randomise

FOLDER = Path(__file__).parent / "clip"
COMMON = {"vocab_size": 151, "num_hidden_layers": 3, "max_position_embeddings": 13, "attn_implementation": "eager"}

CASES = {
    "text": (
        "CLIPTextModel",
        {
            "hidden_size": 28,
            "intermediate_size": 44,
            "num_attention_heads": 2,
            "projection_dim": 19,
            "eos_token_id": 140,
            "bos_token_id": 139,
            "pad_token_id": 140,
            "layer_norm_eps": 0.01,
        },
    ),
    "text_projection": (
        "CLIPTextModelWithProjection",
        {
            "hidden_size": 27,
            "intermediate_size": 40,
            "num_attention_heads": 3,
            "projection_dim": 22,
            "eos_token_id": 2,
            "bos_token_id": 0,
            "hidden_act": "gelu",
            "attention_dropout": 0.1,
        },
    ),
}


def main() -> None:
    for case, (name, fields) in CASES.items():
        rng = np.random.default_rng(0)
        torch.manual_seed(0)
        model = randomise(getattr(transformers, name)(transformers.CLIPTextConfig(**COMMON, **fields)).eval())
        tokens = rng.integers(3, 139, (4, 11))
        # The older kind of text has the end of its config too, which does not end it, and padding of token 1.
        end, pad = (140, 140) if case == "text" else (150, 1)
        for row, length in enumerate((11, 4, 7, 1)):
            tokens[row, length - 1 :] = pad
            tokens[row, length - 1] = end
        tokens[0, 2] = 2
        out = model(torch.tensor(tokens), output_hidden_states=True)
        found = {"hidden": out.last_hidden_state}
        found |= {"pooled": out.pooler_output} if case == "text" else {"projected": out.text_embeds}
        along = {key: rng.standard_normal(x.shape).astype(np.float32) for key, x in found.items()}
        loss = sum((x * torch.tensor(along[key])).mean() for key, x in found.items())
        loss.backward()
        found["states"] = torch.stack(out.hidden_states)
        model.save_pretrained(FOLDER / case)
        golden = {"tokens": tokens, "loss": loss.detach().numpy()} | {f"along_{key}": x for key, x in along.items()}
        golden |= {f"out_{key}": x.detach().numpy() for key, x in found.items()}
        np.savez_compressed(FOLDER / case / "golden.npz", **golden)
        norms = {name: float(parameter.grad.norm()) for name, parameter in model.named_parameters()}
        (FOLDER / case / "gradients.json").write_text(json.dumps(norms, indent=1) + "\n")


if __name__ == "__main__":
    main()
