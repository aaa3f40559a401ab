"""`chunked` against `xla`: values and gradients over random shapes and features; blocks that are skipped; memory."""

import math
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zoo.kernels import Bias, Mask, attention, chunked, engine, reference
from zoo.kernels.chunked_parts import Sizes
from zoo.kernels.problem import build

TOLERANCE = 2e-5


@st.composite
def calls(draw):
    """Arguments to differentiate, arguments to hold, and sizes of parts and blocks."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    b, t, s, kv_heads = (draw(st.integers(1, limit)) for limit in (3, 20, 20, 3))
    n = kv_heads * draw(st.integers(1, 3))
    h, h_value = draw(st.sampled_from([(1, 1), (8, 8), (5, 3)]))
    if draw(st.booleans()):
        s = t

    def per_side(high, *shape):
        return tuple(rng.integers(0, high, size=(*shape, x)).astype(np.int32) for x in (t, s))

    mask = Mask(
        causal=draw(st.booleans()),
        window=draw(st.sampled_from([None, None, 1, 4, (3, 2), (None, 1), (2, None), (None, -1)])),
        segments=draw(st.sampled_from([None, per_side(3, b), tuple(np.sort(x, 1) for x in per_side(4, b))])),
        positions=draw(st.sampled_from([None, None, per_side(20), per_side(20, b)])),
        lengths=draw(st.sampled_from([None, rng.integers(0, s + 1, size=b)])),
        where=draw(st.sampled_from([None, lambda q, k: (q + 2 * k) % 3 != 0])),
    )
    if mask.causal and draw(st.booleans()):
        mask = mask & Mask(causal=True, prefix=rng.integers(0, s + 1, size=b))
    shape = [draw(st.sampled_from([1, size])) for size in (b, n, t, s)]
    table = Bias(lambda tables, head, query, key: tables["a"][head, (query - key) % 7] * tables["b"], None)
    held = {"mask": mask, "soft_cap": draw(st.sampled_from([None, 1.5])), "scale": draw(st.sampled_from([None, 0.3]))}
    if draw(st.booleans()):
        held |= {"dropout": 0.4, "dropout_key": jax.random.key(int(rng.integers(100)))}
    learned = {"q": normal(b, t, n, h), "k": normal(b, s, kv_heads, h), "v": normal(b, s, kv_heads, h_value)}
    learned["bias"] = draw(st.sampled_from([None, normal(*shape), {"a": normal(n, 7), "b": normal()}]))
    function = table.function if isinstance(learned["bias"], dict) else None
    cotangents = normal(b, t, n, h_value), normal(b, t, n)
    return learned, held, function, cotangents, Sizes(*(draw(st.integers(1, most)) for most in (3, 3, 8, 8)))


def compare(call):
    learned, held, function, (d_out, d_lse), sizes = call

    def run(attend, learned):
        bias = Bias(function, learned["bias"]) if function else learned["bias"]
        mask, options = held["mask"], {name: value for name, value in held.items() if name != "mask"}
        out, lse = attend(build(learned["q"], learned["k"], learned["v"], mask, bias=bias, **options))
        finite = jnp.where(lse == -jnp.inf, 0, lse)
        return jnp.sum(out * d_out) + jnp.sum(finite * d_lse), (out, lse)

    results = []
    for attend in (reference.attend, partial(engine.attend, chunked.Chunked(sizes))):
        step = jax.jit(jax.value_and_grad(lambda x, attend=attend: run(attend, x), has_aux=True))
        (_, values), gradients = step(jax.tree.map(jnp.asarray, learned))
        results.append((values, gradients))
    for expected, result in zip(*(jax.tree.leaves(x) for x in results), strict=True):
        bound = TOLERANCE * max(1.0, np.max(np.abs(expected), where=np.isfinite(expected), initial=0))
        np.testing.assert_allclose(result, expected, rtol=0, atol=bound)


@pytest.mark.numbers
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls())
def test_equals_xla(call):
    compare(call)


@pytest.mark.large
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(calls())
def test_equals_xla_at_length(call):
    compare(call)


def example(t=40, b=2, n=4, kv_heads=2, h=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (b, t, m, h), dtype) for key, m in zip(keys, (n, kv_heads, kv_heads), strict=True)]


def in_parts(*blocks):
    return partial(engine.attend, chunked.Chunked(Sizes(1, 1, *blocks)))


def test_rows_with_nothing_to_attend_to():
    q, k, v = example()
    mask = Mask(lengths=jnp.array([0, 40]), segments=jnp.ones((2, 40), int).at[1, 7].set(0))

    def loss(q, k, v):
        out, lse = attention(q, k, v, mask, impl="chunked", return_lse=True, sinks=jnp.ones(4))
        return jnp.sum(out**2) + jnp.sum(jnp.exp(lse)), (out, lse)

    gradients, (out, lse) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    empty = np.zeros((2, 40), bool)
    empty[0], empty[1, 7] = True, True
    assert (np.asarray(lse)[empty] == -np.inf).all() and np.isfinite(np.asarray(lse)[~empty]).all()
    assert (np.asarray(out)[empty] == 0).all()
    assert (np.asarray(gradients[0])[empty] == 0).all()
    assert all((np.asarray(d)[0] == 0).all() and np.isfinite(d).all() for d in gradients)


@pytest.mark.parametrize(
    "mask",
    [
        Mask(causal=True),
        Mask(window=10),
        Mask(window=(10, 5)),
        Mask(lengths=jnp.array([31, 20])),
        Mask(segments=jnp.where(jnp.arange(40) < 24, 1, 2)[None]),
        Mask(causal=True, prefix=9),
        Mask(causal=True, positions=(jnp.arange(40) // 2, jnp.arange(40))),
    ],
    ids=["causal", "window", "two-sided window", "lengths", "segments", "prefix", "positions"],
)
def test_blocks_that_the_mask_empties_are_skipped(mask):
    """A NaN in a masked key would spread through 0 * NaN if its block were read; what one row needs, another skips."""
    q, k, v = example(b=2)
    block = 8
    problem = build(q, k, v, mask)
    row = 2 * block
    hidden = np.asarray(reference.allowed(problem.mask, problem.mask.query, problem.mask.key))
    seen = np.broadcast_to(hidden, (2, 1, 40, 40))[:, 0, row : row + block].any(1).reshape(2, -1, block).any(2)
    assert not seen.all()
    poison = jnp.asarray(np.repeat(~seen, block, axis=1))[:, :, None, None]

    def rows(q, k, v):
        return in_parts(block, block)(build(q, k, v, mask)).output[:, row : row + block]

    poisoned = [jnp.where(poison, jnp.nan, x) for x in (k, v)]
    np.testing.assert_array_equal(rows(q, *poisoned), rows(q, k, v))


def with_gradients(attend, *arrays, **options):
    """Output, and gradients of its squares' sum by the arrays."""

    def loss(*arrays):
        out = attend(build(*arrays, Mask(causal=True), **options)).output
        return jnp.sum(out.astype(jnp.float32) ** 2), out

    (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)
    return out, *gradients


def test_bfloat16_is_as_near_to_float32_as_xla():
    arrays = example(t=100, h=32, dtype=jnp.bfloat16)
    exact = with_gradients(reference.attend, *(x.astype(jnp.float32) for x in arrays))
    error = {}
    for attend in (reference.attend, in_parts(16, 24)):
        found = with_gradients(attend, *arrays)
        assert all(x.dtype == jnp.bfloat16 for x in found)
        error[attend] = [float(jnp.max(jnp.abs(x - y))) for x, y in zip(found, exact, strict=True)]
    for expected, result in zip(*error.values(), strict=True):
        assert result <= 1.5 * expected < 0.2


def test_float64():
    """Where Python's integers are int64 beside the int32 of the mask."""
    with jax.enable_x64(True):
        arrays = [x.astype(jnp.float64) for x in example()]
        bias = jnp.linspace(-1, 1, 40)[None, None, :, None] * jnp.linspace(0, 2, 40)
        expected = with_gradients(reference.attend, *arrays, bias=bias)
        for blocks in ((8, 8), (64, 64)):
            for x, y in zip(with_gradients(in_parts(*blocks), *arrays, bias=bias), expected, strict=True):
                assert x.dtype == jnp.float64
                np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


def test_rows_that_fill_a_block_add_nothing():
    """Their scores are 0 but for the bias, of which exp overflows."""
    arrays = example(t=13)
    bias = jnp.full((1, 1, 1, 13), 100.0)
    expected = with_gradients(reference.attend, *arrays, bias=bias)
    for x, y in zip(with_gradients(in_parts(8, 8), *arrays, bias=bias), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=TOLERANCE, atol=TOLERANCE)


def test_checkpoint_policy_by_name_spares_the_second_forward_pass():
    q, k, v = example()
    policy = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")

    def loops(policy):
        def layer(q):
            return jnp.sum(attention(q, k, v, Mask(causal=True), impl="chunked") ** 2)

        return str(jax.make_jaxpr(jax.grad(jax.checkpoint(layer, policy=policy)))(q)).count("scan[")

    assert loops(policy) < loops(jax.checkpoint_policies.nothing_saveable)


def temporaries(length: int) -> int:
    """Bytes of temporaries, forward and backward: 8 heads of 64, bfloat16, causal."""
    shape = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.bfloat16)

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, Mask(causal=True), impl="chunked").astype(jnp.float32))

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    return step.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.numbers
def test_memory_is_linear_in_length():
    lengths = [2048, 4096, 8192, 16384, 32768]
    sizes = [temporaries(length) for length in lengths]
    exponents = [math.log2(b / a) for a, b in pairwise(sizes)]
    assert max(exponents) <= 1.1, sizes
    assert sizes[-1] < 400 * 2**20, sizes
