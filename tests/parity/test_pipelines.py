"""Images of tiny pipelines, as diffusers draws them (see make_pipelines.py)."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import zoo
from zoo.image_generation import draw

FOLDER = Path(__file__).parent / "pipelines"
CASES = ("text", "classes", "unconditional")


@pytest.mark.parametrize("case", CASES)
def test_images_are_those_of_diffusers(case) -> None:
    golden = np.load(FOLDER / case / "golden.npz")
    asked = json.loads((FOLDER / case / "asked.json").read_text())
    images = draw(zoo.from_pretrained(FOLDER / case), jax.random.key(0), noise=golden["noise"], **asked)
    assert np.std(golden["images"]) > 0.1
    np.testing.assert_allclose((np.asarray(images) + 1) / 2, golden["images"], rtol=0, atol=2e-5)


def test_scheduler_and_settings_are_written_as_they_were(tmp_path) -> None:
    pipeline = zoo.from_pretrained(FOLDER / "classes")
    zoo.save_pretrained(pipeline, tmp_path / "out")
    again = zoo.from_pretrained(tmp_path / "out")
    assert again.scheduler == pipeline.scheduler
    assert again.transformer.config == pipeline.transformer.config
    assert (
        pipeline.transformer.config.noising.target == "image" and pipeline.transformer.config.noising.timesteps == 300
    )
