"""The bytes that `explain` estimates beside what the compiler counts; nothing is run."""

from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from zoo.kernels import Bias, Mask, attention, explain
from zoo.kernels.problem import Shape

FACTOR = 1.5

AS_USERS_COMPILE = {"xla_cpu_use_fusion_emitters": True} if version("jaxlib").startswith("0.10.") else None
"""The tests' own compilation (conftest) makes no copies of 16-bit floats as bits."""


def compiled(impl: str, *arrays: jax.ShapeDtypeStruct, bias: Any = None, **options: Any) -> int:
    """Bytes of temporaries of one forward and backward pass; a bias is learned."""

    def step(q: jax.Array, k: jax.Array, v: jax.Array, bias: Any, gradient: jax.Array) -> tuple[jax.Array, tuple]:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: Any) -> jax.Array:
            return attention(q, k, v, impl=impl, bias=bias, **options)

        output, pull = jax.vjp(attend, q, k, v, bias)
        return output, pull(gradient)

    lowered = jax.jit(step, out_shardings=arrays[0].sharding).lower(*arrays, bias, arrays[0])
    return lowered.compile(AS_USERS_COMPILE).memory_analysis().temp_size_in_bytes


def estimate(impl: str, *arrays: jax.ShapeDtypeStruct, **options: Any) -> int:
    (found,) = (one.temporaries for one in explain(*arrays, **options) if one.name == impl)
    assert found is not None
    return found


def arrays_of(shape: Shape, dtype: str, place: Any = None) -> list[jax.ShapeDtypeStruct]:
    b, t, s, n, k, h = shape
    return [jax.ShapeDtypeStruct(x, dtype, sharding=place) for x in ((b, t, n, h), (b, s, k, h), (b, s, k, h))]


def alibi(slopes: jax.Array, head: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
    return slopes[head] * (key - query)


@pytest.mark.numbers
@pytest.mark.parametrize("impl", ["xla", "chunked"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (Shape(1, 512, 512, 8, 8, 64), {}),
        (Shape(2, 1024, 1024, 8, 2, 64), {}),
        (Shape(1, 2048, 512, 4, 4, 128), {}),
        (Shape(1, 512, 2048, 4, 4, 64), {}),
        (Shape(2, 1024, 1024, 8, 4, 64), {"bias": jax.ShapeDtypeStruct((8, 1024, 1024), jnp.float32)}),
        (Shape(2, 1024, 1024, 8, 4, 64), {"bias": jax.ShapeDtypeStruct((8, 1024, 1024), jnp.bfloat16)}),
        (
            Shape(2, 512, 512, 8, 4, 64),
            {"soft_cap": 20.0, "dropout": 0.1, "dropout_key": jax.random.key(0), "bias": Bias(alibi, jnp.ones(8))},
        ),
    ],
)
def test_one_device(impl: str, dtype: str, shape: Shape, options: dict[str, Any]) -> None:
    arrays = arrays_of(shape, dtype)
    options = options | {"mask": Mask(causal=True)}
    ratio = estimate(impl, *arrays, **options) / compiled(impl, *arrays, **options)
    assert 1 / FACTOR < ratio < FACTOR


@pytest.mark.numbers
@pytest.mark.parametrize("impl", ["chunked", "ring", "ulysses"])
def test_a_length_over_devices(impl: str) -> None:
    """`chunked` gathers keys and values."""
    mesh = jax.make_mesh((4,), ("length",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(None, "length")
    arrays = arrays_of(Shape(1, 8192, 8192, 8, 4, 64), "bfloat16", NamedSharding(mesh, spec))
    options = {"mask": Mask(causal=True), "partition": spec}
    with jax.set_mesh(mesh):
        ratio = estimate(impl, *arrays, **options) / compiled(impl, *arrays, **options)
    assert 1 / FACTOR < ratio < FACTOR


def test_none_where_refused() -> None:
    found = {one.name: one for one in explain(*arrays_of(Shape(1, 65536, 65536, 8, 8, 64), "bfloat16"))}
    assert all((one.temporaries is None) == (one.refusal is not None) for one in found.values())
    assert found["xla"].temporaries is None
    assert found["chunked"].temporaries > 0 and found["tpu_flash"].temporaries > 0
