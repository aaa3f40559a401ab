"""Training steps and sampling of diffusers' U-Net in torch, the other side of `benchmarks.diffusion`.

Runs under an interpreter that has torch and diffusers, by its path, which `sides` explains. Settings are those that are
fastest on a CPU: convolutions over channels last, scaled-dot-product attention (diffusers' own choice), the fused
AdamW, gradients freed at each step, no gradients while sampling.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy
import sides
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel


def trainer(model: UNet2DModel, batch: dict[str, torch.Tensor]) -> Callable[[], float]:
    """One step of DDPM's training: random times and noise, AdamW."""
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.0, fused=True)

    def step() -> float:
        noise = torch.randn_like(batch["images"])
        times = torch.randint(0, 1000, (len(noise),))
        predicted = model(scheduler.add_noise(batch["images"], noise, times), times).sample
        value = torch.nn.functional.mse_loss(predicted, noise)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    return step


def sampler(model: UNet2DModel, batch: dict[str, torch.Tensor], steps: int) -> Callable[[], float]:
    """`steps` of DDIM from noise."""
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)

    @torch.inference_mode()
    def draw() -> float:
        x = torch.randn_like(batch["images"])
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t).sample, t, x).prev_sample
        return x.std().item()

    return draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of a config.json and a batch.npz")
    parser.add_argument("--sample", type=int, metavar="STEPS", help="sample in so many steps; without, train")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contiguous", action="store_true", help="channels first, torch's own order")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    order = torch.contiguous_format if options.contiguous else torch.channels_last
    model = UNet2DModel.from_config(json.loads((options.folder / "config.json").read_text()))
    model = model.to(memory_format=order)
    images = torch.from_numpy(numpy.load(options.folder / "batch.npz")["images"]).permute(0, 3, 1, 2)
    batch = {"images": images.contiguous(memory_format=order)}
    model.train(options.sample is None)
    sides.serve(sampler(model, batch, options.sample) if options.sample else trainer(model, batch))


if __name__ == "__main__":
    main()
