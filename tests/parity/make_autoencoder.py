"""Makes tests/parity/autoencoder/: tiny KL autoencoders of random weights, and what diffusers' makes of images.

    pip install torch==2.13.0 diffusers==0.42.1 && python tests/parity/make_autoencoder.py

Sizes are awkward on purpose, biases and norms are random too. "plain" has all parts, "bare" none that a config can
leave out. Both are also run with tiles, which at the right and below are smaller: in "bare" so much so that a tile lies
within the one before it.
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from randomise import randomise

FOLDER = Path(__file__).parent / "autoencoder"

CASES = {
    "plain": {
        "block_out_channels": (6, 9, 12),
        "layers_per_block": 1,
        "norm_num_groups": 3,
        "latent_channels": 3,
        "sample_size": 16,
        "scaling_factor": 0.3,
        "shift_factor": -0.2,
        "force_upcast": False,
    },
    "bare": {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 4),
        "layers_per_block": 2,
        "norm_num_groups": 2,
        "latent_channels": 2,
        "sample_size": 32,
        "latents_mean": (0.1, -0.4),
        "latents_std": (1.5, 0.5),
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}


def build(fields: dict) -> AutoencoderKL:
    torch.manual_seed(0)
    levels = len(fields["block_out_channels"])
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    return randomise(AutoencoderKL(**kinds, **fields).eval())


def last(x: torch.Tensor) -> np.ndarray:
    """[B, C, Y, X] to [B, Y, X, C]."""
    return x.detach().permute(0, 2, 3, 1).numpy()


def first(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x).permute(0, 3, 1, 2)


def main() -> None:
    for case, fields in CASES.items():
        rng = np.random.default_rng(0)
        model = build(fields)
        channels, latent_channels = model.config.in_channels, model.config.latent_channels
        factor = 2 ** (len(model.config.block_out_channels) - 1)
        golden = {
            "images": rng.standard_normal((2, 12, 20, channels)),
            "noise": rng.standard_normal((2, 12 // factor, 20 // factor, latent_channels)),
            "target": rng.standard_normal((2, 12, 20, channels)),
            "large": rng.standard_normal((1, 28, 48, channels)),
        }
        golden = {name: x.astype(np.float32) for name, x in golden.items()}
        posterior = model.encode(first(golden["images"])).latent_dist
        reconstruction = model.decode(posterior.mode()).sample
        sample = posterior.mean + posterior.std * first(golden["noise"])
        found = {
            "mean": last(posterior.mean),
            "log_variance": last(posterior.logvar),
            "kl": posterior.kl().detach().numpy(),
            "images": last(reconstruction),
            "decoded": last(model.decode(sample).sample),
        }
        loss = torch.nn.functional.mse_loss(reconstruction, first(golden["target"])) + 0.01 * posterior.kl().mean()
        loss.backward()
        model.enable_tiling()
        tiled = model.encode(first(golden["large"])).latent_dist
        found["tiled_mean"], found["tiled_log_variance"] = last(tiled.mean), last(tiled.logvar)
        found["tiled_decoded"] = last(model.decode(tiled.mean).sample)
        model.save_pretrained(FOLDER / case)
        golden |= {f"out_{name}": x for name, x in found.items()} | {"loss": loss.detach().numpy()}
        np.savez_compressed(FOLDER / case / "golden.npz", **golden)
        norms = {name: float(parameter.grad.norm()) for name, parameter in model.named_parameters()}
        (FOLDER / case / "gradients.json").write_text(json.dumps(norms, indent=1) + "\n")


if __name__ == "__main__":
    main()
