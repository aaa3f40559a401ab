"""The tables of families: which rows there are, which are made anew, and cells that see a difference."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import diffusion_rows, diffusion_tasks, families, family_cells, family_table, sampler_rows
from benchmarks.family_cells import GOLDEN
from benchmarks.family_table import Table
from zoo import models, sharding

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
MARKED = f"Before.\n{family_table.begin('animals')}\n{{}}\n{family_table.END}\nAfter.\n"


def animals(speed: str | None = "9") -> Table:
    rows = {"cat | `Cat`": "cat", "dog | `Dog`": "dog", "dog/small | `Dog`": "dog"}
    columns = {"name": False, "class": False, "legs": True} | ({} if speed is None else {"speed": True})
    return Table(columns, rows, lambda name: ("4",), None if speed is None else lambda name: speed)


def test_rows_of_other_kinds_stay_with_their_newest_speed() -> None:
    held = "| cat | `Cat` | three | 1 |\n| cow | `Cow` | 4 | 1 |\n| dog | `Dog` | three | 1 |"
    made = family_table.rewritten(MARKED.format(held), "animals", animals(), ["dog"])
    rows = ["| cat | `Cat` | three | 9 |", "| dog | `Dog` | 4 | 9 |", "| dog/small | `Dog` | 4 | 9 |"]
    lines = "\n".join(["", "| name | class | legs | speed |", "|---|---|---:|---:|", *rows, ""])
    assert made == MARKED.format(lines)
    kept = family_table.rewritten(MARKED.format("| cat | `Cat` | three |"), "animals", animals(None), [])
    assert kept == MARKED.format("\n| name | class | legs |\n|---|---|---:|\n| cat | `Cat` | three |\n")


def test_a_page_without_marks_is_left_alone() -> None:
    with pytest.raises(SystemExit, match="no table of animals: put <!-- animals, made by"):
        family_table.rewritten("Nothing.", "animals", animals(), [])


@pytest.fixture(scope="module")
def tables() -> dict[str, Table]:
    return {title: make() for title, make in families.TABLES.items()}


def test_the_page_has_every_row_of_every_table(tables: dict[str, Table]) -> None:
    page = PAGE.read_text()
    for title, table in tables.items():
        held = page.partition(family_table.begin(title))[2].partition(family_table.END)[0]
        assert len(held.strip().splitlines()) == 2 + len(table.rows)
        assert family_table.rewritten(page, title, table, []) == page, title


def test_every_golden_folder_has_a_row(tables: dict[str, Table]) -> None:
    """But those of other forms of the same files: flax."""
    folders = {str(path.parent.relative_to(GOLDEN)) for path in GOLDEN.rglob("golden.npz") if "flax" not in path.parts}
    named = {name.partition(" | ")[0] for table in tables.values() for name in table.rows}
    named = {name for name in named if not name.startswith("`")}
    # Inception measures samples, and is no family.
    assert folders - named == {"inception", "schedulers", "transformer/torch"} and not named - folders
    classes = {case["config"]["_class_name"] for case in sampler_rows.cases().values()}
    assert tables["samplers"].rows == {f"`{name}`": name for name in classes}


def test_parity_and_round_trips_see_a_difference(tmp_path: Path) -> None:
    folder = tmp_path / "dit"
    folder.mkdir()
    for path in (GOLDEN / "dit" / "shared").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert float(diffusion_rows.parity(folder)) < 2e-5 and family_cells.round_trip(folder) == "same bits"
    golden = dict(np.load(folder / "golden.npz"))
    golden["out"][0, 0, 0, 0] += 0.1 * max(1, abs(golden["out"]).max())
    np.savez(folder / "golden.npz", **golden)
    assert float(diffusion_rows.parity(folder)) == pytest.approx(0.1, rel=0.2)


def test_a_trajectory_is_compared_step_by_step() -> None:
    golden = dict(np.load(sampler_rows.FOLDER / "golden.npz"))
    case, expected = sampler_rows.cases()["euler_image"], golden["euler_image_x"]
    assert sampler_rows.worst(case, expected, golden["noise"], golden["fresh"]) < 2e-5
    expected[3] += 0.5 * max(1, abs(expected[3]).max())
    assert sampler_rows.worst(case, expected, golden["noise"], golden["fresh"]) == pytest.approx(0.5, rel=0.4)


def test_a_mesh_is_compared_with_one_device() -> None:
    assert float(diffusion_rows.sharded(GOLDEN / "clip" / "text")) < 2e-5
    assert family_cells.sharded({}, lambda _: float(sharding.active() is not None)) == "1e+00"


def test_the_newest_speed_of_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family_cells, "RESULTS", tmp_path)
    assert diffusion_rows.speed("dit-xl-2") == "not measured"
    sides = {"zoo": {"per_second": 3.0}, "torch": {"per_second": 2.0}}
    lines = [
        {"what": "train", "model": "dit-xl-2", "ran": ""} | sides,
        {"what": "train", "model": "dit-xl-2", "ran": "5 of 28 layers"} | sides,
        {"what": "train", "model": "dit-xl-2", "ran": "alone"} | {"zoo": sides["zoo"]},
        {"what": "sample", "model": "dit-xl-2", "ran": ""} | sides,
    ]
    (tmp_path / "diffusion.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert diffusion_rows.speed("dit-xl-2") == "1.50 (5 of 28 layers)"


def test_every_preset_of_the_table_has_a_task() -> None:
    presets = {preset for presets in diffusion_rows.PRESETS.values() for preset in presets}
    assert presets == set(diffusion_tasks.TASKS)


@pytest.mark.parametrize("name", ["ddpm-digits", "stable-diffusion-2-text", "dit-xl-2"])
def test_a_task_trains_what_both_sides_build(name: str) -> None:
    """Of one config.json, on batches that its objective reads; nothing is compiled."""
    task = diffusion_tasks.TASKS[name]
    config, ran = diffusion_tasks.on_a_cpu(name)
    experiment = diffusion_tasks.step_on_a_cpu(name, config.to_published(), task.rows)
    batch = diffusion_tasks.batch(config, task.rows, task.side)
    model = jax.eval_shape(lambda: experiment.model.build(nnx.Rngs(0)))
    loss = jax.eval_shape(experiment.objective.loss, model, batch, jax.random.key(0))
    assert loss.total.shape == () and loss.weight.shape == ()
    whole = models.parameter_count(models.preset(name))
    assert ("of" in ran) == (sharding.parameter_count(model) < 0.9 * whole)
    if diffusion_tasks.denoises(name):
        assert experiment.model.noising == models.preset(name).noising


def test_a_network_is_told_the_states_of_texts() -> None:
    """Stable Diffusion's, cut and made small; its batches have what its objective reads."""
    whole = models.preset("stable-diffusion-2-1")
    cut = diffusion_tasks.of_levels(whole, 2)
    assert cut.heads == whole.heads[:2] and cut.attention_levels == (0, 1)
    config = dataclasses.replace(cut, channels=(8, 16), num_heads=2, groups=4, context_width=10, blocks_per_level=1)
    batch = diffusion_tasks.batch(config, 2, 8)
    assert isinstance(diffusion_tasks.trained("stable-diffusion-2-1").objective, diffusion_tasks.DenoisingOfTexts)
    objective = diffusion_tasks.DenoisingOfTexts()
    model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
    assert jax.eval_shape(objective.loss, model, batch, jax.random.key(0)).total.shape == ()
    with pytest.raises(KeyError, match="context"):
        objective.loss(model, {"images": batch["images"], "weights": batch["weights"]}, jax.random.key(0))
