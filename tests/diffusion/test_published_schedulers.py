import json
import math

import pytest

from zoo.diffusion.published_schedulers import from_published, to_published
from zoo.diffusion.samplers import DDIM, DDPM, PLMS, DPMSolver, Euler
from zoo.models.noising import Noising
from zoo.models.published import PublishedError

# As the pipeline of Stable Diffusion 1.5 has it, with fields of other classes that PNDM does not read.
STABLE_DIFFUSION = """{
  "_class_name": "PNDMScheduler",
  "_diffusers_version": "0.6.0",
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "beta_start": 0.00085,
  "num_train_timesteps": 1000,
  "set_alpha_to_one": false,
  "skip_prk_steps": true,
  "steps_offset": 1,
  "trained_betas": null,
  "clip_sample": false
}"""


def test_stable_diffusion_s_own_file() -> None:
    noising, sampler = from_published(json.loads(STABLE_DIFFUSION))
    assert noising == Noising("scaled_linear", 1000, "noise", 0.00085, 0.012)
    assert sampler == PLMS(spacing="leading", offset=1, to_image=False)


def test_fields_left_out_have_the_class_s_defaults() -> None:
    assert from_published({"_class_name": "DDPMScheduler"}) == (Noising(), DDPM(spacing="leading"))
    assert from_published({"_class_name": "DDIMScheduler"}).sampler == DDIM(
        spacing="leading", fixed_stride=True, clipped_noise=False
    )
    assert from_published({"_class_name": "EulerDiscreteScheduler"}).sampler == Euler()
    assert from_published({"_class_name": "DPMSolverMultistepScheduler"}).sampler == DPMSolver()
    flow = from_published({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    assert flow == (Noising("flow", 1000, "velocity"), Euler(shift=3.0))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("DDPM", {"thresholding": True}),
        ("DDPM", {"variance_type": "learned"}),
        ("DDPM", {"variance_type": "learned_range", "timestep_spacing": "trailing"}),
        ("DDPM", {"variance_type": "fixed_large", "steps_offset": 1}),
        ("DDPM", {"trained_betas": [0.1, 0.2]}),
        ("DDPM", {"beta_schedule": "laplace"}),
        ("DDIM", {"beta_schedule": "sigmoid"}),
        ("DDIM", {"prediction_type": "flow_prediction"}),
        ("DDIM", {"num_train_timesteps": 10.5}),
        ("DDIM", {"clip_sample": 1}),
        ("DDIM", {"timestep_spacing": "log"}),
        ("DDIM", {"stride_of_tomorrow": 3}),
        ("PNDM", {}),
        ("PNDM", {"skip_prk_steps": True, "prediction_type": "sample"}),
        ("PNDM", {"skip_prk_steps": True, "timestep_spacing": "trailing"}),
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverMultistep", {"euler_at_final": True}),
        ("DPMSolverMultistep", {"use_lu_lambdas": True}),
        ("DPMSolverMultistep", {"use_flow_sigmas": True}),
        ("DPMSolverMultistep", {"lambda_min_clipped": -5.1}),
        ("DPMSolverMultistep", {"variance_type": "learned"}),
        ("DPMSolverMultistep", {"solver_order": 4}),
        ("DPMSolverMultistep", {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"}),
        ("EulerDiscrete", {"use_beta_sigmas": True}),
        ("EulerDiscrete", {"interpolation_type": "log_linear"}),
        ("EulerDiscrete", {"timestep_type": "continuous"}),
        ("EulerDiscrete", {"sigma_max": 10.0}),
        ("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True}),
        ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}),
    ],
)
def test_what_cannot_be_is_refused_by_name(name, fields) -> None:
    culprit = next((field for field in fields if field != "skip_prk_steps"), "skip_prk_steps")
    with pytest.raises(PublishedError, match=f"has {culprit} ") as caught:
        from_published({"_class_name": f"{name}Scheduler", **fields})
    assert "\n" not in str(caught.value)


def test_a_class_that_is_not_here_is_named() -> None:
    with pytest.raises(PublishedError, match="has _class_name 'HeunDiscreteScheduler', which is none of DDPMScheduler"):
        from_published({"_class_name": "HeunDiscreteScheduler"})


@pytest.mark.parametrize(
    ("noising", "sampler", "words"),
    [
        (Noising(), DDIM(), "diffusers' DDIM has fixed_stride=True and clipped_noise=False"),
        (Noising(), DDPM(to_image=False), "no published form"),
        (Noising("sigmoid"), Euler(), "beta_schedule 'sigmoid'"),
        (Noising("flow", target="velocity"), DPMSolver(), "on the schedule 'flow' has no published form"),
        (Noising("flow", target="noise"), Euler(), "no published form"),
        (Noising(zero_terminal_snr=True), PLMS(spacing="leading"), "no published form"),
    ],
)
def test_what_has_no_published_form_is_refused(noising, sampler, words) -> None:
    with pytest.raises(PublishedError, match=words):
        to_published(noising, sampler)


def test_eta_is_in_no_file_and_infinity_is_written_as_json_has_it() -> None:
    published = to_published(Noising(), DDIM(eta=0.3, fixed_stride=True, clipped_noise=False))
    assert from_published(published).sampler == DDIM(fixed_stride=True, clipped_noise=False)
    solver = json.loads(json.dumps(to_published(Noising("cosine"), DPMSolver(order=3))))
    assert solver["lambda_min_clipped"] == -math.inf and from_published(solver).sampler == DPMSolver(order=3)
