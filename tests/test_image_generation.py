"""Drawing from published pipelines, the tiny ones of tests/parity."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import zoo
from zoo import image_generation, sharding
from zoo.diffusion.samplers import DDIM, DPMSolver, Euler
from zoo.diffusion.schedules import ScheduleError
from zoo.image_generation import DrawingError, draw, table_of, text_tokens
from zoo.models.noising import Noising
from zoo.pipelines import Pipeline
from zoo.published_folder import PretrainedError

FOLDER = Path(__file__).parent / "parity" / "pipelines"
KINDS = ("text", "classes", "unconditional")
KEY = jax.random.key(0)
# Of a repeated request nothing is compiled again.
SHORT: dict[str, Any] = {"prompts": ["a cat", "dogs"], "count": 8, "steps": 2, "size": (8, 12), "guidance": 3.0}


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Pipeline]:
    return {name: zoo.from_pretrained(FOLDER / name) for name in KINDS}


def test_eight_devices_draw_what_one_draws(pipelines) -> None:
    expected = np.asarray(draw(pipelines["text"], KEY, **SHORT))
    assert len({image.tobytes() for image in expected}) == 8 and np.abs(expected).max() <= 1
    with sharding.use(sharding.make_mesh("data=2,fsdp=2,tensor=2")) as mesh:
        found = np.asarray(draw(zoo.from_pretrained(FOLDER / "text", mesh=mesh), KEY, **SHORT))
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_seed_is_other_images_and_another_prompt_too(pipelines) -> None:
    images = [
        np.asarray(draw(pipelines["text"], jax.random.key(seed), **(SHORT | told)))
        for seed, told in ((0, {}), (0, {}), (1, {}), (0, {"prompts": "dogs"}), (0, {"negative_prompt": "cat"}))
    ]
    np.testing.assert_array_equal(images[0], images[1])
    for other in images[2:]:
        assert np.abs(other - images[0]).max() > 0.01
    # Prompts are taken in turn.
    np.testing.assert_array_equal(images[3][1::2], images[0][1::2])


def test_an_image_is_changed_by_its_strength_and_kept_where_the_mask_says(pipelines) -> None:
    image = np.linspace(-1, 1, 8 * 12, dtype=np.float32).reshape(8, 12, 1)
    mask = np.zeros((8, 12, 1), np.float32)
    mask[2:5, 3:8] = 1

    def change(**told: Any) -> np.ndarray:
        return np.abs(np.asarray(draw(pipelines["unconditional"], KEY, steps=10, image=image, **told))[0] - image)

    slight, painted = change(strength=0.1), change(mask=mask)
    assert 0 < slight.mean() < 0.1 and painted[mask > 0].mean() > 0.2
    assert (painted[mask == 0] == 0).all()


def test_every_step_is_told(pipelines) -> None:
    seen: list[int] = []
    with sharding.use(sharding.make_mesh("data=8")) as mesh:
        pipeline = zoo.from_pretrained(FOLDER / "unconditional", mesh=mesh)
        draw(pipeline, KEY, count=8, steps=3, callback=lambda step, _: seen.append(int(step)))
        jax.effects_barrier()
    assert sorted(seen) == [0, 1, 2]


def test_prompts_that_are_too_long_are_cut_and_said_to_be(pipelines) -> None:
    with pytest.warns(UserWarning, match="reads 9 tokens and a prompt has 11: it is cut before 'g !'"):
        long, short = text_tokens(pipelines["text"], ["a red cat do dog!", "cat"])
    end = pipelines["text"].tokenizer.special_ids["eos_token"]
    assert long[-1] == end and (long[:-1] != end).all() and (short[2:] == end).all()


def test_the_scheduler_says_what_noise_it_is_and_how_to_sample(pipelines, tmp_path) -> None:
    assert pipelines["text"].unet.config.noising == Noising("scaled_linear", 300, "velocity", 0.001, 0.015)
    assert table_of(pipelines["text"]).path.steps == 51  # PLMS goes its first step twice.
    assert table_of(pipelines["unconditional"]).clip == 1.5
    assert table_of(pipelines["unconditional"], sampler="ddpm", steps=4).clip == 1.0
    # Latents have no bounds, unless the pipeline says so itself.
    assert table_of(pipelines["text"], sampler="ddim", steps=4).clip is None
    own = table_of(pipelines["classes"], sampler="ddim", steps=4)
    assert own is table_of(pipelines["classes"], steps=4) and own.clip is None
    assert own is not table_of(pipelines["classes"], sampler=Euler(), steps=4)
    # A DiT says how much noise ancestral sampling adds.
    ancestral = table_of(pipelines["classes"], sampler="ddpm", steps=4)
    assert ancestral.learned is not None and ancestral.clip is None
    assert table_of(pipelines["unconditional"], sampler="ddpm", steps=4).learned is None
    assert np.isfinite(draw(pipelines["classes"], KEY, classes=[1], sampler="ddpm", steps=2)).all()
    strange = replace(pipelines["classes"], scheduler=dict(pipelines["classes"].scheduler) | {"beta_end": 0.02})
    with pytest.raises(PretrainedError, match=r"transformer was trained under .*0\.015.* scheduler has .*0\.02"):
        table_of(strange)
    with pytest.raises(PretrainedError, match="transformer was trained under"):
        zoo.save_pretrained(strange, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "request_", "message"),
    [
        ("unconditional", {"prompts": "a cat"}, "a prompt cannot be told to a DDIMPipeline, which is told nothing"),
        (
            "classes",
            {"prompts": "a cat", "classes": [1]},
            "a prompt cannot be told to a DiTPipeline, which is told clas",
        ),
        ("classes", {"negative_prompt": "x", "classes": [1]}, "a negative prompt cannot be told to a DiTPipeline"),
        ("text", {"prompts": "a cat", "classes": [1]}, "classes cannot be told to a StableDiffusionPipeline, which is"),
        ("text", {}, "a StableDiffusionPipeline is told a text: give a prompt"),
        ("text", {"prompts": []}, "a StableDiffusionPipeline is told a text: give a prompt"),
        ("classes", {}, "a DiTPipeline is told classes: give them, each 0 to 999"),
        ("classes", {"classes": [1000, 1001]}, "class 1001 is none of this DiTPipeline's: choose from 0 to 999"),
        ("classes", {"classes": [3], "size": (10, 8)}, r"images of 10 x 8 .* multiples of 4, such as 8 x 8"),
        ("text", {"prompts": "a", "size": (512, 510)}, r"images of 512 x 510 .* multiples of 4, such as 512 x 512"),
        ("text", {"prompts": "a", "guidance": -1}, "guidance -1 does not lead to what is asked for"),
        ("text", {"prompts": "a", "guidance": float("nan")}, "guidance nan does not lead"),
        ("unconditional", {"guidance": 2}, "guidance 2 leads a DDIMPipeline nowhere"),
        ("unconditional", {"count": 0}, "0 images are none"),
        ("unconditional", {"steps": 301}, "sampling in 301 steps is not possible with 300: choose 1 to 300"),
        ("unconditional", {"sampler": "dpmp_2m"}, "unknown sampler 'dpmp_2m': did you mean dpmpp_2m?"),
        ("unconditional", {"strength": 0.5}, "strength 0.5 is of changes to an image, and none is given"),
        ("unconditional", {"mask": np.ones((8, 12, 1))}, "a mask says which parts of an image stay, and no image"),
        ("unconditional", {"image": np.ones((8, 12, 1)), "strength": 1.5}, "strength 1.5 is no share of the steps"),
        ("unconditional", {"image": np.ones((8, 12, 3))}, r"the image has shape \(8, 12, 3\), .* give \(8, 12, 1\)"),
        (
            "unconditional",
            {"noise": np.ones((1, 8, 8, 1))},
            r"the noise has shape \(1, 8, 8, 1\), .* give \(8, 12, 1\)",
        ),
        ("text", {"prompts": "a", "negative_prompt": "b", "guidance": 1}, "guidance 1 leads away from nothing"),
        ("unconditional", {"rescale": 2.0}, "guidance rescale 2.0 is not a share"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(pipelines, kind, request_, message) -> None:
    with pytest.raises((DrawingError, ScheduleError), match=message) as caught:
        draw(pipelines[kind], KEY, **request_)
    assert "\n" not in str(caught.value)


def test_parts_that_do_not_fit_are_refused(pipelines) -> None:
    for kind, parts, message in (
        ("text", {"kind": "FluxPipeline"}, "a FluxPipeline is not known: pipelines here are DDIM"),
        ("text", {"tokenizer": None}, "has a tokenizer, and this one has None"),
        ("text", {"unet": pipelines["unconditional"].unet}, "reads 1 channels and predicts 1, and there are 3"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(replace(pipelines[kind], **parts), KEY, prompts="a" if kind == "text" else None, steps=1)


def test_one_compilation_serves_every_seed_and_prompt(pipelines) -> None:
    before = image_generation._generate._cache_size()  # pyright: ignore[reportFunctionMemberAccess]
    for seed, prompt in enumerate(("a", "b", "c")):
        draw(pipelines["text"], jax.random.key(seed), **(SHORT | {"prompts": prompt, "sampler": DPMSolver()}))
    assert image_generation._generate._cache_size() == before + 1  # pyright: ignore[reportFunctionMemberAccess]
    assert table_of(pipelines["text"], sampler=DDIM(), steps=2) is table_of(pipelines["text"], sampler=DDIM(), steps=2)
