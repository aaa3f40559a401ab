"""The loader lays out the same batch on every mesh, and however many processes read it."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.sharding import batch_sharding, make_mesh
from zoo.train.data.loader import batches
from zoo.train.data.packing import PackedText
from zoo.train.experiment import DataInfo

END = 256


def dataset(batch_size: int = 8, seed: int | None = 0) -> PackedText:
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random(5000) < 0.02, END, rng.integers(0, 256, 5000)).astype(np.uint16)
    tokens[0] = END
    return PackedText(DataInfo("test", "", 0, 0), tokens, np.ones(257, np.int32), END, 16, batch_size, seed)


@pytest.mark.parametrize("mesh", [None, "data=2,fsdp=4", "fsdp=2,tensor=4", "data=2,fsdp=2,tensor=2", "tensor=8"])
def test_the_batch_on_every_mesh(mesh):
    made = make_mesh(mesh)
    data = dataset()
    got = list(batches(data, made, 8, 3, 6))
    assert len(got) == 3
    for step, batch in zip(range(3, 6), got, strict=True):
        for name, array in data.batch(step, range(8)).items():
            assert batch[name].sharding == batch_sharding(made)
            np.testing.assert_array_equal(batch[name], array)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 1000), st.integers(0, 2**32), st.data())
def test_processes_together_hold_the_one_process_batch(batch_size, step, seed, draw):
    data = dataset(batch_size, seed)
    whole = data.batch(step, range(batch_size))
    owner = np.array(draw.draw(st.lists(st.integers(0, 3), min_size=batch_size, max_size=batch_size)))
    for process in range(4):
        rows = np.flatnonzero(owner == process)
        for name, array in data.batch(step, rows.tolist()).items():
            np.testing.assert_array_equal(array, whole[name][rows])


def test_nothing_to_load():
    assert list(batches(dataset(), make_mesh(), 8, 4, 4)) == []


def test_closing_ends_the_threads():
    before = threading.active_count()
    iterator = batches(dataset(), make_mesh(), 8, 0, 10**9)
    next(iterator)
    iterator.close()
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.02)
    assert threading.active_count() <= before


def test_a_fault_of_the_data_reaches_the_caller():
    class Broken(PackedText):
        def batch(self, step, rows):
            raise RuntimeError("disk on fire")

    data = Broken(*(getattr(dataset(), name) for name in PackedText.__dataclass_fields__))
    with pytest.raises(RuntimeError, match="disk on fire"):
        next(batches(data, make_mesh(), 8, 0, 1))


PROCESS = """
import sys
import jax
import numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
sys.path.insert(0, sys.argv[3])
from test_loader import dataset
from zoo.sharding import make_mesh
from zoo.train.data.loader import batches
data = dataset()
asked = []
original = type(data).batch
type(data).batch = lambda self, step, rows: asked.append(len(rows)) or original(self, step, rows)
for step, batch in enumerate(batches(data, make_mesh("data=4,tensor=2"), 8, 0, 3)):
    expected = original(data, step, range(8))
    for name, array in batch.items():
        assert array.shape == (8, 16)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[name][shard.index])
assert set(asked) == {4}, asked
print("rows agree")
"""


def test_two_processes_read_half_each(tmp_path):
    import os
    import socket
    from pathlib import Path

    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    here = str(Path(__file__).parent)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(i), here], stdout=subprocess.PIPE, text=True, env=environment
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [output.strip() for output in outputs] == ["rows agree"] * 2
