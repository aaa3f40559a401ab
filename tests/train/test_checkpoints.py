"""Checkpoints: what is saved comes back bit for bit, on any layout, and nothing altered is ever read."""

import dataclasses
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from zoo import sharding
from zoo.train import arrays, manifest
from zoo.train.checkpoints import Checkpoints, load, load_arrays, named, steps, verify
from zoo.train.experiment import UserError

META = {"seed": 3, "data": {"sha256": "abc", "position": 12.5}, "names": ["a", None]}


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs(), (8, 6)), axes=("embed", "mlp"))
        self.scale = nnx.Param(jnp.ones((6,), jnp.bfloat16) / 3, axes=("norm",))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: jax.Array
    model: Model
    opt_state: optax.OptState
    ema: Model | None = None


def build(seed: int = 0) -> State:
    model = Model(nnx.Rngs(seed))
    return State(jnp.asarray(seed, jnp.int32), model, optax.adamw(1e-3).init(model))


def assert_same(a: object, b: object) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def saved(folder: Path, *at: int, **options: int) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep_last=options.pop("keep_last", 10), **options)
    for step in at:
        checkpoints.save(step, build(step), meta={**META, "step": step})
    checkpoints.wait()
    return checkpoints


def reopened(folder: Path) -> tuple[Checkpoints, list[str]]:
    said: list[str] = []
    return Checkpoints(folder, keep_last=10, say=said.append), said


def abstract() -> State:
    return sharding.with_shardings(jax.eval_shape(build), sharding.make_mesh())


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_restores_what_was_saved(tmp_path):
    saved(tmp_path / "run" / "checkpoints", 5, 7)
    checkpoints, said = reopened(tmp_path / "run" / "checkpoints")
    assert checkpoints.steps() == [5, 7]
    state, step, meta = checkpoints.restore(abstract())
    assert step == 7 and meta == {**META, "step": 7} and said == []
    assert_same(state, build(7))
    assert state.model.kernel.get_metadata()["axes"] == ("embed", "mlp")
    assert checkpoints.verify(7) == []


def test_a_folder_can_be_named_by_way_of_another(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    saved(Path("../run"), 3)
    found = load(Path("../run"), jax.eval_shape(build).model, "model")
    assert found.step == 3 and not list((tmp_path / "here").iterdir())
    assert_same(found.state, build(3).model)


def test_no_checkpoint(tmp_path):
    checkpoints, _ = reopened(tmp_path / "absent")
    assert checkpoints.restore(abstract()) is None and checkpoints.steps() == []
    assert not (tmp_path / "absent").exists()
    with pytest.raises(UserError, match="has no checkpoint"):
        load_arrays(tmp_path / "absent")


def test_names_are_readable_and_know_no_module(tmp_path):
    saved(tmp_path, 1)
    assert (tmp_path / "step_00000001/arrays/model.kernel/zarr.json").exists()
    assert "opt_state.0.mu.kernel" in manifest.read(tmp_path / "step_00000001").arrays
    with pytest.raises(ValueError, match=r"both named 'a\.b'"):
        named({"a": {"b": 1}, "a.b": 2})


def test_unusual_names_and_dtypes(tmp_path):
    tree = {
        "a/../b %": jnp.arange(4, dtype=jnp.int4),
        "ü": jnp.asarray([True, False]),
        "empty": jnp.zeros((0, 3)),
        "f8": jnp.ones((2, 2), jnp.float8_e4m3fn),
        "nan": jnp.asarray([jnp.nan, -0.0, jnp.inf]),
    }
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(0, tree, meta={})
    checkpoints.wait()
    assert checkpoints.verify(0) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000000"]
    restored = reopened(tmp_path)[0].restore(jax.eval_shape(lambda: tree))
    assert_same(restored.state, tree)


def test_saving_copies_before_it_returns(tmp_path, monkeypatch):
    """The next step may overwrite donated buffers while the background still writes."""
    from zoo.train import saving

    gate = threading.Event()
    write = saving.ChecksummedArrayHandler._write
    monkeypatch.setattr(saving.ChecksummedArrayHandler, "_write", lambda *a: gate.wait(30) and write(*a))
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    state = {"x": jnp.arange(1000.0)}
    expected = np.array(state["x"])
    checkpoints.save(1, state, meta={})
    assert checkpoints.steps() == []
    state = jax.jit(lambda s: jax.tree.map(lambda x: x * -1, s), donate_argnums=0)(state)
    state["x"].block_until_ready()
    gate.set()
    checkpoints.wait()
    assert load_arrays(tmp_path).state["x"].tobytes() == expected.tobytes()


def test_large_shards_are_cut_into_equal_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "LARGEST_CHUNK", 1000)
    value = jnp.arange(7 * 12 * 50, dtype=jnp.float32).reshape(7, 12, 50)
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(1, {"x": value, "prime": jnp.arange(1009.0)}, meta={})
    checkpoints.wait()
    chunks = [f for f in files_of(tmp_path / "step_00000001/arrays/x") if f.name != "zarr.json"]
    assert len(chunks) == 25 and {f.stat().st_size for f in chunks} == {7 * 12 * 2 * 4 + 4}
    assert len(files_of(tmp_path / "step_00000001/arrays/prime")) == 2
    assert checkpoints.verify(1) == []
    assert np.array_equal(load_arrays(tmp_path, ["x"]).state["x"], value)


def test_every_flipped_bit_is_found(tmp_path):
    """One random bit in every file, several times over; benchmarks/bit_flips.py does this thousands of times."""
    saved(tmp_path, 1, 2)
    draw = random.Random(0)
    folder = tmp_path / "step_00000002"
    for file in files_of(folder) * 3:
        data = file.read_bytes()
        bit = draw.randrange(8 * len(data))
        file.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        assert verify(tmp_path, 2), file
        checkpoints, said = reopened(tmp_path)
        state, step, _ = checkpoints.restore(abstract())
        assert step == 1 and len(said) == 1 and "checkpoint 2 does not verify" in said[0] and "\n" not in said[0]
        assert_same(state, build(1))
        file.write_bytes(data)
    assert verify(tmp_path, 2) == []


def test_truncated_missing_and_foreign_files(tmp_path):
    saved(tmp_path, 1, 2)
    folder = tmp_path / "step_00000002"
    for file in files_of(folder):
        data = file.read_bytes()
        for damage in ("truncate", "append", "empty", "remove"):
            match damage:
                case "truncate":
                    file.write_bytes(data[:-1])
                case "append":
                    file.write_bytes(data + b"\0")
                case "empty":
                    file.write_bytes(b"")
                case "remove":
                    file.unlink()
            checkpoints, said = reopened(tmp_path)
            assert checkpoints.restore(abstract()).step == 1, (file, damage)
            if file.name == manifest.NAME and damage == "remove":
                assert checkpoints.steps() == [1]
            else:
                assert verify(tmp_path, 2) and file.name in said[0], (file, damage)
            file.write_bytes(data)
    (folder / "arrays" / "model.kernel" / "c" / "0" / "9").write_bytes(b"stray")
    assert verify(tmp_path, 2) == ["arrays/model.kernel/c/0/9 does not belong to it"]
    checkpoints, said = reopened(tmp_path)
    assert checkpoints.restore(abstract()).step == 2 and "arrays/model.kernel/c/0/9" in said[0]


def test_files_of_another_checkpoint_are_found(tmp_path):
    """Whole files, each consistent in itself, from another step or another array."""
    saved(tmp_path, 1, 2, 3)
    kernel = "arrays/model.kernel/c/0/0"
    shutil.copy(tmp_path / "step_00000001" / kernel, tmp_path / "step_00000003" / kernel)
    shutil.copy(tmp_path / "step_00000001/manifest.json", tmp_path / "step_00000002/manifest.json")
    assert verify(tmp_path, 3) == [f"{kernel} was altered"]
    checkpoints, said = reopened(tmp_path)
    assert checkpoints.restore(abstract()).step == 1 and len(said) == 2


def test_nothing_verifies(tmp_path):
    saved(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / f"step_{step:08d}" / "arrays/step/c").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* can be used .*arrays/step/c is missing"):
        reopened(tmp_path)[0].restore(abstract())


def test_mismatch_names_the_array(tmp_path):
    saved(tmp_path, 1)

    def changed(**fields: object) -> State:
        return dataclasses.replace(abstract(), **fields)

    checkpoints, _ = reopened(tmp_path)
    with pytest.raises(UserError, match=r"step is int32\[\] in the checkpoint and float32\[\] here"):
        checkpoints.restore(changed(step=jax.ShapeDtypeStruct((), jnp.float32)))
    with pytest.raises(UserError, match=r"step is int32\[\] in the checkpoint and int32\[1\] here"):
        checkpoints.restore(changed(step=jax.ShapeDtypeStruct((1,), jnp.int32)))
    with pytest.raises(UserError, match=r"ema\.kernel is nothing in the checkpoint and float32\[8, 6\] .*and 1 more"):
        checkpoints.restore(changed(ema=abstract().model))
    with pytest.raises(UserError, match=r"opt_state\.0\.count is int32\[\] in the checkpoint and nothing here"):
        checkpoints.restore(changed(opt_state=()))


def test_keep_last_and_keep_every(tmp_path):
    assert saved(tmp_path / "a", *range(1, 8), keep_last=2).steps() == [6, 7]
    assert saved(tmp_path / "b", *range(1, 8), keep_last=1, keep_every=3).steps() == [3, 6, 7]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["step_00000006", "step_00000007"]
    with pytest.raises(UserError, match="keep_last=0"):
        Checkpoints(tmp_path, keep_last=0)


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path):
    saved(tmp_path, 1, 2, 3)
    (tmp_path / "step_00000003/arrays/step/c").unlink()
    checkpoints = Checkpoints(tmp_path, keep_last=1, say=lambda line: None)
    assert checkpoints.restore(abstract()).step == 2
    checkpoints.save(2, build(2), meta={})  # restored just now: nothing to write
    checkpoints.save(4, build(4), meta={})
    checkpoints.wait()
    assert checkpoints.steps() == [4]


def test_a_damaged_later_checkpoint_is_replaced(tmp_path):
    saved(tmp_path, 1, 3)
    (tmp_path / "step_00000003/arrays/step/c").unlink()
    checkpoints = Checkpoints(tmp_path, keep_last=2, say=lambda line: None)
    assert checkpoints.restore(abstract()).step == 1
    for step in (2, 3, 4):
        checkpoints.save(step, build(step), meta={})
    checkpoints.wait()
    assert checkpoints.steps() == [3, 4] and checkpoints.verify(3) == []


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    saved(tmp_path, 1)
    os.rename(tmp_path / "step_00000001", tmp_path / "step_00000004")
    (tmp_path / "step_00000004/manifest.json").unlink()
    saved(tmp_path, 1)
    others = ["step_2", "step_0000000x", "notes", "step_00000003.txt", "step_000000005"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000009").write_text("a file")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (tmp_path / "step_00000008").symlink_to(tmp_path / "elsewhere")
    saved(tmp_path, 2)
    assert steps(tmp_path) == [1, 2]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step_00000001", "step_00000002", *others, "step_00000008", "step_00000009", "elsewhere"}
    assert (tmp_path / "elsewhere" / "kept").exists()


def test_a_failed_write_is_told_and_harms_nothing(tmp_path, monkeypatch):
    from zoo.train import saving

    checkpoints = saved(tmp_path, 1)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving.ChecksummedArrayHandler, "_write", full)
        checkpoints.save(2, build(2), meta={})
        with pytest.raises(UserError, match=r"checkpoint 2 was not saved in .*: the disk is full;") as caught:
            checkpoints.wait()
        assert "\n" not in str(caught.value)
        checkpoints.save(3, build(3), meta={})
        with pytest.raises(UserError, match="checkpoint 3 was not saved"):
            checkpoints.save(4, build(4), meta={})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"] and checkpoints.verify(1) == []
    checkpoints.save(3, build(3), meta={})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3] and checkpoints.verify(3) == []


def test_random_keys_are_saved_as_their_data(tmp_path):
    with pytest.raises(TypeError, match="key is a typed random key"):
        Checkpoints(tmp_path, keep_last=1).save(1, {"key": jax.random.key(0)}, meta={})
    assert list(tmp_path.iterdir()) == []


def test_meta_must_be_json(tmp_path):
    checkpoints = saved(tmp_path, 1)
    for meta in ({"loss": float("nan")}, {"path": Path("x")}):
        with pytest.raises((TypeError, ValueError)):
            checkpoints.save(2, build(2), meta=meta)
    assert checkpoints.steps() == [1]


def test_loading_a_part(tmp_path):
    saved(tmp_path, 1, 2)
    found = load_arrays(tmp_path, ["model", "step"])
    assert set(found.state) == {"model.kernel", "model.scale", "step"} and found.step == 2 and found.meta["seed"] == 3
    assert found.state["model.scale"].dtype == jnp.bfloat16
    model = load(tmp_path, jax.eval_shape(build).model, "model", step=1)
    assert model.step == 1
    assert_same(model.state, build(1).model)
    assert set(load_arrays(tmp_path).state) == set(named(build()))
    with pytest.raises(UserError, match=r"has no array 'mode': it has model, opt_state, step"):
        load_arrays(tmp_path, ["mode"])
    with pytest.raises(UserError, match=r"has no checkpoint 7: it has 1, 2"):
        load_arrays(tmp_path, step=7)
    with pytest.raises(UserError, match=r"ema\.kernel is nothing in the checkpoint"):
        load(tmp_path, jax.eval_shape(build).model, "ema")


def test_loading_a_part_opens_no_other_file(tmp_path):
    saved(tmp_path, 1)
    shutil.rmtree(tmp_path / "step_00000001/arrays/opt_state.0.mu.kernel")
    assert load_arrays(tmp_path, ["model"]).step == 1
    said: list[str] = []
    (tmp_path / "step_00000001/arrays/model.scale/c/0").write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.scale/c/0 has 0 bytes and should have 16"):
        load_arrays(tmp_path, ["model"], say=said.append)


def test_reading_needs_no_orbax(tmp_path):
    saved(tmp_path, 1)
    code = f"""
import pathlib, sys
from zoo.train.checkpoints import load_arrays
print(load_arrays(pathlib.Path({str(tmp_path)!r}), ["step"]).state["step"], "orbax.checkpoint" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["1", "False"]


def test_orbax_itself_can_open_the_arrays(tmp_path):
    import orbax.checkpoint as ocp

    saved(tmp_path, 1)
    state = named(build(1))
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arguments = {name: ocp.ArrayRestoreArgs(sharding=where) for name in state}
    found = ocp.PyTreeCheckpointer().restore(tmp_path / "step_00000001/arrays", restore_args=arguments)
    assert_same(found, state)


def test_the_manifest_is_json_with_its_own_digest(tmp_path):
    saved(tmp_path, 1)
    text = (tmp_path / "step_00000001/manifest.json").read_text()
    content = json.loads(text)
    assert content["step"] == 1 and content["meta"] == {**META, "step": 1} and len(content["sha256"]) == 64
    # An upper-case exponent or digest, or another order of keys, says the same to JSON and is a change all the same.
    for altered in (
        text.replace(content["sha256"], content["sha256"].upper()),
        text + " ",
        text.replace(": 1", ":  1", 1),
    ):
        (tmp_path / "step_00000001/manifest.json").write_text(altered)
        assert verify(tmp_path, 1) == ["manifest.json was altered or is of another format than 1"]


def run_processes(processes: int, *jobs: tuple[str, Path, str]) -> list[list[dict[str, Any]]]:
    """For each job (action, folder, mesh), what each process saw."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parent / "checkpoint_process.py"
    arguments = [str(processes), str(port), json.dumps(jobs, default=str)]
    started = [
        subprocess.Popen([sys.executable, script, str(process), *arguments], stdout=subprocess.PIPE, text=True)
        for process in range(processes)
    ]
    try:
        seen = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in started]
    finally:
        for process in started:
            process.kill()
    return list(map(list, zip(*seen, strict=True)))


def test_processes_and_meshes(tmp_path):
    """Saved by two processes, restored by two and by one on other meshes, and the other way round."""
    two, one = tmp_path / "two", tmp_path / "one"
    saw, restored = run_processes(2, ("save", two, "fsdp=2,tensor=2"), ("restore", two, "fsdp=2,tensor=2"))
    assert saw == [[""] * 4] * 2 and steps(two) == [2, 3]
    expected = {"step": 3, "meta": {"step": 3}, "same": True, "said": []}
    assert restored == [{**expected, "spec": "P('fsdp', 'tensor')"}] * 2
    assert verify(two, 3) == [] and len(files_of(two / "step_00000003/arrays/kernel")) == 5
    kernel = np.arange(64, dtype=np.float32).reshape(8, 8) / 7 + 3
    np.testing.assert_allclose(load_arrays(two, ["kernel"]).state["kernel"], kernel, rtol=1e-6)

    restored, _ = run_processes(1, ("restore", two, "fsdp=4"), ("save", one, "data=2,fsdp=2"))
    assert restored == [{**expected, "spec": "P('fsdp', None)"}]
    restored, again = run_processes(2, ("restore", two, "data=2,tensor=2"), ("restore", one, "tensor=4"))
    assert restored == again == [{**expected, "spec": "P(None, 'tensor')"}] * 2


def test_processes_fail_and_go_back_together(tmp_path):
    mesh = "fsdp=2,tensor=2"
    jobs = [(action, tmp_path, mesh) for action in ("save_with_a_full_disk", "save", "restore_damaged")]
    failed, saw, restored = run_processes(2, *jobs)
    for seen, why in zip(failed, ("process 1: the disk is full", "the disk is full"), strict=True):
        lines = [
            f"checkpoint {step} was not saved in {tmp_path}: {why}; those before it are as they were" for step in (1, 3)
        ]
        assert seen == ["", lines[0], "", lines[1]]
    assert saw == [[""] * 4] * 2 and steps(tmp_path) == [2, 3]
    for seen in restored:
        assert seen["step"] == 2 and seen["same"]
    assert "going back to checkpoint 2" in restored[0]["said"][0]


def test_a_full_disk(tmp_path):
    """A real one: a tmpfs of 1 MiB in a mount namespace that ends with the child, and a state of 200 KiB."""
    inside = """
import json, sys
from pathlib import Path
import jax.numpy as jnp
from zoo.train.checkpoints import Checkpoints
from zoo.train.experiment import UserError

folder = Path(sys.argv[1])
(folder / "filler").write_bytes(bytes(500_000))
checkpoints = Checkpoints(folder / "checkpoints", keep_last=9)
failures = []
for step in range(1, 6):
    try:
        checkpoints.save(step, {"x": jnp.full(25_600, step), "y": jnp.full(25_600, -step)}, meta={})
        checkpoints.wait()
    except UserError as error:
        failures.append([step, str(error)])
        (folder / "filler").unlink(missing_ok=True)
problems = [checkpoints.verify(step) for step in checkpoints.steps()]
print(json.dumps({"steps": checkpoints.steps(), "failures": failures, "problems": problems}))
"""
    command = 'mount -t tmpfs -o size=1m tmpfs "$1" && exec "$2" -c "$3" "$1"'
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*namespace, command, "", tmp_path, "true"]).returncode:
        pytest.skip("this system lets its users mount nothing")
    run = subprocess.run([*namespace, command, "", tmp_path, sys.executable, inside], capture_output=True, text=True)
    seen = json.loads(run.stdout)
    assert seen["steps"] == [1, 2, 4, 5] and seen["problems"] == [[]] * 4
    ((step, line),) = seen["failures"]
    assert step == 3 and "the disk is full" in line and "\n" not in line


def test_killed_at_any_moment(tmp_path):
    """A process that saves and deletes without pause is killed; what is listed afterwards verifies, every time."""
    inside = """
import sys
from pathlib import Path
import jax.numpy as jnp
from zoo.train.checkpoints import Checkpoints

checkpoints = Checkpoints(Path(sys.argv[1]), keep_last=1)
first = (checkpoints.steps() or [0])[-1] + 1
for step in range(first, 10_000):
    checkpoints.save(step, {f"x{i}": jnp.full(1000, step) for i in range(10)}, meta={})
    print(step, flush=True)
"""
    draw = random.Random(1)
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-c", inside, tmp_path], stdout=subprocess.PIPE, text=True)
        for _ in range(3):
            child.stdout.readline()
        time.sleep(draw.uniform(0, 0.3))
        child.kill()
        child.wait()
        child.stdout.close()
        assert 1 <= len(steps(tmp_path)) <= 2 and all(verify(tmp_path, step) == [] for step in steps(tmp_path))
        last = steps(tmp_path)[-1]
        assert (load_arrays(tmp_path).state["x9"] == last).all()
    saved(tmp_path, last + 1, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == [f"step_{last + 1:08d}"]


def test_deletion_begins_with_the_manifest(tmp_path, monkeypatch):
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep_last=1, say=said.append)
    checkpoints.save(1, build(1), meta={})
    checkpoints.wait()

    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        checkpoints.save(2, build(2), meta={})
        checkpoints.wait()
    assert said == ["checkpoint 1 could not be deleted: Permission denied"]
    assert checkpoints.steps() == [2] and (tmp_path / "step_00000001/arrays").exists()
