"""`zoo export`: a run as a published folder."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import zoo
from zoo import cli, sharding
from zoo.commands.export import byte_tokenizer, card, export, published_scheduler, published_tokenizer
from zoo.diffusion.published_schedulers import from_published
from zoo.models.noising import Noising
from zoo.train import run_folder, session
from zoo.train.data.masked_text import MaskedTextData
from zoo.train.data.text import TextData
from zoo.train.data.tokenizers import ByteTokenizer, FileTokenizer, train_bpe
from zoo.train.experiment import DataInfo, Placement
from zoo.train.recipes import RECIPES

TINY = (
    *("--model.num-layers", "1", "--model.width", "32", "--model.num-heads", "2", "--model.max-length", "64"),
    *("--data.length", "64", "--batch-size", "8", "--sampler.tokens", "4", "--no-compile-cache", "--steps", "2"),
)
TEXTS = ["The if statement\n\n  é中🙂", "", "tab\tnul\x00 \ufeffx", "\u2581 <s>"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert cli.main(["train", "gpt-nano", *TINY, "--run", str(folder)]) == 0
    return folder


def recorded(folder: Path, name: str, **model: Any) -> Path:
    """The folder of a run that has no checkpoint yet."""
    experiment = RECIPES[name]()
    config = dataclasses.replace(experiment.model, **model)
    run_folder.create(folder, dataclasses.replace(experiment, model=config), config, DataInfo("none", "0" * 64, 1, 1))
    return folder


def test_a_run_becomes_a_published_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "my-gpt"
    assert cli.main(["export", str(run), str(target)]) == 0
    assert f"holds step 2 of {run}" in capsys.readouterr().out
    names = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in target.iterdir()} == names
    here = session.reopen(run, Placement())
    model, _ = session.trained_model(run, here)
    tokens = jnp.arange(20, dtype=jnp.int32)[None] * 12
    found = zoo.from_pretrained(target)
    with sharding.use(here.mesh):
        expected = model(tokens).logits
    np.testing.assert_allclose(found(tokens).logits, expected, atol=1e-6)
    assert found.config.special_tokens.eos == (256,)
    tokenizer = zoo.tokenizer(target)
    assert tokenizer.encode(TEXTS) == [ids.tolist() for ids in ByteTokenizer().encode(TEXTS)]
    assert tokenizer.special_ids == {"bos_token": 256, "eos_token": 256} and tokenizer.vocab_size == 257


def test_the_card_says_what_was_trained(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path)
    card = (tmp_path / "README.md").read_text()
    data = json.loads((run / "config.json").read_text())["data"]
    held_out = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert held_out["kind"] == "validation" and f"loss {held_out['loss']:.4f}" in card and "(step 2)" in card
    assert data["sha256"] in card and data["name"] in card and "--model.width 32" in card
    assert "GPT2LMHeadModel, 23,040 parameters" in card and "2 of 2, 8 examples each" in card


def test_a_model_of_diffusers_is_said_to_be_one(tmp_path: Path) -> None:
    source = recorded(tmp_path / "run", "autoencoder-digits")
    (source / "metrics.jsonl").touch()
    text = card(source, tmp_path / "out", RECIPES["autoencoder-digits"]().model, 3)
    assert "library_name: diffusers" in text and "AutoencoderKL, 241,749 parameters" in text


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a diffusion model."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    sizes = ("--model.channels", "4", "8", "--model.groups", "2", "--model.num-heads", "2", "--batch-size", "8")
    short = ("--steps", "1", "--sampler.rows", "1", "--sampler.columns", "8", "--sampler.steps", "2")
    assert cli.main(["train", "ddpm-digits", *sizes, *short, "--no-compile-cache", "--run", str(folder)]) == 0
    return folder


def test_a_diffusion_run_becomes_a_pipeline_that_draws_the_same(digits: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "my-digits"
    assert cli.main(["export", str(digits), str(target)]) == 0
    index = json.loads((target / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline" and index["scheduler"] == ["diffusers", "DDPMScheduler"]
    card = (target / "README.md").read_text()
    assert "unconditional-image-generation" in card and "library_name: diffusers" in card
    exec(
        compile(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0].replace("steps=100", "steps=2"), "card", "exec")
    )
    here = session.reopen(digits, Placement())
    model, _ = session.trained_model(digits, here)
    pipeline = zoo.from_pretrained(target)
    assert (pipeline.unet.config.num_classes, pipeline.unet.config.null_class) == (10, True)
    assert pipeline.unet.config.noising == model.config.noising and pipeline.unet.config.image_size == (8, 8)
    told = jnp.ones((8, 8, 8, 1)), jnp.full(8, 7)
    classes = jnp.arange(3, 11)  # The last is none of them.
    with sharding.use(here.mesh):
        expected = np.asarray(model(*told, classes=classes))
    np.testing.assert_allclose(pipeline.unet(*told, classes=classes), expected, atol=1e-6)


@pytest.mark.parametrize(
    "noising",
    [
        Noising("cosine", 200, "velocity"),
        Noising("scaled_linear", target="image", first_beta=0.001, zero_terminal_snr=True),
        Noising("sigmoid"),
        Noising("flow", target="velocity"),
    ],
)
def test_the_scheduler_of_a_run_says_its_noise(noising: Noising) -> None:
    assert from_published(published_scheduler(noising)).noising == noising


def test_a_picture_of_a_run_says_how_it_was_made(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--steps", "2", "--rows", "1", "--seed", "5", "--no-compile-cache")
    assert cli.main(["sample", str(digits), *flags]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.split()]
    assert paths == [digits / "samples.png", digits / "denoising.png"]
    for path in paths:
        with Image.open(path) as image:
            told = dict(getattr(image, "text", {}))
        assert told["seed"] == "5" and told["step"] == "1"
        assert told.items() >= {"recipe": "ddpm-digits", "sampler": "ddim", "steps": "2", "guidance": "1.5"}.items()


def test_every_byte_is_its_own_token(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().to_str())
    found = zoo.tokenizer(tmp_path)
    letters = "".join(map(chr, [*range(0x800), 0xFFFD, 0x1F642]))
    assert found.encode([letters]) == [list(letters.encode())]
    assert [found.decode([byte]) for byte in range(256)] == [ByteTokenizer().decode([byte]) for byte in range(256)]
    assert found.decode([*b"ab", 256]) == "ab"


def test_a_tokenizer_file_goes_along(tmp_path: Path) -> None:
    train_bpe(["the cat and the hat"] * 9, 262, tmp_path / "own.json")
    made, special = published_tokenizer(TextData(tokenizer=str(tmp_path / "own.json")))
    made.save(str(tmp_path / "tokenizer.json"))
    own = FileTokenizer(tmp_path / "own.json")
    assert zoo.tokenizer(tmp_path).encode(TEXTS) == [ids.tolist() for ids in own.encode(TEXTS)]
    assert made.token_to_id(special["eos_token"]) == own.end_of_text


def test_the_tokens_of_an_objective_go_along(tmp_path: Path) -> None:
    data = MaskedTextData(length=32)
    made, special = published_tokenizer(data)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(special))
    found, roles = zoo.tokenizer(tmp_path), data.vocabulary.roles
    names = {"pad_token": "pad", "cls_token": "classify", "sep_token": "separate", "mask_token": "mask"}
    assert found.special_ids == {name: roles[role] for name, role in names.items()}
    assert found.encode(["a[MASK]"]) == [[roles["classify"], 97, roles["mask"], roles["separate"]]]
    assert found.vocab_size == data.vocabulary.size


@pytest.mark.parametrize(
    ("name", "model", "words"),
    [
        ("gpt-nano", {"windows": (None, 16)}, "windows (None, 16): GPT-2's published layout has dense layers alone"),
        ("vit-digits", {}, "a ViT with pool 'mean' has no published form"),
        ("gpt-nano", {}, "no checkpoint"),
    ],
)
def test_what_has_no_published_form_is_refused(
    tmp_path: Path, name: str, model: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = recorded(tmp_path / "run", name, **model)
    assert cli.main(["export", str(source), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("zoo: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "usage: zoo export RUN FOLDER"),
        (["run"], "takes a run and the folder to write, and got no folder"),
        (["run", "a", "b"], "takes a run and the folder to write, and got a b"),
        (["--run", "a"], "name a run: zoo export RUN"),
        (["run", "--out"], "and got --out"),
        (["run", "{full}"], "is there and not empty: name a folder that is not there yet"),
        (["{full}/none", "out"], "none is not a run (it has no config.json)"),
    ],
)
def test_mistakes_are_told(
    tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    code = cli.main(["export", *(argument.format(full=tmp_path) for argument in arguments)])
    out, error = capsys.readouterr()
    assert code == (2 if arguments else 0)
    assert words in out + error
    assert {path.name for path in tmp_path.iterdir()} == {"file"}
