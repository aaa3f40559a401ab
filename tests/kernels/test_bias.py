"""Biases as functions with tables: T5's buckets and ALiBi equal their arrays, values and gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.kernels import AttentionError, Bias, Mask, attention

B, T, S, N, H = 2, 20, 24, 4, 8
BUCKETS, DISTANCE = 16, 20


def buckets(relative: jax.Array) -> jax.Array:
    """T5's bidirectional buckets of key - query: half for each direction, exact when near, logarithmic beyond."""
    half, exact = BUCKETS // 2, BUCKETS // 4
    distance = jnp.abs(relative)
    far = exact + (jnp.log(jnp.maximum(distance, 1) / exact) / math.log(DISTANCE / exact) * (half - exact)).astype(int)
    return jnp.where(relative > 0, half, 0) + jnp.where(distance < exact, distance, jnp.minimum(far, half - 1))


def t5(table: jax.Array, head: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
    return table[buckets(key - query), head]


def alibi(slopes: jax.Array, head: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
    return -slopes[head] * jnp.abs(query - key)


def arrays() -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((B, T, N, H), (B, S, N // 2, H), (B, S, N // 2, H))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.numbers
@pytest.mark.parametrize("impl", ["xla", "chunked"])
@pytest.mark.parametrize(("function", "tables"), [(t5, (BUCKETS, N)), (alibi, (N,))], ids=["T5 buckets", "ALiBi"])
def test_function_equals_array(function, tables, impl: str) -> None:
    q, k, v = arrays()
    tables = jax.random.normal(jax.random.key(1), tables)
    heads, queries, keys = jnp.arange(N)[:, None, None], jnp.arange(T)[:, None], jnp.arange(S)

    def by_function(tables: jax.Array) -> jax.Array:
        return jnp.sum(attention(q, k, v, bias=Bias(function, tables), impl=impl) ** 3)

    def by_array(tables: jax.Array) -> jax.Array:
        return jnp.sum(attention(q, k, v, bias=function(tables, heads, queries, keys), impl=impl) ** 3)

    for a, b in zip(*(jax.jit(jax.value_and_grad(f))(tables) for f in (by_function, by_array)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_function_sees_positions() -> None:
    """Two packed documents get the same bias as each on its own."""
    q, k, v = (x[:1, :10] for x in arrays())
    tables = jax.random.normal(jax.random.key(1), (BUCKETS, N))
    alone = attention(q, k, v, Mask(causal=True), bias=Bias(t5, tables))
    double = [jnp.concatenate([x, x], axis=1) for x in (q, k, v)]
    positions = jnp.tile(jnp.arange(10), 2)
    packed = Mask(causal=True, positions=positions, segments=jnp.repeat(jnp.array([[1, 2]]), 10, axis=1))
    both = attention(*double, packed, bias=Bias(t5, tables))
    np.testing.assert_allclose(both, jnp.concatenate([alone, alone], axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.numbers
def test_long_sequences_hold_no_square_of_bias() -> None:
    length = 8192
    shape = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
    tables = jax.ShapeDtypeStruct((BUCKETS, 1), jnp.float32)

    def loss(q: jax.Array, tables: jax.Array) -> jax.Array:
        return jnp.sum(attention(q, q, q, Mask(causal=True), bias=Bias(t5, tables)))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(shape, tables).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < length * length


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (np.zeros((N, T, S + 1), np.float32), r"broadcast to \[B, N, T, S\] = \(2, 4, 20, 24\)"),
        (np.zeros((1, B, N, T, S), np.float32), "must broadcast"),
        (np.zeros((T, S), bool), "bias is bool"),
        (Bias(alibi, {"slopes": np.zeros(N, int)}), r"Bias table \['slopes'\] is int"),
        (Bias(lambda slopes, head, query, key: jnp.zeros((3, 5)), np.zeros(N)), r"Bias function gave shape \(3, 5\)"),
    ],
)
def test_errors_name_the_thing(bias, message: str) -> None:
    with pytest.raises(AttentionError, match=message) as error:
        attention(*arrays(), bias=bias)
    assert "\n" not in str(error.value)
