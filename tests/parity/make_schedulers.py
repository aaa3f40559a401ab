"""Makes tests/parity/schedulers/: what Hugging Face's schedulers make of a fixed fake network, step by step.

    pip install torch==2.13.0 diffusers==0.42.1 && python tests/parity/make_schedulers.py

cases.json has each case's scheduler_config.json, its steps, and eta where there is one. golden.npz has the first noise
and the fresh noise of all of them, and for each case the times and x after every step, [steps, B, C, Y, X]; of the
learned variance, its logarithm at every time but the last, [steps - 1, values], where a network says what SAID lists.
"""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

FOLDER = Path(__file__).parent / "schedulers"
SHAPE = (2, 1, 2, 2)
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}

CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "ddpm": ("DDPMScheduler", {}, 50),
    "ddpm_large": ("DDPMScheduler", {"variance_type": "fixed_large", "clip_sample": False}, 50),
    "ddpm_sigmoid": ("DDPMScheduler", {"beta_schedule": "sigmoid", "timestep_spacing": "linspace"}, 50),
    "ddpm_cosine_image": ("DDPMScheduler", {**COSINE, "prediction_type": "sample", "clip_sample_range": 0.5}, 50),
    "ddpm_zero": ("DDPMScheduler", {**ZERO, "clip_sample": False}, 50),
    "ddpm_learned": ("DDPMScheduler", {"variance_type": "learned_range"}, 50),
    "ddpm_all": ("DDPMScheduler", {"num_train_timesteps": 50, "beta_end": 0.3}, 50),
    "ddim": ("DDIMScheduler", {**STABLE, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, 50),
    "ddim_open": ("DDIMScheduler", {**STABLE, "set_alpha_to_one": False, "prediction_type": "v_prediction"}, 50),
    "ddim_eta": ("DDIMScheduler", {"eta": 0.7}, 50),
    "ddim_zero": ("DDIMScheduler", {**STABLE, **ZERO, "clip_sample": False}, 50),
    "ddim_uneven": ("DDIMScheduler", {**COSINE, "timestep_spacing": "linspace", "prediction_type": "sample"}, 13),
    "plms": ("PNDMScheduler", {**STABLE, "skip_prk_steps": True, "steps_offset": 1}, 50),
    "plms_velocity": (
        "PNDMScheduler",
        {"skip_prk_steps": True, "prediction_type": "v_prediction"},
        50,
    ),
    "plms_to_image": (
        "PNDMScheduler",
        {**COSINE, "skip_prk_steps": True, "set_alpha_to_one": True},
        7,
    ),
    "euler": ("EulerDiscreteScheduler", {**STABLE, "steps_offset": 1}, 50),
    "euler_leading": ("EulerDiscreteScheduler", {**STABLE, "timestep_spacing": "leading", "steps_offset": 1}, 50),
    "euler_karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, 50),
    "euler_velocity": (
        "EulerDiscreteScheduler",
        {**STABLE, "prediction_type": "v_prediction", "final_sigmas_type": "sigma_min"},
        50,
    ),
    "euler_zero": ("EulerDiscreteScheduler", {**STABLE, **ZERO}, 50),
    "euler_image": ("EulerDiscreteScheduler", {"prediction_type": "sample", "timestep_spacing": "trailing"}, 7),
    "dpm_1": ("DPMSolverMultistepScheduler", {"solver_order": 1}, 50),
    "dpm_2": ("DPMSolverMultistepScheduler", STABLE, 50),
    "dpm_2_few": ("DPMSolverMultistepScheduler", {**STABLE, "timestep_spacing": "leading", "steps_offset": 1}, 9),
    "dpm_2_karras": ("DPMSolverMultistepScheduler", {**STABLE, "use_karras_sigmas": True}, 50),
    "dpm_2_heun": ("DPMSolverMultistepScheduler", {"solver_type": "heun", "timestep_spacing": "trailing"}, 50),
    "dpm_2_zero": ("DPMSolverMultistepScheduler", {**STABLE, **ZERO}, 50),
    "dpm_2_open": (
        "DPMSolverMultistepScheduler",
        {"lower_order_final": False, "final_sigmas_type": "sigma_min", "prediction_type": "sample"},
        11,
    ),
    "dpm_2_karras_open": (
        "DPMSolverMultistepScheduler",
        {**STABLE, "use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "lower_order_final": False},
        20,
    ),
    "dpm_3": ("DPMSolverMultistepScheduler", {"solver_order": 3, "prediction_type": "v_prediction"}, 50),
    "dpm_3_few": ("DPMSolverMultistepScheduler", {"solver_order": 3, "final_sigmas_type": "sigma_min"}, 12),
    "flow": ("FlowMatchEulerDiscreteScheduler", {}, 50),
    "flow_shift": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 50),
}


SAID = (-1.3, -1.0, 0.0, 0.4, 1.0)


def network(x: torch.Tensor, time: torch.Tensor, learned: bool = False) -> torch.Tensor:
    predicted = 0.7 * torch.sin(x) + 0.2 * torch.cos(time / 150)
    return torch.cat([predicted, torch.sin(3 * x)], 1) if learned else predicted


def run(name: str, fields: dict[str, Any], steps: int, x: torch.Tensor, fresh: torch.Tensor) -> tuple[Any, ...]:
    """The scheduler's config, its times, and x after each step."""
    options = {"eta": fields["eta"]} if "eta" in fields else {}
    scheduler = getattr(diffusers, name)(**{field: value for field, value in fields.items() if field != "eta"})
    scheduler.set_timesteps(steps)
    x, passed = x * getattr(scheduler, "init_noise_sigma", 1.0), []
    for step, time in enumerate(scheduler.timesteps):
        # What the scheduler would draw.
        diffusers.schedulers.scheduling_ddpm.randn_tensor = lambda *_, step=step, **__: fresh[step]
        if "eta" in fields:
            options["variance_noise"] = fresh[step]
        seen = scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
        learned = fields.get("variance_type") == "learned_range"
        x = scheduler.step(network(seen, time, learned), time, x, **options).prev_sample
        passed.append(x.numpy())
    return dict(scheduler.config), scheduler.timesteps.numpy(), np.stack(passed)


def log_variances(name: str, fields: dict[str, Any], steps: int) -> np.ndarray:
    scheduler = getattr(diffusers, name)(**fields)
    scheduler.set_timesteps(steps)
    said = torch.tensor(SAID, dtype=torch.float64)
    return np.stack([scheduler._get_variance(time, said).numpy() for time in scheduler.timesteps[:-1]])


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    x, fresh = torch.randn(SHAPE, generator=generator), torch.randn(50, *SHAPE, generator=generator)
    arrays, cases = {"noise": x.numpy(), "fresh": fresh.numpy()}, {}
    for case, (name, fields, steps) in CASES.items():
        config, arrays[f"{case}_times"], arrays[f"{case}_x"] = run(name, fields, steps, x, fresh)
        config = {key: value for key, value in config.items() if not key.startswith("_")}
        cases[case] = {"config": {"_class_name": name, **config}, "steps": steps, "eta": fields.get("eta", 0.0)}
    arrays["said"], arrays["log_variances"] = np.array(SAID), log_variances(*CASES["ddpm_learned"])
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "cases.json").write_text(json.dumps(cases, indent=1, sort_keys=True) + "\n")
    np.savez_compressed(FOLDER / "golden.npz", **arrays)


if __name__ == "__main__":
    main()
