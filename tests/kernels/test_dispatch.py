"""The entry point: what `auto` takes, what is refused and how, and what compiles where."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.kernels import AttentionError, Mask, attention, dispatch, explain


def shapes(t: int, s: int | None = None, b: int = 1, n: int = 2, k: int = 1, h: int = 8, dtype=jnp.float32):
    s = t if s is None else s
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in ((b, t, n, h), (b, s, k, h), (b, s, k, h))]


def chosen(*arguments, **options) -> dict[str, str]:
    """By where `auto` takes it, the implementation."""
    return {one.chosen: one.name for one in explain(*arguments, **options) if one.chosen}


def test_auto() -> None:
    assert chosen(*shapes(16)) == {"everywhere": "xla"}
    assert chosen(*shapes(1, 100_000)) == {"everywhere": "xla"}
    assert chosen(*shapes(2048)) == {"on TPUs": "tpu_flash", "elsewhere": "chunked"}
    assert chosen(*shapes(2048), bias=jnp.ones((1, 2048))) == {"on TPUs": "tpu_flash", "elsewhere": "chunked"}
    assert chosen(*shapes(16384), bias=jnp.ones((1, 16384))) == {"everywhere": "chunked"}
    assert chosen(*shapes(1_000_000, n=32)) == {"everywhere": "chunked"}


def test_second_derivatives_are_refused_by_name() -> None:
    x = jnp.ones((1, 8, 1, 8))
    gradient = jax.grad(lambda q: jnp.sum(attention(q, x, x, impl="chunked") ** 2))
    with pytest.raises(AttentionError, match="first derivatives alone: for second ones take impl='xla'"):
        jax.grad(lambda q: jnp.sum(gradient(q)))(x)


def test_explain_says_why_not() -> None:
    by_name = {candidate.name: candidate for candidate in explain(*shapes(65536, n=8), Mask(causal=True))}
    assert set(by_name) == set(dispatch.IMPLEMENTATIONS)
    assert by_name["chunked"].refusal is None
    assert by_name["xla"].refusal == "its scores take 128.0 GiB a device, above 2: use impl='chunked'"


def test_nothing_quadratic_above_the_budget() -> None:
    with pytest.raises(AttentionError, match=r"impl='xla' cannot take this call: its scores take 128.0 GiB"):
        jax.eval_shape(lambda q, k, v: attention(q, k, v, impl="xla"), *shapes(65536, n=8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.ones((2, 8, 4))}, r"q has shape \(2, 8, 4\)"),
        ({"k": jnp.ones((2, 8, 3, 16)), "v": jnp.ones((2, 8, 3, 16))}, "4 query heads do not divide over 3"),
        ({"k": jnp.ones((3, 8, 2, 16))}, "q, k and v have 2, 3 and 2 rows"),
        ({"k": jnp.ones((2, 8, 2, 32))}, "q has head size 16 and k 32"),
        ({"v": jnp.ones((2, 9, 2, 16))}, r"k has \[S, K\] = \(8, 2\) and v \(9, 2\)"),
        ({"v": jnp.ones((2, 8, 2, 16), jnp.bfloat16)}, "v is bfloat16 and q is float32"),
        ({"q": jnp.ones((2, 8, 4, 16), int)}, "q is int32"),
        ({"q": jnp.ones((2, 0, 4, 16))}, "no dimension may be 0"),
        ({"sinks": jnp.ones(3)}, r"sinks have shape \(3,\): they must be \(4,\)"),
        ({"soft_cap": 0.0}, "soft_cap=0.0"),
        ({"impl": "chunkd"}, "impl='chunkd' is unknown: did you mean 'chunked'"),
        ({"impl": "fused"}, "give auto, xla or chunked"),
        ({"mask": Mask(segments=jnp.ones((2, 9), int))}, "query segments have shape"),
    ],
)
def test_errors_name_the_thing(change, message: str) -> None:
    arguments = {"q": jnp.ones((2, 8, 4, 16)), "k": jnp.ones((2, 8, 2, 16)), "v": jnp.ones((2, 8, 2, 16))} | change
    with pytest.raises(AttentionError, match=message) as error:
        attention(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("impl", ["xla", "chunked"])
def test_sinks_shrink_the_weights_and_not_the_lse(impl: str) -> None:
    """A sink is a key with value 0 whose score is learned."""
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 6, 2, 4)) for i in range(3))
    sinks = jnp.array([0.5, -1.0])
    more = [jnp.concatenate([x, jnp.zeros((1, 1, 2, 4))], axis=1) for x in (k, v)]
    column = jnp.zeros((1, 2, 1, 7)).at[0, :, 0, 6].set(sinks)
    expected = attention(q, *more, bias=column, impl=impl)
    out, lse = attention(q, k, v, sinks=sinks, impl=impl, return_lse=True)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, attention(q, k, v, impl=impl, return_lse=True).lse, rtol=1e-6)


def test_half_precision_types_and_wider_sums() -> None:
    for dtype in (jnp.bfloat16, jnp.float16):
        q = jnp.ones((1, 300, 2, 8), dtype)
        for impl in ("xla", "chunked"):
            out, lse = attention(q, q, q, impl=impl, return_lse=True)
            assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
            np.testing.assert_allclose(lse, 8**0.5 + np.log(300), rtol=1e-2)


def test_vmap_and_numpy_arguments() -> None:
    q, k, v = (np.random.default_rng(i).normal(size=(3, 2, 40, 2, 8)).astype(np.float32) for i in range(3))
    for impl in ("xla", "chunked"):
        mapped = jax.vmap(lambda q, k, v, impl=impl: attention(q, k, v, Mask(window=9), impl=impl))(q, k, v)
        for one, *arguments in zip(mapped, q, k, v, strict=True):
            np.testing.assert_allclose(one, attention(*arguments, Mask(window=9), impl=impl), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
@pytest.mark.parametrize("impl", ["xla", "chunked"])
def test_lowers_for_accelerators(impl: str, platform: str) -> None:
    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(attention(q, k, v, Mask(window=64), soft_cap=20.0, impl=impl).astype(jnp.float32))

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    lowered = step.trace(*shapes(1024, n=4, k=2, h=64, dtype=jnp.bfloat16)).lower(lowering_platforms=(platform,))
    assert "dot_general" in lowered.as_text()


def test_block_sizes_follow_the_platform_compiled_for() -> None:
    step = jax.jit(lambda q, k, v: attention(q, k, v, impl="chunked")).trace(*shapes(1024, b=2, n=8, k=8))
    scores = {"cpu": "tensor<1x8x512x256xf32>", "tpu": "tensor<2x8x512x512xf32>"}
    for platform, other in (("cpu", "tpu"), ("tpu", "cpu")):
        text = step.lower(lowering_platforms=(platform,)).as_text()
        assert scores[platform] in text and scores[other] not in text


def test_importing_the_bare_folder_is_refused() -> None:
    root = Path(__file__).parents[2]
    for name in ("kernels", "train"):
        result = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=root, capture_output=True, text=True)
        assert f"ImportError: this folder is the package zoo.{name}" in result.stderr
