"""The TPU kernels compiled for chips that are not there: whether they compile, what they hold, their schedules."""

import functools
import importlib.util
import re

import pytest

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("needs the extra `aot`", allow_module_level=True)

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import zoo.kernels as kernels
from benchmarks import attention_compiled, attention_memory, schedule, tpu, tpu_grid
from benchmarks.attention_cases import Case

pytestmark = pytest.mark.usefixtures("libtpu_environment")


@pytest.mark.parametrize(
    ("chip", "head_dim", "feature"),
    [
        ("v5e", 64, "causal"),
        ("v5p", 80, "segments"),
        ("v6e", 96, "lengths"),
        ("v6e", 128, "all"),
        ("v5e", 256, "odd_lengths"),
        ("v6e", 256, "float32"),
        ("v4", 128, "window"),
        ("v4", 64, "t5"),
        ("v4", 256, "float32_array"),
        ("v4", 128, "float32_all"),
        ("v4", 256, "all"),
        ("v5p", 96, "alibi"),
        ("v4", 128, "absolute"),
        ("v5p", 64, "array"),
        ("v7x", 128, "causal"),
    ],
)
def test_compiles(chip: str, head_dim: int, feature: str) -> None:
    assert tpu_grid.compiles(chip, head_dim, feature) == "compiles"


def test_temporaries_beside_splash() -> None:
    """8 heads of 128 at 32k: ours needs none."""
    ours, splash = (attention_memory.tpu_temporaries("v5e", 32768, impl) for impl in ("tpu_flash", "splash"))
    assert ours < 2**20 < splash


@pytest.mark.parametrize(("chip", "heads", "head_dim"), [("v5e", 8, 64), ("v6e", 8, 128)])
def test_estimate_of_temporaries(chip: str, heads: int, head_dim: int) -> None:
    """`explain` beside the compiler, for arrays that lie as [B, L, N, H]."""
    shape = jax.ShapeDtypeStruct((1, 16384, heads, head_dim), jnp.bfloat16)
    attend = functools.partial(kernels.attention, mask=kernels.Mask(causal=True), impl="tpu_flash", partition=P())

    def step(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> tuple[jax.Array, tuple]:
        output, pull = jax.vjp(attend, q, k, v)
        return output, pull(gradient)

    devices = topologies.get_topology_desc(platform="tpu", topology_name=tpu.TOPOLOGIES[chip]).devices
    with jax.set_mesh(Mesh(np.array(devices[:1]), ("one",), axis_types=(AxisType.Auto,))):
        candidates = kernels.explain(shape, shape, shape, kernels.Mask(causal=True), partition=P())
    (estimate,) = (one.temporaries for one in candidates if one.name == "tpu_flash")
    found = tpu.compile_for(chip, step, *(shape,) * 4).memory_analysis().temp_size_in_bytes
    assert 2 / 3 < estimate / found < 3 / 2


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_inside_shard_map(kind: AxisType) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "tensor"), axis_types=(kind,) * 2)
    heads = P("data", None, "tensor")

    def shape(*sizes: int, spec: P, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, slopes: jax.Array, segments: jax.Array) -> jax.Array:
        mask = kernels.Mask(causal=True, segments=segments)
        bias = kernels.Bias(lambda slopes, head, query, key: slopes[head] * (key - query), slopes)
        options = {"bias": bias, "dropout": 0.1, "dropout_key": jax.random.key(0)}
        partition = None if kind == AxisType.Explicit else heads
        return jnp.sum(kernels.attention(q, k, v, mask, partition=partition, **options).astype(jnp.float32))

    q, k = (shape(2, 1024, n, 128, spec=heads) for n in (8, 2))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
        segments = shape(2, 1024, spec=P("data"), dtype=jnp.int32)
        compiled = step.lower(q, k, k, shape(8, spec=P()), segments).compile()
    assert {"flash_forward", "flash_backward"} <= set(re.findall(r"flash_[a-z]+", compiled.as_text()))


@pytest.mark.parametrize("feature", ["causal", "alibi"])
def test_64_bit_integers_are_no_hindrance(feature: str) -> None:
    step, shapes = tpu_grid.call(feature, 128)
    with jax.enable_x64(True):
        tpu.compile_for("v5e", step, *shapes)


def test_the_suite_compiles() -> None:
    """A row of each kind: a kernel's schedule and bound, memory alone, and a reason."""
    case = Case("grouped", 2, 1024, 1024, 4, 2, 128, causal=True)
    rows = attention_compiled.rows([(case, "bfloat16", "both")], ["tpu_flash", "splash", "cudnn"], "v5e")
    flash, splash, cudnn = rows
    assert 2000 < flash["bundles"] < 4000 and 0.5 < flash["matrix_unit"] < 1
    # Two products forward and five backward, on as much as the matrix units do.
    assert 1 < flash["bound"] / (case.flops("both") * 7 / 6 / 197e12) < 4
    assert 0 < splash["temporaries"] < splash["memory"] < 0.01 * attention_compiled.device_memory("v5e")
    assert "bundles" not in splash and "refused" in cudnn


def test_schedules() -> None:
    """Bundles per 512 x 512 scores, where they stand in benchmarks/notes/attention_tpu.md."""
    limits = {
        ("v5e", "forward"): 900,
        ("v5e", "backward"): 2180,
        ("v6e", "forward"): 440,
        ("v6e", "backward"): 1120,
    }
    cases = [("flaxzoo", which, chip) for chip, which in limits]
    figures = tpu.in_processes(schedule.measure, cases, share=1)
    found = {(chip, which): one.bundles for (_, which, chip), one in figures.items()}
    assert {case: bundles for case, bundles in found.items() if bundles > limits[case]} == {}
