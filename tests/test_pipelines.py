"""Pipelines in and out. Which classes their parts have is one table; here it names the tiny ones of tests/parity."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import zoo
from zoo import pipelines, sharding
from zoo.pipelines import Pipeline
from zoo.pretrained import PretrainedError, by_path

PARITY = Path(__file__).parent / "parity"
SCHEDULER = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "trained_betas": None, "steps_offset": 1}
INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "requires_safety_checker": True,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "GPT2LMHeadModel"],
    "tokenizer": ["transformers", "CLIPTokenizerFast"],
    "transformer": ["diffusers", "Transformer2DModel"],
}
WORDS = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}, "version": "1.0"}


@pytest.fixture(autouse=True)
def tiny_parts(monkeypatch) -> None:
    parts = {"transformer": "DiTTransformer2DModel", "text_encoder": "GPT2LMHeadModel", "tokenizer": "CLIPTokenizer"}
    monkeypatch.setitem(pipelines.PIPELINES, "StableDiffusionPipeline", parts)
    monkeypatch.setitem(pipelines.PIPELINES, "DiTPipeline", {"transformer": "DiTTransformer2DModel"})


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "pipeline"
    for name, source in (("transformer", "dit/shared"), ("text_encoder", "gpt2")):
        shutil.copytree(PARITY / source, made / name, ignore=shutil.ignore_patterns("*.npz", "gradients.json"))
    write(made / "tokenizer" / "tokenizer.json", WORDS)
    write(made / "scheduler" / "scheduler_config.json", SCHEDULER)
    write(made / "model_index.json", INDEX)
    return made


def write(path: Path, fields: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(fields))


def change(folder: Path, **fields: Any) -> None:
    write(folder / "model_index.json", INDEX | fields)


def test_a_pipeline_is_its_parts_and_is_written_back_as_it_was(folder, tmp_path) -> None:
    pipeline = zoo.from_pretrained(folder)
    assert isinstance(pipeline, Pipeline) and pipeline.unet is None and pipeline.scheduler == SCHEDULER
    assert pipeline.tokenizer is not None and pipeline.tokenizer.encode(["b"]) == [[1]]
    zoo.save_pretrained(pipeline, tmp_path / "out")
    written = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    for path in written:
        ours, theirs = (place / path for place in (tmp_path / "out", folder))
        if path.suffix == ".safetensors":
            continue
        ours, theirs = json.loads(ours.read_text()), json.loads(theirs.read_text())
        if path.name == "model_index.json":
            theirs["transformer"][1], theirs["tokenizer"][1] = "DiTTransformer2DModel", "CLIPTokenizer"
            assert ours == {k: v for k, v in theirs.items() if k != "_diffusers_version"} | {
                "image_encoder": [None] * 2
            }
        else:
            assert ours == {name: theirs[name] for name in ours}
    again = zoo.from_pretrained(tmp_path / "out")
    for one, other in zip(jax.tree.leaves(pipeline), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(PretrainedError, match="out holds a model already"):
        zoo.save_pretrained(pipeline.transformer, tmp_path / "out")
    with pytest.raises(PretrainedError, match="out holds a pipeline already"):
        zoo.save_pretrained(pipeline, tmp_path / "out")


def test_dtype_and_mesh_reach_every_part_and_a_pipeline_is_a_pytree(folder) -> None:
    mesh = sharding.make_mesh("data=4,fsdp=2")
    pipeline = zoo.from_pretrained(folder, dtype="bfloat16", mesh=mesh)
    for model in (pipeline.transformer, pipeline.text_encoder):
        assert {str(leaf[...].dtype) for leaf in by_path(model).values()} == {"bfloat16"}
        assert {len(leaf[...].sharding.device_set) for leaf in by_path(model).values()} == {8}
    doubled = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p))(pipeline)
    assert isinstance(doubled, Pipeline) and doubled.scheduler == SCHEDULER


def test_a_safety_checker_is_left_out_and_said_to_be(folder) -> None:
    change(folder, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    with pytest.warns(UserWarning, match=r"^the safety_checker \(StableDiffusionSafetyChecker\) of a .* is left out"):
        assert zoo.from_pretrained(folder).settings == {"requires_safety_checker": False}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "FluxPipeline"}, "_class_name 'FluxPipeline', and pipelines here are DDIMPipeline, DDPMPipe"),
        ({"transformer": None}, "has transformer None"),
        ({"transformer": ["diffusers", None]}, "transformer None, and a StableDiffusionPipeline here has a DiTT"),
        ({"transformer": ["os", "system"]}, "transformer 'system', and a StableDiffusionPipeline here has a DiTT"),
        ({"scheduler": [None, None]}, "scheduler None, and a StableDiffusionPipeline here has one there"),
        ({"scheduler": ["diffusers", "DDPM"]}, "'DDPM' in model_index.json and 'DDIMScheduler' in scheduler_config"),
        ({"../vae": ["diffusers", "AutoencoderKL"]}, r"names a ../vae \(AutoencoderKL\)"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, r"names a controlnet \(ControlNetModel\)"),
        ({"force_zeros": True}, "force_zeros True, which a StableDiffusionPipeline here knows nothing of"),
    ],
)
def test_an_index_that_zoo_cannot_follow_is_refused_by_name(folder, fields, message) -> None:
    change(folder, **fields)
    with pytest.raises(PretrainedError, match=message):
        zoo.from_pretrained(folder)


def test_a_part_of_another_class_missing_or_elsewhere_is_refused(folder) -> None:
    shutil.move(folder / "transformer", folder.parent / "transformer")
    with pytest.raises(PretrainedError, match=r"transformer is not there, and model_index.json names a transformer"):
        zoo.from_pretrained(folder)
    (folder / "transformer").symlink_to(folder.parent / "transformer")
    with pytest.raises(PretrainedError, match="transformer is a link out of"):
        zoo.from_pretrained(folder)
    (folder / "transformer").unlink()
    shutil.copytree(folder / "text_encoder", folder / "transformer")
    with pytest.raises(PretrainedError, match="is of the class 'GPT2LMHeadModel', and the pipeline has a DiTT"):
        zoo.from_pretrained(folder)


def test_parts_of_older_pipelines_lie_beside_the_index(folder, tmp_path) -> None:
    older = shutil.copytree(folder / "transformer", tmp_path / "older")
    write(older / "scheduler_config.json", SCHEDULER)
    parts = {name: INDEX[name] for name in ("scheduler", "transformer")}
    write(older / "model_index.json", {"_class_name": "DiTPipeline", **parts})
    zoo.save_pretrained(zoo.from_pretrained(older), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model_index.json", "scheduler", "transformer"}
    weights = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / "transformer" / weights).read_bytes() == (older / weights).read_bytes()


def test_a_pipeline_without_a_part_is_not_written(folder, tmp_path) -> None:
    pipeline = zoo.from_pretrained(folder)
    given: dict[str, Any] = {"transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder}
    with pytest.raises(PretrainedError, match="has a tokenizer, and this one has None: give it one"):
        zoo.save_pretrained(Pipeline("StableDiffusionPipeline", SCHEDULER, **given), tmp_path / "out")
    given |= {"text_encoder": pipeline.transformer, "tokenizer": pipeline.tokenizer}
    with pytest.raises(PretrainedError, match="text_encoder of the class GPT2LMHeadModel, and this one has 'DiTT"):
        zoo.save_pretrained(Pipeline("StableDiffusionPipeline", SCHEDULER, **given), tmp_path / "out")
    given["text_encoder"] = pipeline.text_encoder
    with pytest.raises(PretrainedError, match="scheduler has no _class_name"):
        zoo.save_pretrained(Pipeline("StableDiffusionPipeline", {}, **given), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_a_hub_pipeline_only_what_is_read_is_downloaded(folder, tmp_path, monkeypatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    for name in (
        "v1-5-pruned.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "safety_checker/model.bin",
    ):
        write(folder / name, {})
    files, cache = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()), tmp_path / "cache"

    def snapshot_download(source: str, *, allow_patterns: Any, ignore_patterns: Any) -> str:
        asked = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        for name in filter_repo_objects(files, **asked):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert isinstance(zoo.from_pretrained("someone/tiny-pipeline"), Pipeline)
    found = {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}
    assert found == {name for name in files if "fp16" not in name and "/" in name and "safety" not in name} | {
        "model_index.json"
    }
