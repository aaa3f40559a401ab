"""`chunked`: exact attention over blocks of queries and keys in plain JAX, in memory linear in length both ways.

The online softmax and its gradient by recomputation are those of FlashAttention (Dao et al. 2022,
https://arxiv.org/abs/2205.14135; 2023, https://arxiv.org/abs/2307.08691). For each block of queries a loop runs over the
key blocks from the first to the last that the mask leaves anything of; those it leaves whole are not masked. The
backward pass is one such sweep.

Every product is row-major times row-major or its transpose on the right: XLA's CPU products with a transposed left
operand run at a fifth of the speed. The gradients of k and v are therefore accumulated transposed, [.., H, S].
Names: rows are the G = N / K query heads of a group times a block of t queries; s is a block of keys.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from zoo.kernels import bias as biases
from zoo.kernels import dropout as dropouts
from zoo.kernels.mask import ResolvedMask, Side, allowed, block_kinds
from zoo.kernels.problem import AttentionOutput, Problem, grouped, varying_axes, varying_over

QUERY_BLOCK = 512
KEY_BLOCK = 512


class _Differentiable(NamedTuple):
    """What gradients are taken of; the rest of the problem is integers."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: biases.Given


def attend(problem: Problem, query_block: int = QUERY_BLOCK, key_block: int = KEY_BLOCK) -> AttentionOutput:
    """Linear memory; every feature; differentiable once, in reverse (`lse` too)."""
    p = problem
    shape = p.shape
    blocks = (_block(shape.queries, query_block), _block(shape.keys, key_block))
    diff = _Differentiable(p.q, p.k, p.v, p.bias)
    return AttentionOutput(*_attend(blocks, diff, p.replace(q=None, k=None, v=None, bias=None)))


def _block(length: int, limit: int) -> int:
    """The block size that covers a length in the fewest blocks of at most `limit`, with the least padding."""
    count = -(-length // limit)
    return -(-length // count)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(blocks: tuple[int, int], diff: _Differentiable, rest: Problem) -> tuple[jax.Array, jax.Array]:
    return _attend_forward(blocks, diff, rest)[0]


def _attend_forward(blocks: tuple[int, int], diff: _Differentiable, rest: Problem) -> tuple[tuple, tuple]:
    out, lse = _forward(_prepare(rest.replace(**diff._asdict()), blocks))
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (diff, rest, out, lse)


def _attend_backward(blocks: tuple[int, int], saved: tuple, cotangents: tuple) -> tuple[_Differentiable, None]:
    diff, rest, out, lse = saved
    return _backward(_prepare(rest.replace(**diff._asdict()), blocks), out, lse, *cotangents), None


_attend.defvjp(_attend_forward, _attend_backward)


class _Blocked(NamedTuple):
    """A problem laid out for the loops: lengths padded to whole blocks, heads in front of lengths.

    q [queries, B, K, G t, H], times the scale; k, v [keys, B, K, s, H]; first, last [queries]: the range of key blocks;
    whole [queries, keys]: no masking needed.
    """

    problem: Problem
    q: jax.Array
    k: jax.Array
    v: jax.Array
    mask: ResolvedMask
    bias: biases.Given
    first: jax.Array
    last: jax.Array
    whole: jax.Array
    t: int
    s: int

    def query_side(self, i: jax.Array | int) -> Side:
        return self.mask.query.block(i * self.t, self.t)

    def key_side(self, j: jax.Array | int) -> Side:
        return self.mask.key.block(j * self.s, self.s)

    def by_group(self, rows: jax.Array) -> jax.Array:
        """[B, K, G t, x] as [B, K, G, t, x]."""
        return rows.reshape(*rows.shape[:2], -1, self.t, rows.shape[3])


def _prepare(problem: Problem, blocks: tuple[int, int]) -> _Blocked:
    p, (t, s) = problem, blocks
    queries, keys = -(-p.shape.queries // t), -(-p.shape.keys // s)
    mask = p.mask.padded(queries * t, keys * s)
    needed, whole = block_kinds(mask, t, s)
    order = jnp.arange(keys, dtype=jnp.int32)
    return _Blocked(
        problem=p,
        q=_rows((p.q.astype(p.dtype) * p.scale).astype(p.q.dtype), p.shape.kv_heads, t),
        k=_rows(p.k, p.shape.kv_heads, s),
        v=_rows(p.v, p.shape.kv_heads, s),
        mask=mask,
        bias=biases.padded(p.bias, queries * t, keys * s),
        first=jnp.min(jnp.where(needed, order, keys), axis=1),
        last=jnp.max(jnp.where(needed, order + 1, 0), axis=1),
        whole=whole,
        t=t,
        s=s,
    )


def _rows(x: jax.Array, kv_heads: int, block: int) -> jax.Array:
    """[B, L, N, X] padded and cut to [L / block, B, K, G block, X]."""
    b, length, n, width = x.shape
    count = -(-length // block)
    x = jnp.pad(x, ((0, 0), (0, count * block - length), (0, 0), (0, 0)))
    x = x.reshape(b, count, block, kv_heads, n // kv_heads, width).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(count, b, kv_heads, n // kv_heads * block, width)


def _unrows(x: jax.Array, block: int, length: int) -> jax.Array:
    """The inverse of `_rows`: [L / block, B, K, G block, X] to [B, L, N, X]."""
    count, b, kv_heads, rows, width = x.shape
    x = x.reshape(count, b, kv_heads, rows // block, block, width).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(b, count * block, kv_heads * (rows // block), width)[:, :length]


def _product(p: Problem, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A product of operands in the arguments' type, summed in float32."""
    dtype = p.q.dtype
    return jnp.einsum(
        equation, x.astype(dtype), y.astype(dtype), precision=p.precision, preferred_element_type=p.dtype
    )


def _scores(b: _Blocked, i: jax.Array | int, j: jax.Array | int, query: Side, key: Side) -> tuple[jax.Array, Any]:
    """Scores of one block [B, K, G, t, s], masked with -inf, and the derivative of the soft cap or None."""
    p = b.problem
    x = b.by_group(_product(p, "bkth,bksh->bkts", b.q[i], b.k[j]))
    slope = None
    if p.soft_cap is not None:
        capped = jnp.tanh(x / p.soft_cap)
        x, slope = p.soft_cap * capped, 1 - capped * capped
    if b.bias is not None:
        added = biases.block(b.bias, p.heads, query, key, (i * b.t, j * b.s))
        x += grouped(added, p.shape.kv_heads).astype(p.dtype)
    if b.mask.hides:
        hide = lambda x: jnp.where(allowed(b.mask, query, key)[:, :, None], x, -jnp.inf)
        x = jax.lax.cond(b.whole[i, j], lambda x: x, hide, x)
    return x, slope


def _dropped(b: _Blocked, weights: jax.Array, query: Side, key: Side) -> jax.Array:
    """Dropout without its factor 1 / (1 - rate), which is applied once per row."""
    p = b.problem
    if p.seed is None:
        return weights
    keep = dropouts.keep(p.seed, p.dropout, p.batch, p.heads, query.index, key.index)
    return jnp.where(grouped(keep, p.shape.kv_heads), weights, 0)


def _loop(b: _Blocked, i: jax.Array | int, body: Any, carry: Any) -> Any:
    """Runs body(j, carry) over the key blocks that block i of the queries needs."""
    if b.k.shape[0] == 1:
        return body(0, carry)
    return jax.lax.fori_loop(b.first[i], b.last[i], body, carry)


def _forward(b: _Blocked) -> tuple[jax.Array, jax.Array]:
    p = b.problem
    flat = lambda x: x.reshape(*x.shape[:2], -1, *x.shape[4:])

    def one(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        query = b.query_side(i)

        def step(j: jax.Array | int, carry: tuple) -> tuple:
            top, total, out = carry
            key = b.key_side(j)
            x, _ = _scores(b, i, j, query, key)
            new_top = jnp.maximum(top, x.max(-1))
            safe = jnp.where(new_top == -jnp.inf, 0, new_top)
            weights = jnp.exp(x - safe[..., None])
            shrink = jnp.exp(top - safe)
            total = total * shrink + weights.sum(-1)
            values = _product(p, "bkts,bksh->bkth", flat(_dropped(b, weights, query, key)), b.v[j])
            return new_top, total, out * flat(shrink)[..., None] + values

        rows = b.by_group(b.q[0]).shape[:-1]
        zero = (jnp.full(rows, -jnp.inf, p.dtype), jnp.zeros(rows, p.dtype), jnp.zeros(b.q.shape[1:4] + b.v.shape[-1:], p.dtype))
        top, total, out = _loop(b, i, step, varying_over(zero, varying_axes(b.q)))
        empty = total == 0
        total = jnp.where(empty, 1, total)
        lse = flat(jnp.where(empty, -jnp.inf, top + jnp.log(total)))
        return (out / (flat(total)[..., None] * (1 - p.dropout))).astype(p.q.dtype), lse[..., None]

    out, lse = jax.lax.map(one, jnp.arange(b.q.shape[0], dtype=jnp.int32))
    return _unrows(out, b.t, p.shape.queries), _unrows(lse, b.t, p.shape.queries)[..., 0]


def _backward(b: _Blocked, out: jax.Array, lse: jax.Array, d_out: jax.Array, d_lse: jax.Array) -> _Differentiable:
    p = b.problem
    kv_heads = p.shape.kv_heads
    flat = lambda x: x.reshape(*x.shape[:2], -1, *x.shape[4:])
    # d score = weight (d weight - delta): delta gathers what normalising, and lse, give back to every score of a row.
    delta = jnp.sum(d_out.astype(p.dtype) * out.astype(p.dtype), axis=-1) - d_lse.astype(p.dtype)
    # exp(x - inf) is 0: rows with nothing to attend to have no gradient.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    lse, delta = (_rows(x[..., None], kv_heads, b.t) for x in (lse, delta))
    d_out = _rows(d_out, kv_heads, b.t)
    kept = 1 / (1 - p.dropout)
    axes = varying_axes(b.q)

    def one(sums: tuple, i: jax.Array) -> tuple[tuple, jax.Array]:
        query = b.query_side(i)
        q_turned, d_out_turned = b.q[i].swapaxes(-1, -2), d_out[i].swapaxes(-1, -2)
        row_lse, row_delta = b.by_group(lse[i]), b.by_group(delta[i])

        def step(j: jax.Array | int, carry: tuple) -> tuple:
            d_q, d_k, d_v, d_bias = carry
            key = b.key_side(j)
            x, slope = _scores(b, i, j, query, key)
            weights = jnp.exp(x - row_lse)
            d_v = _add_at(d_v, j, _product(p, "bkht,bkts->bkhs", d_out_turned, flat(_dropped(b, weights, query, key))))
            d_weights = b.by_group(_product(p, "bkth,bksh->bkts", d_out[i], b.v[j]))
            d_x = weights * (_dropped(b, d_weights, query, key) * kept - row_delta)
            whole_heads = d_x.reshape(d_x.shape[0], -1, *d_x.shape[3:])
            d_bias = biases.add_gradient(d_bias, b.bias, whole_heads, p.heads, query, key, (i * b.t, j * b.s))
            d_x = flat(d_x if slope is None else d_x * slope)
            d_k = _add_at(d_k, j, _product(p, "bkht,bkts->bkhs", q_turned, d_x))
            return d_q + _product(p, "bkts,bksh->bkth", d_x, b.k[j]), d_k, d_v, d_bias

        zero = varying_over(jnp.zeros(b.q.shape[1:], p.dtype), axes)
        d_q, *sums = _loop(b, i, step, (zero, *sums))
        return tuple(sums), (d_q * p.scale).astype(p.q.dtype)

    turned = lambda x: jnp.zeros((*x.shape[:3], x.shape[4], x.shape[3]), p.dtype)
    zeros = varying_over((turned(b.k), turned(b.v), biases.zero_gradient(b.bias, p.dtype)), axes)
    (d_k, d_v, d_bias), d_q = jax.lax.scan(one, zeros, jnp.arange(b.q.shape[0], dtype=jnp.int32))
    unturn = lambda x: _unrows(x.swapaxes(-1, -2).astype(p.q.dtype), b.s, p.shape.keys)
    return _Differentiable(_unrows(d_q, b.t, p.shape.queries), unturn(d_k), unturn(d_v * kept), _like_bias(p.bias, d_bias))


def _add_at(total: jax.Array, j: jax.Array | int, part: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(total, total[j] + part, j, 0)


def _like_bias(bias: biases.Given, gradient: Any) -> biases.Given:
    """The accumulated gradient in the bias's own shape and type."""
    if bias is None:
        return None
    if isinstance(bias, biases.Bias):
        return biases.Bias(bias.function, jax.tree.map(lambda d, x: d.astype(x.dtype), gradient, bias.tables))
    return gradient[:, :, : bias.shape[2], : bias.shape[3]].astype(bias.dtype)
