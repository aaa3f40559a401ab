"""The benchmark suite of attention: its cases and their float64 answers, its rows, and what it calls a regression."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention_compiled
from benchmarks import attention_history as history
from benchmarks.attention import BUILD, DEFAULT, Refused, chosen_cases, compiled, implementation, run_case
from benchmarks.attention_cases import Case, cases, draw, error
from zoo.kernels import attention
from zoo.kernels.mask import allowed, resolve

SMALL = [
    Case("encoder", 2, 16, 16, 4, 4, 8),
    Case("decoder", 1, 40, 40, 4, 2, 8, causal=True),
    Case("packed", 2, 32, 32, 2, 2, 8, causal=True, document=8),
    Case("window", 1, 48, 48, 2, 2, 8, causal=True, window=5),
    Case("decode", 3, 1, 24, 4, 2, 8, causal=True),
    Case("cross", 1, 8, 24, 2, 2, 8),
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.family)
def test_work_is_that_of_the_mask(case: Case) -> None:
    mask = resolve(case.mask(), case.batch, case.queries, case.keys)
    table = np.broadcast_to(allowed(mask, mask.query, mask.key), (case.batch, 1, case.queries, case.keys))
    assert case.pairs() == table[0].sum()
    assert case.flops("both") == 12 * case.batch * case.heads * case.head_dim * case.pairs()


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.family)
def test_rows_are_complete_and_right(case: Case) -> None:
    names = DEFAULT["cpu"]
    rows = run_case(case, {name: BUILD[name] for name in names}, mode="both", dtype="float32", repeats=1, peak=1e12)
    assert [row["implementation"] for row in rows] == list(names)
    for row in rows:
        assert row["error"] < 1e-5 and row["wall"] > 0 and row["temporaries"] >= 0
        assert row["of_peak"] == pytest.approx(row["flops_per_second"] / 1e12)


@pytest.mark.parametrize("mode", ["forward", "residuals", "backward", "both"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.family)
def test_torch(case: Case, mode: str) -> None:
    pytest.importorskip("torch")
    (row,) = run_case(case, {"torch": BUILD["torch"]}, mode=mode, dtype="float32", repeats=1)
    assert row["wall"] > 0 and (mode != "both" or row["error"] < 1e-5)


def test_which_masks_flags_cannot_say() -> None:
    causal, from_the_end = Case("long", 1, 8, 8, 1, 1, 8, causal=True), Case("decode", 1, 1, 8, 1, 1, 8, causal=True)
    window, to_both_sides = replace(causal, window=3), replace(causal, causal=False, window=3)
    arrays = [from_the_end, to_both_sides, replace(causal, document=4)]
    for case in (causal, SMALL[0], SMALL[-1], window, *arrays):
        assert case.needs_array(windows=True) == (case in arrays)
        assert case.needs_array(windows=False) == (case in (window, *arrays))


def test_errors_are_seen() -> None:
    case = SMALL[1]

    def wrong(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, case.mask()) * 1.01

    def run(x) -> tuple:
        output, pull = jax.vjp(wrong, x.q, x.k, x.v)
        return output, pull(x.gradient)

    assert error(case, draw(case, "float32"), run) > 5e-3


@pytest.mark.parametrize("mode", ["forward", "residuals", "backward"])
def test_every_mode_runs(mode: str) -> None:
    program = compiled(BUILD["chunked"](SMALL[0]), mode, draw(SMALL[0], "bfloat16"))
    leaves = jax.tree.leaves(program.run())
    assert len(leaves) == {"forward": 1, "backward": 3}.get(mode, len(leaves)) and all(
        jnp.isfinite(x).all() for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)
    )


def test_what_cannot_run_is_a_row_with_the_reason() -> None:
    def build(case: Case):
        raise Refused("no such size")

    first, second = run_case(SMALL[0], {"mine": build, "xla": BUILD["xla"]}, mode="forward", repeats=1)
    assert first["refused"] == "no such size" and "wall" not in first
    assert "refused" not in second


def test_the_readme_adds_an_implementation() -> None:
    page = (Path(__file__).parents[2] / "benchmarks" / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict = {}
    exec(example, names)
    for case in SMALL[2], SMALL[5]:
        (row,) = run_case(case, {"mine": names["build"]}, dtype="float32", repeats=1)
        assert row["error"] < 1e-5
    (row,) = run_case(SMALL[3], {"mine": names["build"]}, repeats=1)
    assert row["refused"] == "it knows no window"


def test_the_report_is_written(tmp_path: Path) -> None:
    rows = run_case(Case("long", 1, 32, 32, 2, 2, 8, causal=True), {"xla": BUILD["xla"]}, mode="forward", repeats=1)
    rows.append({**rows[0], "refused": "too <long>"})
    history.append(tmp_path, [row | {"commit": "abc"} for row in rows])
    assert history.base("ab", tmp_path)[0]["case"] == "long/32"
    assert {path.name for path in tmp_path.iterdir()} | set(history.write_report(tmp_path, rows)) == {
        path.name for path in tmp_path.iterdir()
    }
    with (tmp_path / "table.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert "too &lt;long&gt;" in (tmp_path / "report.html").read_text()
    with pytest.raises(SystemExit, match="no such file, and no such commit"):
        history.base("zzz", tmp_path)


def test_deterministic_figures_alone_are_gated(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"case": "a/1", "mode": "both", "dtype": "float32", "implementation": "x", "wall": 1.0}
    row |= {"temporaries": 1000, "error": 1e-7}
    assert history.compare([row], [row | {"wall": 9.0}]) == []
    assert "9.00  a/1 both float32 x" in capsys.readouterr().out
    assert "temporaries 1000 -> 1100" in history.compare([row], [row | {"temporaries": 1100}])[0]
    assert "error" in history.compare([row], [row | {"error": 1e-3}])[0]
    refused = {name: row[name] for name in history.KEY if name in row} | {"refused": "why"}
    assert history.compare([row], [refused]) == ["a/1 both float32 x: ran, and is refused now: why"]
    assert history.compare([refused], [row]) == []
    compiled = {name: x for name, x in row.items() if name != "wall"} | {"target": "v5e", "bundles": 900.0}
    with pytest.raises(SystemExit, match="no row has a counterpart"):
        history.compare([row], [compiled])
    assert history.key(row | {"device": "cpu"}) != history.key(row | {"device": "NVIDIA H100"})
    assert "bundles 900 -> 950" in history.compare([compiled], [compiled | {"bundles": 950.0}])[0]


def test_growth_against_the_next_shorter_length() -> None:
    line = {"mode": "both", "dtype": "float32", "implementation": "x", "family": "long"}
    rows = [line | {"length": n, "temporaries": m} for n, m in ((4, 300), (1, 10), (2, 20))]
    rows += [line | {"length": 8, "refused": "why"}, line | {"length": 9, "temporaries": 9, "implementation": "y"}]
    history.add_growth(rows)
    assert [round(row.get("growth", 0), 2) for row in rows] == [3.91, 0, 1.0, 0, 0]
    for growth in (-0.1, 0.0, 1.0):
        row = rows[0] | {"case": "long/4", "growth": growth}
        assert history.compare([row], [row]) == []
        assert len(history.compare([row], [row | {"growth": growth + 0.1}])) == 1


def test_columns_are_those_that_rows_have() -> None:
    key = {"case": "long/9", "family": "long", "length": 9, "mode": "both", "dtype": "float32", "implementation": "x"}
    run, compiled = key | {"wall": 2.0, "error": None}, key | {"target": "v5e", "bound": 3e-6, "temporaries": 2**20}
    assert [column.name for column in history.columns([run])] == ["wall"]
    shown = history.columns([run, compiled])
    assert [history.cells(row, shown) for row in (run, compiled)] == [["2000.00", "", ""], ["", "3", "1.0"]]
    assert history.names([run]) == ["case", "mode", "dtype", "implementation"]
    assert history.names([run, compiled])[0] == "target"
    assert history.plots([compiled]).startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "chip"), [("v5e", "v5e"), ("v5e:2x2", "v5e"), ("tpu7x", "v7x"), ("h100", "h100")])
def test_targets(name: str, chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("libtpu", "jax_cuda12_plugin"):
        monkeypatch.setitem(sys.modules, module, importlib.util.module_from_spec(ModuleSpec(module, None)))
    assert attention_compiled.target(name) == chip
    assert 15e9 < attention_compiled.device_memory(chip) < 110e9


def test_targets_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a100", "v5e:4x4"):
        with pytest.raises(ValueError, match=f"'{name}' is unknown: choose v4, v5e"):
            attention_compiled.target(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"v6e needs libtpu: pip install -e '.\[aot\]'"):
        attention_compiled.target("v6e")
    with pytest.raises(ValueError, match=r"h100 needs jax_cuda12_plugin"):
        attention_compiled.target("h100")


def test_an_implementation_of_ones_own_refuses(tmp_path: Path) -> None:
    """Where the suite runs as a program."""
    (tmp_path / "mine.py").write_text(
        "from benchmarks.attention import Refused\n"
        "def build(case):\n    raise Refused('not today')\n"
        "def broken(case):\n    return lambda q, k, v: q @ v\n"
    )
    command = [sys.executable, "-m", "benchmarks.attention", "--cases", "unet", "--longest", "256"]
    command += ["--modes", "forward"]
    command += ["--dtypes", "float32", "--out", str(tmp_path / "out"), "--implementations", "mine:build", "mine:broken"]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"}
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)
    mine, broken = map(json.loads, (tmp_path / "out" / history.HISTORY).read_text().splitlines())
    assert mine["refused"] == "not today" and broken["refused"].startswith("TypeError: ")


def test_names_are_checked() -> None:
    assert {case.family for case in chosen_cases(["long"], 2048)} == {"long"}
    assert max(case.keys for case in cases(2048)) == 2048
    with pytest.raises(SystemExit, match="case 'lung' is unknown: choose among"):
        chosen_cases(["lung"], 2048)
    with pytest.raises(SystemExit, match="no case of window has at most 4096 keys: raise --longest"):
        chosen_cases(["window"], 4096)
    with pytest.raises(SystemExit, match="implementation 'chunky' is unknown: choose"):
        implementation("chunky")
    with pytest.raises(SystemExit, match="cannot be imported"):
        implementation("no_such_module:build")
