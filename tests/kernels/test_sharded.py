"""Sharded attention equals unsharded, dropout included, in every way to say how it is sharded."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from zoo import sharding
from zoo.kernels import AttentionError, Bias, Mask, attention, explain

B, T, N, H = 4, 16, 8, 8
SPEC = P("x", None, "y")


def arguments(kv_heads: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "q": normal(B, T, N, H),
        "k": normal(B, T, kv_heads, H),
        "v": normal(B, T, kv_heads, H),
        "slopes": normal(N),
        "sinks": normal(N),
        "segments": jnp.asarray(np.sort(rng.integers(0, 3, (B, T)), axis=1)),
        "lengths": jnp.array([T, 5, 9, 0]),
    }


def attend(impl: str, partition: Any, q, k, v, slopes, sinks, segments, lengths) -> jax.Array:
    return attention(
        q,
        k,
        v,
        Mask(causal=True, segments=segments, lengths=lengths),
        bias=Bias(lambda slopes, head, query, key: slopes[head] * (query - key), slopes),
        sinks=sinks,
        dropout=0.3,
        dropout_key=jax.random.key(3),
        impl=impl,
        partition=partition,
    )


def graded(function: Callable[..., jax.Array], given: dict[str, Any]) -> Any:
    """Value and gradients of everything learned, jitted."""
    weigh = jnp.arange(H, dtype=jnp.float32)

    def loss(learned: dict[str, Any], held: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        out = function(**learned, **held)
        return jnp.sum(out * weigh), out

    held = {name: given[name] for name in ("segments", "lengths")}
    learned = {name: x for name, x in given.items() if name not in held}
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(learned, held)


def agree(result: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        # As numpy's, because the two may stand on different meshes.
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, float(np.max(np.abs(np.asarray(b))))))


@pytest.fixture(scope="module")
def whole() -> Callable[[int], Any]:
    """The unsharded answer, by the number of key/value heads."""
    answers = {}

    def answer(kv_heads: int) -> Any:
        if kv_heads not in answers:
            answers[kv_heads] = graded(lambda **x: attend("xla", None, **x), arguments(kv_heads))
        return answers[kv_heads]

    return answer


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("impl", ["xla", "chunked"])
@pytest.mark.parametrize(
    ("sizes", "kv_heads"),
    [
        ("data=2,fsdp=2,tensor=2", 4),
        ("data=2,tensor=4", 2),  # two shards share each key/value head
        ("tensor=8", 1),
        ("data=2,sequence=2,tensor=2", 4),
        ("data=8", 4),  # more shards than rows: nothing is cut
    ],
)
def test_by_the_rules_of_a_mesh_in_use(sizes: str, kv_heads: int, impl: str, whole) -> None:
    with sharding.use(sharding.make_mesh(sizes)):
        agree(graded(lambda **x: attend(impl, None, **x), arguments(kv_heads)), whole(kv_heads))


def test_heads_that_would_tear_groups_apart_stay_whole() -> None:
    q = jax.random.normal(jax.random.key(0), (2, 8, 12, 4))
    k = jax.random.normal(jax.random.key(1), (2, 8, 3, 4))
    with sharding.use(sharding.make_mesh("data=2,tensor=4")):
        sharded = jax.jit(attention)(q, k, k)
    np.testing.assert_allclose(sharded, attention(q, k, k), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", ["arguments' mesh", "set_mesh", "NamedSharding"])
def test_by_partition(where: str, mesh, whole) -> None:
    given, impl = arguments(), "chunked"
    if where == "NamedSharding":
        result = graded(lambda **x: attend(impl, NamedSharding(mesh, SPEC), **x), given)
    elif where == "set_mesh":
        with jax.set_mesh(mesh):
            result = graded(lambda **x: attend(impl, SPEC, **x), given)
    else:
        given |= {name: jax.device_put(given[name], NamedSharding(mesh, SPEC)) for name in ("q", "k", "v")}
        result = graded(lambda **x: attend(impl, SPEC, **x), given)
    agree(result, whole(4))


@pytest.mark.parametrize("impl", ["xla", "chunked"])
def test_by_the_types_of_an_explicit_mesh(impl: str, whole) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    given = arguments()
    given |= {name: jax.device_put(given[name], NamedSharding(mesh, SPEC)) for name in ("q", "k", "v")}
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x: attend(impl, None, **x))(given)
        assert out.sharding.spec[:3] == ("x", None, "y")
        agree(graded(lambda **x: attend(impl, None, **x), given), whole(4))


@pytest.mark.parametrize(
    ("manual", "impl", "check_vma"),
    [({"x", "y"}, "chunked", True), ({"x", "y"}, "xla", False), ({"x"}, "chunked", False), ({"x"}, "xla", True)],
)
def test_inside_a_callers_shard_map(manual: set[str], impl: str, check_vma: bool, mesh, whole) -> None:
    heads = "y" if "y" in manual else None
    block, per_head, per_row = P("x", None, heads), P(heads), P("x")
    # The slopes are a table, whole on every device and looked up by the global head; sinks go with the heads.
    specs = {
        "q": block,
        "k": block,
        "v": block,
        "slopes": P(),
        "sinks": per_head,
        "segments": per_row,
        "lengths": per_row,
    }

    def mapped(**given: jax.Array) -> jax.Array:
        def local(given):
            return attend(impl, SPEC, **given)

        options = {"mesh": mesh, "out_specs": block, "axis_names": manual, "check_vma": check_vma}
        return jax.shard_map(local, in_specs=(specs,), **options)(given)

    agree(graded(mapped, arguments()), whole(4))


def test_a_sharded_length_inside_a_callers_shard_map(mesh) -> None:
    """Queries cut, keys gathered by the caller: the mask compares global positions."""
    q, k, v = (arguments()[name] for name in ("q", "k", "v"))

    def local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = (jax.lax.all_gather(x, "x", axis=1, tiled=True) for x in (k, v))
        return attention(q, k, v, Mask(window=5), partition=P(None, "x"))

    cut = P(None, "x")
    out = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(cut, cut, cut), out_specs=cut))(q, k, v)
    np.testing.assert_allclose(out, attention(q, k, v, Mask(window=5)), rtol=1e-5, atol=1e-6)

    def ungathered(q, k, v):
        return attention(q, k, v, Mask(window=5), partition=cut)

    with pytest.raises(AttentionError, match="gather them first"):
        jax.shard_map(ungathered, mesh=mesh, in_specs=(cut, cut, cut), out_specs=cut)(q, k, v)


def test_every_part_of_a_sharded_call_may_be_long(mesh) -> None:
    """The loops of `chunked`, with blocks chosen by platform, inside a shard_map of ours."""
    q, k, v = (jax.random.normal(jax.random.key(i), (4, 300, 8, 8)) for i in range(3))

    def attend(partition):
        return jax.grad(
            lambda q: jnp.sum(attention(q, k, v, Mask(causal=True), impl="chunked", partition=partition) ** 2)
        )

    expected = jax.jit(attend(None))(q)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(jax.jit(attend(P("x", None, "y")))(q), expected, rtol=2e-5, atol=2e-5)


def test_arrays_on_a_mesh_that_nobody_named(mesh) -> None:
    q = jax.device_put(arguments()["q"], NamedSharding(mesh, SPEC))
    for call in (attention, jax.jit(attention)):
        with pytest.raises(
            AttentionError, match=r"mesh of x=4,y=2: name their axes with partition=.* or .*use\(mesh\)"
        ):
            call(q, q, q)
    np.testing.assert_allclose(
        jax.jit(lambda q: attention(q, q, q, partition=SPEC))(q),
        attention(*[arguments()["q"]] * 3),
        rtol=1e-5,
        atol=1e-6,
    )


def test_explain_counts_one_devices_part() -> None:
    q = jax.ShapeDtypeStruct((8, 8192, 16, 64), jnp.bfloat16)

    def refusals():
        return {candidate.name: candidate.refusal for candidate in explain(q, q, q)}

    assert "32.0 GiB a device" in refusals()["xla"]
    with sharding.use(sharding.make_mesh("data=4,tensor=2")):
        assert "4.0 GiB a device" in refusals()["xla"]


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (P("z"), "partition names 'z': the mesh has the axes x, y"),
        (P(None, None, None, "x"), "cuts the head size"),
        (P("x", None, "x"), "names 'x' twice"),
        (P(None, ("x", "y")), "T=6 does not divide over x=4 x y=2"),
        (P(None, None, ("y", "x")), "N=12 does not divide over y=2 x x=4"),
        (P(None, None, "x"), "12 query heads in 3 groups do not divide over 4 parts"),
    ],
)
def test_errors_name_the_thing(partition: P, message: str, mesh) -> None:
    q, k = jnp.ones((4, 6, 12, 8)), jnp.ones((4, 6, 3, 8))
    with jax.set_mesh(mesh), pytest.raises(AttentionError, match=message) as error:
        attention(q, k, k, partition=partition)
    assert "\n" not in str(error.value)


def test_errors_without_a_mesh_and_inside_shard_map(mesh) -> None:
    q = jnp.ones((4, 8, 2, 8))
    with pytest.raises(AttentionError, match=r"no mesh is set: use jax.set_mesh\(mesh\) or NamedSharding"):
        attention(q, q, q, partition=P("x"))

    def local(q):
        return attention(q, q, q, dropout=0.1, dropout_key=jax.random.key(0))

    with pytest.raises(AttentionError, match="depends on global indices: say how"):
        jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P("x"))(q)
