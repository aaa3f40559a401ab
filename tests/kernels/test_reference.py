"""`xla` against the equation written as loops in float64, and its gradients against finite differences."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from zoo.kernels import Bias, Mask, attention
from zoo.kernels import dropout as dropouts

B, T, S, N, K, H = 2, 5, 7, 4, 2, 3


def equation(q, k, v, allowed, *, bias=None, soft_cap=None, sinks=None, keep=None, rate=0.0, scale=None):
    """Output and lse by loops over rows, heads, queries and keys. allowed(b, i, j) -> bool; bias(b, n, i, j)."""
    rows, queries, heads, width = q.shape
    keys, kv_heads, value_width = k.shape[1], k.shape[2], v.shape[3]
    scale = width**-0.5 if scale is None else scale
    out, lse = np.zeros((rows, queries, heads, value_width)), np.full((rows, queries, heads), -np.inf)
    for b in range(rows):
        for n in range(heads):
            group = n * kv_heads // heads
            for i in range(queries):
                scores = {}
                for j in range(keys):
                    if not allowed(b, i, j):
                        continue
                    score = scale * float(q[b, i, n].astype(np.float64) @ k[b, j, group].astype(np.float64))
                    if soft_cap is not None:
                        score = soft_cap * math.tanh(score / soft_cap)
                    scores[j] = score + (bias(b, n, i, j) if bias is not None else 0.0)
                total = sum(math.exp(score) for score in scores.values())
                if not scores:
                    continue
                lse[b, i, n] = math.log(total)
                total += math.exp(sinks[n]) if sinks is not None else 0.0
                for j, score in scores.items():
                    kept = 1.0 if keep is None else keep[b, n, i, j] / (1 - rate)
                    out[b, i, n] += kept * math.exp(score) / total * v[b, j, group]
    return out, lse


def arrays(seed=0, queries=T, keys=S, kv_heads=K, heads=N):
    rng = np.random.default_rng(seed)
    shapes = ((B, queries, heads, H), (B, keys, kv_heads, H), (B, keys, kv_heads, H + 1))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


QUERY_SEGMENTS = np.array([[1, 1, 2, 2, 0], [1, 3, 3, 3, 3]])
KEY_SEGMENTS = np.array([[1, 2, 2, 2, 2, 0, 0], [2, 3, 3, 1, 1, 3, 0]])
QUERY_POSITIONS = np.array([[4, 0, 2, 1, 3], [2, 3, 4, 5, 6]])
KEY_POSITIONS = np.array([[6, 5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5, 6]])
LENGTHS = np.array([0, 4])

MASKS = {
    "nothing": (Mask(), lambda b, i, j: True),
    "causal": (Mask(causal=True), lambda b, i, j: j <= i),
    "window of 2": (Mask(window=2), lambda b, i, j: 0 <= i - j < 2),
    "window (1, 2)": (Mask(window=(1, 2)), lambda b, i, j: -2 <= i - j <= 1),
    "window (None, 0)": (Mask(window=(None, 0)), lambda b, i, j: i - j >= 0),
    "strictly causal": (Mask(window=(None, -1)), lambda b, i, j: j < i),
    "prefix": (Mask(causal=True, prefix=np.array([2, 4])), lambda b, i, j: j <= i or j < (2, 4)[b]),
    "segments": (
        Mask(segments=(QUERY_SEGMENTS, KEY_SEGMENTS)),
        lambda b, i, j: QUERY_SEGMENTS[b, i] == KEY_SEGMENTS[b, j] != 0,
    ),
    "positions": (
        Mask(causal=True, positions=(QUERY_POSITIONS, KEY_POSITIONS)),
        lambda b, i, j: KEY_POSITIONS[b, j] <= QUERY_POSITIONS[b, i],
    ),
    "lengths": (Mask(lengths=LENGTHS), lambda b, i, j: j < LENGTHS[b]),
    "where": (Mask(where=lambda q, k: (q + k) % 3 != 0), lambda b, i, j: (i + j) % 3 != 0),
    "all at once": (
        Mask(causal=True, positions=(QUERY_POSITIONS, KEY_POSITIONS))
        & Mask(segments=(QUERY_SEGMENTS, KEY_SEGMENTS), lengths=np.array([6, 5]))
        & Mask(where=lambda q, k: q != k + 1)
        & Mask(window=(4, None)),
        lambda b, i, j: (
            0 <= QUERY_POSITIONS[b, i] - KEY_POSITIONS[b, j] <= 4
            and QUERY_SEGMENTS[b, i] == KEY_SEGMENTS[b, j] != 0
            and j < (6, 5)[b]
            and QUERY_POSITIONS[b, i] != KEY_POSITIONS[b, j] + 1
        ),
    ),
}


def agree(result, expected):
    for a, b in zip(result, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    mask, allowed = MASKS[name]
    q, k, v = arrays()
    agree(attention(q, k, v, mask, impl="xla", return_lse=True), equation(q, k, v, allowed))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (6, 1)])
def test_query_heads_share_key_heads_in_order(heads, kv_heads):
    q, k, v = arrays(heads=heads, kv_heads=kv_heads)
    agree(attention(q, k, v, impl="xla", return_lse=True), equation(q, k, v, lambda b, i, j: True))


def test_every_feature_at_once():
    q, k, v = arrays(queries=S)
    rng = np.random.default_rng(1)
    sinks, table = rng.normal(size=N).astype(np.float32), rng.normal(size=(N, 2 * S)).astype(np.float32)
    key, rate = jax.random.key(3), 0.4
    indices = [jnp.arange(size) for size in (B, N, S, S)]
    keep = np.asarray(dropouts.keep(dropouts.words(key), rate, *indices))
    result = attention(
        q,
        k,
        v,
        Mask(causal=True),
        bias=Bias(lambda table, head, query, key: table[head, query - key + S], table),
        soft_cap=1.5,
        sinks=sinks,
        dropout=rate,
        dropout_key=key,
        scale=0.7,
        impl="xla",
        return_lse=True,
    )
    expected = equation(
        q,
        k,
        v,
        lambda b, i, j: j <= i,
        bias=lambda b, n, i, j: table[n, i - j + S],
        soft_cap=1.5,
        sinks=sinks,
        keep=keep,
        rate=rate,
        scale=0.7,
    )
    assert not keep.all()
    agree(result, expected)


@pytest.mark.parametrize("shape", [(B, N, T, S), (1, N, T, S), (B, 1, 1, S), (T, S), (1, 1, 1, 1)])
def test_array_bias_broadcasts(shape):
    q, k, v = arrays()
    bias = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    full = np.broadcast_to(bias, (B, N, T, S))
    expected = equation(q, k, v, lambda b, i, j: True, bias=lambda b, n, i, j: full[b, n, i, j])
    agree(attention(q, k, v, bias=bias, impl="xla", return_lse=True), expected)


def test_gradients_by_finite_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(4)
        q, k, v = (x.astype(np.float64) for x in arrays(queries=S))
        table, sinks = rng.normal(size=(N, 2 * S)), rng.normal(size=N)

        @jax.jit
        def run(q, k, v, table, sinks):
            bias = Bias(lambda table, head, query, key: table[head, query - key + S], table)
            mask = Mask(causal=True, lengths=np.array([S, 3]), window=(None, -1))
            options = {"dropout": 0.3, "dropout_key": jax.random.key(0), "soft_cap": 2.0, "sinks": sinks, "bias": bias}
            out, lse = attention(q, k, v, mask, impl="xla", return_lse=True, **options)
            return out, jnp.where(lse == -jnp.inf, 0, lse)

        check_grads(run, (q, k, v, table, sinks), order=1, modes=("rev", "fwd"), atol=1e-6, rtol=1e-6)
