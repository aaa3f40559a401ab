"""The command: its verbs over a tiny run, and one line for every mistake."""

import io
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import jax
import pytest

from zoo import cli
from zoo.commands import doctor, train
from zoo.commands.flags import parse
from zoo.train import ending
from zoo.train.experiment import UserError

TINY = (
    *("--model.num-layers", "1", "--model.width", "32", "--model.num-heads", "2", "--model.max-length", "64"),
    *("--data.length", "64", "--batch-size", "8", "--sampler.tokens", "12", "--log-every", "2", "--no-compile-cache"),
)


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that must end with code 2."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("zoo: ") and err.count("\n") == 1, err
    assert out == ""
    return err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert cli.main(["train", "gpt-nano", *TINY, "--steps", "4", "--run", str(folder)]) == 0
    return folder


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert cli.main(arguments) == 0
        out, err = capsys.readouterr()
        assert not err and set(cli.VERBS) <= set(re.findall(r"zoo (\w+)", out))


def test_recipe_help_is_grouped_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "gpt-nano", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for text in ("model options", "optimizer options", "--model.num-layers", "--mesh", "--run", "two CPU cores"):
        assert text in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "did you mean train?"),
        (["train", "gpt-nan"], "unknown recipe 'gpt-nan': did you mean gpt-nano?"),
        (["train", "gpt-nano", "--stesp", "3"], "unknown flag --stesp: did you mean --steps?"),
        (["train", "gpt-nano", "--num-layers=3"], "did you mean --model.num-layers?"),
        (["train", "gpt-nano", "--optimizer.lr", "1"], "did you mean --optimizer.learning-rate?"),
        (["train", "gpt-nano", "--steps", "many"], "--steps: invalid literal for int() with base 10: 'many'"),
        (["train", "gpt-nano", "--steps"], "missing value for argument '--steps'"),
        (["train", "gpt-nano", "--tensorboard", "yes"], "unexpected 'yes'"),
        (["train", "gpt-nano", "--preset", "gpt3-13"], "did you mean 'gpt3-13b'"),
        (["train", "gpt-nano", "--preset"], "--preset needs the name"),
        (["train", "gpt-nano", "--mesh", "dat=2"], "mesh axis 'dat' is unknown"),
        (["train", "gpt-nano", "--mesh", "data=3"], "needs 3 devices and there are 8"),
        (["train", "ddpm-digits", "--sampler.steps", "2000"], "2000 sampling steps are not in the model's 1 to 1000"),
        (["train", "ddpm-digits", "--model.attention-levels", "5"], "zoo: --model: attention_levels names 5, and"),
        (["train", "gpt-nano", "--sampler.top-p", "2"], "top_p 2.0 is not within 0"),
        (["train", "gpt-nano", "--optimizer.clip-norm", "inf"], "--optimizer.clip-norm inf bounds nothing"),
        (["train", "gpt-nano", "--optimizer.b2", "1"], "--optimizer.b2 1.0 is no decay"),
        (["train", "gpt-nano", "--optimizer.learning-rate", "nan"], "--optimizer.learning-rate nan: choose a finite"),
        (["train", "gpt-nano", "--seed=-1"], "--seed -1 is not a seed"),
        (["train", "gpt-nano", "--keep-last", "0"], "--keep-last 0 is too small"),
        (["train", "gpt-nano", "--name", "mine"], "--name mine: the name is the recipe's"),
        (["train", "gpt-nano", "--model.precision.compute", "bfloat16"], "give a run --compute bfloat16"),
        (["train", "gpt-nano", "--model.num-heads", "0"], "num_heads 0 is too small"),
        (["train", "gpt-nano", "--mesh", "expert=8"], "mesh axis expert=8 cuts nothing here"),
        (["train", "gpt-nano", "--sampler.prompt", "x" * 300], "a prompt of 301 tokens leaves no room"),
        (["train", "ddpm-digits", "--model.noising.schedule", "sigmoidal"], "noise schedule 'sigmoidal' is unknown"),
        (["train", "ddpm-digits", "--model.dropout", "1.5"], "dropout 1.5 is not a probability"),
        (["train", "vit-digits", "--model.head", "pooler"], "--model.head pooler scores no classes"),
        (["train", "gpt-nano", "--simulate-devices", "3", "--simulate-hosts", "2"], "does not divide"),
        (["sample", "--prompt", "x"], "name a run"),
        (["eval", "runs/none"], "runs/none is not a run"),
        (["eval", "runs/none", "--features", "x"], "--features needs --samples: say how many"),
        (["eval", "runs/none", "--steps", "5"], "--steps is of samples that are compared with images: name a network"),
        (["eval", "runs/none", "--features", "x", "--samples", "100", "--seed=-1"], "--seed -1 is not a seed"),
        (["list", "--al"], "unknown flag --al"),
        (["doctor", "now"], "unexpected 'now'"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in mistake(capsys, *arguments)


@pytest.mark.parametrize("flags", [("--optimizer.name", "adamx"), ("--mesh", "tensor=8")])
def test_a_run_that_cannot_start_leaves_no_folder(
    flags: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mistake(capsys, "train", "gpt-nano", *TINY, *flags, "--run", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "gpt-nan", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_no_mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("zoo.commands.list.recipes", lambda: 1 / 0)
    assert cli.main(["list"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_too_little_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore")

    monkeypatch.setattr("zoo.commands.list.main", fail)
    assert "Out of memory while trying to allocate 9 bytes. (raise --accumulate" in mistake(capsys, "list")


def test_bits_per_dimension_are_of_image_diffusion(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--bits-per-dimension is of runs of Denoising, not NextToken"
    assert words in mistake(capsys, "eval", str(run), "--bits-per-dimension")


def test_a_run_is_written_and_resumed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = json.loads((run / "config.json").read_text())["experiment"]
    assert experiment["steps"] == 4 and experiment["model"]["width"] == 32
    assert (run / "report.html").is_file() and (run / "curves.png").is_file()
    assert cli.main(["train", "gpt-nano", *TINY, "--steps", "4", "--run", str(run)]) == 0
    assert "from step 4" in capsys.readouterr().out
    line = mistake(capsys, "train", "gpt-nano", *TINY, "--steps", "4", "--seed", "1", "--run", str(run))
    assert "seed: 0 -> 1" in line


def test_eval_prints_a_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(run), "--no-compile-cache"]) == 0
    figures = dict(re.findall(r"(\w[\w ]*\w) +([\d.]+)", capsys.readouterr().out))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    [last] = [record for record in records if record["kind"] == "validation" and record["step"] == 4]
    assert float(figures["loss"]) == pytest.approx(last["loss"], abs=1e-4)
    assert {"step", "loss", "perplexity", "bits per byte", "accuracy"} <= set(figures)


def test_sample_streams_and_is_drawn_by_its_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def draw(*flags: str) -> str:
        assert cli.main(["sample", str(run), "--prompt", "if x:", "--no-compile-cache", *flags]) == 0
        return capsys.readouterr().out

    first = draw()
    assert first.startswith("if x:") and first.endswith("\n") and len(first) > len("if x:\n")
    assert draw() == first
    assert draw("--seed", "1") != first
    assert "unknown flag --promt: did you mean --prompt?" in mistake(capsys, "sample", str(run), "--promt", "x")


def on_two_hosts(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zoo", "train", "gpt-nano", *TINY, *flags]
    hosts = ["--simulate-devices", "4", "--simulate-hosts", "2"]
    return subprocess.run([*command, *hosts], capture_output=True, text=True, timeout=400)


def test_hosts_end_at_once_on_a_mistake(tmp_path: Path) -> None:
    done = on_two_hosts("--mesh", "data=3", "--run", str(tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr == "zoo: mesh data=3 needs 3 devices and there are 4: choose sizes whose product is 4\n"
    assert done.stdout == ""


@pytest.mark.large
def test_hosts_train_together(tmp_path: Path) -> None:
    done = on_two_hosts("--steps", "2", "--sampler.samples", "4", "--run", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "devices: 4 on 2 hosts" in done.stdout and "Gloo" not in done.stdout


def test_list_lines_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"gpt-nano +GPT +Text +\S", out) and re.search(r"ddpm-digits +UNet +Image +\S", out)
    assert re.search(r"gpt2 +GPT +124,439,808", out)


def test_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for text in ("jax ", "flax ", "python ", "devices ", "8 x cpu", "disk ", "write test ", "no problems found"):
        assert text in out
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr("zoo.train.launch.accelerators", lambda: {"tpu": "a TPU"})
    assert cli.main(["doctor"]) == 1
    assert "flaxzoo[tpu]" in re.sub(r"\s+", " ", capsys.readouterr().out)
    [_, write, _] = doctor.disk(tmp_path)
    assert not write.problem and list(tmp_path.iterdir()) == []


M = TypeVar("M")


@dataclass(frozen=True)
class Inner:
    switch: bool = True
    pattern: tuple[int | None, ...] = (None, 2)
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer(Generic[M]):
    inner: M
    folder: Path | None = None
    rate: float = 1.0
    limit: int | None = 3
    again: Inner = field(default_factory=Inner)


@dataclass(frozen=True)
class Beside:
    count: int = 0


def parsed(*arguments: str) -> tuple[Any, ...]:
    return parse((Outer(Inner()), Beside()), arguments, prog="prog", description="")


def test_flags_of_every_type() -> None:
    outer, beside = parsed(
        *("--inner.no-switch", "--inner.pattern", "4", "None", "8", "--inner.kind=b", "--folder", "/x", "--rate", "2"),
        *("--limit", "None", "--again.kind", "b", "--count", "1", "--count", "2"),
    )
    assert outer == Outer(Inner(False, (4, None, 8), "b"), Path("/x"), 2.0, None, Inner(kind="b"))
    assert beside == Beside(2)
    assert parsed() == (Outer(Inner()), Beside())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--inner.kind", "c"], "invalid choice 'c'"),
        (["--limit", "x"], "--limit: no type matching"),
        (["--inner.patern", "1"], "did you mean --inner.pattern?"),
        (["--kind", "a"], "did you mean --inner.kind?"),
    ],
)
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_flags_that_do_not_fit(
    arguments: list[str], words: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # tyro draws its boxes by what the terminal can show.
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(UserError) as error:
        parsed(*arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_command_that_resumes_makes_the_same_experiment() -> None:
    given = [*TINY, "--steps", "7", "--data.train-bpe", "300", "--model.windows", "None", "16", "--ema", "0.9"]
    experiment, _ = train.read(["gpt-nano", *given])
    _, _, *command = shlex.split(ending.next_steps(Path("a run"), experiment)["resume"])
    again, placement = train.read(command)
    assert again == experiment and placement.run == Path("a run")
