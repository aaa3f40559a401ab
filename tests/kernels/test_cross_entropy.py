"""Linear cross entropy against numpy, in every chunking and sharding; what it holds, and what devices exchange."""

import contextlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from zoo import sharding
from zoo.kernels import LossError, cross_entropy, linear_cross_entropy

B, T, D, V, REAL = 4, 12, 8, 16, 13
SETTINGS = [(0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.2, 0.03)]

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def drawn() -> Arrays:
    """hidden, kernel, targets and weights, of which some are 0; the kernel's padding is not."""
    rng = np.random.default_rng(0)
    weights = rng.random((B, T)) * (rng.random((B, T)) < 0.8)
    return (
        rng.standard_normal((B, T, D)).astype(np.float32),
        rng.standard_normal((D, V)).astype(np.float32),
        rng.integers(0, REAL, (B, T)).astype(np.int32),
        weights.astype(np.float32),
    )


def reference(arrays: Arrays, smoothing: float, z_loss: float) -> tuple[float, dict[str, float], Any]:
    """Total, sums and gradients of hidden and kernel, token by token, in float64."""
    hidden, kernel, targets, weights = (x.astype(np.float64) if x.dtype.kind == "f" else x for x in arrays)
    total, sums = 0.0, {"nll": 0.0, "correct": 0.0, "z": 0.0}
    d_hidden, d_kernel = np.zeros_like(hidden), np.zeros_like(kernel)
    for index in np.ndindex(targets.shape):
        logits = hidden[index] @ kernel[:, :REAL]
        lse = logits.max() + np.log(np.exp(logits - logits.max()).sum())
        p, q = np.exp(logits - lse), np.full(REAL, smoothing / REAL)
        q[targets[index]] += 1 - smoothing
        total += weights[index] * (-(q * (logits - lse)).sum() + z_loss * lse**2)
        sums["nll"] += weights[index] * (lse - logits[targets[index]])
        sums["correct"] += weights[index] * (logits.argmax() == targets[index])
        sums["z"] += weights[index] * lse**2
        d_logits = weights[index] * (p - q + 2 * z_loss * lse * p)
        d_hidden[index] = kernel[:, :REAL] @ d_logits
        d_kernel[:, :REAL] += np.outer(hidden[index], d_logits)
    return total, sums, (d_hidden, d_kernel)


def graded(loss: Callable[..., Any], *arrays: Any) -> Any:
    """(total, sums), and the gradients of hidden and kernel, jitted."""
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*arrays)


def agree(result: Any, expected: Any, tolerance: float = 2e-5) -> None:
    (total, sums), gradients = result
    expected_total, expected_sums, expected_gradients = expected
    pairs = [(total, expected_total), *((sums[name], expected_sums[name]) for name in expected_sums)]
    for a, b in pairs + list(zip(gradients, expected_gradients, strict=True)):
        b = np.asarray(b)
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))


def regularised(*arrays: Any, **options: Any) -> Any:
    return linear_cross_entropy(*arrays, label_smoothing=0.1, z_loss=0.01, vocabulary=REAL, **options)


@pytest.mark.numbers
@pytest.mark.parametrize("chunk", [None, 1, 4, 5, 100])
@pytest.mark.parametrize(("smoothing", "z_loss"), SETTINGS)
def test_it_equals_numpy(smoothing: float, z_loss: float, chunk: int | None) -> None:
    """Also in chunks that do not divide T, and where nothing is differentiated, which is another program."""

    def loss(*arrays):
        return linear_cross_entropy(*arrays, label_smoothing=smoothing, z_loss=z_loss, vocabulary=REAL, chunk=chunk)

    result, expected = graded(loss, *drawn()), reference(drawn(), smoothing, z_loss)
    agree(result, expected)
    assert not np.any(result[1][1][:, REAL:])
    agree((jax.jit(loss)(*drawn()), ()), (*expected[:2], ()))


def test_a_whole_vocabulary_needs_no_padding() -> None:
    hidden, kernel, targets, weights = drawn()
    cut = kernel[:, :REAL]
    expected = reference((hidden, cut, targets, weights), 0.1, 0.01)

    def loss(*arrays):
        return linear_cross_entropy(*arrays, label_smoothing=0.1, z_loss=0.01)

    agree(graded(loss, hidden, cut, targets, weights), expected)


def test_the_cotangent_scales_the_gradients_and_the_figures_have_none() -> None:
    _, _, expected = reference(drawn(), 0.1, 0.01)

    def loss(*arrays):
        total, sums = regularised(*arrays, chunk=4)
        return 2.5 * total + sums["nll"] + sums["z"]

    gradients = jax.jit(jax.grad(loss, (0, 1)))(*drawn())
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(a, 2.5 * b, atol=1e-4)


@pytest.mark.parametrize("chunk", [None, 5])
def test_bfloat16_operands_have_float32_sums(chunk: int | None) -> None:
    """Parameters may be float32 beside them: their gradient is then rounded nowhere but in the operands."""
    hidden, kernel, targets, weights = drawn()
    low = hidden.astype(jnp.bfloat16)
    rounded = (low.astype(np.float32), kernel.astype(jnp.bfloat16).astype(np.float32), targets, weights)
    expected = reference(rounded, 0.1, 0.01)
    result = graded(lambda *x: regularised(*x, chunk=chunk), low, kernel, targets, weights)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(result[0]))
    assert [x.dtype for x in result[1]] == [jnp.bfloat16, jnp.float32]
    # Gradients of logits are rounded to eight bits before their products.
    agree(result, expected, tolerance=1e-2)
    agree((result[0], ()), (*expected[:2], ()))


def test_extreme_logits_stay_finite() -> None:
    kernel = jnp.array([[1e4, -1e4, 0.0]])
    ones = jnp.ones((1, 1))
    (total, _), (d_hidden, d_kernel) = graded(linear_cross_entropy, ones[..., None], kernel, jnp.array([[1]]), ones)
    assert float(total) == 2e4
    np.testing.assert_allclose(d_kernel, [[1.0, -1.0, 0.0]])
    np.testing.assert_allclose(d_hidden, [[[2e4]]])


def test_targets_of_no_weight_may_be_outside_the_vocabulary() -> None:
    hidden, kernel, targets, weights = drawn()
    outside = np.where(weights == 0, -1, targets)
    agree(graded(regularised, hidden, kernel, outside, weights), reference(drawn(), 0.1, 0.01))


SIZES = ["data=2,fsdp=2,tensor=2", "data=2,sequence=2,tensor=2", "fsdp=8", "tensor=8"]


@pytest.mark.parametrize("chunk", [None, 2, 5])
@pytest.mark.parametrize("sizes", SIZES)
def test_by_the_rules_of_a_mesh_in_use(sizes: str, chunk: int | None) -> None:
    expected = reference(drawn(), 0.1, 0.01)
    with sharding.use(sharding.make_mesh(sizes)):
        agree(graded(lambda *x: regularised(*x, chunk=chunk), *drawn()), expected)
        agree((jax.jit(lambda *x: regularised(*x, chunk=chunk))(*drawn()), ()), (*expected[:2], ()))


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("where", ["set_mesh", "NamedSharding"])
def test_by_partition(where: str, mesh) -> None:
    spec, expected = P("x", None, "y"), reference(drawn(), 0.1, 0.01)
    if where == "NamedSharding":
        agree(graded(lambda *x: regularised(*x, partition=NamedSharding(mesh, spec)), *drawn()), expected)
    else:
        with jax.set_mesh(mesh):
            agree(graded(lambda *x: regularised(*x, partition=spec), *drawn()), expected)


def with_a_bias() -> tuple[tuple[np.ndarray, ...], Any]:
    """Arrays, the last a bias, and what is expected of them: it is a row of the kernel whose feature is always 1."""
    hidden, kernel, targets, weights = drawn()
    bias = np.random.default_rng(1).standard_normal(V).astype(np.float32)
    longer = np.concatenate([hidden, np.ones((B, T, 1), np.float32)], -1), np.concatenate([kernel, bias[None]])
    total, sums, (d_hidden, d_kernel) = reference((*longer, targets, weights), 0.1, 0.01)
    return (*drawn(), bias), (total, sums, (d_hidden[..., :D], d_kernel[:D], d_kernel[D]))


def graded_with_bias(*arrays: Any) -> Any:
    def loss(*arrays: Any) -> Any:
        return regularised(*arrays[:4], bias=arrays[4], chunk=5)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 4), has_aux=True))(*arrays)


@pytest.mark.parametrize("sizes", [None, *SIZES])
def test_a_bias_and_its_gradient(sizes: str | None) -> None:
    arrays, expected = with_a_bias()
    with contextlib.nullcontext() if sizes is None else sharding.use(sharding.make_mesh(sizes)):
        agree(graded_with_bias(*arrays), expected)


def test_a_bias_on_an_explicit_mesh() -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    arrays, expected = with_a_bias()
    hidden, kernel, targets, weights, bias = arrays
    hidden, kernel, bias = (
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in ((hidden, P("x", None, None)), (kernel, P("x", "y")), (bias, P("y")))
    )
    with jax.set_mesh(mesh):
        result = graded_with_bias(hidden, kernel, targets, weights, bias)
    assert [x.sharding.spec for x in result[1]] == [P("x", None, None), P("x", "y"), P("y")]
    agree(result, expected)


@pytest.mark.parametrize("kernel_spec", [P("x", "y"), P(None, "x"), P("y", None)])
def test_by_the_types_of_an_explicit_mesh(kernel_spec: P) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    hidden, kernel, targets, weights = drawn()
    hidden = jax.device_put(hidden, NamedSharding(mesh, P("x", None, None)))
    kernel = jax.device_put(kernel, NamedSharding(mesh, kernel_spec))
    with jax.set_mesh(mesh):
        result = graded(lambda *x: regularised(*x, chunk=5), hidden, kernel, targets, weights)
    assert [x.sharding.spec for x in result[1]] == [P("x", None, None), kernel_spec]
    agree(result, reference(drawn(), 0.1, 0.01))


@pytest.mark.parametrize(("manual", "check_vma"), [({"x", "y"}, True), ({"x", "y"}, False), ({"x"}, True)])
def test_inside_a_callers_shard_map(manual: set[str], check_vma: bool, mesh) -> None:
    def loss(hidden, kernel, targets, weights):
        def local(*arrays):
            total, sums = regularised(*arrays, chunk=5)
            return jax.lax.psum((total, sums), "x")

        rows = P("x")
        options = {"mesh": mesh, "out_specs": P(), "axis_names": manual, "check_vma": check_vma}
        mapped = jax.shard_map(local, in_specs=(rows, P(), rows, rows), **options)
        return mapped(hidden, kernel, targets, weights)

    agree(graded(loss, *drawn()), reference(drawn(), 0.1, 0.01))


def computations(program: str) -> dict[str, str]:
    """The text of each computation of an HLO module, by name."""
    return dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", program, re.M | re.S))


def reductions(body: str) -> list[int]:
    """Elements of each array that an all-reduce or reduce-scatter of `body` gives."""
    lines = re.findall(r"= (.*?) (?:all-reduce|reduce-scatter)(?:-start)?\(", body)
    shapes = [shape for line in lines for shape in re.findall(r"\w+\[([\d,]*)\]", line)]
    return [int(np.prod([int(size) for size in shape.split(",") if size])) for shape in shapes]


@pytest.mark.parametrize("sizes", ["data=2,fsdp=4", "data=2,fsdp=2,tensor=2"])
def test_the_kernels_gradient_is_reduced_once(sizes: str) -> None:
    """In the loop over chunks nothing is, but what a sharded vocabulary asks for, of which nothing has a kernel's size.

    Behind it, the kernel's gradient is scattered over fsdp, and the rest is reduced over data.
    """
    width, vocabulary = 32, 4096
    mesh = sharding.make_mesh(sizes)
    shapes = jax.ShapeDtypeStruct((8, 16, width), jnp.float32), jax.ShapeDtypeStruct((width, vocabulary), jnp.float32)
    tokens = [jax.ShapeDtypeStruct((8, 16), dtype) for dtype in (jnp.int32, jnp.float32)]
    placed = sharding.partition_spec(("embed", "vocab"), (width, vocabulary), mesh)
    with sharding.use(mesh):
        gradient = jax.jit(
            jax.grad(lambda *x: linear_cross_entropy(*x, chunk=4)[0], (0, 1)),
            out_shardings=(NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, placed)),
        )
        program = gradient.lower(*shapes, *tokens).compile().as_text()
    bodies = re.findall(r"body=%?([\w.\-]+)", program)
    parts = computations(program)
    inside, outside = [], []
    for name, text in parts.items():
        (inside if name in bodies else outside).extend(reductions(text))
    ways = {axis: size for axis, size in mesh.shape.items() if size > 1}
    slice_of_kernel = width * vocabulary // ways.get("tensor", 1)
    assert bodies and (max(inside) <= 8 // 4 * 4 * width if "tensor" in ways else not inside)
    assert [size for size in outside if size >= slice_of_kernel // 8] == [slice_of_kernel // ways["fsdp"]] * 2


def temporaries(rows: int, length: int, width: int, vocabulary: int, *, differentiated: bool = True, **options) -> int:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, length, width), (width, vocabulary))]
    tokens = [jax.ShapeDtypeStruct((rows, length), dtype) for dtype in (jnp.int32, jnp.float32)]

    def loss(*arrays):
        return linear_cross_entropy(*arrays, **options)[0]

    program = jax.jit(jax.grad(loss, (0, 1)) if differentiated else loss)
    return program.lower(*arrays, *tokens).compile().memory_analysis().temp_size_in_bytes


def test_chunks_bound_memory(monkeypatch) -> None:
    """By default no logits above CHUNK_BYTES: a twelfth of the whole here, where all at once take three of them."""
    size = {"rows": 4, "length": 128, "width": 16, "vocabulary": 8192}
    logits = 4 * size["rows"] * size["length"] * size["vocabulary"]
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", logits // 16)
    assert temporaries(**size) < logits / 4
    assert temporaries(**size, differentiated=False) < logits / 5
    assert temporaries(**size, chunk=size["length"]) > logits


def test_only_large_vocabularies_are_cut() -> None:
    """A GPT-2 of two rows is, a model of bytes is not."""
    assert cross_entropy._chunks(None, 2, 512, 50304) == (2, 256)
    assert cross_entropy._chunks(None, 8, 256, 384) == (1, 256)
    assert cross_entropy._chunks(None, 1, 1001, 2**19)[1] * 2**21 <= cross_entropy.CHUNK_BYTES
    assert cross_entropy._chunks(None, 2**10, 8, 2**20) == (8, 1)


def test_a_value_alone_computes_no_gradient() -> None:
    def products(f) -> int:
        return jax.jit(f).lower(*drawn()).as_text().count("stablehlo.dot_general")

    assert products(regularised) == 1
    assert products(jax.grad(lambda *x: regularised(*x)[0], (0, 1))) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": np.ones((B, D))}, r"hidden has shape \(4, 8\): it must be \[B, T, D\]"),
        ({"kernel": np.ones((V, D))}, r"the kernel has shape \(16, 8\): it must be \[D, V\] with hidden's D=8"),
        ({"targets": np.ones((B, 1), int)}, r"targets have shape \(4, 1\): they must be \(4, 12\)"),
        ({"targets": np.ones((B, T))}, "targets are float.*: they must be integers"),
        ({"bias": np.ones(REAL)}, r"the bias has shape \(13,\): it must be \[V\] with the kernel's V=16"),
        ({"vocabulary": 17}, "vocabulary 17 is not within the kernel's V=16"),
        ({"chunk": 0}, "chunk 0 is too small: choose a whole number from 1"),
        ({"partition": P("z")}, "partition names 'z': the mesh has the axes x, y"),
        ({"partition": P("x", None, "x")}, "names 'x' twice"),
        ({"partition": P(None, ("x", "y"))}, "T=12 does not divide over x=4 x y=2"),
        ({"partition": P("x", None, "y", None)}, "has 4 entries: name the mesh axes of"),
    ],
)
def test_errors_name_the_thing(change: dict[str, Any], message: str, mesh) -> None:
    arguments = dict(zip(("hidden", "kernel", "targets", "weights"), drawn(), strict=True)) | change
    with jax.set_mesh(mesh), pytest.raises(LossError, match=message) as error:
        linear_cross_entropy(**arguments)
    assert "\n" not in str(error.value)


def test_arrays_on_a_mesh_that_nobody_named(mesh) -> None:
    with jax.set_mesh(mesh), pytest.raises(LossError, match=r"mesh of x=4,y=2: name their axes with partition=.* or"):
        jax.jit(linear_cross_entropy)(*drawn())
    with pytest.raises(LossError, match=r"no mesh is set: use jax\.set_mesh"):
        linear_cross_entropy(*drawn(), partition=P("x"))


def test_a_vocabulary_cut_inside_a_callers_shard_map(mesh) -> None:
    def local(*arrays):
        return linear_cross_entropy(*arrays, partition=P("x", None, "y"))[0]

    rows = P("x")
    with pytest.raises(LossError, match=r"V is cut over y inside shard_map: gather the kernel first"):
        jax.shard_map(local, mesh=mesh, in_specs=(rows, P(None, "y"), rows, rows), out_specs=P())(*drawn())
