"""The scheduler_config.json of Hugging Face diffusers: what a network was trained under, and how to sample from it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from zoo.diffusion.samplers import DDIM, DDPM, PLMS, DPMSolver, Euler, Sampler
from zoo.models.noising import Noising
from zoo.models.published import PublishedError

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
VARIANCE_TYPES = {"fixed_small": "small", "fixed_large": "large", "learned_range": "learned"}
TARGETS = {"epsilon": "noise", "sample": "image", "v_prediction": "velocity"}

_BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_CLIP: dict[str, Any] = {
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
}
_SIGMAS: dict[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "final_sigmas_type": "zero",
    "timestep_spacing": "linspace",
    "rescale_betas_zero_snr": False,
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": _BETAS | _CLIP | {"variance_type": "fixed_small"},
    "DDIMScheduler": _BETAS | _CLIP | {"set_alpha_to_one": True},
    "PNDMScheduler": _BETAS | {"skip_prk_steps": False, "set_alpha_to_one": False, "timestep_spacing": "leading"},
    "EulerDiscreteScheduler": _BETAS
    | _SIGMAS
    | {"interpolation_type": "linear", "sigma_min": None, "sigma_max": None, "timestep_type": "discrete"},
    "DPMSolverMultistepScheduler": _BETAS
    | _SIGMAS
    | {
        "solver_order": 2,
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
        "use_dynamic_shifting": False,
        "time_shift_type": "exponential",
    },
    "FlowMatchEulerDiscreteScheduler": {
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "invert_sigmas": False,
        "shift_terminal": None,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "time_shift_type": "exponential",
        "stochastic_sampling": False,
    },
}
"""Every field of each class that we have, with what diffusers takes where a file leaves it out."""

_CHOICES: dict[str, tuple[Any, ...]] = {
    "beta_schedule": tuple(SCHEDULES),
    "prediction_type": tuple(TARGETS),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "variance_type": tuple(VARIANCE_TYPES),
    "final_sigmas_type": ("zero", "sigma_min"),
    "solver_order": (1, 2, 3),
    "solver_type": ("midpoint", "heun"),
    "skip_prk_steps": (True,),
    "clip_sample": (True, False),
    "set_alpha_to_one": (True, False),
    "rescale_betas_zero_snr": (True, False),
    "use_karras_sigmas": (True, False),
    "lower_order_final": (True, False),
}
_NUMBERS = {"num_train_timesteps", "beta_start", "beta_end", "steps_offset", "clip_sample_range", "shift"}
_WHOLE = {"num_train_timesteps", "steps_offset"}
# Without a meaning, since what they are of is refused.
_INERT = {"dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type", "base_shift", "max_shift"}
_INERT |= {"base_image_seq_len", "max_image_seq_len"}
# Those of one class that does not have a choice that another has.
_ONLY: dict[tuple[str, str], tuple[Any, ...]] = {
    ("DPMSolverMultistepScheduler", "variance_type"): (None,),
    ("FlowMatchEulerDiscreteScheduler", "use_karras_sigmas"): (False,),
    ("PNDMScheduler", "prediction_type"): ("epsilon", "v_prediction"),
    # It goes its first step twice; elsewhere the second time begins at a time that it has not been at.
    ("PNDMScheduler", "timestep_spacing"): ("leading",),
}


class Scheduler(NamedTuple):
    """noising: for the config of the network.  sampler: for sampling as the published pipeline does."""

    noising: Noising
    sampler: Sampler


def from_published(fields: Mapping[str, Any]) -> Scheduler:
    """What a scheduler_config.json says; raises PublishedError, by name, for what cannot be represented here."""
    name = fields.get("_class_name")
    if name not in DEFAULTS:
        raise PublishedError(f"scheduler_config.json has _class_name {name!r}, which is none of {', '.join(DEFAULTS)}")
    # Files carry fields of other classes, which this one does not read; a field that no class has may mean anything.
    known = set().union(*DEFAULTS.values())
    for field in fields:
        if field not in known and not field.startswith("_"):
            raise PublishedError(f"scheduler_config.json has {field} {fields[field]!r}, which no {name} here knows")
    full = {field: fields.get(field, default) for field, default in DEFAULTS[name].items()}
    for field, value in full.items():
        _check(name, field, value)
    noising = _noising(name, full)
    return Scheduler(noising, _sampler(name, full, noising))


def to_published(noising: Noising, sampler: Sampler) -> dict[str, Any]:
    """scheduler_config.json, with every field that diffusers writes; from_published reads the same back.

    Raises PublishedError for a sampler or a noising that no class of diffusers is.
    """
    name = _class_of(noising, sampler)
    fields = _fields(noising, sampler)
    full = {field: fields.get(field, default) for field, default in DEFAULTS[name].items()}
    published = {"_class_name": name} | full
    # How much fresh noise DDIM adds is said when sampling, and in no file.
    saved = replace(sampler, eta=0.0) if isinstance(sampler, DDIM) else sampler
    if from_published(published) != (noising, saved):
        raise PublishedError(f"{sampler} under {noising} has no published form: {name} reads its fields otherwise")
    return published


def _check(name: str, field: str, value: Any) -> None:
    if field in _INERT:
        return
    if field in _NUMBERS:
        kind = int if field in _WHOLE else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or not value >= 0:
            raise PublishedError(f"scheduler_config.json has {field} {value!r}: {name} needs a number from 0 there")
        return
    choices = _ONLY.get((name, field)) or _CHOICES.get(field) or (DEFAULTS[name][field],)
    if field == "beta_schedule" and name != "DDPMScheduler":
        choices = tuple(choice for choice in choices if choice != "sigmoid")
    if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices):
        listed = " or ".join(map(repr, choices))
        raise PublishedError(f"scheduler_config.json has {field} {value!r}: {name} here has {listed} alone")


def _noising(name: str, fields: Mapping[str, Any]) -> Noising:
    if name == "FlowMatchEulerDiscreteScheduler":
        return Noising("flow", fields["num_train_timesteps"], "velocity")
    return Noising(
        SCHEDULES[fields["beta_schedule"]],
        fields["num_train_timesteps"],
        TARGETS[fields["prediction_type"]],
        fields["beta_start"],
        fields["beta_end"],
        fields.get("rescale_betas_zero_snr", False),
    )


def _sampler(name: str, fields: Mapping[str, Any], noising: Noising) -> Sampler:
    if name == "FlowMatchEulerDiscreteScheduler":
        return Euler(shift=fields["shift"])
    common = {"spacing": fields["timestep_spacing"], "offset": fields["steps_offset"]}
    clip = fields["clip_sample_range"] if fields.get("clip_sample") else None
    if name == "DDPMScheduler":
        variance = VARIANCE_TYPES[fields["variance_type"]]
        if variance != "small" and (common["spacing"] == "trailing" or common["offset"]):
            raise PublishedError(
                f"scheduler_config.json has variance_type {fields['variance_type']!r} with timestep_spacing "
                f"{common['spacing']!r} "
                f"and steps_offset {common['offset']}: the last step would add noise, as none here does"
            )
        return DDPM(variance=variance, clip=clip, **common)
    if name == "DDIMScheduler":
        return DDIM(to_image=fields["set_alpha_to_one"], clip=clip, fixed_stride=True, clipped_noise=False, **common)
    if name == "PNDMScheduler":
        return PLMS(to_image=fields["set_alpha_to_one"], **common)
    common |= {"to_image": fields["final_sigmas_type"] == "zero", "karras": fields["use_karras_sigmas"]}
    if name == "EulerDiscreteScheduler":
        return Euler(**common)
    if common["karras"] and noising.schedule == "cosine":
        raise PublishedError(
            "scheduler_config.json has use_karras_sigmas true with beta_schedule 'squaredcos_cap_v2': "
            f"{name} rounds those times another way than any here"
        )
    return DPMSolver(
        order=fields["solver_order"],
        lower_order_last=fields["lower_order_final"],
        heun=fields["solver_type"] == "heun",
        **common,
    )


def _class_of(noising: Noising, sampler: Sampler) -> str:
    classes: dict[type[Sampler], str] = {
        DDPM: "DDPMScheduler",
        DDIM: "DDIMScheduler",
        PLMS: "PNDMScheduler",
        Euler: "EulerDiscreteScheduler",
    }
    classes[DPMSolver] = "DPMSolverMultistepScheduler"
    if noising.schedule == "flow":
        classes = {Euler: "FlowMatchEulerDiscreteScheduler"}
    if type(sampler) not in classes:
        raise PublishedError(
            f"{sampler} on the schedule {noising.schedule!r} has no published form: choose euler there"
        )
    if isinstance(sampler, DDIM) and (sampler.clipped_noise or not sampler.fixed_stride):
        raise PublishedError(
            f"{sampler} has no published form: diffusers' DDIM has fixed_stride=True and clipped_noise=False"
        )
    return classes[type(sampler)]


def _fields(noising: Noising, sampler: Sampler) -> dict[str, Any]:
    """What the published fields are, whichever of them the class has."""
    fields: dict[str, Any] = {
        "num_train_timesteps": noising.timesteps,
        "beta_start": noising.first_beta,
        "beta_end": noising.last_beta,
        "beta_schedule": next((theirs for theirs, ours in SCHEDULES.items() if ours == noising.schedule), "linear"),
        "prediction_type": next((theirs for theirs, ours in TARGETS.items() if ours == noising.target), "epsilon"),
        "rescale_betas_zero_snr": noising.zero_terminal_snr,
        "timestep_spacing": sampler.spacing,
        "steps_offset": sampler.offset,
        "set_alpha_to_one": sampler.to_image,
        "final_sigmas_type": "zero" if sampler.to_image else "sigma_min",
        "skip_prk_steps": True,
    }
    if isinstance(sampler, DDPM | DDIM):
        fields["clip_sample"] = sampler.clip is not None
        fields["clip_sample_range"] = 1.0 if sampler.clip is None else sampler.clip
    if isinstance(sampler, DDPM):
        fields["variance_type"] = next(theirs for theirs, ours in VARIANCE_TYPES.items() if ours == sampler.variance)
    if isinstance(sampler, Euler | DPMSolver):
        fields["use_karras_sigmas"] = sampler.karras
    if isinstance(sampler, Euler):
        fields["shift"] = sampler.shift
    if isinstance(sampler, DPMSolver):
        fields |= {"solver_order": sampler.order, "lower_order_final": sampler.lower_order_last}
        fields["solver_type"] = "heun" if sampler.heun else "midpoint"
    return fields
