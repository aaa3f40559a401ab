"""The wheel, and an editable install, hold the whole package and nothing else, with the links or without."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Where the folders of the clone go in the package.
PLACES = {"zoo": "zoo", "kernels": "zoo/kernels", "train": "zoo/train"}

# In a foreign folder that has kernels/ and train/ of its own: the package comes from the environment, and a GPT runs.
FOREIGN = """
import sys
from pathlib import Path
import zoo
assert Path(zoo.__file__).is_relative_to(sys.argv[1]), zoo.__file__
import jax
from flax import nnx
from zoo import kernels, train
from zoo.models.gpt import GPT, GPTConfig
model = GPT(GPTConfig(vocab_size=50, max_length=8, num_layers=2, width=16, num_heads=2), rngs=nnx.Rngs(0))
logits = jax.jit(lambda m, x: m(x).logits)(model, jax.numpy.ones((2, 8), int))
assert logits.shape == (2, 8, 50) and bool(jax.numpy.isfinite(logits).all())
assert "kernels" not in sys.modules and "train" not in sys.modules
print(kernels.__file__, train.__file__)
"""


def files_of_the_clone() -> set[str]:
    """The package's Python files, by their place in it."""
    return {
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, place in PLACES.items()
        for path in (ROOT / folder).rglob("*.py")
        if not (folder == "zoo" and path.relative_to(ROOT / folder).parts[0] in ("kernels", "train"))
    }


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, without the links, as a system that has none checks it out."""
    folder = tmp_path_factory.mktemp("clone")
    for name in PLACES:
        no_links = shutil.ignore_patterns("__pycache__", *(("kernels", "train") if name == "zoo" else ()))
        shutil.copytree(ROOT / name, folder / name, ignore=no_links)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    assert not (folder / "zoo" / "kernels").exists()
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    for name in ("kernels", "train"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise SystemExit('the wrong folder was imported')")
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment with our dependencies and without us; returns its interpreter."""
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # A folder named in a .pth file does not have its own .pth files read: an editable install there stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


def pip(python: Path, *arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", f"--python={python}", "install", "-q", "--no-deps", "--no-build-isolation"]
    run(*command, *arguments, cwd=python.parent)


def test_every_package_folder_is_declared() -> None:
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {str(Path(name).parent).replace("/", ".") for name in files_of_the_clone()}
    assert declared == found


@pytest.mark.parametrize("links", [True, False])
def test_the_wheel_is_complete(links: bool, clone: Path, foreign: Path, environment: Path, tmp_path: Path) -> None:
    source = clone
    if links:
        source = tmp_path / "linked"
        shutil.copytree(clone, source)
        for name in ("kernels", "train"):
            (source / "zoo" / name).symlink_to(f"../{name}", target_is_directory=True)
    wheels = tmp_path / "wheels"
    build = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, source]
    run(sys.executable, *build, cwd=tmp_path)
    [wheel] = wheels.iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if name.endswith(".py")} == files_of_the_clone()
    assert "zoo/py.typed" in names and any(name.endswith("LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"zoo", "flaxzoo"}
    pip(environment, wheel)
    run(environment, "-c", FOREIGN, environment.parents[1], cwd=foreign)
    assert "zoo train gpt-nano" in run(environment.parent / "zoo", "--help", cwd=foreign)


def test_an_editable_install_needs_no_links(clone: Path, foreign: Path, environment: Path) -> None:
    pip(environment, "-e", clone)
    kernels, train = run(environment, "-c", FOREIGN, clone, cwd=foreign).split()
    assert Path(kernels).parent == clone / "kernels" and Path(train).parent == clone / "train"
