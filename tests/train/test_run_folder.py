"""Run folders: an experiment comes back from JSON as it was, and nothing foreign is ever touched."""

import dataclasses
import json
from pathlib import Path

import pytest

from zoo.train import run_folder
from zoo.train.experiment import DataInfo, Experiment, Optimizer, UserError
from zoo.train.recipes import RECIPES

DATA = DataInfo("text", "a" * 64, 10, 1000)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_survive_json(name: str, tmp_path: Path):
    experiment = RECIPES[name]()
    run_folder.create(tmp_path / "run", experiment, experiment.model, DATA)
    assert run_folder.load(tmp_path / "run", RECIPES[name]()) == experiment
    assert run_folder.name(tmp_path / "run") == name
    hash(run_folder.load(tmp_path / "run", RECIPES[name]()))  # tuples are tuples again


def test_what_a_person_changed_comes_back(tmp_path: Path):
    default = RECIPES["gpt-nano"]()
    changed = dataclasses.replace(
        default,
        model=dataclasses.replace(default.model, windows=(None, 128), num_layers=2, head_dim=16),
        optimizer=Optimizer("muon", learning_rate=1, clip_norm=None, moment_dtype="bfloat16"),
        ema=0.999,
        keep_every=100,
    )
    run_folder.create(tmp_path / "run", changed, changed.model, DATA)
    loaded = run_folder.load(tmp_path / "run", default)
    assert loaded == changed and isinstance(loaded.model.windows, tuple)


def test_what_using_a_run_needs_is_kept(tiny: Experiment, tmp_path: Path):
    """The model's config as the data made it, and the tokenizer."""
    (tmp_path / "words.json").write_text("{}")
    fitted = dataclasses.replace(tiny.model, width=48)
    run_folder.create(tmp_path / "run", tiny, fitted, DATA, tmp_path / "words.json")
    assert run_folder.load(tmp_path / "run", tiny) == tiny
    assert run_folder.load_model(tmp_path / "run", tiny.model) == fitted
    assert (tmp_path / "run" / "tokenizer.json").read_text() == "{}"


def test_another_experiment_is_refused_by_its_fields(tiny: Experiment, tmp_path: Path):
    run_folder.create(tmp_path, tiny, tiny.model, DATA)
    before = (tmp_path / "config.json").read_bytes()
    other = dataclasses.replace(tiny, seed=1, model=dataclasses.replace(tiny.model, width=32))
    with pytest.raises(UserError, match=r"another experiment \(model.width: 16 -> 32; seed: 0 -> 1\): choose another"):
        run_folder.create(tmp_path, other, other.model, DATA)
    with pytest.raises(UserError, match="a run of tiny, not of other"):
        run_folder.check(tmp_path, dataclasses.replace(tiny, name="other"))
    assert (tmp_path / "config.json").read_bytes() == before


def test_other_data_is_refused(tiny: Experiment, tmp_path: Path):
    run_folder.create(tmp_path, tiny, tiny.model, DATA)
    run_folder.create(tmp_path, tiny, tiny.model, DATA)
    with pytest.raises(UserError, match="had SHA-256 aaaaaaaaaaaaaaaa and now has bbbbbbbbbbbbbbbb"):
        run_folder.create(tmp_path, tiny, tiny.model, dataclasses.replace(DATA, sha256="b" * 64))


def test_a_folder_with_other_things_is_refused(tiny: Experiment, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not a run and not an empty folder: choose another folder"):
        run_folder.create(tmp_path, tiny, tiny.model, DATA)
    with pytest.raises(UserError, match="is not a run and not an empty folder"):
        run_folder.check(tmp_path / "thesis.txt", tiny)
    with pytest.raises(UserError, match="is not a run"):
        run_folder.name(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("content", ["{", "[]", '{"experiment": {}}', '{"experiment": {"name": "tiny"}}'])
def test_a_damaged_config_is_named(content: str, tiny: Experiment, tmp_path: Path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config.json is damaged"):
        run_folder.check(tmp_path, tiny)


def test_a_published_model_is_no_run(tiny: Experiment, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    for read in (lambda: run_folder.name(tmp_path), lambda: run_folder.check(tmp_path, tiny)):
        with pytest.raises(
            UserError, match=r"is a published model and not a run: zoo.from_pretrained\('.*'\) loads it"
        ):
            read()


def test_a_config_of_another_version_is_named(tiny: Experiment, tmp_path: Path):
    run_folder.create(tmp_path, tiny, tiny.model, DATA)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["experiment"]["optimizer"]["b1"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="differ in fields b1 of Optimizer"):
        run_folder.load(tmp_path, tiny)


def test_default_folders_are_new(tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20300101-000000")
    first = run_folder.default_folder(tiny)
    first.mkdir(parents=True)
    assert str(first) == "runs/tiny-20300101-000000"
    assert str(run_folder.default_folder(tiny)) == "runs/tiny-20300101-000000-2"


def test_one_process_trains_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / run_folder.CONFIG).write_text("{}")
    again = pytest.raises(UserError, match="is being trained by another process")
    with run_folder.claimed(tmp_path), again, run_folder.claimed(tmp_path):
        pass
    with run_folder.claimed(tmp_path):
        assert (tmp_path / run_folder.CONFIG).read_text() == "{}"
