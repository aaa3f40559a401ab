"""Makes tests/parity/pipelines/: tiny pipelines of random weights, and the images that diffusers draws with them.

    pip install torch==2.13.0 transformers==5.23.0 diffusers==0.42.1 && python tests/parity/make_pipelines.py

Schedulers are not the usual ones on purpose: what they say must reach the samples. Noise is that of torch's generator,
which pipelines draw themselves where they take no latents. asked.json has what is asked of a pipeline, as
`zoo.image_generation.draw` takes it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from randomise import randomise

FOLDER = Path(__file__).parent / "pipelines"
NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.015, "num_train_timesteps": 300}
ASKED: dict[str, dict[str, Any]] = {
    "text": {
        "prompts": ["a red cat!", "dogs"],
        "negative_prompt": "grey",
        "guidance": 3.0,
        "rescale": 0.6,
        "steps": 6,
    },
    "classes": {"classes": [207, 3], "guidance": 2.5, "steps": 5},
    "unconditional": {"count": 2, "steps": 5},
}


def unet(name: str, **fields: object) -> torch.nn.Module:
    common = {"layers_per_block": 1, "norm_num_groups": 2, "block_out_channels": [4, 8], "sample_size": [8, 12]}
    return randomise(getattr(diffusers, name)(**common, **fields).eval())


def autoencoder() -> torch.nn.Module:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": [4, 6], "norm_num_groups": 2, "latent_channels": 3, "scaling_factor": 0.4}
    return randomise(diffusers.AutoencoderKL(**blocks, **sizes).eval())


def tokenizer() -> transformers.CLIPTokenizer:
    """Letters, and the merges of a few words."""
    letters = [chr(c) for c in [*range(ord("a"), ord("z") + 1), ord("!")]]
    merges = [("c", "a"), ("ca", "t</w>"), ("r", "e"), ("d", "o")]
    pieces = [*letters, *(f"{c}</w>" for c in letters), *("".join(pair) for pair in merges)]
    names = [*pieces, "<|startoftext|>", "<|endoftext|>"]
    ids = {name: i for i, name in enumerate(names)}
    return transformers.CLIPTokenizer(vocab=ids, merges=merges, model_max_length=9)


def text() -> tuple[diffusers.DiffusionPipeline, dict[str, np.ndarray]]:
    """Predicts velocity, samples by PLMS, and has its guidance rescaled."""
    words = tokenizer()
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    roles = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    clip = transformers.CLIPTextConfig(vocab_size=len(words), max_position_embeddings=9, **sizes, **roles)
    blocks = {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 2,
        "cross_attention_dim": 12,
    }
    made = diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=randomise(transformers.CLIPTextModel(clip).eval()),
        tokenizer=words,
        unet=unet("UNet2DConditionModel", in_channels=3, out_channels=3, **blocks),
        scheduler=diffusers.PNDMScheduler(
            prediction_type="v_prediction", steps_offset=1, skip_prk_steps=True, set_alpha_to_one=True, **NOISE
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    noise = torch.randn((2, 3, 8, 12), generator=torch.manual_seed(1))
    asked = ASKED["text"]
    images = made(
        asked["prompts"],
        negative_prompt=[asked["negative_prompt"]] * 2,
        height=16,
        width=24,
        num_inference_steps=asked["steps"],
        guidance_scale=asked["guidance"],
        guidance_rescale=asked["rescale"],
        latents=noise,
        output_type="np",
    ).images
    return made, {"noise": noise.permute(0, 2, 3, 1).numpy(), "images": images}


def classes() -> tuple[diffusers.DiffusionPipeline, dict[str, np.ndarray]]:
    """A DiT that says something of the variance too; the pipeline knows 1000 classes, whatever the network does."""
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4, "sample_size": 4, "patch_size": 2}
    channels = {"in_channels": 3, "out_channels": 6, "num_embeds_ada_norm": 1000}
    made = diffusers.DiTPipeline(
        transformer=randomise(diffusers.DiTTransformer2DModel(**sizes, **channels).eval()),
        vae=autoencoder(),
        scheduler=diffusers.DDIMScheduler(prediction_type="sample", clip_sample=False, **NOISE),
    )
    noise = torch.randn((2, 3, 4, 4), generator=torch.manual_seed(1))
    asked = ASKED["classes"]
    images = made(
        asked["classes"],
        guidance_scale=asked["guidance"],
        num_inference_steps=asked["steps"],
        generator=torch.manual_seed(1),
        output_type="np",
    ).images
    return made, {"noise": noise.permute(0, 2, 3, 1).numpy(), "images": images}


def unconditional() -> tuple[diffusers.DiffusionPipeline, dict[str, np.ndarray]]:
    """Samples by DDIM, though the folder has the scheduler of DDPM."""
    blocks = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    network = unet("UNet2DModel", in_channels=1, out_channels=1, attention_head_dim=4, **blocks)
    made = diffusers.DDIMPipeline(network, diffusers.DDPMScheduler(**NOISE, clip_sample_range=1.5))
    noise = torch.randn((2, 1, 8, 12), generator=torch.manual_seed(1))
    asked = ASKED["unconditional"]
    images = made(
        asked["count"], num_inference_steps=asked["steps"], generator=torch.manual_seed(1), output_type="np"
    ).images
    return made, {"noise": noise.permute(0, 2, 3, 1).numpy(), "images": images}


def main() -> None:
    for make in (text, classes, unconditional):
        torch.manual_seed(0)
        made, golden = make()
        place = FOLDER / make.__name__
        shutil.rmtree(place, ignore_errors=True)
        made.save_pretrained(place)
        np.savez_compressed(place / "golden.npz", **golden)
        (place / "asked.json").write_text(json.dumps(ASKED[make.__name__]) + "\n")


if __name__ == "__main__":
    main()
