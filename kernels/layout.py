"""Over which mesh axes a call is cut, and the call inside `jax.shard_map`.

A hand-written kernel is opaque to the partitioner, so attention runs inside shard_map: rows over the mesh axes of the
batch, query heads over those of the heads (keys and values with them, or whole where they are fewer), and queries
over those of the length, with keys and values gathered, or cut alike for what passes them on itself. A caller that is
inside shard_map already is not wrapped again (axes that it left open are the partitioner's); `partition=` then serves
to know the global indices.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from zoo import sharding
from zoo.kernels.bias import Bias
from zoo.kernels.mask import AttentionError, ResolvedMask, Side
from zoo.kernels.problem import AttentionOutput, Origin, Problem, Shape, keeps_groups

Names = tuple[str, ...]
Partition = PartitionSpec | NamedSharding | None

_TWO_WAYS = "name their axes with partition=PartitionSpec(batch, length, heads) or call it under zoo.sharding.use(mesh)"


class Cut(NamedTuple):
    """Mesh axes that cut q's [B, T, N]."""

    batch: Names = ()
    queries: Names = ()
    heads: Names = ()


class Layout(NamedTuple):
    """mesh: of the shard_map to run in, which cuts by `cut`; None for none. manual: the cut of a caller's shard_map.

    keys: the axes that cut keys and values, those of the queries or none.
    """

    mesh: Mesh | AbstractMesh | None
    cut: Cut = Cut()
    manual: Cut = Cut()
    keys: Names = ()


def find(
    q: jax.Array, k: jax.Array, v: jax.Array, partition: Partition, *, needs_indices: bool, cuts_keys: bool = False
) -> Layout:
    """From `partition`, else from the types under an Explicit mesh, else by the rules of `zoo.sharding.use`.

    needs_indices: whether the result depends on global indices of rows and heads (dropout, Bias).
    cuts_keys: whether to cut keys and values as the queries are; they stay whole where T is not S.
    """
    layout = _of_queries(q, k, v, partition, needs_indices)
    if not cuts_keys or q.shape[1] != k.shape[1]:
        return layout
    return layout._replace(keys=layout.cut.queries or layout.manual.queries)


def _of_queries(q: jax.Array, k: jax.Array, v: jax.Array, partition: Partition, needs_indices: bool) -> Layout:
    mesh, spec = given(q, partition, AttentionError)
    if mesh is None:
        return Layout(None)
    if axes_of_type(mesh, AxisType.Manual):
        return Layout(None, manual=_manual_cut(mesh, spec, needs_indices))
    rules = sharding.active()
    explicit = bool(axes_of_type(mesh, AxisType.Explicit))
    if spec is None and explicit:
        spec = jax.typeof(q).sharding.spec
    elif spec is None and rules is not None:
        spec = _by_rules(q, k, *rules)
    elif spec is None and maybe_sharded(mesh, q, k, v):
        raise AttentionError(f"attention of arrays on a mesh of {sizes(mesh)}: {_TWO_WAYS}")
    cut = _entries(spec or PartitionSpec(), mesh)
    _check_divides(cut, q, k, mesh)
    return Layout(mesh, cut) if any(cut) or explicit else Layout(None)


def _manual_cut(mesh: Mesh | AbstractMesh, spec: PartitionSpec | None, needs_indices: bool) -> Cut:
    """What a caller's shard_map has cut of what `spec` names."""
    manual = axes_of_type(mesh, AxisType.Manual)
    if spec is None and needs_indices and any(mesh.shape[axis] > 1 for axis in manual):
        raise AttentionError(
            f"attention inside shard_map over {'/'.join(manual)} with dropout or a Bias depends on global indices: "
            "say how [B, T, N] are cut with partition=PartitionSpec(...), or PartitionSpec() for not at all"
        )
    cut = _entries(spec or PartitionSpec(), mesh)
    return Cut(*(tuple(axis for axis in names if axis in manual) for names in cut))


def origin(layout: Layout, shape: Shape) -> Origin:
    """Global indices of the first row, query, query head and key, where a caller's shard_map has cut them."""
    manual = layout.manual
    if manual.queries and not layout.keys and shape.keys == shape.queries:
        raise AttentionError(
            f"inside shard_map over {'/'.join(manual.queries)} keys and values are cut as the queries are "
            f"(T=S={shape.keys}): give impl='ring' or impl='ulysses', "
            "or gather them first with jax.lax.all_gather(..., axis=1, tiled=True)"
        )

    def first(names: Names, size: int) -> jax.Array | int:
        return jax.lax.axis_index(names) * size if names else 0

    query = first(manual.queries, shape.queries)
    return Origin(
        first(manual.batch, shape.batch), query, first(manual.heads, shape.heads), key=query if layout.keys else 0
    )


Attend = Callable[[Problem, jax.Array | None], AttentionOutput]


def run(layout: Layout, attend: Attend, problem: Problem, sinks: jax.Array | None) -> AttentionOutput:
    """attend(problem, sinks), inside a shard_map where the layout has a mesh."""
    mesh, cut = layout.mesh, layout.cut
    if mesh is None:
        return attend(problem, sinks)
    if cut.queries:
        problem = problem.replace(mask=problem.mask.moved())
    shape = problem.shape
    shares = shape.kv_heads % math.prod(mesh.shape[axis] for axis in cut.heads) != 0
    group = jnp.arange(shape.heads, dtype=jnp.int32) // (shape.heads // shape.kv_heads) if shares else None

    def local(problem: Problem, sinks: jax.Array | None, group: jax.Array | None) -> AttentionOutput:
        if group is not None:
            k, v = (jax.lax.dynamic_slice_in_dim(x, group[0], 1, axis=2) for x in (problem.k, problem.v))
            problem = problem.replace(k=k, v=v)
        return attend(problem, sinks)

    heads = PartitionSpec(cut.heads or None)
    specs = (
        _specs(problem, cut, layout.keys, () if shares else cut.heads),
        None if sinks is None else heads,
        None if group is None else heads,
    )
    arguments: Any = (problem, sinks, group)
    if AxisType.Explicit in mesh.axis_types:
        arguments = resharded(mesh, specs, arguments)
    out = PartitionSpec(*(names or None for names in cut))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out)(*arguments)


def gathered_bytes(layout: Layout, problem: Problem) -> int:
    """Of keys and values that are gathered for queries cut over the length, and of their gradients."""
    whole = bool(layout.cut.queries) and not layout.keys
    return 2 * problem.q.dtype.itemsize * (problem.k.size + problem.v.size) if whole else 0


def _specs(problem: Problem, cut: Cut, keys: Names, kv_heads: Names) -> Problem:
    """The problem with PartitionSpecs in the place of arrays."""
    batch, queries, heads = (names or None for names in cut)
    rows = problem.shape.batch

    def of(x: jax.Array | None, *rest: Names | None) -> Any:
        return None if x is None else PartitionSpec(batch if x.shape[0] == rows else None, *rest)

    def side(side: Side, axis: Names | None) -> Any:
        specs = PartitionSpec(axis), of(side.positions, axis), of(side.segments, axis)
        return Side(*specs, side.start)  # type: ignore[arg-type]

    mask = problem.mask
    bias = problem.bias
    if isinstance(bias, Bias):
        bias = Bias(bias.function, PartitionSpec())
    elif bias is not None:
        whole = (batch, heads, queries, None)
        bias = PartitionSpec(*(names if size > 1 else None for names, size in zip(whole, bias.shape, strict=True)))
    kv = PartitionSpec(batch, keys or None, kv_heads or None)
    return problem.replace(
        q=PartitionSpec(batch, queries, heads),
        k=kv,
        v=kv,
        mask=ResolvedMask(
            side(mask.query, queries), side(mask.key, keys or None), of(mask.prefix), of(mask.lengths), rules=mask.rules
        ),
        bias=bias,
        seed=None if problem.seed is None else PartitionSpec(),
        batch=PartitionSpec(batch),
        heads=PartitionSpec(heads),
    )


def given(
    x: jax.Array, partition: Partition, error: type[ValueError]
) -> tuple[Mesh | AbstractMesh | None, PartitionSpec | None]:
    """The mesh that is set, else that of x's type, else that of `partition`, None where there is none; and the spec.

    Raises `error` for a spec and no mesh.
    """
    candidates = [jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh]
    if isinstance(partition, NamedSharding):
        spec = partition.spec
        candidates.append(partition.mesh)
    else:
        spec = partition
    mesh = next((mesh for mesh in candidates if not mesh.empty), None)
    if mesh is None and any(spec or ()):
        raise error(f"partition={spec} and no mesh is set: use jax.set_mesh(mesh) or NamedSharding(mesh, {spec})")
    return mesh, spec


def resharded(mesh: Mesh | AbstractMesh, specs: Any, arrays: Any) -> Any:
    """The arrays laid out by a tree of specs that is a prefix of theirs: what shard_map asks of an Explicit mesh."""

    def lay(spec: PartitionSpec, part: Any) -> Any:
        return jax.tree.map(lambda x: jax.sharding.reshard(x, NamedSharding(mesh, spec)), part)

    return jax.tree.map(lay, specs, arrays, is_leaf=lambda x: isinstance(x, PartitionSpec))


def axes_of_type(mesh: Mesh | AbstractMesh, kind: AxisType) -> Names:
    return tuple(axis for axis, one in zip(mesh.axis_names, mesh.axis_types, strict=True) if one == kind)


def maybe_sharded(mesh: Mesh | AbstractMesh, *arrays: jax.Array) -> bool:
    """Whether arrays may be cut over the mesh; inside jit their layout is not known."""
    if mesh.size == 1:
        return False
    return any(isinstance(x, Tracer) or not x.sharding.is_fully_replicated for x in arrays)


def _by_rules(q: jax.Array, k: jax.Array, mesh: AbstractMesh, rules: sharding.Rules) -> PartitionSpec:
    """The rules' spec; heads stay whole where groups would be torn apart."""
    spec = sharding.partition_spec(("act_batch", "act_length", "act_heads", None), q.shape, mesh, rules)
    ways = math.prod(mesh.shape[axis] for axis in _entries(spec, mesh).heads)
    return spec if keeps_groups(q.shape[2], k.shape[2], ways) else PartitionSpec(*spec[:2])


def _entries(spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> Cut:
    if len(spec) > 3 and any(spec[3:]):
        raise AttentionError(f"partition {spec} cuts the head size: only B, T and N can be cut")
    return Cut(*named(PartitionSpec(*spec[:3]), mesh, AttentionError))


def named(spec: PartitionSpec, mesh: Mesh | AbstractMesh, error: type[ValueError]) -> list[Names]:
    """The mesh axes of each entry of a partition; raises `error` for one that is named twice or that mesh lacks."""
    entries = [names_of(entry) for entry in spec]
    axes = [axis for names in entries for axis in names]
    for axis in axes:
        if axes.count(axis) > 1:
            raise error(f"partition {spec} names {axis!r} twice: a mesh axis cuts one dimension")
        if axis not in mesh.axis_names:
            raise error(f"partition names {axis!r}: the mesh has the axes {', '.join(mesh.axis_names)}")
    return entries


def names_of(entry: Any) -> Names:
    """The mesh axes of one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def check_divides(
    mesh: Mesh | AbstractMesh, error: type[ValueError], dimensions: Iterable[tuple[str, int, Names]]
) -> None:
    """Raises `error` for a dimension (name, size, mesh axes) that its axes do not divide."""
    for name, size, names in dimensions:
        ways = math.prod(mesh.shape[axis] for axis in names)
        if size % ways:
            axes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in names)
            raise error(f"{name}={size} does not divide over {axes}: partition it over a divisor of {size}")


def _check_divides(cut: Cut, q: jax.Array, k: jax.Array, mesh: Mesh | AbstractMesh) -> None:
    check_divides(mesh, AttentionError, zip(("B", "T", "N"), q.shape[:3], cut, strict=True))
    ways = math.prod(mesh.shape[axis] for axis in cut.heads)
    if not keeps_groups(q.shape[2], k.shape[2], ways):
        raise AttentionError(
            f"{q.shape[2]} query heads in {k.shape[2]} groups do not divide over {ways} parts: "
            "choose a divisor of the groups, or a multiple of them that divides the heads"
        )


def sizes(mesh: Mesh | AbstractMesh) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
