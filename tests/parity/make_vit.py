"""Makes tests/parity/vit/: tiny ViTs and DINOv2s of random weights, one of each class, and what Hugging Face's answer.

    pip install torch==2.13.0 transformers==5.23.0 && python tests/parity/make_vit.py

Sizes are awkward on purpose, biases, norms and branch scales are random too, and scores spread as a trained model's do.
Images are of the trained size, larger, smaller, and of another shape, so that positions are read as they are and
resampled both ways, with and without antialiasing.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from randomise import randomise
from safetensors.numpy import load_file

FOLDER = Path(__file__).parent / "vit"
COMMON = {"hidden_size": 30, "num_attention_heads": 3, "num_hidden_layers": 3, "attn_implementation": "eager"}
NAMES = {0: "crane", 1: "heron", 2: "crane", 3: "tench, Tinca tinca", 4: "maillot"}

CASES = {
    "vit": (
        "ViTModel",
        {"intermediate_size": 52, "image_size": 20, "patch_size": 5, "layer_norm_eps": 0.01},
        (35, 17),
    ),
    "vit_classification": (
        "ViTForImageClassification",
        {
            "intermediate_size": 52,
            "image_size": [13, 21],
            "patch_size": [3, 4],
            "num_channels": 2,
            "qkv_bias": False,
            "hidden_act": "gelu_new",
            "hidden_dropout_prob": 0.2,
            "attention_probs_dropout_prob": 0.1,
            "problem_type": "single_label_classification",
            "id2label": NAMES,
            "label2id": {name: i for i, name in NAMES.items()},
        },
        (13, 21),
    ),
    "dinov2": ("Dinov2Model", {"image_size": 28, "patch_size": 4, "use_swiglu_ffn": True, "mlp_ratio": 3}, (17, 30)),
    "dinov2_classification": (
        "Dinov2ForImageClassification",
        {"image_size": 22, "patch_size": 4, "use_mask_token": False, "num_labels": 5, "mlp_ratio": 2},
        (22, 22),
    ),
    "registers": (
        "Dinov2WithRegistersModel",
        {"image_size": 20, "patch_size": 4, "num_register_tokens": 3, "hidden_act": "relu", "mlp_ratio": 2},
        (33, 25),
    ),
    "registers_classification": (
        "Dinov2WithRegistersForImageClassification",
        {
            "image_size": 33,
            "patch_size": 3,
            "num_register_tokens": 2,
            "qkv_bias": False,
            "use_swiglu_ffn": True,
            "num_labels": 5,
            "layerscale_value": 0.1,
        },
        (12, 20),
    ),
}


def build(name: str, fields: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = randomise(cls(cls.config_class(**COMMON, **fields)).eval())
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("lambda1"):
                parameter.normal_(1.0, 0.3)
    return model


def gradient_norms(model: torch.nn.Module) -> dict[str, float]:
    """By the names that tensors are saved under, which are not those in memory."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        gradients = load_file(Path(place) / "model.safetensors")
    return {name: float(np.linalg.norm(value.astype(np.float64))) for name, value in gradients.items()}


def main() -> None:
    for case, (name, fields, image_size) in CASES.items():
        rng = np.random.default_rng(0)
        model = build(name, fields)
        images = rng.standard_normal((3, *image_size, model.config.num_channels)).astype(np.float32)
        given = {"pixel_values": torch.tensor(images).permute(0, 3, 1, 2), "output_hidden_states": True}
        golden = {"images": images}
        if case.startswith("vit"):
            given["interpolate_pos_encoding"] = case == "vit"
        if case in ("dinov2", "registers"):
            patches = (image_size[0] // 4) * (image_size[1] // 4)
            golden["masked"] = rng.random((3, patches)) < 0.4
            given["bool_masked_pos"] = torch.tensor(golden["masked"])
        if case.endswith("classification"):
            golden["labels"] = rng.integers(0, 5, 3)
            out = model(**given, labels=torch.tensor(golden["labels"]))
            found, loss = {"logits": out.logits}, out.loss
        else:
            out = model(**given)
            found = {"hidden": out.last_hidden_state, "pooled": out.pooler_output}
            along = {key: rng.standard_normal(x.shape).astype(np.float32) for key, x in found.items()}
            loss = sum((x * torch.tensor(along[key])).mean() for key, x in found.items())
            golden |= {f"along_{key}": value for key, value in along.items()}
        found["states"] = torch.stack(out.hidden_states)
        loss.backward()
        model.save_pretrained(FOLDER / case)
        golden |= {f"out_{key}": x.detach().numpy() for key, x in found.items()} | {"loss": loss.detach().numpy()}
        np.savez_compressed(FOLDER / case / "golden.npz", **golden)
        (FOLDER / case / "gradients.json").write_text(json.dumps(gradient_norms(model), indent=1) + "\n")


if __name__ == "__main__":
    main()
