"""Rotary positions of published configs: `rope_theta` and `rope_parameters`, or the fields of older files.

What is left out is as in Hugging Face transformers, modeling_rope_utils.
"""

from collections.abc import Mapping
from typing import Any

from zoo.layers.positions import LinearScaling, Llama3Scaling
from zoo.models.published import PublishedError, number, require, size

Scaling = LinearScaling | Llama3Scaling


def read_rotary(fields: Mapping[str, Any], name: str) -> tuple[float, Scaling | None]:
    """rope_theta and the scaling of a config.json of the class `name`; raises PublishedError for what is none."""
    # An older file's rope_scaling wins over rope_parameters, as in transformers.
    where = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    given = fields.get(where) or {}
    if not isinstance(given, dict):
        raise PublishedError(f"config.json has {where} {given!r}: the model needs an object there")
    found = {"rope_theta": fields.get("rope_theta", 10000.0)} | given
    found["rope_type"] = kind = found.get("rope_type", found.pop("type", "default"))
    llama3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    parts = {"default": (), "linear": ("factor",), "llama3": llama3}
    if not isinstance(kind, str) or kind not in parts:
        raise PublishedError(f"config.json has {where} of type {kind!r}, and a {name} here has {', '.join(parts)}")
    require(fields, name, partial_rotary_factor=1.0)
    require(found, f"{name}'s {where}", partial_rotary_factor=1.0)
    known = {"rope_theta", "rope_type", "partial_rotary_factor", *parts[kind]}
    if unknown := sorted(key for key in found.keys() - known if found[key] is not None):
        raise PublishedError(
            f"config.json has {where} with {unknown[0]} {found[unknown[0]]!r}, which those of type {kind!r} lack here"
        )
    theta = _positive(found, "rope_theta")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearScaling(_positive(found, "factor"))
    # As in transformers: the field beside rope_parameters, where there is one, wins over the one within.
    name = "original_max_position_embeddings"
    original = {name: fields.get("max_position_embeddings")} | found | {k: v for k, v in fields.items() if k == name}
    return theta, Llama3Scaling(
        factor=_positive(found, "factor"),
        slow=_positive(found, "low_freq_factor"),
        fast=_positive(found, "high_freq_factor"),
        original_length=size(original, name),
    )


def rotary_fields(theta: float, scaling: Scaling | None) -> dict[str, Any]:
    """The `rope_parameters` that `read_rotary` reads."""
    if scaling is None:
        return {"rope_theta": theta, "rope_type": "default"}
    if isinstance(scaling, LinearScaling):
        return {"factor": scaling.factor, "rope_theta": theta, "rope_type": "linear"}
    return {
        "factor": scaling.factor,
        "high_freq_factor": scaling.fast,
        "low_freq_factor": scaling.slow,
        "original_max_position_embeddings": scaling.original_length,
        "rope_theta": theta,
        "rope_type": "llama3",
    }


def _positive(fields: Mapping[str, Any], name: str) -> float:
    value = number({name: fields.get(name)}, name, 0.0)
    if not value:
        raise PublishedError(f"config.json has {name} {value!r}: rotary positions need a number above 0 there")
    return value
