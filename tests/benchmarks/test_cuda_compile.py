"""Attention compiled for an H100 that is not there: whether it compiles, what it holds, what of cuDNN is in it."""

import importlib.util
import re
from typing import Any

import pytest

if importlib.util.find_spec("jax_cuda12_plugin") is None:
    pytest.skip("needs the extra `aot-cuda`", allow_module_level=True)

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from benchmarks import attention_memory, cuda
from zoo.kernels import Bias, Mask, attention, explain

SHAPES = tuple(jax.ShapeDtypeStruct((2, 2048, n, 64), jnp.bfloat16) for n in (8, 4, 4, 8))


def alibi(slopes: jax.Array, head: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
    return slopes[head] * (key - query)


def compiled(mask: Mask, impl: str, **options: Any) -> Any:
    """The program of one forward and backward pass."""

    def step(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> tuple[jax.Array, tuple]:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attention(q, k, v, mask, impl=impl, partition=PartitionSpec(), **options)

        output, pull = jax.vjp(attend, q, k, v)
        return output, pull(gradient)

    return cuda.compile_for("h100", step, *SHAPES)


@pytest.mark.parametrize("impl", ["xla", "chunked"])
@pytest.mark.parametrize("feature", ["causal", "segments", "all"])
def test_compiles(impl: str, feature: str) -> None:
    mask, options = Mask(causal=True), {}
    if feature != "causal":
        mask = mask & Mask(segments=jnp.ones((2, 2048), jnp.int32), lengths=jnp.array([9, 2000]))
    if feature == "all":
        options = {"dropout": 0.1, "dropout_key": jax.random.key(0), "soft_cap": 20.0}
        options["bias"] = Bias(alibi, jnp.ones(8))
    program = compiled(mask, impl, **options)
    assert "while" in program.as_text() or impl == "xla"
    with jax.set_mesh(cuda.mesh_of("h100")):
        candidates = explain(*SHAPES[:3], mask, partition=PartitionSpec(), **options)
    (estimate,) = (one.temporaries for one in candidates if one.name == impl)
    assert 2 / 3 < estimate / program.memory_analysis().temp_size_in_bytes < 3 / 2


def test_memory_is_linear() -> None:
    sizes = [attention_memory.temporaries("chunked", length, gpu="h100") for length in (8192, 16384)]
    assert sizes[1] < 2 * sizes[0]


@pytest.mark.parametrize("mask", [Mask(window=64), Mask(causal=True, lengths=jnp.array([9, 2000]))])
def test_cudnn_once_each_way(mask: Mask) -> None:
    """The backward pass takes what the forward pass kept, and runs no second one."""
    (refusal,) = (one.refusal for one in explain(*SHAPES[:3]) if one.name == "cudnn")
    if refusal is not None:
        pytest.skip(f"needs the package nvidia-cudnn-cu12: {refusal}")
    for impl in ("auto", "cudnn"):
        calls = re.findall(r'custom_call_target="(__cudnn[^"]*)"', compiled(mask, impl).as_text())
        assert sorted(calls) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
