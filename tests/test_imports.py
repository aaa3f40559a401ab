"""Imports point one way, nobody imports a bare `kernels` or `train`, and light things stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each imports only from its own row and those above.
ORDER = (
    {"zoo.sharding"},
    {"zoo.kernels"},
    {"zoo.layers"},
    {"zoo.models"},
    {
        "zoo.generation",
        "zoo.image_generation",
        "zoo.beam_search",
        "zoo.diffusion",
        "zoo.pipelines",
        "zoo.pretrained",
        "zoo.published_folder",
        "zoo.flax_checkpoints",
        "zoo.chat_template",
        "zoo.tokenizer_settings",
        "zoo.tokenizers",
        "zoo.sentencepieces",
    },
    {"zoo.train"},
    {"zoo.cli", "zoo.commands", "zoo.__main__"},
    {"benchmarks", "tests"},
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def sources() -> Iterator[tuple[str, Path]]:
    """Dotted module name and file of everything that is ours."""
    folders = {"zoo": ROOT / "zoo", "zoo.kernels": ROOT / "kernels", "zoo.train": ROOT / "train"}
    folders |= {"benchmarks": ROOT / "benchmarks", "tests": ROOT / "tests"}
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder)
            if package == "zoo" and inside.parts[0] in ("kernels", "train"):
                continue
            yield ".".join([package, *inside.with_suffix("").parts]).removesuffix(".__init__"), path


def imported(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that an import statement anywhere in a module may load; "." before a relative one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def part(module: str) -> str:
    """The row entry a module belongs to: the first two names of zoo.x, the first of others."""
    names = module.split(".")
    return ".".join(names[:2]) if names[0] == "zoo" else names[0]


def wrong_imports(module: str, source: str) -> list[str]:
    """What `source`, as the code of `module`, imports against the rules."""
    found = []
    for name in imported(ast.parse(source)):
        upward = part(name) in RANK and part(module) in RANK and RANK[part(name)] > RANK[part(module)]
        if upward or name.split(".")[0] in ("kernels", "train") or name.startswith("."):
            found.append(name)
    return found


def test_imports_point_one_way() -> None:
    modules = dict(sources())
    assert {"zoo.sharding", "zoo.kernels", "zoo.train.experiment", "zoo.models.gpt"} <= set(modules)
    wrong = {name: wrong_imports(name, path.read_text()) for name, path in modules.items()}
    assert {name: imports for name, imports in wrong.items() if imports} == {}


def test_every_part_has_its_place() -> None:
    assert {part(name) for name, _ in sources()} - {"zoo"} <= set(RANK)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("zoo.layers.norms", "from zoo.models import gpt"),
        ("zoo.layers.norms", "from zoo import models"),
        ("zoo.kernels.chunked", "def f():\n    import zoo.train.step"),
        ("zoo.models.gpt", "from ..layers import norms"),
        ("zoo.train.loop", "import train.step"),
        ("tests.test_x", "from kernels import attention"),
    ],
)
def test_the_rules_catch(module: str, source: str) -> None:
    assert wrong_imports(module, source)


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import zoo", ("jax", "flax", "numpy")),
        ("import zoo.cli; zoo.cli.main(['--help'])", ("jax", "flax", "numpy", "tyro", "rich")),
        ("import zoo.train.experiment", ("orbax", "grain", "tensorflow_datasets", "tyro", "matplotlib")),
        ("import zoo.models.gpt", ("zoo.train", "grain", "tyro", "matplotlib", "tensorflow_datasets")),
    ],
)
def test_light_things_stay_light(statement: str, absent: tuple[str, ...]) -> None:
    check = f"{statement}\nimport sys\nsys.exit(', '.join(m for m in {absent} if m in sys.modules) or None)"
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", ["kernels", "train"])
def test_a_bare_name_says_what_to_write(name: str) -> None:
    run = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 1
    assert f"from zoo.{name} import" in run.stderr.strip().splitlines()[-1]
