"""Cells that the rows of all families have: differences, round trips, a mesh, chips that are not there, speeds."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

import zoo
from benchmarks import pod
from zoo import sharding

GOLDEN = Path(__file__).parents[1] / "tests" / "parity"
RESULTS = Path(__file__).with_name("results")
MESH = "data=2,fsdp=2,tensor=2"

EVEN = {"width": 32, "num_heads": 4, "num_kv_heads": 2, "num_decoder_heads": 4, "head_dim": 8, "mlp_width": 48}
EVEN |= {"decoder_mlp_width": 48}
"""Sizes that a mesh of two in every direction divides; golden files have awkward ones."""


def difference(a: Any, b: Any) -> float:
    """The largest one, relative to the largest value of b, or to 1."""
    a, b = np.asarray(a), np.asarray(b)
    return float(np.abs(a - b).max() / max(1.0, float(np.abs(b).max())))


def largest(pairs: Iterable[tuple[Any, Any]]) -> str:
    """The largest difference of any pair, as a cell."""
    return f"{max(difference(a, b) for a, b in pairs):.0e}"


def round_trip(folder: Path) -> str:
    """Whether a published folder, read and written, has the same tensors in each of its files."""
    with tempfile.TemporaryDirectory() as parent:
        zoo.save_pretrained(zoo.from_pretrained(folder), Path(parent) / "out")
        return "same bits" if _tensors(Path(parent) / "out") == _tensors(folder) else "DIFFERS"


def _tensors(folder: Path) -> dict[tuple[str, str], tuple[Any, ...]]:
    return {
        (str(path.relative_to(folder)), name): (x.dtype, x.shape, x.tobytes())
        for path in folder.rglob("*.safetensors")
        for name, x in load_file(path).items()
    }


def even(config: Any, **sizes: Any) -> dict[str, Any]:
    """Of the sizes EVEN, and of those given, the ones that a config has."""
    fields = {field.name for field in dataclasses.fields(config) if getattr(config, field.name) is not None}
    return {name: size for name, size in (EVEN | sizes).items() if name in fields}


def four_rows(arrays: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Arrays with as many rows as MESH cuts a batch into; those without `count` rows stay."""
    return {n: np.concatenate([x] * 4)[:4] if x.ndim and len(x) == count else x for n, x in arrays.items()}


def sharded(model: Any, call: Callable[[Any], Any]) -> str:
    """What `call` makes of a model on MESH, against what it makes on one device."""
    mesh = sharding.make_mesh(MESH)
    whole = call(model)
    with sharding.use(mesh):
        parts = call(jax.device_put(model, sharding.shardings(model, mesh)))
    return largest(zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True))


def compiled(experiment: Any, example: Any) -> str:
    """GiB a chip of a training step over batches of rows such as `example`, or why there is none."""
    try:
        pod.devices()
    except Exception as problem:
        return f"not run: {str(problem).splitlines()[0][:40]}"
    held = pod.held(experiment, example, "fsdp=8")
    return f"{held:.1f} GiB" if held > 0.1 else f"{held:.3f} GiB"


def newest(file: str, setting: Mapping[str, Any]) -> dict[str, Any] | None:
    """The last result in a file of RESULTS that has a torch side and this setting."""
    path = RESULTS / file
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return next((one for one in reversed(found) if "torch" in one and setting.items() <= one.items()), None)


def ratio(result: Mapping[str, Any] | None, of_it: str = "") -> str:
    """zoo's pace over torch's.  of_it: what part of the preset ran, where it was not all."""
    if result is None:
        return "not measured"
    pace = f"{result['zoo']['per_second'] / result['torch']['per_second']:.2f}"
    return f"{pace} ({of_it})" if of_it else pace
