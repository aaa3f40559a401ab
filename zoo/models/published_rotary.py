"""Rotary positions of published configs: `rope_theta` and `rope_parameters`, or the fields of older files.

What is left out is as in Hugging Face transformers, modeling_rope_utils.
"""

from collections.abc import Mapping
from typing import Any

from zoo.layers.positions import DynamicScaling, LinearScaling, Llama3Scaling, YarnScaling
from zoo.models.published import PublishedError, flag, number, require, size

Scaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling

LENGTH = "original_max_position_embeddings"

PARTS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", LENGTH),
    "yarn": ("factor", "beta_slow", "beta_fast", "attention_factor", "truncate", LENGTH),
}
"""Fields by `rope_type`."""


def read_rotary(fields: Mapping[str, Any], name: str) -> tuple[float, Scaling | None]:
    """rope_theta and the scaling of a config.json of the class `name`; raises PublishedError for what is none."""
    # An older file's rope_scaling wins over rope_parameters, as in transformers.
    where = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    given = fields.get(where) or {}
    if not isinstance(given, dict):
        raise PublishedError(f"config.json has {where} {given!r}: the model needs an object there")
    found = {"rope_theta": fields.get("rope_theta", 10000.0)} | given
    found["rope_type"] = kind = found.get("rope_type", found.pop("type", "default"))
    if not isinstance(kind, str) or kind not in PARTS:
        raise PublishedError(f"config.json has {where} of type {kind!r}, and a {name} here has {', '.join(PARTS)}")
    require(fields, name, partial_rotary_factor=1.0)
    require(found, f"{name}'s {where}", partial_rotary_factor=1.0)
    known = {"rope_theta", "rope_type", "partial_rotary_factor", *PARTS[kind]}
    if unknown := sorted(key for key in found.keys() - known if found[key] is not None):
        raise PublishedError(
            f"config.json has {where} with {unknown[0]} {found[unknown[0]]!r}, which those of type {kind!r} lack here"
        )
    theta = _positive(found, "rope_theta")
    if kind == "default":
        return theta, None
    factor = _positive(found, "factor")
    if kind in ("linear", "dynamic"):
        return theta, LinearScaling(factor) if kind == "linear" else DynamicScaling(factor)
    # As in transformers: the field beside rope_parameters, where there is one, wins over the one within.
    original = (
        {LENGTH: fields.get("max_position_embeddings")} | found | {k: v for k, v in fields.items() if k == LENGTH}
    )
    length = size(original, LENGTH)
    if kind == "llama3":
        slow, fast = _positive(found, "low_freq_factor"), _positive(found, "high_freq_factor")
        return theta, Llama3Scaling(factor, slow, fast, length)
    told = {"beta_slow": 1.0, "beta_fast": 32.0} | {key: x for key, x in found.items() if x is not None}
    growth = _positive(told, "attention_factor") if "attention_factor" in told else None
    return theta, YarnScaling(
        factor, _positive(told, "beta_slow"), _positive(told, "beta_fast"), length, growth, flag(told, "truncate", True)
    )


def rotary_fields(theta: float, scaling: Scaling | None) -> dict[str, Any]:
    """The `rope_parameters` that `read_rotary` reads."""
    if scaling is None:
        return {"rope_theta": theta, "rope_type": "default"}
    fields: dict[str, Any] = {"factor": scaling.factor, "rope_theta": theta}
    if isinstance(scaling, LinearScaling | DynamicScaling):
        return fields | {"rope_type": "linear" if isinstance(scaling, LinearScaling) else "dynamic"}
    fields[LENGTH] = scaling.original_length
    if isinstance(scaling, Llama3Scaling):
        return fields | {"low_freq_factor": scaling.slow, "high_freq_factor": scaling.fast, "rope_type": "llama3"}
    fields |= {"beta_slow": scaling.slow, "beta_fast": scaling.fast, "rope_type": "yarn"}
    if scaling.growth is not None:
        fields["attention_factor"] = scaling.growth
    return fields if scaling.whole_pairs else fields | {"truncate": False}


def _positive(fields: Mapping[str, Any], name: str) -> float:
    value = number({name: fields.get(name)}, name, 0.0)
    if not value:
        raise PublishedError(f"config.json has {name} {value!r}: rotary positions need a number above 0 there")
    return value
