"""`zoo sample` of published pipelines: the tiny ones of tests/parity."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zoo import cli
from zoo.train import pictures

FOLDER = Path(__file__).parent / "parity" / "pipelines"
QUICK = ("--no-compile-cache", "--mesh", "data=8", "--count", "8", "--steps", "2")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with pipelines and images in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("text", "classes", "unconditional"):
        (tmp_path / name).symlink_to(FOLDER / name)
    shutil.copytree(FOLDER / "text" / "unet", tmp_path / "bare")
    pictures.write_png(np.full((8, 12, 3), 200, np.uint8), tmp_path / "white.png")
    half = np.zeros((8, 12, 1), np.uint8)
    half[:, 6:] = 255
    pictures.write_png(half, tmp_path / "half.png")
    pictures.write_png(np.full((9, 12, 3), 200, np.uint8), tmp_path / "odd.png")
    pictures.write_png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), tmp_path / "noise.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "noise.png").read_bytes()[:4000])
    (tmp_path / "text.png").write_text("no image")
    shutil.copytree(FOLDER / "unconditional", tmp_path / "flux")
    index = tmp_path / "flux" / "model_index.json"
    index.write_text(index.read_text().replace("DDIMPipeline", "FluxPipeline"))
    shutil.copytree(FOLDER / "classes", tmp_path / "unipc")
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        path = tmp_path / "unipc" / name
        path.write_text(path.read_text().replace("DDIMScheduler", "UniPCMultistepScheduler"))
    return tmp_path


def read(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    with Image.open(path) as image:
        return np.asarray(image), dict(getattr(image, "text", {}))


def test_images_come_as_a_new_file_that_says_how_they_were_made(here, capsys, shown) -> None:
    for seed in ("3", "4"):
        assert cli.main(["sample", "unconditional", *QUICK, "--sampler", "dpmpp_2m", "--seed", seed]) == 0
    assert shown == [2, 2, "closed"] * 2
    names = ("samples.png", "samples-2.png")
    out, err = capsys.readouterr()
    assert out.split() == [str(here / name) for name in names] and not err
    (first, told), (other, _) = (read(here / name) for name in names)
    assert first.shape == (3 * 10 + 2, 3 * 14 + 2)
    assert (first != other).any()
    wanted = {"model": "unconditional", "seed": "3", "steps": "2", "sampler": "dpmpp_2m", "guidance": "1.0"}
    assert told.items() >= wanted.items() and told["size"] == "8x12" and "prompt" not in told


def test_an_image_is_painted_anew_where_the_mask_says(here, capsys) -> None:
    flags = ("--image", "odd.png", "--mask", "half.png", "--size", "8x12", "--strength", "0.5", "--columns", "8")
    said = ("--prompt", "ein roter Kater, ärgerlich 猫", "dogs", "--out", "new/cat.png")
    assert cli.main(["sample", "text", *QUICK, *said, *flags]) == 0
    out, err = capsys.readouterr()
    assert out == f"{here / 'new' / 'cat.png'}\n"
    assert "odd.png is 9x12: resized to 8x12" in err and "warning: the text encoder reads 9 tokens" in err
    pixels, told = read(here / "new" / "cat.png")
    assert pixels.shape == (8 + 4, 8 * 14 + 2, 3)
    cats, dogs = pixels[2:10, 2:14], pixels[2:10, 16:28]
    assert (cats[:, :6] == 200).all() and (cats[:, 6:] != 200).any() and (cats != dogs).any()
    assert told["prompt"] == "\n".join(said[1:3]) and told["strength"] == "0.5" and told["image"] == "odd.png"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("unconditional --prompt cat", "a prompt cannot be told to a DDIMPipeline, which is told nothing"),
        ("text --prompt cat --classes 3", "classes cannot be told to a StableDiffusionPipeline"),
        ("text", "a StableDiffusionPipeline is told a text: give a prompt"),
        ("classes --classes 1000", "class 1000 of 1000: choose from 0 to 999"),
        ("classes --classes 3;4", "classes '3;4' are no numbers and rising ranges"),
        ("text --prompt cat --size 10x12", "images of 10 x 12 do not fit this StableDiffusionPipeline"),
        ("text --prompt cat --size 10", "--size 10 is none: give height x width in pixels, such as 512x768"),
        ("unconditional --steps 301", "sampling in 301 steps is not possible with 300"),
        ("unconditional --steps 0", "sampling in 0 steps is not possible"),
        ("unconditional --image white.png --strength 1.5", "strength 1.5 is no share of the steps"),
        ("unconditional --strength 0.5", "strength 0.5 is of changes to an image, and none is given"),
        ("text --prompt cat --image cut.png", "cut.png is no whole image ("),
        ("text --prompt cat --image text.png", "text.png is no whole image ("),
        ("text --prompt cat --image none.png", "none.png is not there: name an image"),
        ("text --prompt cat --image odd.png", "images of 9 x 12 do not fit"),
        ("text --prompt cat --image white.png --mask odd.png", "--mask is 9x12 and --image 8x12: give --size 8x12"),
        ("text --prompt cat --mask white.png", "a mask says which parts of an image stay, and no image is given"),
        ("unconditional --sampler eular", "unknown sampler 'eular': did you mean euler?"),
        ("text --prompt cat --guidance=-1", "guidance -1.0 does not lead to what is asked for"),
        ("unconditional --out white.png", "--out white.png is there already: name another file"),
        ("unconditional --out white.png/a.png", "--out white.png/a.png is below white.png, which is a file"),
        ("unconditional --image white.png --size 9x12", "images of 9 x 12 do not fit this DDIMPipeline"),
        ("unconditional --out white.jpg", "--out white.jpg is no PNG file"),
        ("unconditional --columns 0", "--columns 0 make no grid"),
        ("unconditional --seed=-1", "--seed -1 is not a seed: choose a whole number from 0"),
        ("unconditional --count 0", "0 images are none"),
        ("unconditional --promt cat", "unknown flag --promt: did you mean --prompt?"),
        ("unconditional --dtype bfloat", "dtype 'bfloat' is unknown"),
        ("bare", "bare is a bare UNet2DConditionModel, without the scheduler that says how to sample from it"),
        ("flux", "_class_name 'FluxPipeline', and pipelines here are"),
        ("unipc", "_class_name 'UniPCMultistepScheduler', which is none of"),
        ("text/none", "text/none is not a run"),
    ],
)
def test_a_mistake_is_one_line_and_no_file(here, capsys, arguments, words) -> None:
    before = set(here.iterdir())
    assert cli.main(["sample", *arguments.split(), "--no-compile-cache"]) == 2
    out, err = capsys.readouterr()
    assert words in err and err.startswith("zoo: ") and err.count("\n") == 1 and not out
    assert set(here.iterdir()) == before


def test_help_shows_the_flags(here, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", "text", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("--negative-prompt", "--guidance", "--strength", "--mesh", "--out"))
