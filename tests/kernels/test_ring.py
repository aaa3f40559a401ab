"""A length cut over mesh axes: `ring` and `ulysses` equal the plain equation on whole arrays, gradients included."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from zoo import sharding
from zoo.kernels import AttentionError, Bias, Mask, attention, explain, ring, tpu_flash
from zoo.kernels.mask import allowed, resolve
from zoo.kernels.tpu_flash import TpuFlash

B, T, N, K, H = 2, 48, 8, 2, 8
LENGTH = P(None, "x")
ROWS_LENGTH_HEADS = P("a", "b", "c")


def arguments() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"q": (B, T, N, H), "k": (B, T, K, H), "v": (B, T, K, H), "sinks": (N,), "slopes": (N,)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def packed() -> dict[str, jax.Array]:
    """Documents that begin within devices' parts and go over their ends, and padding."""
    segments = np.repeat([[1, 2, 3, 0]], [13, 22, 8, 5], axis=1)
    segments = np.concatenate([segments, np.repeat([[4, 9]], [T - 11, 11], axis=1)])
    starts = np.maximum.accumulate(np.where(np.diff(segments, axis=1, prepend=-1) != 0, np.arange(T), 0), axis=1)
    return {"segments": jnp.asarray(segments), "positions": jnp.asarray(np.arange(T) - starts)}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "causal": ({"causal": True}, {}),
    "full": ({}, {"soft_cap": 2.0}),
    "window": ({"window": 7}, {"dropout": 0.3}),
    "both sides": ({"window": (9, 3), "lengths": jnp.array([T, 0])}, {}),
    "packed": ({"causal": True, "lengths": jnp.array([40, T]), **packed()}, {"biased": True}),
    "prefix": ({"causal": True, "prefix": jnp.array([17, 2])}, {"soft_cap": 3.0, "dropout": 0.2}),
    "where": ({"where": lambda q, k: (q - k) % 3 == 0, "positions": jnp.arange(T)[::-1]}, {}),
}


def attend(
    case: str, impl: str, partition: Any, learned: dict[str, jax.Array], held: dict[str, jax.Array], **more: Any
) -> Any:
    """The case's call; held: arrays of its mask."""
    fields, options = CASES[case]
    options = {"dropout_key": jax.random.key(3), "return_lse": True, **options, **more}
    q, k, v, sinks, slopes = (learned[name] for name in ("q", "k", "v", "sinks", "slopes"))
    if options.pop("biased", False):
        options["bias"] = Bias(lambda slopes, head, query, key: slopes[head] * (query - key), slopes)
    return attention(q, k, v, Mask(**fields | held), sinks=sinks, impl=impl, partition=partition, **options)


def held_of(case: str) -> dict[str, jax.Array]:
    return {name: x for name, x in CASES[case][0].items() if isinstance(x, jax.Array)}


def graded(function: Callable[..., Any], learned: dict[str, jax.Array], held: dict[str, jax.Array]) -> Any:
    """Output, lse and the gradients that flow through both."""

    def loss(learned: dict[str, jax.Array], held: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        output, lse = function(learned, held)
        seen = jnp.where(lse == -jnp.inf, 0, lse)
        return jnp.sum(output * jnp.cos(jnp.arange(H))) + jnp.sum(jnp.sin(seen)), (output, lse)

    gradients, results = jax.jit(jax.grad(loss, has_aux=True))(learned, held)
    return results, gradients


@cache
def whole(case: str) -> Any:
    return graded(partial(attend, case, "xla", None), arguments(), held_of(case))


def agree(result: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, float(np.abs(b[np.isfinite(b)]).max())))


def mesh_of(kind: AxisType = AxisType.Auto, **sizes: int) -> jax.sharding.Mesh:
    count = int(np.prod(list(sizes.values())))
    types = (kind,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=jax.devices()[:count])


def equals_whole(case: str, impl: str, partition: P | None, mesh: jax.sharding.Mesh) -> None:
    """By `partition`, or by the rules."""
    expected = whole(case)
    with jax.set_mesh(mesh) if partition else sharding.use(mesh):
        agree(graded(partial(attend, case, impl, partition), arguments(), held_of(case)), expected)


@pytest.mark.numbers
@pytest.mark.parametrize("case", CASES)
def test_ring_over_eight_devices(case: str) -> None:
    equals_whole(case, "ring", LENGTH, mesh_of(x=8))


@pytest.mark.numbers
@pytest.mark.parametrize("case", CASES)
def test_ulysses_over_four_devices(case: str) -> None:
    """Two of which share each key/value head."""
    equals_whole(case, "ulysses", LENGTH, mesh_of(x=4))


@pytest.mark.numbers
@pytest.mark.parametrize(("impl", "case"), [("ring", "packed"), ("ring", "prefix"), ("ulysses", "packed")])
def test_rows_length_and_heads_cut_by_the_rules(impl: str, case: str) -> None:
    equals_whole(case, impl, None, sharding.make_mesh("data=2,sequence=2,tensor=2"))


def test_a_length_over_two_axes_and_an_odd_number_of_devices() -> None:
    expected, _ = whole("causal")
    two = P(None, ("y", "x"))
    for mesh, impl, spec in (
        (mesh_of(x=2, y=4), "ring", two),
        (mesh_of(x=2, y=4), "ulysses", two),
        (mesh_of(x=3), "ring", LENGTH),
    ):
        with jax.set_mesh(mesh):
            agree(jax.jit(partial(attend, "causal", impl, spec))(arguments(), {}), expected)


@pytest.mark.numbers
def test_parts_of_odd_length_and_blocks_within_parts() -> None:
    for length, size in ((40, 8), (1200, 4)):
        q, k, v = (jax.random.normal(jax.random.key(i), (1, length, 2, 8)) for i in range(3))
        expected = attention(q, k, v, Mask(window=length // 2), impl="xla")
        with jax.set_mesh(mesh_of(x=size)):
            result = jax.jit(partial(attention, impl="ring", partition=LENGTH))(q, k, v, Mask(window=length // 2))
        agree(result, expected)


@pytest.mark.numbers
def test_bfloat16_parts_are_summed_in_float32() -> None:
    given = {name: x.astype(jnp.bfloat16) for name, x in arguments().items()}
    with jax.set_mesh(mesh_of(x=8)):
        (output, lse), gradients = graded(partial(attend, "causal", "ring", LENGTH), given, {})
    (expected, expected_lse), expected_gradients = whole("causal")
    assert output.dtype == gradients["k"].dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, expected_lse, atol=0.03)
    np.testing.assert_allclose(output.astype(jnp.float32), expected, atol=0.05)
    scale = float(jnp.abs(expected_gradients["k"]).max())
    np.testing.assert_allclose(gradients["k"].astype(jnp.float32), expected_gradients["k"], atol=0.02 * scale)


@pytest.mark.parametrize(
    ("impl", "case", "check_vma"), [("ring", "window", True), ("ring", "packed", False), ("ulysses", "window", False)]
)
def test_inside_a_callers_shard_map(impl: str, case: str, check_vma: bool) -> None:
    """Which has cut rows, length and heads already."""
    block = ROWS_LENGTH_HEADS
    specs = {"q": block, "k": block, "v": block, "sinks": P("c"), "slopes": P()}
    held = {name: P("a") if x.ndim == 1 else P("a", "b") for name, x in held_of(case).items()}
    mapped = jax.shard_map(
        partial(attend, case, impl, block),
        mesh=mesh_of(a=2, b=2, c=2),
        in_specs=(specs, held),
        out_specs=block,
        check_vma=check_vma,
    )
    agree(graded(mapped, arguments(), held_of(case)), whole(case))


def test_the_tpu_kernels_in_a_ring(monkeypatch) -> None:
    """Interpreted, which does without check_vma alone."""
    monkeypatch.setattr(tpu_flash, "or_chunked", lambda problem: TpuFlash(interpret=True))
    shapes = {"q": (1, 256, 2, H), "k": (1, 256, 1, H), "v": (1, 256, 1, H)}
    given = {name: jax.random.normal(jax.random.key(i), shape) for i, (name, shape) in enumerate(shapes.items())}

    def call(learned: dict[str, jax.Array], held: dict[str, jax.Array], **options: Any) -> Any:
        return attention(**learned, mask=Mask(causal=True), return_lse=True, **options)

    expected = graded(partial(call, impl="xla"), given, {})
    local = partial(call, impl="ring", partition=LENGTH)
    specs = (LENGTH, LENGTH)
    mapped = jax.shard_map(local, mesh=mesh_of(x=2), in_specs=specs, out_specs=LENGTH, check_vma=False)
    agree(graded(mapped, given, {}), expected)


@pytest.mark.parametrize("impl", ["ring", "ulysses"])
def test_by_the_types_of_an_explicit_mesh(impl: str) -> None:
    mesh, given = mesh_of(AxisType.Explicit, x=4), arguments()
    given |= {name: jax.device_put(given[name], NamedSharding(mesh, LENGTH)) for name in ("q", "k", "v")}
    expected = whole("causal")
    with jax.set_mesh(mesh):
        agree(graded(partial(attend, "causal", impl, None), given, {}), expected)


@pytest.mark.parametrize("n", [1, 5, 8])
def test_zigzag_gives_all_devices_the_same_work_in_every_step(n: int) -> None:
    length, mesh = 12 * n, mesh_of(x=n)
    index = jnp.arange(length)

    def mapped(move: Callable[..., jax.Array]) -> Callable[[jax.Array], jax.Array]:
        return jax.shard_map(lambda x: move(("x",), x, axis=0), mesh=mesh, in_specs=P("x"), out_specs=P("x"))

    laid = mapped(ring.to_zigzag)(index)
    pieces = np.asarray(laid).reshape(n, 2, 6)[:, :, 0] // 6
    np.testing.assert_array_equal(pieces, [(i, 2 * n - 1 - i) for i in range(n)])
    np.testing.assert_array_equal(mapped(ring.from_zigzag)(laid), index)
    mask = resolve(Mask(causal=True, positions=laid), 1, length, length)
    work = np.asarray(allowed(mask, mask.query, mask.key)).reshape(n, 12, n, 12).sum((1, 3))
    steps = np.stack([np.roll(work[i], -i) for i in range(n)])
    # What is not the device's own part.
    assert len(np.unique(steps[:, 1:])) <= 1 and len(np.unique(steps[:, 0])) == 1


def test_causal_masks_alone_are_laid_in_zigzag_order() -> None:
    given = [arguments()[name] for name in ("q", "k", "v")]

    def transfers(mask: Mask) -> int:
        attend = partial(attention, mask=mask, impl="ring", partition=LENGTH)
        return str(jax.make_jaxpr(attend)(*given)).count("ppermute")

    with jax.set_mesh(mesh_of(x=8)):
        assert transfers(Mask(window=(5, 5))) < transfers(Mask(causal=True)) == transfers(Mask(window=5))


@pytest.mark.numbers
def test_memory_is_linear_and_no_device_gathers_keys() -> None:
    def compiled(length: int) -> Any:
        shape = jax.ShapeDtypeStruct((1, length, 4, 32), jnp.float32)

        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attention(q, k, v, Mask(causal=True), impl="ring", partition=LENGTH).sum()

        mesh = mesh_of(x=8)
        cut = NamedSharding(mesh, LENGTH)
        with jax.set_mesh(mesh):
            step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), in_shardings=cut, out_shardings=cut)
            return step.lower(shape, shape, shape).compile()

    sizes = []
    for length in (8192, 16384):
        program = compiled(length)
        text = program.as_text()
        assert "collective-permute" in text and "all-gather" not in text and "all-to-all" not in text
        sizes.append(program.memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 2.2 * sizes[0]
    whole_scores = 4 * 16384**2 // 8 * 4
    assert sizes[1] < whole_scores / 10


def test_explain_says_where_a_length_axis_is_missing() -> None:
    q, k = jax.ShapeDtypeStruct((B, T, N, H), jnp.float32), jax.ShapeDtypeStruct((B, T, K, H), jnp.float32)

    def refusals(**options: Any) -> dict[str, str | None]:
        return {candidate.name: candidate.refusal for candidate in explain(q, k, k, **options)}

    for name in ("ring", "ulysses"):
        assert "no mesh axis cuts T = S" in str(refusals()[name])
    with jax.set_mesh(mesh_of(x=8)):
        assert refusals(partition=LENGTH)["ring"] is refusals(partition=LENGTH)["ulysses"] is None
        assert "takes no array as bias" in str(refusals(partition=LENGTH, bias=jnp.ones((T, T)))["ring"])


@pytest.mark.parametrize(
    ("impl", "partition", "change", "message"),
    [
        ("ring", None, {}, "impl='ring' cannot take this call: no mesh axis cuts T = S: name one with"),
        ("ulysses", P("x"), {}, r"impl='ulysses' cannot .* partition=PartitionSpec\(batch, length, heads\), or use"),
        ("ring", LENGTH, {"k": jnp.ones((4, 16, 2, 8)), "v": jnp.ones((4, 16, 2, 8))}, "no mesh axis cuts T = S"),
        ("ring", LENGTH, {"bias": jnp.ones((8, 8))}, "it takes no array as bias: give a Bias"),
        ("ulysses", LENGTH, {}, "6 query heads do not divide over the 4 parts of the length: use impl='ring'"),
        ("ulysses", P(None, "y"), {}, "6 query heads in 3 groups do not divide over 2 parts: use impl='ring'"),
        ("rings", LENGTH, {}, "impl='rings' is unknown: did you mean 'ring'"),
    ],
)
def test_errors_name_the_thing(impl: str, partition: P | None, change: dict, message: str) -> None:
    given = {"q": jnp.ones((4, 8, 6, 8)), "k": jnp.ones((4, 8, 3, 8)), "v": jnp.ones((4, 8, 3, 8))} | change
    mesh = mesh_of(x=4, y=2)
    with jax.set_mesh(mesh), pytest.raises(AttentionError, match=message) as error:
        attention(**given, impl=impl, partition=P() if partition is None else partition)
    assert "\n" not in str(error.value)
