"""Makes tests/parity/unet/: tiny U-Nets of random weights, of both published classes, and what diffusers' answer.

    pip install torch==2.13.0 diffusers==0.42.1 && python tests/parity/make_unet.py

Sizes are awkward on purpose, epsilons large enough to be seen, biases and norms random too.
"""

import json
from pathlib import Path

import diffusers
import numpy as np
import torch
from randomise import randomise

FOLDER = Path(__file__).parent / "unet"
COMMON = {"layers_per_block": 1, "norm_num_groups": 2}
TEXT = COMMON | {"cross_attention_dim": 10, "mid_block_type": "UNetMidBlock2DCrossAttn"}

CASES = {
    "ddpm": (
        "UNet2DModel",
        COMMON
        | {
            "sample_size": 12,
            "block_out_channels": [8, 12],
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": None,
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_eps": 1e-6,
            "dropout": 0.1,
        },
    ),
    "classes": (
        "UNet2DModel",
        COMMON
        | {
            "sample_size": [6, 10],
            "in_channels": 2,
            "out_channels": 3,
            "layers_per_block": 2,
            "block_out_channels": [12, 8],
            "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
            "attention_head_dim": 4,
            "norm_eps": 0.01,
            "num_class_embeds": 5,
        },
    ),
    "text": (
        "UNet2DConditionModel",
        TEXT
        | {
            "block_out_channels": [8, 12],
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "attention_head_dim": 2,
            "norm_eps": 1e-5,
        },
    ),
    "text_and_classes": (
        "UNet2DConditionModel",
        TEXT
        | {
            "sample_size": 8,
            "in_channels": 5,
            "block_out_channels": [12, 8],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": [3, 4],
            "norm_eps": 0.01,
            "num_class_embeds": 4,
            "use_linear_projection": True,
            "upcast_attention": True,
        },
    ),
}


def main() -> None:
    for case, (name, fields) in CASES.items():
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        model = randomise(getattr(diffusers, name)(**fields).eval())
        size = (8, 6)
        golden = {
            "images": rng.standard_normal((3, *size, model.config.in_channels)).astype(np.float32),
            "target": rng.standard_normal((3, *size, model.config.out_channels)).astype(np.float32),
            "time": np.array([0, 41, 999]),
        }
        given = {"timestep": torch.tensor(golden["time"])}
        if model.config.num_class_embeds is not None:
            golden["classes"] = np.array([3, 0, 2])
            given["class_labels"] = torch.tensor(golden["classes"])
        if name == "UNet2DConditionModel":
            golden["context"] = rng.standard_normal((3, 5, 10)).astype(np.float32)
            given["encoder_hidden_states"] = torch.tensor(golden["context"])
        images, target = (torch.tensor(golden[name]).permute(0, 3, 1, 2) for name in ("images", "target"))
        out = model(images, **given).sample
        loss = (out - target).square().mean()
        loss.backward()
        model.save_pretrained(FOLDER / case)
        golden |= {"out": out.permute(0, 2, 3, 1).detach().numpy(), "loss": loss.detach().numpy()}
        np.savez_compressed(FOLDER / case / "golden.npz", **golden)
        norms = {name: float(p.grad.double().norm()) for name, p in model.named_parameters()}
        (FOLDER / case / "gradients.json").write_text(json.dumps(norms, indent=1) + "\n")


if __name__ == "__main__":
    main()
