"""Presets of every model family by name; a family's module is imported when it is first asked for."""

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

FAMILIES = (
    "autoencoder",
    "bert",
    "clip",
    "dit",
    "gpt",
    "llama",
    "t5",
    "text_to_image",
    "transformer",
    "unet",
    "vit",
    "xlnet",
)


# The `model_type` of a published config.json, or its `_class_name` (diffusers), and whose config class reads it.
PUBLISHED = {
    "AutoencoderKL": ("autoencoder", "AutoencoderConfig"),
    "DiTTransformer2DModel": ("dit", "DiTConfig"),
    "Transformer2DModel": ("dit", "DiTConfig"),
    "UNet2DConditionModel": ("unet", "UNetConfig"),
    "UNet2DModel": ("unet", "UNetConfig"),
    "bart": ("transformer", "TransformerConfig"),
    "bert": ("bert", "BertConfig"),
    "clip_text_model": ("clip", "CLIPTextConfig"),
    "dinov2": ("vit", "ViTConfig"),
    "dinov2_with_registers": ("vit", "ViTConfig"),
    "gpt2": ("gpt", "GPTConfig"),
    "llama": ("llama", "LlamaConfig"),
    "marian": ("transformer", "TransformerConfig"),
    "mistral": ("llama", "LlamaConfig"),
    "mt5": ("t5", "T5Config"),
    "qwen2": ("llama", "LlamaConfig"),
    "qwen3": ("llama", "LlamaConfig"),
    "t5": ("t5", "T5Config"),
    "vit": ("vit", "ViTConfig"),
    "xlnet": ("xlnet", "XLNetConfig"),
}


class UnknownPreset(ValueError):
    """A preset that there is none of; the message offers the nearest name."""


def presets() -> dict[str, Any]:
    """Every preset's config by its name."""
    families = [importlib.import_module(f"{__name__}.{family}") for family in FAMILIES]
    return {name: config for family in families for name, config in family.PRESETS.items()}


def preset(name: str) -> Any:
    """The config of a preset; raises UnknownPreset."""
    known = presets()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise UnknownPreset(f"preset {name!r} is unknown: did you mean {nearest!r}? `zoo list` shows all")
    return known[name]


def published_config(fields: Mapping[str, Any]) -> Any:
    """The config of a published model from its config.json; raises PublishedError where no family here is it."""
    from zoo.models.published import PublishedError

    field = "_class_name" if "_class_name" in fields else "model_type"
    kind = fields.get(field)
    if not isinstance(kind, str) or kind not in PUBLISHED:
        raise PublishedError(f"config.json has {field} {kind!r}, and published models here are {', '.join(PUBLISHED)}")
    family, config = PUBLISHED[kind]
    return getattr(importlib.import_module(f"{__name__}.{family}"), config).from_published(fields)


def parameter_count(config: Any) -> int:
    """Number of parameters of the model of a config; nothing is allocated."""
    import jax
    from flax import nnx

    from zoo import sharding

    return sharding.parameter_count(jax.eval_shape(lambda key: config.build(nnx.Rngs(key)), jax.random.key(0)))
