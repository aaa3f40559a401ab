"""Makes tests/parity/dit/: tiny DiTs of random weights, and what diffusers' answer.

    pip install torch==2.13.0 diffusers==0.42.1 && python tests/parity/make_dit.py

Sizes are awkward on purpose, and biases are random too. `each` has another embedding in every block and learns its
sigma, `shared` the same one everywhere, as files converted from the paper's weights have; its latents are smaller than
the size that its positions were made for.
"""

import json
from pathlib import Path

import diffusers
import numpy as np
import torch
from randomise import randomise

FOLDER = Path(__file__).parent / "dit"
CASES = {
    "each": (
        {
            "num_attention_heads": 3,
            "attention_head_dim": 8,
            "in_channels": 3,
            "out_channels": 6,
            "num_layers": 2,
            "sample_size": 6,
            "num_embeds_ada_norm": 5,
            "norm_eps": 0.01,
        },
        6,
    ),
    "shared": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "in_channels": 2,
            "num_layers": 3,
            "attention_bias": False,
            "sample_size": 11,
            "patch_size": 3,
            "activation_fn": "gelu",
            "num_embeds_ada_norm": 4,
        },
        6,
    ),
}


def build(case: str, fields: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    model = randomise(diffusers.DiTTransformer2DModel(**fields).eval())
    first, *others = model.transformer_blocks
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.norm1.linear.weight.normal_(0.0, 0.1)  # "norm" in its name, and no scale
            for parameter in block.norm1.emb.parameters():
                parameter.normal_(0.0, 0.1)
    if case == "shared":
        for block in others:
            block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return model


def gradients(model: torch.nn.Module, case: str) -> dict[str, torch.Tensor]:
    """By the names of parameters; of those that are the same in all blocks, the sum."""
    found = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    for name in [name for name in found if case == "shared" and ".norm1.emb." in name]:
        end = name.split(".norm1.emb.")[1]
        copies = [dict(block.norm1.emb.named_parameters())[end] for block in model.transformer_blocks]
        found[name] = sum(copy.grad.double() for copy in copies)
    return found


def main() -> None:
    for case, (fields, side) in CASES.items():
        rng = np.random.default_rng(0)
        model = build(case, fields)
        given = {
            "images": rng.standard_normal((3, model.config.in_channels, side, side)).astype(np.float32),
            "time": np.array([0, 37, 801]),
            "classes": np.array([1, fields["num_embeds_ada_norm"], 0]),
        }
        out = model(torch.tensor(given["images"]), torch.tensor(given["time"]), torch.tensor(given["classes"])).sample
        target = rng.standard_normal(out.shape).astype(np.float32)
        loss = torch.nn.functional.mse_loss(out, torch.tensor(target))
        loss.backward()
        model.save_pretrained(FOLDER / case)
        golden = {"out": out.detach().numpy(), "target": target, "loss": loss.detach().numpy()}
        np.savez_compressed(FOLDER / case / "golden.npz", **given, **golden)
        norms = {name: float(x.norm()) for name, x in gradients(model, case).items()}
        (FOLDER / case / "gradients.json").write_text(json.dumps(norms, indent=1) + "\n")


if __name__ == "__main__":
    main()
