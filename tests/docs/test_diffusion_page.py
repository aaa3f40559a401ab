"""docs/diffusion.md runs as it stands, but for its sizes: tiny pipelines stand for those of the hub."""

import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from zoo import cli, sharding
from zoo.image_generation import USUAL
from zoo.train import pictures

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "diffusion.md").read_text()
TINY = {
    "google/ddpm-cifar10-32": str(ROOT / "tests/parity/pipelines/unconditional"),
    "facebook/DiT-XL-2-256": str(ROOT / "tests/parity/pipelines/classes"),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": str(ROOT / "tests/parity/pipelines/text"),
    "512x768": "16x24",
    "zoo train ddpm-digits": "zoo train ddpm-digits --model.channels 4 8 --model.groups 2 --batch-size 8 --steps 1 "
    "--sampler.rows 1 --sampler.columns 8 --sampler.steps 2",
    "zoo train vit-digits": "zoo train vit-digits --model.num-layers 1 --model.width 16 --model.mlp-width 16 "
    "--model.num-heads 2 --batch-size 8 --steps 1 --sampler.rows 1",
    "--samples 1000 --bits-per-dimension": "--samples 100",
}
WITHOUT_CACHE = ("train", "sample", "eval")


def blocks(language: str) -> list[str]:
    page = PAGE
    for published, tiny in TINY.items():
        page = page.replace(published, tiny)
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("fox.png", "hat.png"):
        pictures.write_png(np.full((16, 24, 3), 255, np.uint8), tmp_path / name)
    commands = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) == 11
    for zoo, verb, *rest in commands:
        assert zoo == "zoo" and cli.main([verb, *rest, *["--no-compile-cache"] * (verb in WITHOUT_CACHE)]) == 0
    drawn = {path.name for path in tmp_path.glob("*.png")} - {"fox.png", "hat.png"}
    assert drawn == {"samples.png", "samples-2.png", "samples-3.png", "samples-4.png", "samples-5.png", "hat-1.png"}


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = sharding.make_mesh("data=2", jax.devices()[:2])
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes: two)
    drawing, own = blocks("python")
    exec(compile(drawing, "diffusion.md", "exec"), found := {})
    assert found["images"].shape == (2, 16, 24, 3)
    exec(compile(own, "diffusion.md", "exec"), found := {})
    np.testing.assert_allclose(found["images"].mean((1, 2, 3)), [0.75, -0.75], atol=1e-3)


def test_the_table_is_what_is_usual() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \| ([\d.]+) \|$", PAGE, flags=re.MULTILINE)
    assert {kind: (int(steps), float(scale)) for kind, steps, scale in rows} == dict(USUAL)
