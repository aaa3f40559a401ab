"""One of several processes with four devices in all; test_checkpoints.py starts them. Prints what it saw, as JSON.

Usage: checkpoint_process.py PROCESS PROCESSES PORT JOBS, with JOBS a JSON list of [action, folder, mesh].
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

process, processes, port = map(int, sys.argv[1:4])
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={4 // processes}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from zoo import sharding  # noqa: E402
from zoo.train import saving  # noqa: E402
from zoo.train.checkpoints import Checkpoints  # noqa: E402
from zoo.train.experiment import UserError  # noqa: E402


def build(step: int = 0) -> dict[str, Any]:
    values = jnp.arange(64.0) / 7 + step
    return {
        "kernel": nnx.Param(values.reshape(8, 8), axes=("embed", "mlp")),
        "norm": nnx.Param(values[:4].astype(jnp.bfloat16), axes=("norm",)),
        "step": jnp.asarray(step, jnp.int32),
    }


def restore(folder: Path, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    said: list[str] = []
    checkpoints = Checkpoints(folder, keep_last=2, say=said.append)
    state, step, meta = checkpoints.restore(sharding.with_shardings(jax.eval_shape(build), mesh))
    expected = sharding.initialize(build, jnp.asarray(step), mesh=mesh)
    same = all(
        np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes()
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)
        for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True)
    )
    return {
        "step": step,
        "meta": meta,
        "same": same,
        "said": said,
        "spec": str(state["kernel"].get_value().sharding.spec),
    }


def save(folder: Path, mesh: jax.sharding.Mesh) -> list[str]:
    """What went wrong, in order, when steps 1, 2 and 3 were saved and waited for."""
    checkpoints = Checkpoints(folder, keep_last=2)
    failures = [
        failure_of(
            checkpoints.save, step, sharding.initialize(build, jnp.asarray(step), mesh=mesh), meta={"step": step}
        )
        for step in (1, 2, 3)
    ]
    return [*failures, failure_of(checkpoints.wait)]


def failure_of(call: Callable[..., None], *args: Any, **options: Any) -> str:
    try:
        call(*args, **options)
    except UserError as error:
        return str(error)
    return ""


def save_with_a_full_disk(folder: Path, mesh: jax.sharding.Mesh) -> list[str]:
    """The disk is full for the last process alone."""
    if process < processes - 1:
        return save(folder, mesh)
    with mock.patch.object(
        saving.ChecksummedArrayHandler, "_write", side_effect=OSError(28, "No space left on device")
    ):
        return save(folder, mesh)


def restore_damaged(folder: Path, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """A bit flips in a chunk of step 3 that the last process alone reads."""
    if process == 0:
        chunk = folder / "step_00000003/arrays/kernel/c/1/1"
        data = chunk.read_bytes()
        chunk.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    return restore(folder, mesh)


def main() -> None:
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", processes, process)
    actions = {f.__name__: f for f in (save, restore, save_with_a_full_disk, restore_damaged)}
    seen = [actions[action](Path(folder), sharding.make_mesh(mesh)) for action, folder, mesh in json.loads(sys.argv[4])]
    print(json.dumps(seen))


main()
