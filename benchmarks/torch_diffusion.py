"""Training steps and sampling of diffusers' networks in torch, the other side of `benchmarks.diffusion`.

Runs under an interpreter that has torch, diffusers and transformers, by its path, which `sides` explains. Settings are
those that are fastest on a CPU: convolutions over channels last, scaled-dot-product attention (both libraries' own
choice), the fused AdamW, gradients freed at each step, no gradients while sampling.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy
import sides
import torch
import transformers
from torch.nn.functional import l1_loss, mse_loss

Batch = dict[str, torch.Tensor]
TOLD = {"labels": "class_labels", "context": "encoder_hidden_states"}
"""What a batch has beside images, and what networks call it."""


def build(fields: dict[str, Any]) -> torch.nn.Module:
    """The published class of a config.json, in its own initialisation."""
    if "_class_name" in fields:
        return getattr(diffusers, fields["_class_name"]).from_config(fields)
    return getattr(transformers, fields["architectures"][0])(transformers.CLIPTextConfig(**fields))


def told(batch: Batch) -> dict[str, torch.Tensor]:
    return {theirs: batch[ours] for ours, theirs in TOLD.items() if ours in batch}


def loss_of(model: Any, scheduler: Any, batch: Batch) -> Callable[[], torch.Tensor]:
    """What the model is trained for: noise at random times, images through a latent, or the states of texts."""

    def denoising() -> torch.Tensor:
        images, noise = batch["images"], torch.randn_like(batch["images"])
        times = torch.randint(0, scheduler.config.num_train_timesteps, (len(noise),))
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(images, noise, times) if velocity else noise
        predicted = model(scheduler.add_noise(images, noise, times), timestep=times, **told(batch)).sample
        return mse_loss(predicted, target)

    def autoencoding() -> torch.Tensor:
        posterior = model.encode(batch["images"]).latent_dist
        images = model.decode(posterior.sample()).sample
        return l1_loss(images, batch["images"]) + 1e-3 * posterior.kl().mean() / images[0].numel()

    def states() -> torch.Tensor:
        return mse_loss(model(batch["tokens"]).last_hidden_state, batch["targets"])

    return denoising if scheduler else autoencoding if "images" in batch else states


def trainer(model: Any, loss: Callable[[], torch.Tensor]) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.0, fused=True)

    def step() -> float:
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    return step


def sampler(model: Any, fields: dict[str, Any], batch: Batch, steps: int) -> Callable[[], float]:
    """`steps` of DDIM from noise."""
    scheduler = diffusers.DDIMScheduler.from_config(fields, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)

    @torch.inference_mode()
    def draw() -> float:
        x = torch.randn_like(batch["images"])
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, timestep=t.expand(len(x)), **told(batch)).sample, t, x).prev_sample
        return x.std().item()

    return draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of a config.json, a batch.npz, and of a denoiser's scheduler.json")
    parser.add_argument("--sample", type=int, metavar="STEPS", help="sample in so many steps; without, train")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contiguous", action="store_true", help="channels first, torch's own order")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    order = torch.contiguous_format if options.contiguous else torch.channels_last
    model = build(json.loads((options.folder / "config.json").read_text())).to(memory_format=order)
    arrays = {name: torch.from_numpy(x) for name, x in numpy.load(options.folder / "batch.npz").items()}
    batch = {name: x if x.is_floating_point() else x.long() for name, x in arrays.items()}
    if "images" in batch:
        batch["images"] = batch["images"].permute(0, 3, 1, 2).contiguous(memory_format=order)
    path = options.folder / "scheduler.json"
    fields = json.loads(path.read_text()) if path.exists() else None
    if options.sample:
        sides.serve(sampler(model.eval(), fields, batch, options.sample))
    else:
        scheduler = fields and diffusers.DDPMScheduler.from_config(fields)
        sides.serve(trainer(model.train(), loss_of(model, scheduler, batch)))


if __name__ == "__main__":
    main()
