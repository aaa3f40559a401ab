import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo.kernels import Mask
from zoo.layers.attention import MultiHeadAttention
from zoo.layers.linear import LayerError
from zoo.layers.norms import RMSNorm
from zoo.layers.positions import Rotary

INIT = jax.nn.initializers.normal(0.3)
CAUSAL = Mask(causal=True)


def build(**kwargs) -> MultiHeadAttention:
    return jax.jit(lambda: MultiHeadAttention(24, 6, rngs=nnx.Rngs(0), init=INIT, **kwargs))()


def random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@jax.jit
def plain(module: MultiHeadAttention, x, kv, allowed) -> jax.Array:
    """The equation, with keys and values repeated for each query head; allowed [T, S]."""
    groups = 6 // module.num_kv_heads
    q, k, v = module.query(x), module.key(kv), module.value(kv)
    if module.query_norm is not None:
        q, k = module.query_norm(q), module.key_norm(k)
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(module.head_dim)
    weights = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), axis=-1)
    return module.out(jnp.einsum("bnts,bsnh->btnh", weights, v))


@pytest.mark.parametrize("num_kv_heads", [6, 2, 1])
def test_grouped_queries_follow_the_equation(num_kv_heads) -> None:
    module, x = build(num_kv_heads=num_kv_heads), random(1, 2, 9, 24)
    expected = plain(module, x, x, jnp.tril(jnp.ones((9, 9), bool)))
    output, cache, _ = jax.jit(lambda x: module(x, mask=CAUSAL))(x)
    assert cache is None
    np.testing.assert_allclose(output, expected, atol=1e-5)


def test_normalised_heads_and_the_biases_asked_for() -> None:
    module, x = build(bias=True, out_bias=False, head_norm=RMSNorm, num_kv_heads=2), random(1, 2, 5, 24)
    assert module.out.bias is None and module.query.bias is not None
    module.key_norm.scale = module.key_norm.scale.replace(random(2, 4))
    with_norms = jax.jit(lambda x: module(x).output)(x)
    expected = plain(module, x, x, jnp.ones((5, 5), bool))
    np.testing.assert_allclose(with_norms, expected, atol=1e-5)
    np.testing.assert_allclose(module(x, x).output, expected, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_one_product_for_queries_keys_and_values_gives_the_same(bias) -> None:
    module, x = build(bias=bias, head_norm=RMSNorm, num_kv_heads=2, rotary=Rotary(4)), random(1, 2, 5, 24)
    if bias:
        module.value.bias = module.value.bias.replace(random(2, 2, 4))
    merged = module.merged()
    assert merged.query.kernel.shape == (24, 6 + 2 + 2, 4) and len(jax.tree.leaves(merged)) < len(
        jax.tree.leaves(module)
    )
    np.testing.assert_allclose(merged(x, mask=CAUSAL).output, module(x, mask=CAUSAL).output, atol=1e-5)


def test_cross_attention_sees_another_sequence_of_another_width() -> None:
    module, x, kv = build(kv_width=10, num_kv_heads=3), random(1, 2, 4, 24), random(2, 2, 7, 10)
    expected = plain(module, x, kv, jnp.ones((4, 7), bool))
    run = jax.jit(lambda x, kv: module(x, kv).output)
    np.testing.assert_allclose(run(x, kv), expected, atol=1e-5)
    np.testing.assert_allclose(run(x, module.keys_and_values(kv)), expected, atol=1e-5)
    shorter = module.keys_and_values(kv, lengths=jnp.array([5, 5]))
    np.testing.assert_allclose(run(x, shorter), run(x, kv[:, :5]), atol=1e-5)


def test_rows_may_share_what_they_attend_to() -> None:
    module, x, kv = build(num_kv_heads=3), random(1, 6, 4, 24), random(2, 2, 7, 24)
    real = (jnp.arange(7) < jnp.array([7, 5])[:, None]).astype(jnp.int32)
    expected = module(x, jnp.repeat(kv, 3, 0), mask=masked(4, jnp.repeat(real, 3, 0)), return_weights=True)
    for shared in (kv, module.keys_and_values(kv)):
        found = module(x, shared, mask=masked(12, real), return_weights=True)
        np.testing.assert_allclose(found.output, expected.output, atol=1e-5)
        np.testing.assert_allclose(found.weights, expected.weights, atol=1e-6)
    with pytest.raises(LayerError, match=r"^kv has 2 rows and x 5, .* give as many, or a divisor of them$"):
        module(x[:5], kv)


def masked(queries: int, real: jax.Array) -> Mask:
    return Mask(segments=(jnp.ones((len(real), queries), jnp.int32), real))


@pytest.mark.parametrize("rotary", [None, Rotary()])
def test_a_cache_filled_in_pieces_equals_one_pass(rotary) -> None:
    module, x = build(num_kv_heads=2, rotary=rotary), random(1, 2, 11, 24)
    run = jax.jit(lambda x, cache: module(x, mask=CAUSAL, cache=cache))
    expected = run(x, None).output
    cache, outputs = module.init_cache(2, 16), []
    for piece in jnp.split(x, [4, 5, 9], axis=1):
        output, cache, _ = run(piece, cache)
        outputs.append(output)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), expected, atol=1e-5)
    np.testing.assert_array_equal(cache.lengths, [11, 11])


def test_rows_of_different_length_share_a_cache() -> None:
    module, x = build(num_kv_heads=2, rotary=Rotary()), random(1, 2, 6, 24)
    lengths = jnp.array([6, 3])
    run = jax.jit(lambda x, cache: module(x, mask=CAUSAL, cache=cache))
    _, cache, _ = run(x, module.init_cache(2, 8))
    cache = cache.cut(lengths)
    new = random(2, 2, 1, 24)
    output, cache, _ = run(new, cache)
    np.testing.assert_array_equal(cache.lengths, lengths + 1)
    for row, length in enumerate([6, 3]):
        alone = jnp.concatenate([x[row : row + 1, :length], new[row : row + 1]], axis=1)
        expected = run(alone, None).output[:, -1]
        np.testing.assert_allclose(output[row : row + 1, 0], expected, atol=1e-5)


def test_dropout_is_by_key() -> None:
    module, x = build(dropout=0.5), random(1, 2, 9, 24)
    run = jax.jit(lambda key: module(x, key=key).output)
    np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
    assert np.abs(run(jax.random.key(1)) - run(jax.random.key(2))).max() > 1e-2
    np.testing.assert_allclose(run(None), plain(module, x, x, jnp.ones((9, 9), bool)), atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(LayerError, match="num_heads 6 is no multiple of num_kv_heads 4"):
        build(num_kv_heads=4)
    with pytest.raises(LayerError, match="kv given with a cache"):
        build()(random(1, 1, 2, 24), random(1, 1, 2, 24), cache=build().init_cache(1, 4))
    with pytest.raises(LayerError, match="width 25 is no multiple of num_heads 6"):
        MultiHeadAttention(25, 6, rngs=nnx.Rngs(0))


def test_a_fresh_cache_can_be_donated() -> None:
    attention = MultiHeadAttention(8, 2, rngs=nnx.Rngs(0))
    cache = jax.jit(lambda cache: cache.cut(cache.lengths), donate_argnums=0)(attention.init_cache(1, 4))
    assert cache.keys.shape == cache.values.shape == (1, 2, 4, 4)
