"""Logical axes to mesh axes: one table of rules, meshes, constraints, and state that is born sharded.

A parameter names its logical axes where it is made (`nnx.Param(x, axes=("embed", "mlp"))`); an activation is named
where it matters (`constrain(x, "act_batch", "act_length", "act_embed")`). No module knows a mesh. With none set,
everything here does nothing, so that a module works in anyone's code.

The alphabet of logical axes:

    parameters    layers  vocab  positions  embed  mlp  heads  kv_heads  head_dim  norm
                  kernel_y  kernel_x  conv_in  conv_out  time  classes
    activations   act_batch  act_length  act_embed  act_mlp  act_heads  act_kv_heads  act_head_dim  act_vocab
                  act_y  act_x  act_channels

and of mesh axes, outermost (slowest network) first: data, fsdp, stage, sequence, expert, tensor.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")
Axes = tuple[str | None, ...]
Rules = Mapping[str, tuple[str, ...]]

MESH_AXES = ("data", "fsdp", "stage", "sequence", "expert", "tensor")

RULES: Rules = {
    "layers": ("stage",),
    "vocab": ("tensor",),
    "positions": (),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "norm": (),
    "kernel_y": (),
    "kernel_x": (),
    "conv_in": ("fsdp",),
    "conv_out": ("tensor",),
    "time": ("fsdp",),
    "classes": (),
    "act_batch": ("data", "fsdp"),
    "act_length": ("sequence",),
    "act_embed": (),
    "act_mlp": ("tensor",),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_head_dim": (),
    "act_vocab": ("tensor",),
    "act_y": (),
    "act_x": (),
    "act_channels": ("tensor",),
}

# Grouped keys and values are few: where the tensor axis is wider than their number, every device holds them all.
_REPLICATED_WHEN_UNEVEN = {"kv_heads"}

_rules: ContextVar[Rules | None] = ContextVar("zoo_sharding_rules", default=None)


class ShardingError(ValueError):
    """A mesh and an array that do not fit; the message names the axis, both sizes and the mend."""


def parse_mesh(text: str) -> dict[str, int]:
    """`"data=2,fsdp=4"` as `{"data": 2, "fsdp": 4}`; raises ShardingError on an unknown axis or a size below 1."""
    sizes: dict[str, int] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES:
            raise ShardingError(f"mesh axis {axis!r} is unknown: the axes are {', '.join(MESH_AXES)}")
        if axis in sizes:
            raise ShardingError(f"mesh axis {axis!r} is given twice in {text!r}: give each axis once")
        if not size.isdigit() or int(size) < 1:
            raise ShardingError(f"mesh axis {axis!r} has size {size!r}: write {axis}=N with N a whole number from 1")
        sizes[axis] = int(size)
    return sizes


def make_mesh(sizes: Mapping[str, int] | str | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:  # pyright: ignore[reportInvalidTypeForm]
    """A mesh with all six axes (those not named have size 1), of AxisType.Auto.

    With no sizes, every device is on `data`. Over several slices of a pod, `data` is laid across the slices first, so
    that the data-centre network carries gradient reductions alone; it must then be a multiple of their number.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = parse_mesh(sizes) if isinstance(sizes, str) else dict(sizes or {"data": len(devices)})
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    if math.prod(shape) != len(devices):
        named = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ShardingError(
            f"mesh {named} needs {math.prod(shape)} devices and there are {len(devices)}: "
            f"choose sizes whose product is {len(devices)}"
        )
    grid = device_grid(shape, devices)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def check_used(mesh: Mesh, rules: Rules = RULES) -> None:
    """Raises ShardingError for a mesh axis that no rule lays anything over: its devices would repeat one another."""
    used = {axis for axes in rules.values() for axis in axes}
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in used:
            raise ShardingError(f"mesh axis {axis}={size} cuts nothing here: choose among {', '.join(sorted(used))}")


def device_grid(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices in the shape of a mesh, neighbours on the network near each other, slices outermost on `data`."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    ring = MESH_AXES.index("sequence")
    if slices == 1:
        return in_a_cycle(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), ring)
    if shape[0] % slices:
        raise ShardingError(
            f"mesh axis data={shape[0]} does not divide over {slices} slices: make data a multiple of {slices}"
        )
    inner, outer = (shape[0] // slices, *shape[1:]), (slices,) + (1,) * (len(shape) - 1)
    return in_a_cycle(mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True), ring)


def in_a_cycle(grid: np.ndarray, axis: int) -> np.ndarray:
    """The devices of a mesh axis in an order that comes back to where it began, no step longer than its network asks.

    A ring passes arrays along such an axis. libtpu 0.0.52 lets that overlap with computing on a v5e slice in this
    order, and not in the order of rows. Along a line the way out takes every other chip and the way back the rest;
    over a grid of chips with an even side every step is to a neighbour. Anything else, and what has no coordinates,
    stays as it was.
    """
    line = np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1)[:, 0]
    coords = np.array([getattr(device, "coords", ()) for device in line], int).reshape(len(line), -1)
    values = [np.unique(column) for column in coords.T]
    sides = sorted((i for i, v in enumerate(values) if len(v) > 1), key=lambda i: len(values[i]) % 2)
    sizes = tuple(len(values[i]) for i in sides)
    if not sizes or math.prod(sizes) != len(line) or (len(sizes) > 1 and sizes[0] % 2):
        return grid
    places = [tuple(int(np.searchsorted(values[i], place[i])) for i in sides) for place in coords]
    return np.take(grid, [places.index(place) for place in _cycle(sizes)], axis)


def _cycle(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every place of a grid whose first side is even, out along one edge and back through all that is left."""
    if len(sizes) == 1:
        return [(i,) for i in (*range(0, sizes[0], 2), *reversed(range(1, sizes[0], 2)))]
    edge, *others = _path(sizes[1:])
    rows = [(row, others if turn % 2 == 0 else others[::-1]) for turn, row in enumerate(reversed(range(sizes[0])))]
    return [(row, *edge) for row in range(sizes[0])] + [(row, *place) for row, line in rows for place in line]


def _path(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every place of a grid, to and fro: each is a neighbour of the one before."""
    if not sizes:
        return [()]
    line = _path(sizes[1:])
    return [(row, *place) for row in range(sizes[0]) for place in (line if row % 2 == 0 else line[::-1])]


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules = RULES) -> Iterator[Mesh]:
    """Within it, `constrain` and `zoo.kernels.attention` follow `rules` on `mesh`; it also sets JAX's own mesh.

    A mesh with Explicit axes is taken as its Auto twin over the same devices: the rules speak of layouts, which the
    compiler may complete, and Explicit axes would demand one for every intermediate value.
    """
    automatic = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    token = _rules.set(rules)
    try:
        with jax.set_mesh(automatic):
            yield automatic
    finally:
        _rules.reset(token)


def active() -> tuple[jax.sharding.AbstractMesh, Rules] | None:
    """The mesh and rules of the enclosing `use`, or None. Axes that are already manual (shard_map) are not listed."""
    rules = _rules.get()
    mesh = jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty:
        return None
    return mesh, rules


def partition_spec(
    axes: Axes, shape: Sequence[int], mesh: Mesh | jax.sharding.AbstractMesh, rules: Rules = RULES, *, name: str = ""
) -> PartitionSpec:
    """The PartitionSpec of one array from its logical axes.

    Mesh axes of size 1, absent from the mesh, or taken by an earlier dimension are left out. With `name`, a dimension
    that its mesh axes do not divide raises ShardingError, unless it is of size 1 (an attention of one head); without
    (activations), it stays whole.
    """
    if len(axes) != len(shape):
        raise ShardingError(f"{name or 'array'} has shape {tuple(shape)} and {len(axes)} logical axes {axes}")
    sizes = dict(mesh.shape)
    taken: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in rules:
            raise ShardingError(f"logical axis {axis!r} of {name or 'an activation'} has no rule: add it to the rules")
        chosen = tuple(m for m in (rules[axis] if axis else ()) if sizes.get(m, 1) > 1 and m not in taken)
        ways = math.prod(sizes[m] for m in chosen)
        if size % ways:
            if name and size > 1 and axis not in _REPLICATED_WHEN_UNEVEN:
                raise ShardingError(
                    f"{name}: its axis {axis!r} has size {size}, which mesh axis "
                    f"{' x '.join(f'{m}={sizes[m]}' for m in chosen)} does not divide: choose a divisor of {size}"
                )
            chosen = ()
        taken.update(chosen)
        entries.append(chosen or None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lays an activation out by its logical axes; returns it as it is where no mesh is in use or axes are manual."""
    context = active()
    if context is None:
        return x
    mesh, rules = context
    if any(kind == AxisType.Manual for kind in mesh.axis_types):
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh, rules))


def is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def logical_axes(variable: nnx.Variable) -> Axes:
    """The logical axes a parameter was made with; raises ShardingError where it names none."""
    axes = variable.get_metadata().get("axes")
    if axes is None:
        raise ShardingError(f"a parameter of shape {variable.shape} names no logical axes: nnx.Param(x, axes=(...))")
    return axes


def shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """NamedShardings for a (possibly abstract) tree: each parameter by its axes, all else replicated.

    The result has one sharding in the place of each Variable, and is a pytree prefix of `tree`: it serves as
    `in_shardings`, `out_shardings` and for `jax.device_put`. Optimizer moments keep their parameter's metadata, so that
    they are laid out alike.
    """

    def one(path: Any, leaf: Any) -> NamedSharding:
        if not is_variable(leaf):
            return NamedSharding(mesh, PartitionSpec())
        name = jax.tree_util.keystr(path).lstrip(".")
        return NamedSharding(mesh, partition_spec(logical_axes(leaf), leaf.shape, mesh, rules, name=name))

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_variable)


def with_shardings(tree: Tree, mesh: Mesh, rules: Rules = RULES) -> Tree:
    """An abstract tree whose leaves carry their shardings: what restoring and compiling ahead of time ask for."""

    def one(leaf: Any, sharding: NamedSharding) -> Any:
        value = leaf.get_value() if is_variable(leaf) else leaf
        placed = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
        return leaf.replace(placed) if is_variable(leaf) else placed

    return jax.tree.map(one, tree, shardings(tree, mesh, rules), is_leaf=is_variable)


def abstract(build: Callable[..., Tree], *arguments: Any) -> Tree:
    """`build(*arguments)` with shapes in the place of arrays; nothing is allocated."""
    return jax.eval_shape(build, *arguments)


def initialize(build: Callable[..., Tree], *arguments: Any, mesh: Mesh, rules: Rules = RULES) -> Tree:
    """`build(*arguments)` born sharded: no device ever holds more than its part."""
    layout = shardings(jax.eval_shape(build, *arguments), mesh, rules)
    with use(mesh, rules):
        # Of the arrays that random numbers are made of, a CPU would hold those of all parameters at once.
        scheduler = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
        options = scheduler if mesh.devices.flat[0].platform == "cpu" else None
        return jax.jit(build, out_shardings=layout, compiler_options=options)(*arguments)


def batch_sharding(mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """The layout of a batch: rows over the mesh axes of `act_batch`, all else whole."""
    axes = tuple(axis for axis in rules["act_batch"] if mesh.shape.get(axis, 1) > 1)
    return NamedSharding(mesh, PartitionSpec(axes or None))


def batch_ways(mesh: Mesh, rules: Rules = RULES) -> int:
    """Into how many parts the rows of a batch are cut."""
    return math.prod(mesh.shape.get(axis, 1) for axis in rules["act_batch"])


def rows_of_process(mesh: Mesh, batch_size: int, rules: Rules = RULES) -> np.ndarray:
    """The rows of a global batch that the devices of this process hold, in ascending order."""
    indices = batch_sharding(mesh, rules).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def decays(axes: Axes) -> bool:
    """Whether weight decay applies: matrices and embeddings yes, biases, norms and other vectors no.

    Decided by names, not by rank: a stacked bias has two dimensions ("layers", "mlp"), the bias of a head two more.
    """
    return len([axis for axis in axes if axis not in ("layers", "head_dim")]) >= 2


def parameter_count(tree: Any) -> int:
    """Number of parameters, without the rows that pad a vocabulary (metadata `rows` says how many are real)."""

    def one(variable: Any) -> int:
        rows = variable.get_metadata().get("rows")
        size = math.prod(variable.shape)
        return size if rows is None else size // variable.shape[0] * rows

    return sum(one(leaf) for leaf in jax.tree.leaves(tree, is_leaf=is_variable) if is_variable(leaf))
