"""Published checkpoints in and out, on the tiny GPT-2 of tests/parity."""

import dataclasses
import json
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import zoo
from zoo import sharding
from zoo.generation import generate
from zoo.models import preset
from zoo.models.gpt import GPTConfig
from zoo.models.published import PublishedError
from zoo.pretrained import PretrainedError, by_path, from_pretrained, save_pretrained

FOLDER = Path(__file__).parent / "parity" / "gpt2"


@pytest.fixture
def folder(tmp_path) -> Path:
    return shutil.copytree(FOLDER, tmp_path / "published", ignore=shutil.ignore_patterns("*.npz"))


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return load_file(FOLDER / "model.safetensors")


def change(folder: Path, file: str = "config.json", /, **fields) -> None:
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].tobytes() == value.tobytes(), name


def test_what_was_read_is_written_back_bit_for_bit(tmp_path, tensors) -> None:
    zoo.save_pretrained(zoo.from_pretrained(FOLDER), tmp_path)
    assert_same(load_file(tmp_path / "model.safetensors"), tensors)
    theirs, ours = (json.loads((place / "config.json").read_text()) for place in (FOLDER, tmp_path))
    assert ours == {name: theirs[name] for name in ours}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_large_models_are_split_over_files_and_read_from_them(tmp_path, tensors) -> None:
    save_pretrained(from_pretrained(FOLDER), tmp_path, shard_bytes=40_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    again = {name: x for file in files for name, x in load_file(tmp_path / file).items()}
    assert_same(again, tensors)
    for path, variable in by_path(from_pretrained(tmp_path)).items():
        np.testing.assert_array_equal(variable[...], by_path(from_pretrained(FOLDER))[path][...], err_msg=path)


def test_older_files_have_no_prefix_and_hold_constants_and_the_tied_head(folder, tensors) -> None:
    older = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    older |= {"h.0.attn.bias": np.ones((1, 1, 48, 48), bool), "lm_head.weight": older["wte.weight"]}
    save_file(older, folder / "model.safetensors")
    model = from_pretrained(folder)
    np.testing.assert_array_equal(model.embed.table[:211], tensors["transformer.wte.weight"])
    np.testing.assert_array_equal(model.embed.table[211:], 0)


def test_every_shard_gets_its_part() -> None:
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    model = from_pretrained(FOLDER, mesh=mesh, rules={**sharding.RULES, "heads": ()})  # three heads over two devices
    table, stacked = model.embed.table[...], model.stack.blocks[0].feedforward.up.kernel[...]
    for array in (table, stacked):
        assert len({str(shard.index) for shard in array.addressable_shards}) == 4
    for path, variable in by_path(from_pretrained(FOLDER)).items():
        np.testing.assert_array_equal(by_path(model)[path][...], variable[...], err_msg=path)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_the_stored_dtype_is_written_back(folder, tmp_path, tensors, dtype) -> None:
    stored = {name: value.astype(jnp.bfloat16) for name, value in tensors.items()}
    save_file(stored, folder / "model.safetensors")
    model = from_pretrained(folder, dtype=dtype)
    assert {str(variable.dtype) for variable in by_path(model).values()} == {dtype or "bfloat16"}
    # Training steps map over the tree: what was stored must come through.
    save_pretrained(jax.jit(lambda m: jax.tree.map(lambda x: x * 1, m))(model), tmp_path / "back")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), stored)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_layers_of_several_dtypes_are_read_as_the_widest(folder, tensors) -> None:
    name = "transformer.h.1.ln_1.bias"
    save_file(tensors | {name: tensors[name].astype(jnp.bfloat16)}, folder / "model.safetensors")
    bias = from_pretrained(folder).stack.blocks[0].attention_norm.bias[...]
    assert bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias[1], tensors[name].astype(jnp.bfloat16))
    np.testing.assert_array_equal(bias[0], tensors["transformer.h.0.ln_1.bias"])


def test_a_dtype_is_of_computing_too() -> None:
    model = from_pretrained(FOLDER, dtype="bfloat16")
    assert model.features(jnp.ones((1, 4), jnp.int32)).hidden.dtype == jnp.bfloat16


def test_reading_holds_what_stays_and_one_tensor(tmp_path) -> None:
    save_pretrained(GPTConfig(vocab_size=128, num_layers=8, width=128, num_heads=4).build(nnx.Rngs(0)), tmp_path)
    everything = sum(value.nbytes for value in load_file(tmp_path / "model.safetensors").values())
    from_pretrained(tmp_path)
    tracemalloc.start()
    from_pretrained(tmp_path)
    beside = tracemalloc.get_traced_memory()[1]  # What stays, and the file, are mapped, which tracemalloc does not see.
    tracemalloc.stop()
    assert beside < 0.25 * everything, (beside, everything)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_generation_stops_where_the_folder_says(folder, file) -> None:
    golden = np.load(FOLDER / "golden.npz")
    prompts, expected = golden["prompts"].tolist(), golden["greedy"].tolist()
    stop = expected[0][3]
    change(folder, file, eos_token_id=[stop, 210])
    made = generate(from_pretrained(folder), prompts, max_new_tokens=20)
    assert made.stopped[0] and made.tokens[0] == expected[0][: expected[0].index(stop)]
    assert generate(from_pretrained(folder), prompts, max_new_tokens=20, stop_tokens=()).tokens == expected


def test_a_hub_model_in_the_cache_needs_no_network(tmp_path, monkeypatch, tensors) -> None:
    from huggingface_hub import constants

    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(FOLDER, snapshot)
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    table = from_pretrained("someone/tiny").embed.table[:211]
    np.testing.assert_array_equal(table, tensors["transformer.wte.weight"])
    with pytest.raises(PretrainedError, match=r"^someone/else is no folder, and the hub does not give it \(.*\)$"):
        from_pretrained("someone/else")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_function": "mish"}, "activation_function 'mish'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False"),
        ({"architectures": ["GPT2ForTokenClassification"]}, "GPT2ForTokenClassification"),
        ({"embd_pdrop": 0.3}, "embd_pdrop 0.3"),
        ({"model_type": "gpt9"}, "model_type 'gpt9'"),
        ({"n_layer": "3"}, "n_layer '3'"),
        ({"n_layer": 10**9}, "1000000000 layers"),
        ({"n_embd": None}, "n_embd None"),
        ({"eos_token_id": "<end>"}, "'<end>'"),
        ({"n_head": 7}, "num_heads 7"),
    ],
)
def test_a_config_that_no_family_can_be_is_refused_by_name(folder, fields, message) -> None:
    change(folder, **fields)
    with pytest.raises(ValueError, match=message) as refused:
        from_pretrained(folder)
    assert type(refused.value).__module__.startswith("zoo.") and "\n" not in str(refused.value)


def test_missing_left_over_and_misshapen_tensors_are_all_named(folder, tensors) -> None:
    changed = dict(tensors)
    del changed["transformer.h.1.ln_1.bias"], changed["transformer.wpe.weight"]
    changed |= {"transformer.h.3.ln_1.bias": np.ones(36, np.float32), "transformer.ln_f.bias": np.ones(35, np.float32)}
    changed |= {"transformer.ln_f.weight": np.ones(36, np.int8)}
    save_file(changed, folder / "model.safetensors")
    with pytest.raises(PretrainedError) as refused:
        from_pretrained(folder)
    assert str(refused.value).endswith(
        "missing: transformer.h.1.ln_1.bias, transformer.wpe.weight; left over: transformer.h.3.ln_1.bias; "
        "of another shape than config.json says: transformer.ln_f.bias (35,) for (36,); "
        "no floating-point numbers: transformer.ln_f.weight int8"
    )


def test_an_untied_head_is_refused(folder, tensors) -> None:
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(PretrainedError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        from_pretrained(folder)


def test_pickles_are_refused(folder) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(PretrainedError, match=r"pytorch_model\.bin alone, a pickle"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", "/tmp/elsewhere.safetensors", "sub/x.safetensors", "a.bin"]
)
def test_an_index_that_leaves_its_folder_is_refused(folder, name) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"transformer.wte.weight": name}}))
    with pytest.raises(PretrainedError, match="no safetensors file of this folder: refused"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"\xff" * 8 + raw[8:], lambda raw: b""]
)
def test_a_damaged_file_is_named(folder, damage) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(PretrainedError, match=r"model\.safetensors is no whole safetensors file"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is not there"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is no JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json holds no object"),
        (lambda folder: (folder / "model.safetensors").unlink(), "there are no weights to read"),
    ],
)
def test_an_incomplete_folder_is_told_what_it_lacks(folder, make, message) -> None:
    make(folder)
    with pytest.raises(PretrainedError, match=message):
        from_pretrained(folder)


def test_a_path_that_is_no_folder_is_answered_without_the_network(tmp_path) -> None:
    with pytest.raises(PretrainedError, match="is no folder: name the folder that holds"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(PretrainedError, match="dtype 'half' is unknown"):
        from_pretrained(FOLDER, dtype="half")


def test_a_model_that_is_there_stays(folder, tensors) -> None:
    with pytest.raises(PretrainedError, match="holds a model already"):
        save_pretrained(from_pretrained(FOLDER), folder)
    assert_same(load_file(folder / "model.safetensors"), tensors)


def test_what_has_no_published_form_is_not_written(tmp_path) -> None:
    banded = dataclasses.replace(preset("gpt3-125m"), num_layers=2, width=8, num_heads=2, vocab_size=10)
    with pytest.raises(PublishedError, match=r"windows \(None, 256\)"):
        save_pretrained(banded.build(nnx.Rngs(0)), tmp_path / "new")
    with pytest.raises(PretrainedError, match=r"^a Linear has no published form: give a model of a family"):
        save_pretrained(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), tmp_path / "new")
    assert not (tmp_path / "new").exists()
