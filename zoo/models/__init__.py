"""Presets of every model family by name; a family's module is imported when it is first asked for."""

import difflib
import importlib
from typing import Any

FAMILIES = ("gpt", "unet")


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


def parameter_count(config: Any) -> int:
    """Number of parameters of the model of a config; nothing is allocated."""
    import jax
    from flax import nnx

    from zoo import sharding

    return sharding.parameter_count(jax.eval_shape(lambda key: config.build(nnx.Rngs(key)), jax.random.key(0)))
