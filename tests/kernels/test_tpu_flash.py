"""The TPU kernels, interpreted, against the plain equation: values and gradients of every feature and of pairs."""

from functools import partial
from itertools import combinations, cycle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.kernels import Bias, Mask, attention, engine, reference, tpu_blocks, tpu_call, tpu_flash, tpu_pair_bias
from zoo.kernels.problem import Origin, build
from zoo.kernels.tpu_blocks import Blocks
from zoo.kernels.tpu_flash import TpuFlash

B, T, S, N, K, H = 2, 300, 420, 4, 2, 64
RNG = np.random.default_rng(0)

FORWARD = Blocks(128, 256, 128, 128)
BACKWARD = Blocks(256, 256, 128, 128)


def per_side(high: int) -> tuple[np.ndarray, np.ndarray]:
    queries, keys = (RNG.integers(1, high, size=(B, x)) for x in (T, S))
    return np.sort(queries, 1), np.sort(keys, 1)


def padded_segments() -> tuple[np.ndarray, np.ndarray]:
    queries, keys = per_side(5)
    queries[:, -30:], keys[:, -30:] = 0, 0
    return queries, keys


def permuted() -> tuple[np.ndarray, np.ndarray]:
    queries, keys = (RNG.permuted(np.tile(np.arange(x), (B, 1)), axis=1) for x in (T, S))
    return queries, keys


def alibi(slopes: jax.Array, head: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
    return -slopes[head] * jnp.abs(query - key)


def t5(table: jax.Array, head: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
    """Buckets of key - query, 16 for each direction, exact below 8 and logarithmic up to 128."""
    distance = jnp.abs(key - query)
    far = 8 + (jnp.log2(jnp.maximum(distance, 1) / 8) * 2).astype(jnp.int32)
    return table[jnp.where(key > query, 16, 0) + jnp.where(distance < 8, distance, jnp.minimum(far, 15)), head]


def absolute(table: jax.Array, head: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
    """Of the key alone, and of where the query is in its row of 20."""
    return table[key % S, head] * jnp.cos(query % 20)


FEATURES: dict[str, dict] = {
    "causal": {"mask": Mask(causal=True)},
    "window": {"mask": Mask(window=(70, 10))},
    "prefix": {"mask": Mask(causal=True, prefix=np.array([5, 200]))},
    "segments": {"mask": Mask(segments=padded_segments())},
    "positions": {"mask": Mask(causal=True, positions=permuted())},
    "lengths": {"mask": Mask(lengths=np.array([0, 400]))},
    "where": {"mask": Mask(where=lambda q, k: (q + 2 * k) % 3 != 0)},
    "where_by_row": {"mask": Mask(where=lambda q, k: q > k - 40, positions=permuted())},
    "soft_cap": {"soft_cap": 2.0},
    "wide_cap": {"soft_cap": 100.0, "scale": 3.0},
    "bound": {"logits_bound": 30.0},
    "dropout": {"dropout": 0.3, "dropout_key": jax.random.key(1)},
    "scale": {"scale": 0.3},
    "alibi": {"bias": Bias(alibi, jnp.array([0.5, 0.1, 0.02, -0.2]))},
    "t5": {"bias": Bias(t5, jnp.asarray(RNG.normal(size=(32, N)), jnp.float32))},
    "absolute": {"bias": Bias(absolute, jnp.asarray(RNG.normal(size=(S, N)), jnp.float32))},
    "array": {"bias": jnp.asarray(RNG.normal(size=(B, N, T, S)), jnp.float32)},
    "array_of_keys": {"bias": jnp.where(RNG.random((1, N, 1, S)) < 0.3, -jnp.inf, 1.0)},
    "multi_query": {},
    "head_128": {},
    "wide_values": {},
}


BIASES = ("alibi", "t5", "absolute", "array", "array_of_keys")
ALTERNATIVES = (("soft_cap", "wide_cap"), ("positions", "where_by_row"), *combinations(BIASES, 2))
EXCLUSIVE = set(map(frozenset, ALTERNATIVES))


def arrays(features: tuple[str, ...]) -> tuple:
    h = 128 if "head_128" in features else H
    kv = 1 if "multi_query" in features else K
    value = 2 * h if "wide_values" in features else h
    rng = np.random.default_rng(1)
    shapes = ((B, T, N, h), (B, S, kv, h), (B, S, kv, value), (B, T, N, value), (B, T, N))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def options(features: tuple[str, ...]) -> dict:
    mask, rest = Mask(), {}
    for name in features:
        mask = mask & FEATURES[name].get("mask", Mask())
        rest |= {key: value for key, value in FEATURES[name].items() if key != "mask"}
    return {"mask": mask, **rest}


def value_and_gradients(attend, features: tuple[str, ...]):
    q, k, v, d_out, d_lse = arrays(features)
    given = options(features)
    bias = given.pop("bias", None)

    @jax.jit
    def run(*learned):
        def loss(q, k, v, bias):
            out, lse = attend(build(q, k, v, bias=bias, **given))
            return jnp.sum(out * d_out) + jnp.sum(jnp.where(lse == -jnp.inf, 0, lse) * d_lse), (out, lse)

        return jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(*learned)

    (_, output), gradients = run(q, k, v, bias)
    return output, gradients


def flash(turned: bool) -> TpuFlash:
    return TpuFlash(FORWARD._replace(turned=turned), BACKWARD._replace(turned=turned), interpret=True)


def compare(flash: TpuFlash, features: tuple[str, ...]) -> None:
    """Values and gradients are those of the plain equation."""
    expected, result = (value_and_gradients(x, features) for x in (reference.attend, partial(engine.attend, flash)))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(result), strict=True):
        bound = 2e-5 * max(1.0, np.max(np.abs(a), where=np.isfinite(a), initial=0))
        np.testing.assert_allclose(b, a, rtol=0, atol=bound)


def covering_sets() -> list[tuple[str, ...]]:
    """Few sets of features that have every pair in one of them."""
    rng = np.random.default_rng(0)
    missing = {frozenset(pair) for pair in combinations(FEATURES, 2)} - EXCLUSIVE
    sets = []

    def covered(names: set[str]) -> int:
        return sum(pair <= names for pair in missing)

    while missing:
        draws = [set(rng.choice(list(FEATURES), 6, replace=False)) for _ in range(200)]
        best = max((draw for draw in draws if not any(pair <= draw for pair in EXCLUSIVE)), key=covered)
        missing = {pair for pair in missing if not pair <= best}
        sets.append(tuple(sorted(best)))
    return sets


@pytest.mark.numbers
@pytest.mark.parametrize(("feature", "turned"), list(zip(FEATURES, cycle([False, True]), strict=False)))
def test_feature(feature: str, turned: bool) -> None:
    compare(flash(turned), (feature,))


SETS = covering_sets()
"""The first have most pairs."""


@pytest.mark.numbers
@pytest.mark.parametrize(
    "features", [*SETS[:2], *(pytest.param(x, marks=pytest.mark.large) for x in SETS[2:])], ids="+".join
)
def test_pairs_of_features(features: tuple[str, ...]) -> None:
    compare(flash(turned="causal" in features), features)


@pytest.mark.numbers
@pytest.mark.parametrize("rise", [10.0, 60.0, 400.0])
def test_scores_that_outgrow_the_reference(rise: float) -> None:
    """Keys are visited from the last to the first: the first have scores that are greater by `rise`."""
    q = jnp.ones((1, 128, 1, 64))
    scores = jnp.where(jnp.arange(1024) < 300, rise, 0.0) + jnp.sin(jnp.arange(1024.0))
    k = jnp.broadcast_to(scores[None, :, None, None] / 64, (1, 1024, 1, 64))
    v = jax.random.normal(jax.random.key(0), k.shape)
    problem = build(q, k, v, Mask(), scale=1.0)
    expected, result = reference.attend(problem), engine.attend(flash(False), problem)
    # A score itself is rounded to 2^-24 of its size.
    np.testing.assert_allclose(result.output, expected.output, rtol=0, atol=2e-5 + 2**-22 * rise)
    np.testing.assert_allclose(result.lse, expected.lse, rtol=1e-6)


@pytest.mark.numbers
@pytest.mark.parametrize(("turned", "queries_first"), [(False, 0), (True, 128)])
@pytest.mark.parametrize("rise", [-200.0, 40.0, 200.0])
def test_a_query_that_sees_itself(rise: float, turned: bool, queries_first: int) -> None:
    """Its own score is the reference: others are greater by up to `rise`, or less. Queries may be the last keys."""
    keys = 512
    scores = rise * (1 - jnp.arange(keys) / keys) + jnp.sin(jnp.arange(float(keys)))
    k = jnp.broadcast_to(scores[None, :, None, None] / 64, (1, keys, 1, 64))
    v = jax.random.normal(jax.random.key(0), k.shape)
    q = jnp.ones((1, keys - queries_first, 1, 64))
    problem = build(q, k, v, Mask(causal=True), scale=1.0, origin=Origin(query=queries_first))
    call = tpu_call.Call.of(problem, FORWARD)
    assert call.spec.sees_itself
    expected, result = reference.attend(problem), engine.attend(flash(turned), problem)
    # A score, a sum of 64 products, is rounded to some 2^-21 of its size.
    np.testing.assert_allclose(result.output, expected.output, rtol=0, atol=2e-5 + 2**-19 * abs(rise))
    np.testing.assert_allclose(result.lse, expected.lse, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "queries", "first"),
    [
        (Mask(), 512, 0),
        (Mask(causal=True, prefix=3), 512, 0),
        (Mask(causal=True, segments=np.ones((1, 512), int)), 512, 0),
        (Mask(causal=True, lengths=np.array([512])), 512, 0),
        (Mask(causal=True, where=lambda q, k: (q - k) % 2 == 1), 512, 0),
        (Mask(causal=True, positions=np.arange(512)), 512, 0),
        (Mask(window=(None, 3)), 512, 0),
        (Mask(causal=True), 384, 129),
        (Mask(causal=True), 512, 128),
    ],
)
def test_a_query_that_may_not_see_itself(mask: Mask, queries: int, first: int) -> None:
    """Or whose own key is in another block, or past the last."""
    q, k = jnp.ones((1, queries, 1, 64)), jnp.ones((1, 512, 1, 64))
    problem = build(q, k, k, mask, origin=Origin(query=first))
    assert not tpu_call.Call.of(problem, FORWARD).spec.sees_itself


@pytest.mark.numbers
@pytest.mark.parametrize(
    ("features", "turned"),
    [
        (("causal", "window", "t5"), False),
        (("lengths", "dropout"), True),
        pytest.param(("causal", "window", "t5"), True, marks=pytest.mark.large),
        pytest.param(("lengths", "dropout", "alibi"), False, marks=pytest.mark.large),
        pytest.param(("segments", "prefix"), False, marks=pytest.mark.large),
        pytest.param(("segments", "prefix", "alibi"), True, marks=pytest.mark.large),
    ],
)
def test_strips_and_tiles(features: tuple[str, ...], turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of several strips, tiles of fewer queries than the block, more queries than keys in a block."""
    monkeypatch.setattr(tpu_call, "STRIP", 128)
    compare(TpuFlash(Blocks(384, 256, 128, 128, turned), Blocks(384, 512, 128, 256, turned), interpret=True), features)


def test_through_dispatch() -> None:
    """Sinks, and a caller's vmap over rows with masks of their own."""
    q, k, v, *_ = arrays(("causal",))
    segments = padded_segments()

    def one(impl: str, q, k, v, query, key):
        mask = Mask(segments=(query[None], key[None]))
        return attention(q[None], k[None], v[None], mask, sinks=jnp.arange(N) / 4, impl=impl)[0]

    expected, result = (jax.vmap(partial(one, impl))(q, k, v, *segments) for impl in ("xla", "tpu_flash"))
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-5)


@pytest.mark.numbers
@pytest.mark.parametrize("bias", ["t5", "absolute", "array"])
def test_keys_in_parts(bias: str) -> None:
    """The backward pass cuts keys into parts whose sums fit VMEM; a bias is laid out for each visit alone."""
    problem = build(*arrays(("causal",))[:3], **options(("causal", bias)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tpu_blocks.CHIPS, "v5e", tpu_blocks.Chip(("TPU v5 lite",), 2**19))
        assert tpu_flash.key_parts(problem, BACKWARD) == [slice(0, 256), slice(256, S)]
        compare(flash(False), ("causal", "dropout", "segments", bias))


@pytest.mark.numbers
@pytest.mark.parametrize("wrong", [jnp.nan, jnp.inf])
def test_a_bias_may_hold_anything_where_the_mask_hides(wrong: float) -> None:
    """The logarithm of a distance, say, under a causal mask."""
    q, k, v, d_out, _ = arrays(("causal",))

    def gradients(attend, hidden: float) -> tuple:
        bias = jnp.where(np.tri(T, S, dtype=bool), 0.5, hidden)

        def loss(*learned: jax.Array) -> jax.Array:
            return jnp.sum(attend(build(*learned[:3], Mask(causal=True), bias=learned[3])).output * d_out)

        return jax.grad(loss, (0, 1, 2, 3))(q, k, v, bias)

    expected, result = gradients(reference.attend, 0.0), gradients(partial(engine.attend, flash(False)), wrong)
    for a, b in zip(expected, result, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-5 * max(1, np.abs(a).max()))


@pytest.mark.numbers
@pytest.mark.parametrize("shape", [(B, 1, T, S), (1, 1, 1, S), (1, N, T, S)])
def test_array_that_broadcasts(shape: tuple[int, ...]) -> None:
    """Its gradient has its own shape and type; of blocks that the mask leaves out it is 0."""
    q, k, v, d_out, _ = arrays(("causal",))
    bias = jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.bfloat16)

    def gradient(attend) -> jax.Array:
        def loss(bias: jax.Array) -> jax.Array:
            return jnp.sum(attend(build(q, k, v, Mask(causal=True, window=50), bias=bias)).output * d_out)

        return jax.grad(loss)(bias)

    expected, result = (gradient(x) for x in (reference.attend, partial(engine.attend, flash(False))))
    assert result.shape == shape and result.dtype == jnp.bfloat16
    exact, found = (x.astype(jnp.float32) for x in (expected, result))
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-2 * np.abs(exact).max())


@pytest.mark.numbers
@pytest.mark.parametrize("name", ["t5", "absolute"])
def test_bias_under_dispatch(name: str) -> None:
    """Sinks, grouped heads, packed documents that number their positions anew, a caller's vmap."""
    q, k, v, *_ = arrays(("causal",))
    function, table = FEATURES[name]["bias"].function, FEATURES[name]["bias"].tables
    q = q[:, :256]
    segments = np.sort(RNG.integers(0, 4, size=(B, 256)), axis=1)
    starts = np.stack([np.searchsorted(row, row) for row in segments])
    positions = np.arange(256) - starts

    def loss(impl: str, q, k, v, table) -> jax.Array:
        def one(q, k, v, segments, positions):
            mask = Mask(causal=True, segments=segments[None], positions=positions[None])
            bias = Bias(function, table)
            return attention(q[None], k[None, :256], v[None, :256], mask, bias=bias, sinks=jnp.ones(N), impl=impl)

        return jnp.sum(jnp.sin(jax.vmap(one)(q, k, v, segments, positions)))

    expected, result = (jax.grad(partial(loss, impl), (0, 1, 2, 3))(q, k, v, table) for impl in ("xla", "tpu_flash"))
    for a, b in zip(expected, result, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-5 * max(1, np.abs(a).max()))


@pytest.mark.numbers
def test_bias_of_a_part_of_the_heads_and_queries() -> None:
    """As shard_map cuts them: heads and positions are those of the whole."""
    q, k, v, *_ = arrays(("causal",))
    bias, mask = FEATURES["alibi"]["bias"], Mask(causal=True)
    whole = reference.attend(build(q, k, v, mask, bias=bias)).output
    part = build(q[:, 128:, 2:], k[:, :, 1:], v[:, :, 1:], mask, bias=bias, origin=Origin(query=128, head=2))
    np.testing.assert_allclose(engine.attend(flash(True), part).output, whole[:, 128:, 2:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("turned", [False, True])
def test_bfloat16(turned: bool) -> None:
    """Values and gradients are within bfloat16 of the plain equation in float32."""
    *halves, d_out = (x.astype(jnp.bfloat16) for x in arrays(("causal",))[:4])

    def both(attend, *learned: jax.Array) -> tuple:
        output, pull = jax.vjp(lambda q, k, v: attend(build(q, k, v, Mask(causal=True))).output, *learned)
        return output, *pull(d_out.astype(output.dtype))

    expected = both(reference.attend, *(x.astype(jnp.float32) for x in halves))
    result = both(partial(engine.attend, flash(turned)), *halves)
    for a, b in zip(expected, result, strict=True):
        assert b.dtype == jnp.bfloat16
        np.testing.assert_allclose(b.astype(jnp.float32), a, rtol=0, atol=1e-2 * np.abs(a).max())


@pytest.mark.parametrize(
    ("length", "bias", "size"),
    [
        (256, jnp.ones((2, 1, 256, 256)), 4 * 2 * 256**2),
        (256, jnp.ones((1, 1, 1, 256)), 4 * 3 * 256**2),
        (256, jnp.ones((1, 1, 256, 256), jnp.float16), 4 * 3 * 256**2),
        (129, jnp.ones((1, 1, 129, 129), jnp.bfloat16), (4 * 2 + 2) * 256**2),
        (2, Bias(absolute, jnp.ones((S, 1))), 4 * 4 * 128**2),
        (2, Bias(alibi, jnp.ones(1)), 0),
    ],
)
def test_bytes_of_a_bias_of_pairs(length: int, bias: Any, size: int) -> None:
    """In whole blocks: the gradient, and a copy where the kernels cannot read the array as it lies."""
    x = jnp.zeros((2, length, 1, 64))
    assert tpu_pair_bias.bytes_of(build(x, x, x, Mask(), bias=bias)) == size


def test_what_is_refused() -> None:
    def refusal(dtype=jnp.float32, h=64, length=256, **options):
        x = jnp.zeros((1, length, 1, h), dtype)
        return tpu_flash.supports(build(x, x, x, Mask(), **options))

    assert refusal() is None
    assert refusal(jnp.float16) == "its arguments are float16: it takes bfloat16 and float32"
    of_keys = Bias(lambda table, head, query, key: table[head] * key, jnp.ones(1))
    assert refusal(bias=of_keys) is None and refusal(bias=jnp.ones(())) is None
    beyond = "with its gradient that takes 2.0 GiB a device, above 0.5"
    assert refusal(length=2**14, bias=jnp.ones(())) == f"its bias is an array: {beyond}"
    assert (
        refusal(length=2**14, bias=of_keys) == f"its bias depends on more of the positions than key - query: {beyond}"
    )
    assert refusal(h=60) == "its head sizes are 60 and 60: it takes multiples of 8 up to 256"
    table = jnp.eye(4, dtype=bool)
    captured = tpu_flash.supports(build(*arrays(("causal",))[:3], Mask(where=lambda q, k: table[q // 128, k // 128])))
    assert captured is not None and "where= uses arrays from outside" in captured
    assert refusal(length=2**20, h=8) == "1 rows of 1048576 x 1048576 pairs make too long a list of blocks"
