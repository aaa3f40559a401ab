"""Published checkpoints in and out: a folder with config.json and safetensors, or a model of the Hugging Face hub.

Tensors are read one at a time and laid onto the shards that this host holds: at no time is more of the model in its
memory than what stays there and one tensor.
"""

import dataclasses
import functools
import math
import mmap
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import rearrange
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from zoo import sharding
from zoo.layers.linear import DTYPES
from zoo.models import published_config
from zoo.models.published import Layout, Weight
from zoo.published_folder import (
    FLOATS,
    PIPELINE_INDEX,
    PretrainedError,
    Stored,
    Writer,
    find_model,
    holds_model,
    read_json,
    stored_tensors,
    weight_file,
    weight_files,
)

SHARD_BYTES = 5 * 10**9

COPYING, COPIED_AT_ONCE = min(8, os.cpu_count() or 1), 2**20
"""Threads that copy a tensor, and the bytes below which one does."""


def from_pretrained(
    source: str | os.PathLike,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: sharding.Rules | None = None,
) -> Any:
    """The model of a folder, or of a hub id such as "openai-community/gpt2", which is downloaded unless it is cached.

    A folder with model_index.json gives a zoo.pipelines.Pipeline of such models.

    dtype: of parameters and of computing, by name. None: parameters as they are stored, computing in float32.
    mesh: the model is laid out over it by `rules` (sharding.RULES where None). None: one device.
    `save_pretrained` writes the dtype back that was stored, whatever it was read as.
    Raises PretrainedError; PublishedError for a model that no family here can be, and LayerError for sizes that do not
    fit one another.
    """
    folder = find_model(source)
    if (folder / PIPELINE_INDEX).exists():
        from zoo.pipelines import read_pipeline

        return read_pipeline(folder, dtype=dtype, mesh=mesh, rules=rules)
    return read_model(folder, dtype=dtype, mesh=mesh, rules=rules)


def read_model(folder: Path, *, dtype: str | None, mesh: Mesh | None, rules: sharding.Rules | None) -> nnx.Module:
    """What `from_pretrained` gives for the folder of one model."""
    config = published_config(read_json(folder / "config.json") | _rules_of_generation(folder))
    if dtype is not None:
        if dtype not in DTYPES:
            raise PretrainedError(f"dtype {dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
        precision = dataclasses.replace(config.precision, parameters=dtype, compute=dtype)
        config = dataclasses.replace(config, precision=precision)
    tensors = Tensors(folder, config.published_layout())
    told = config.with_tensors(tensors.found) if hasattr(config, "with_tensors") else config
    if told != config:
        config, tensors = told, Tensors(folder, told.published_layout())
    model = sharding.abstract(lambda: config.build(nnx.Rngs(0)))
    return load(model, tensors, dtype, layouts(model, mesh, rules))


def read_weights(
    path: str | os.PathLike, config: Any, *, mesh: Mesh | None = None, rules: sharding.Rules | None = None
) -> Any:
    """The model of a config whose weights are one safetensors file, with no config.json beside it.

    Parameters are as they are stored. mesh, rules: as `from_pretrained` has them. Raises PretrainedError.
    """
    tensors = Tensors(Path(path).expanduser(), config.published_layout())
    model = sharding.abstract(lambda: config.build(nnx.Rngs(0)))
    return load(model, tensors, None, layouts(model, mesh, rules))


def _rules_of_generation(folder: Path) -> dict[str, Any]:
    """What generation must obey: of a file of its own, or none where older folders have it in config.json."""
    if not (folder / "generation_config.json").exists():
        return {}
    fields = read_json(folder / "generation_config.json")
    rules = {name: fields.get(name) for name in ("forced_bos_token_id", "forced_eos_token_id", "bad_words_ids")}
    # Of the tokens that end a text, config.json may know fewer: chats also end with their turns.
    ends = fields.get("eos_token_id")
    return rules if ends is None else rules | {"eos_token_id": ends}


def save_pretrained(model: Any, folder: str | os.PathLike, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a folder that the torch implementation of the model's family loads: config.json and safetensors.

    Of a zoo.pipelines.Pipeline, the folder that diffusers loads, with each model in a folder of its own.

    shard_bytes: of one file; what is larger is split, with an index. Each tensor has the dtype that it was read with,
    else that of its parameter. Every process of a mesh must call it; the first one writes.
    Raises PretrainedError where the folder holds a model already, and PublishedError where there is no published form.
    """
    folder = Path(folder).expanduser()
    from zoo.pipelines import Pipeline, save_pipeline

    if isinstance(model, Pipeline):
        return save_pipeline(model, folder, shard_bytes=shard_bytes)
    if holds_model(folder):
        raise PretrainedError(f"{folder} holds a model already: name another folder, or move that one away")
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_published"):
        raise PretrainedError(f"a {type(model).__name__} has no published form: give a model of a family of zoo.models")
    fields, layout = config.to_published(), config.published_layout()
    writer = Writer(folder, shard_bytes, layout.stem) if jax.process_index() == 0 else None
    dtypes: Counter[str] = Counter()
    for group in groups(model, layout.weights):
        for tensor in group.tensors:
            value = gathered(group, tensor)
            dtypes[str(value.dtype)] += value.size
            if writer is not None:
                writer.add(tensor.name, value)
    if writer is not None:
        stored = {"dtype": dtypes.most_common(1)[0][0]} if "model_type" in fields else {}
        writer.finish(fields | stored)


class Tensor(NamedTuple):
    """A published tensor, and the row of the stacked parameters that it holds; None where they are not stacked."""

    name: str
    row: int | None


class Group(NamedTuple):
    """Parameters that share tensors: those of one Weight, in one block of a stack's period."""

    weight: Weight
    variables: dict[str, nnx.Variable]  # by path
    tensors: list[Tensor]

    @property
    def one_shape(self) -> tuple[int, ...]:
        """Shape of a parameter of one layer, without the rows that pad a vocabulary."""
        return real_shape(next(iter(self.variables.values())), stacked=self.tensors[0].row is not None)

    def parts(self, tensor: np.ndarray) -> list[np.ndarray]:
        """A published tensor as the parameters of one layer, without a copy where the layout permits."""
        whole = rearrange(tensor, self.weight.layout, **self.weight.sizes(self.one_shape))
        return [whole] if len(self.variables) == 1 else list(whole)

    def tensor(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The published tensor of the parameters of one layer."""
        whole = parts[0] if len(parts) == 1 else np.stack(parts)
        left, right = self.weight.layout.split("->")
        return np.ascontiguousarray(rearrange(whole, f"{right} -> {left}", **self.weight.sizes(self.one_shape)))


def shapes(all_groups: Iterable[Group]) -> dict[str, tuple[int, ...]]:
    """The shape of every published tensor by its name."""
    return {t.name: group.weight.tensor_shape(group.one_shape) for group in all_groups for t in group.tensors}


def wanted_tensors(config: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, by its name, that the published folder of a config's model holds."""
    model = sharding.abstract(lambda: config.build(nnx.Rngs(0)))
    return shapes(groups(model, config.published_layout().weights))


def real_shape(variable: nnx.Variable, *, stacked: bool) -> tuple[int, ...]:
    shape, rows = variable.shape, variable.get_metadata().get("rows")
    shape = shape[1:] if stacked else shape
    return shape if rows is None else (rows, *shape[1:])


def groups(model: Any, weights: Iterable[Weight]) -> Iterator[Group]:
    """The parameters of a (possibly abstract) model and their published tensors: each parameter once."""
    variables = by_path(model)
    blocks = 1 + max((int(n) for path in variables for n in re.findall(r"\.blocks\.(\d+)\.", path)), default=0)
    for weight in weights:
        if "*" not in weight.parameters[0]:
            yield Group(weight, {path: variables[path] for path in weight.parameters}, [Tensor(weight.name, None)])
            continue
        for block in range(blocks):
            found = {path: variables[path] for path in (p.replace("*", str(block)) for p in weight.parameters)}
            rows = next(iter(found.values())).shape[0]
            tensors = [Tensor(weight.name.format(row * blocks + block), row) for row in range(rows)]
            yield Group(weight, found, tensors)


def by_path(model: Any) -> dict[str, Any]:
    """Every parameter of a module, or what stands in its place, by its path."""
    leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=sharding.is_variable)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def layer_count(model: Any) -> int:
    """Layers of the deepest stack's parameters."""
    variables = by_path(model).values()
    return max((v.shape[0] for v in variables if sharding.logical_axes(v)[:1] == ("layers",)), default=0)


def layouts(model: Any, mesh: Mesh | None, rules: sharding.Rules | None) -> dict[str, Sharding]:
    """Where each parameter goes."""
    if mesh is None:
        here = SingleDeviceSharding(jax.local_devices()[0])
        return dict.fromkeys(by_path(model), here)
    return by_path(sharding.shardings(model, mesh, rules or sharding.RULES))


class Tensors:
    """The tensors of a folder, or of one file, by their names in the class with a head; found, and not yet read."""

    def __init__(self, source: Path, layout: Layout):
        self.source, self.layout = source, layout
        known = {weight.name.format("0") for weight in layout.weights} | set(layout.tied)
        self.found: dict[str, Stored] = {}
        for path in weight_files(source, layout.stem) if source.is_dir() else [weight_file(source)]:
            for name, stored in stored_tensors(path).items():
                if any(re.fullmatch(pattern, name) for pattern in layout.ignored):
                    continue
                full = name
                for old, new in layout.renamed.items():
                    full = full.removesuffix(old) + new if full.endswith(old) else full
                full = full if full.startswith(layout.prefix) or full in known else layout.prefix + full
                if full in self.found:
                    raise PretrainedError(
                        f"{source} has the tensor {full} twice, in {path.name} for one: keep one file"
                    )
                self.found[full] = stored

    def check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Raises PretrainedError, with all names, unless the tensors are those wanted, in their shapes."""
        names = self.found.keys()
        missing = sorted(wanted.keys() - names)
        left_over = sorted(names - wanted.keys() - self.layout.tied.keys())
        held = [(name, self.found[name]) for name in sorted(wanted.keys() & names)]
        wrong = [f"{name} {stored.shape} for {wanted[name]}" for name, stored in held if stored.shape != wanted[name]]
        refuse(
            self.source,
            {
                "missing": missing,
                "left over": left_over,
                f"of another shape than {'config.json says' if self.source.is_dir() else 'it has'}": wrong,
                "no floating-point numbers": [f"{n} {x.dtype}" for n, x in held if x.dtype not in FLOATS.values()],
            },
        )
        for name, own in self.layout.tied.items():
            if name in names and not np.array_equal(self.found[name].read(), self.found[own].read()):
                raise PretrainedError(f"{self.source}: {name} differs from {own}, and here they are one: no such model")


def refuse(source: Path, problems: Mapping[str, Sequence[str]]) -> None:
    """Raises PretrainedError with all names of tensors that have a problem, unless there are none."""
    told = [f"{what}: {', '.join(names)}" for what, names in problems.items() if names]
    if told:
        model = "the model that its config.json names" if source.is_dir() else "the model that it is read for"
        raise PretrainedError(f"{source} does not hold {model}; {'; '.join(told)}")


def load(model: Any, tensors: Tensors, dtype: str | None, places: Mapping[str, Sharding]) -> Any:
    """An abstract model with its parameters read, each onto its place."""
    if (layers := layer_count(model)) > len(tensors.found):
        raise PretrainedError(f"{tensors.source} has {len(tensors.found)} tensors, and its config.json {layers} layers")
    all_groups = list(groups(model, tensors.layout.weights))
    tensors.check(shapes(all_groups))
    loaded: dict[str, nnx.Variable] = {}
    for group in all_groups:
        # One dtype for all layers: the widest, where a file mixes them.
        stored = str(jax.numpy.result_type(*{tensors.found[tensor.name].dtype for tensor in group.tensors}))
        buffers = {path: Shards(variable, dtype or stored, places[path]) for path, variable in group.variables.items()}
        for tensor in group.tensors:
            for shards, part in zip(buffers.values(), group.parts(tensors.found[tensor.name].read()), strict=True):
                shards.write(part, tensor.row)
        loaded |= {path: group.variables[path].replace(b.array(), stored=stored) for path, b in buffers.items()}
    paths = list(by_path(model))
    if nameless := set(paths) - loaded.keys():
        raise PretrainedError(f"parameters without a published name: {', '.join(sorted(nameless))}")
    structure = jax.tree.structure(model, is_leaf=sharding.is_variable)
    return jax.tree.unflatten(structure, [loaded[path] for path in paths])


class Shards:
    """The shards of one parameter that this host's devices hold, while they are filled."""

    def __init__(self, variable: nnx.Variable, dtype: str, place: Sharding):
        self.shape, self.place = variable.shape, place
        self.devices: dict[Any, str] = {}
        self.buffers: dict[str, tuple[list[slice], np.ndarray]] = {}
        for device, index in place.addressable_devices_indices_map(self.shape).items():
            self.devices[device] = which = str(index)
            if which not in self.buffers:
                ends = [slice(*one.indices(size)) for one, size in zip(index or (), self.shape, strict=True)]
                buffer = pages(place.shard_shape(self.shape), jax.numpy.dtype(dtype))
                self.buffers[which] = ends, buffer

    def write(self, value: np.ndarray, row: int | None) -> None:
        """Puts a parameter, or row `row` of a stacked one, where it belongs; what pads a vocabulary stays zero."""
        for index, buffer in self.buffers.values():
            if row is not None:
                rows, *index = index
                if not rows.start <= row < rows.stop:
                    continue
                buffer = buffer[row - rows.start]
            part = value[tuple(index)]
            copy(buffer[tuple(slice(size) for size in part.shape)], part)

    def array(self) -> jax.Array:
        buffers = {device: self.buffers[which][1] for device, which in self.devices.items()}
        shards = [jax.device_put(buffer, device, may_alias=True) for device, buffer in buffers.items()]
        return jax.make_array_from_single_device_arrays(self.shape, self.place, shards)


def pages(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros on pages of their own, which JAX takes as they are on a CPU, and which exist once they are written.

    numpy would ask for huge pages, and a virtual machine that returns its free ones has to fetch those from its host.
    """
    memory = mmap.mmap(-1, max(1, math.prod(shape) * dtype.itemsize))
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)


def copy(into: np.ndarray, value: np.ndarray) -> None:
    """into[...] = value by several threads: new pages cost more than their copying, and come to each thread apart."""
    if value.nbytes < COPIED_AT_ONCE or not value.ndim:
        into[...] = value
        return
    step = -(-len(value) // COPYING)
    parts = [slice(start, start + step) for start in range(0, len(value), step)]
    list(copiers().map(lambda part: np.copyto(into[part], value[part], casting="unsafe"), parts))


@functools.cache
def copiers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(COPYING, thread_name_prefix="zoo-copy")


def gathered(group: Group, tensor: Tensor) -> np.ndarray:
    """One published tensor, on every host, in the dtype that it was stored in."""
    parts = []
    for variable in group.variables.values():
        array = variable[...] if tensor.row is None else variable[tensor.row]
        host = array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True)
        stored = variable.get_metadata().get("stored") or str(array.dtype)
        real = tuple(slice(size) for size in group.one_shape)
        parts.append(np.asarray(host)[real].astype(jax.numpy.dtype(stored)))
    return group.tensor(parts)
