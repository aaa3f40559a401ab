"""From a Dataset to global arrays on a mesh: each process builds its rows in background threads."""

from collections.abc import Generator

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from zoo.sharding import batch_sharding, rows_of_process
from zoo.train.experiment import Batch, Dataset

_THREADS = 2
_AHEAD = 4  # batches


def batches(dataset: Dataset, mesh: Mesh, batch_size: int, start: int, stop: int) -> Generator[Batch, None, None]:
    """Global batches `start` to `stop` - 1 of `dataset`, leading axis `batch_size`, laid out by `batch_sharding(mesh)`.

    What a batch holds does not depend on the mesh or the number of processes: each asks for the rows of its devices.
    Up to four batches are built ahead; the time that `next` takes is the time spent waiting for input. Closing the
    iterator ends the threads.
    """
    sharding = batch_sharding(mesh)
    rows = rows_of_process(mesh, batch_size)
    asked = rows.tolist()

    def place(local: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # it is for arrays of keys alone
            first, last, _ = index[0].indices(batch_size)
            begin, end = np.searchsorted(rows, (first, last))
            return local[begin:end]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, part)

    steps = grain.MapDataset.range(start, stop).map(lambda step: dataset.batch(int(step), asked))
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
    local_batches = iter(steps.to_iter_dataset(options))
    try:
        for batch in local_batches:
            yield {name: place(array) for name, array in batch.items()}
    finally:
        local_batches.close()
