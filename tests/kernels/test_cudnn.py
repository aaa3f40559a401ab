"""`cudnn`: what jax.nn is asked for, run by its plain implementation; what is refused; what is lowered for GPUs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from zoo.kernels import AttentionError, Bias, Mask, attention, cudnn, dispatch, engine, explain
from zoo.kernels.problem import build

B, T, N, K, H = 2, 24, 4, 2, 16
SEGMENTS = jnp.array([[1] * 7 + [2] * 9 + [3] * 8, [0] * 5 + [1] * 3 + [2] * 15 + [0]])


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch):
    """jax.nn finds a cuDNN, as it would on a machine with a GPU; nothing of it is run."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    cudnn._refusal_of_jax.cache_clear()
    yield
    cudnn._refusal_of_jax.cache_clear()


def arrays(keys: int = T, dtype=jnp.float32) -> list[jax.Array]:
    shapes = (B, T, N, H), (B, keys, K, H), (B, keys, K, H)
    return [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]


def shapes(t: int = 1024, s: int | None = None, h: int = 64, dtype=jnp.bfloat16) -> list[jax.ShapeDtypeStruct]:
    sizes = (B, t, N, h), (B, s or t, K, h), (B, s or t, K, h)
    return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]


def with_gradients(attend, q, k, v):
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(jnp.cos(out))


@pytest.mark.numbers
@pytest.mark.parametrize(
    ("mask", "keys", "options"),
    [
        (Mask(), T, {}),
        (Mask(), 40, {"scale": 0.3}),
        (Mask(causal=True), T, {}),
        (Mask(causal=True), 40, {}),
        (Mask(causal=True), 10, {}),
        (Mask(window=5), T, {}),
        (Mask(window=5), 40, {"scale": 0.3}),
        (Mask(window=(5, 0)), T, {}),
        (Mask(causal=True, window=(3, 2)), T, {}),
        (Mask(window=(99, 99)), T, {}),
        (Mask(window=(99, 0)), 10, {}),
        (Mask(lengths=jnp.array([7, 24])), T, {}),
        (Mask(lengths=jnp.array([0, 99])), T, {}),
        (Mask(lengths=jnp.array(9)), T, {}),
        (Mask(causal=True, lengths=jnp.array([0, 9])), 40, {}),
        (Mask(causal=True, segments=SEGMENTS), T, {}),
        (Mask(segments=SEGMENTS, lengths=jnp.array([0, 9])), T, {"scale": 0.3}),
        (Mask(causal=True, prefix=jnp.array(3)), T, {}),
        (Mask(where=lambda q, k: (q + k) % 2 == 0), 40, {}),
        (Mask(causal=True, positions=jnp.arange(T)[::-1]), T, {}),
        (Mask(window=(3, 2)), T, {}),
        (Mask(window=9) & Mask(lengths=jnp.array([3, 4])), T, {}),
        (Mask(window=9), 10, {}),
    ],
)
def test_the_same_attention(mask: Mask, keys: int, options) -> None:
    """The call of jax.nn as it is made for cuDNN, run by its plain implementation."""

    def plain(q, k, v):
        return engine.attend(cudnn.JaxNN("xla"), build(q, k, v, mask, **options)).output

    found = with_gradients(jax.jit(plain), *arrays(keys))
    expected = with_gradients(lambda q, k, v: attention(q, k, v, mask, impl="xla", **options), *arrays(keys))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


def test_what_is_kept_of_a_forward_pass_spares_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that keeps what cuDNN does, and whose gradients are what it kept."""

    @jax.custom_vjp
    def fused(q, k, v):
        return attention(q, k, v, impl="xla")

    def forward(q, k, v):
        out, lse = attention(q, k, v, impl="xla", return_lse=True)
        return out, (q, k, v, lse.swapaxes(1, 2), out)

    def backward(kept, d_out):
        _, k, v, lse, out = kept
        return out, jnp.full_like(k, lse.sum()), jnp.zeros_like(v)

    fused.defvjp(forward, backward)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **options: fused(q, k, v))
    q, k, v = arrays()
    problem = build(q, k, v, Mask())
    out, lse = cudnn.JaxNN().forward(problem)
    np.testing.assert_allclose(lse.swapaxes(1, 2), attention(q, k, v, impl="xla", return_lse=True).lse, rtol=1e-5)
    learned = cudnn.JaxNN().backward(problem, engine.Output(out + 1, lse + 1), engine.Output(jnp.cos(out), lse))
    np.testing.assert_array_equal(learned.q, out + 1)
    np.testing.assert_allclose(learned.k[0, 0, 0, 0], (lse + 1).sum(), rtol=1e-5)


def test_vmap_over_some_of_the_arrays() -> None:
    q, k, v = arrays()
    many = jnp.stack([q, 2 * q, -q])
    lengths = jnp.array([[3, 4], [0, 24], [9, 1]])

    def one(impl, q, k, v, lengths):
        mask = Mask(lengths=lengths)
        if impl == "xla":
            return attention(q, k, v, mask, impl="xla")
        return engine.attend(cudnn.JaxNN("xla"), build(q, k, v, mask)).output

    for axes in ((0, None, None, None), (0, None, None, 0)):
        given = lengths if axes[3] == 0 else lengths[0]

        def total(impl, q, k, v, axes=axes, given=given):
            return jax.vmap(lambda q, k, v, n: one(impl, q, k, v, n), axes)(q, k, v, given)

        found, expected = (with_gradients(lambda *x, i=i: total(i, *x), many, k, v) for i in ("cudnn", "xla"))
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


def test_inside_shard_map() -> None:
    """Arrays that differ over the axes of a mesh."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))
    spec = PartitionSpec("data", None, "tensor")

    def attend(q, k, v):
        return engine.attend(cudnn.JaxNN("xla"), build(q, k, v, Mask(window=5))).output

    local = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec))
    found = with_gradients(local, *arrays())
    expected = with_gradients(lambda q, k, v: attention(q, k, v, Mask(window=5), impl="xla"), *arrays())
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


def refusal(*given, **options) -> str | None:
    return next(candidate.refusal for candidate in explain(*given, **options) if candidate.name == "cudnn")


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (shapes(dtype=jnp.float32), {}, "its arguments are float32"),
        (shapes(h=12), {}, "its head sizes are 12 and 12"),
        (shapes(h=264), {}, "its head sizes are 264 and 264"),
        ((*shapes()[:2], shapes(h=32)[2]), {}, "its head sizes are 64 and 32"),
        (shapes(h=136), {}, "jax.nn refuses it on this machine: The head dim must be <= 128"),
        (shapes(), {"bias": jnp.ones((1, 1024))}, "it has no bias"),
        (shapes(), {"bias": Bias(lambda table, head, query, key: table[head] * key, jnp.ones(N))}, "it has no bias"),
        (shapes(), {"soft_cap": 20.0}, "it has no soft cap"),
        (shapes(), {"dropout": 0.1, "dropout_key": jax.random.key(0)}, "it drops other probabilities"),
        (shapes(), {"return_lse": True}, "the log-sum-exp is asked for"),
        (shapes(), {"sinks": jnp.ones(N)}, "the log-sum-exp is asked for"),
    ],
)
def test_refusals(found: None, given, options, message: str) -> None:
    assert re.search(message, refusal(*given, **options) or "")


UNNAMED = [
    (Mask(segments=jnp.ones((B, 1024), int)), 1024, "its masks have no segments"),
    (Mask(causal=True, prefix=jnp.array(3)), 1024, "its masks have no prefix"),
    (Mask(where=lambda q, k: (q + k) % 2 == 0), 1024, "its masks have no where="),
    (Mask(causal=True, positions=jnp.arange(1024)), 1024, "its masks count positions from 0"),
    (Mask(window=(3, 2)), 1024, r"its masks have no window of \(3, 2\): it takes causal windows"),
    (Mask(window=(3, None)), 1024, r"no window of \(3, None\)"),
    (Mask(window=(None, 3)), 1024, r"no window of \(None, 3\)"),
    (Mask(causal=True, window=(-1, None)), 1024, r"no window of \(-1, None\)"),
    (Mask(causal=True, window=(None, -1)), 1024, r"no window of \(None, -1\)"),
    (Mask(window=9) & Mask(lengths=jnp.array([3, 4])), 1024, "a window with lengths"),
    (Mask(window=9), 512, "over fewer keys than queries"),
]


@pytest.mark.parametrize(("mask", "keys", "message"), UNNAMED)
def test_a_mask_without_a_name_is_an_array_while_that_is_small(found: None, monkeypatch, mask, keys, message) -> None:
    given = (*shapes(1024, keys), mask)
    taken = next(candidate for candidate in explain(*given) if candidate.name == "cudnn")
    named = next(candidate for candidate in explain(*shapes(1024, keys)) if candidate.name == "cudnn")
    assert taken.refusal is None and taken.chosen == "on CUDA GPUs"
    assert taken.temporaries - named.temporaries == 2 * B * 1024 * keys
    monkeypatch.setattr(cudnn, "PAIR_BYTES", 2 * B * 1024 * keys - 1)
    assert re.search(f"{message}.*, and all pairs take", refusal(*given) or "")


def test_what_is_no_limit_is_not_refused(found: None) -> None:
    positions = Mask(positions=jnp.arange(1024), window=None)
    for mask in (positions, Mask(window=(2000, 2000)), Mask(window=(9, 0)), Mask(causal=True, window=(9, 5))):
        assert refusal(*shapes(), mask) is None
    assert refusal(*shapes(), soft_cap=None, logits_bound=5.0) is None


def test_queries_that_are_cut_over_a_mesh(found: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part's queries begin at a position of their own."""
    mesh = jax.make_mesh((4,), ("length",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        options = {"partition": PartitionSpec(None, "length")}
        monkeypatch.setattr(cudnn, "PAIR_BYTES", 0)
        assert "count positions from 0" in (refusal(*shapes(), Mask(causal=True), **options) or "")
        assert refusal(*shapes(), **options) is None


def test_without_cudnn() -> None:
    """Neither named nor taken where jax.nn does not find it."""
    by_name = {candidate.name: candidate for candidate in explain(*shapes())}
    if by_name["cudnn"].refusal is None:
        pytest.skip("this machine has cuDNN")
    assert (by_name["cudnn"].chosen, by_name["chunked"].chosen) == (None, "elsewhere")
    assert by_name["cudnn"].refusal.startswith("jax.nn refuses it on this machine: cuDNN")
    with pytest.raises(AttentionError, match=r"impl='cudnn' cannot take this call: jax\.nn refuses it") as error:
        jax.eval_shape(lambda q, k, v: attention(q, k, v, impl="cudnn"), *shapes())
    assert "\n" not in str(error.value)


def test_where_auto_takes_it(found: None) -> None:
    def chosen(*given, **options) -> dict[str, str]:
        return {one.chosen: one.name for one in explain(*given, **options) if one.chosen}

    everywhere_else = {"on TPUs": "tpu_flash", "elsewhere": "chunked"}
    assert chosen(*shapes()) == everywhere_else | {"on CUDA GPUs": "cudnn"}
    assert chosen(*shapes(dtype=jnp.float16)) == {"on CUDA GPUs": "cudnn", "elsewhere": "chunked"}
    assert chosen(*shapes(), soft_cap=9.0) == everywhere_else
    assert chosen(*shapes(16)) == {"everywhere": "xla"}


def lowered(platform: str, impl: str, mask: Mask, dtype=jnp.bfloat16) -> str:
    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(attention(q, k, v, mask, impl=impl).astype(jnp.float32))

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    return step.trace(*shapes(dtype=dtype)).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("impl", ["auto", "cudnn"])
@pytest.mark.parametrize(
    ("mask", "named"),
    [
        (Mask(window=64), "sliding_window_length\\22: 64"),
        (Mask(causal=True, lengths=jnp.array([9, 900])), "PADDING_CAUSAL"),
        (Mask(causal=True, segments=jnp.ones((B, 1024), int)), "CAUSAL"),
    ],
)
def test_lowers_for_cuda(found: None, impl: str, mask: Mask, named: str) -> None:
    text = lowered("cuda", impl, mask)
    calls = re.findall(r"(?:(%\w+):\d = )stablehlo.custom_call @__cudnn\$(\w+)\(", text)
    kind = "fmhaScaleBiasSoftmax" if mask.segments is not None else "fmhaSoftmax"
    assert [name for _, name in calls] == [kind, kind, f"{kind}Backward"]
    assert named in text
    assert "dot_general" not in text
    # Nothing reads the second forward pass: the compiler leaves it out. (In regions of `auto`, names come again.)
    second = calls[1][0]
    assert impl == "auto" or not re.search(rf"(?<!hlo.transpose ){second}#\d", text)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_lowers_for_cuda_on_a_mesh(found: None, kind: AxisType) -> None:
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(kind,) * 2)
    spec = PartitionSpec("data", None, "tensor")
    given = [x.update(sharding=NamedSharding(mesh, spec)) for x in shapes()]

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        partition = spec if kind == AxisType.Auto else None
        return jnp.sum(attention(q, k, v, Mask(causal=True), partition=partition).astype(jnp.float32))

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in text and "dot_general" not in text


@pytest.mark.parametrize("platform", ["cpu", "tpu", "rocm"])
def test_changes_nothing_elsewhere(platform: str, monkeypatch: pytest.MonkeyPatch, request) -> None:
    """float16, which the TPU kernels do not take either: they are lowered for a known TPU alone."""
    without = lowered(platform, "auto", Mask(window=64), jnp.float16)
    request.getfixturevalue("found")
    with_cudnn = lowered(platform, "auto", Mask(window=64), jnp.float16)
    assert with_cudnn == without


def test_platforms_in_words() -> None:
    choice = dispatch.Choice("a", "b", "c")
    assert [choice.where(name) for name in "abcd"] == ["on TPUs", "on CUDA GPUs", "elsewhere", None]
    assert dispatch.Choice("a", "c", "c").where("c") == "elsewhere"
