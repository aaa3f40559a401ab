"""`chunked`: exact attention over blocks of queries and keys in plain JAX, in memory linear in length both ways.

The online softmax and its gradient by recomputation are those of FlashAttention (Dao et al. 2022,
https://arxiv.org/abs/2205.14135; 2023, https://arxiv.org/abs/2307.08691). For each block of queries a loop runs over
the key blocks from the first to the last that the mask leaves anything of; those it leaves whole are not masked. The
backward pass is one such sweep.

Every product is row-major times row-major or its transpose on the right: XLA's CPU products with a transposed left
operand run at a fifth of the speed. The gradients of k and v are therefore accumulated transposed, [.., H, S].
A row is one query of one of the G = N / K heads of a group; t and s are the sizes of a block of queries and of keys.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zoo.kernels import bias as biases
from zoo.kernels import dropout as dropouts
from zoo.kernels.engine import Learned, Output
from zoo.kernels.mask import ResolvedMask, Side, allowed, block_kinds
from zoo.kernels.memory import from_bits, platform, to_bits
from zoo.kernels.problem import Problem, grouped, varying_axes, varying_over

CPU_BLOCK_BYTES = 2**22
"""Scores of one block on a CPU, where they stay in its cache."""

BLOCK_BYTES = 2**27
"""Scores of one block elsewhere: few, large steps of the loops."""

Blocks = tuple[int, int]


class Chunked(NamedTuple):
    """The engine. blocks: most queries and keys in a block; by the platform that is compiled for where not given."""

    blocks: Blocks | None = None

    def forward(self, problem: Problem) -> Output:
        return _by_platform(self.blocks, _forward, problem)

    def backward(self, problem: Problem, output: Output, gradient: Output) -> Learned:
        return _by_platform(self.blocks, _backward, problem, output, gradient)


def temporaries(problem: Problem) -> int:
    """Bytes: four blocks of scores, and copies of arguments and gradients in the loops' layout.

    More by one block each for a soft cap and a bias. Gradients of k, v and an array as bias are summed whole, in
    float32; in the results where those are float32. On TPUs an upper limit: VMEM holds a part.
    """
    p, shape, size = problem, problem.shape, problem.q.dtype.itemsize
    t, s = _cpu_blocks(p) if platform() == "cpu" else _square_blocks(p)
    block = _score_bytes(p) * _block(shape.queries, t) * _block(shape.keys, s)
    blocks = 4 + (p.soft_cap is not None) + (p.bias is not None)
    wide = p.dtype.itemsize
    copies = wide * p.q.size + (size + (wide if size < wide else 0)) * (p.k.size + p.v.size)
    if isinstance(p.bias, jax.Array) and p.bias.dtype.itemsize < wide:
        copies += p.bias.size * (p.bias.dtype.itemsize + wide)
    return blocks * block + copies


def _by_platform(blocks: Blocks | None, run: Callable[..., Any], problem: Problem, *arguments: Output) -> Any:
    """run(problem cut into blocks, *arguments), the sizes fixed when a platform is compiled for."""

    def at(size: Blocks) -> Callable[..., Any]:
        return lambda problem, *rest: run(_cut(problem, size), *rest)

    if blocks is not None:
        return at(blocks)(problem, *arguments)
    on_cpu, elsewhere = _cpu_blocks(problem), _square_blocks(problem)
    if max(problem.shape.queries, problem.shape.keys) <= min(on_cpu + elsewhere):
        return at(on_cpu)(problem, *arguments)
    return jax.lax.platform_dependent(problem, *arguments, cpu=at(on_cpu), default=at(elsewhere))


def _score_bytes(problem: Problem) -> int:
    """Of one query and key, over all rows and heads."""
    return problem.shape.batch * problem.shape.heads * problem.dtype.itemsize


def _square_blocks(problem: Problem) -> Blocks:
    size = next((size for size in (512, 256, 128) if _score_bytes(problem) * size**2 <= BLOCK_BYTES), 64)
    return size, size


def _cpu_blocks(problem: Problem) -> Blocks:
    """Twice as many queries as keys, within the limit; square where that fits half of it.

    Of eight sizes tried, the fastest for 1 x 8 heads of 64 at 4096 (512 x 256: 1.5 times 256 x 256), 1 x 32 of 128 at
    2048, 4 x 12 of 64 at 1024 and 2 x 12 at 512. Short sequences take small blocks: half of a causal diagonal is waste.
    """
    score, most = _score_bytes(problem), max(128, problem.shape.queries // 4)
    t = next((t for t in (512, 256, 128) if t <= most and score * t * t // 2 <= CPU_BLOCK_BYTES), 64)
    return t, t if 2 * score * t * t <= CPU_BLOCK_BYTES else max(64, t // 2)


def _block(length: int, limit: int) -> int:
    """The block size that covers a length in the fewest blocks of at most `limit`, with the least padding."""
    count = -(-length // limit)
    return -(-length // count)


class _Blocked(NamedTuple):
    """A problem cut for the loops, its lengths padded to whole blocks.

    q [B, queries t, N, H] and k, v [keys, B, K, s, H], as bits; first, last [queries]: the range of key blocks that the
    mask leaves anything of; whole [queries, keys]: no masking needed.
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

    def query_rows(self, x: jax.Array, i: jax.Array | int) -> jax.Array:
        """Block i of [B, queries t, N, X] as [B, K, G t, X]."""
        block = jax.lax.dynamic_slice_in_dim(x, i * self.t, self.t, axis=1)
        b, t, _, width = block.shape
        block = block.reshape(b, t, self.problem.shape.kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
        return _flat(block)

    def scaled_q(self, i: jax.Array | int) -> jax.Array:
        rows = from_bits(self.query_rows(self.q, i), self.problem.q.dtype)
        return (rows.astype(self.problem.dtype) * self.problem.scale).astype(rows.dtype)

    def keys(self, j: jax.Array | int) -> jax.Array:
        return from_bits(self.k[j], self.problem.q.dtype)

    def values(self, j: jax.Array | int) -> jax.Array:
        return from_bits(self.v[j], self.problem.q.dtype)

    def by_group(self, rows: jax.Array) -> jax.Array:
        """[B, K, G t, x] as [B, K, G, t, x]."""
        return rows.reshape(*rows.shape[:2], -1, self.t, rows.shape[3])

    def queries_first(self, rows: jax.Array) -> jax.Array:
        """[B, K, G t, X] as [B, t, N, X]."""
        x = self.by_group(rows).transpose(0, 3, 1, 2, 4)
        return x.reshape(*x.shape[:2], -1, x.shape[4])

    def joined(self, blocks: jax.Array, length: int) -> jax.Array:
        """Blocks [count, B, L / count, N, X] in one, cut to [B, length, N, X]."""
        x = jnp.moveaxis(blocks, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _cut(problem: Problem, blocks: Blocks) -> _Blocked:
    p = problem
    t, s = _block(p.shape.queries, blocks[0]), _block(p.shape.keys, blocks[1])
    queries, keys = -(-p.shape.queries // t), -(-p.shape.keys // s)
    mask = p.mask.padded(queries * t, keys * s)
    kinds = block_kinds(mask, t, s)
    needed, whole = kinds.needed.any(0), kinds.whole.all(0)
    order = jnp.arange(keys, dtype=jnp.int32)
    return _Blocked(
        problem=p,
        q=_padded(to_bits(p.q), queries * t),
        k=_key_blocks(to_bits(p.k), keys, s),
        v=_key_blocks(to_bits(p.v), keys, s),
        mask=mask,
        bias=biases.padded(p.bias, queries * t, keys * s),
        first=jnp.min(jnp.where(needed, order, keys), axis=1),
        last=jnp.max(jnp.where(needed, order + 1, 0), axis=1),
        whole=whole,
        t=t,
        s=s,
    )


def _padded(x: jax.Array, length: int) -> jax.Array:
    """[B, L, ...] with zeros up to `length`."""
    extra = length - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2)) if extra else x


def _key_blocks(x: jax.Array, count: int, size: int) -> jax.Array:
    """[B, S, K, X] padded and cut to [count, B, K, size, X]."""
    x = _padded(x, count * size)
    return x.reshape(x.shape[0], count, size, *x.shape[2:]).transpose(1, 0, 3, 2, 4)


def _flat(x: jax.Array) -> jax.Array:
    """[B, K, G, t, ...] as [B, K, G t, ...]."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _product(p: Problem, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A product of operands in the arguments' type, summed in float32."""
    dtype = p.q.dtype
    return jnp.einsum(equation, x.astype(dtype), y.astype(dtype), precision=p.precision, preferred_element_type=p.dtype)


def _scores(
    b: _Blocked, q: jax.Array, i: jax.Array | int, j: jax.Array | int, query: Side, key: Side
) -> tuple[jax.Array, jax.Array | None]:
    """Scores of one block [B, K, G, t, s], masked with -inf, and the derivative of the soft cap or None."""
    p = b.problem
    x = b.by_group(_product(p, "bkth,bksh->bkts", q, b.keys(j)))
    slope = None
    if p.soft_cap is not None:
        capped = jnp.tanh(x / p.soft_cap)
        x, slope = p.soft_cap * capped, 1 - capped * capped
    if b.bias is not None:
        added = biases.block(b.bias, p.heads, query, key, (i * b.t, j * b.s))
        x += grouped(added, p.shape.kv_heads).astype(p.dtype)
    if b.mask.hides:

        def masked(x: jax.Array) -> jax.Array:
            return jnp.where(allowed(b.mask, query, key)[:, :, None], x, -jnp.inf)

        x = jax.lax.cond(b.whole[i, j], lambda x: x, masked, x)
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


def _forward(b: _Blocked) -> Output:
    p = b.problem
    axes = varying_axes(b.q)

    def one(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        query, q = b.query_side(i), b.scaled_q(i)

        def step(j: jax.Array | int, carry: tuple) -> tuple:
            top, total, out = carry
            key = b.key_side(j)
            x, _ = _scores(b, q, i, j, query, key)
            new_top = jnp.maximum(top, x.max(-1))
            safe = jnp.where(new_top == -jnp.inf, 0, new_top)
            weights = jnp.exp(x - safe[..., None])
            shrink = jnp.exp(top - safe)
            total = total * shrink + weights.sum(-1)
            values = _product(p, "bkts,bksh->bkth", _flat(_dropped(b, weights, query, key)), b.values(j))
            return new_top, total, out * _flat(shrink)[..., None] + values

        rows = b.by_group(q).shape[:-1]
        zero = jnp.zeros(rows, p.dtype)
        start = (zero - jnp.inf, zero, jnp.zeros((*q.shape[:3], b.v.shape[-1]), p.dtype))
        top, total, out = _loop(b, i, step, varying_over(start, axes))
        empty = total == 0
        total = jnp.where(empty, 1, total)
        lse = _flat(jnp.where(empty, -jnp.inf, top + jnp.log(total)))
        out = (out / (_flat(total)[..., None] * (1 - p.dropout))).astype(p.q.dtype)
        return b.queries_first(to_bits(out)), b.queries_first(lse[..., None])

    blocks = jnp.arange(b.first.shape[0], dtype=jnp.int32)
    out, lse = (b.joined(x, p.shape.queries) for x in jax.lax.map(one, blocks))
    return Output(from_bits(out, p.q.dtype), lse[..., 0].swapaxes(1, 2))


def _backward(b: _Blocked, output: Output, gradient: Output) -> Learned:
    p = b.problem
    axes = varying_axes(b.q)
    # exp(x - inf) is 0: rows with nothing to attend to have no gradient.
    lse = jnp.where(output.lse == -jnp.inf, jnp.inf, output.lse)
    by_row = (lse.swapaxes(1, 2)[..., None], gradient.lse.swapaxes(1, 2)[..., None], output.out, gradient.out)
    lse, d_lse, out, d_out = (_padded(to_bits(x), b.q.shape[1]) for x in by_row)
    kept = 1 / (1 - p.dropout)

    def one(sums: tuple, i: jax.Array) -> tuple[tuple, jax.Array]:
        query, q = b.query_side(i), b.scaled_q(i)
        rows_lse, rows_d_lse = (b.by_group(b.query_rows(x, i)) for x in (lse, d_lse))
        rows_out, rows_d_out = (from_bits(b.query_rows(x, i), p.q.dtype) for x in (out, d_out))
        # d score = weight (d weight - delta): what normalising, and lse, give back to every score of a row.
        delta = jnp.sum(rows_d_out.astype(p.dtype) * rows_out.astype(p.dtype), axis=-1, keepdims=True)
        delta = b.by_group(delta) - rows_d_lse
        q_turned, d_out_turned = q.swapaxes(-1, -2), rows_d_out.swapaxes(-1, -2)

        def step(j: jax.Array | int, carry: tuple) -> tuple:
            d_q, d_k, d_v, d_bias = carry
            key = b.key_side(j)
            x, slope = _scores(b, q, i, j, query, key)
            weights = jnp.exp(x - rows_lse)
            d_v = _add_at(d_v, j, _product(p, "bkht,bkts->bkhs", d_out_turned, _flat(_dropped(b, weights, query, key))))
            d_weights = b.by_group(_product(p, "bkth,bksh->bkts", rows_d_out, b.values(j)))
            d_x = weights * (_dropped(b, d_weights, query, key) * kept - delta)
            whole_heads = d_x.reshape(d_x.shape[0], -1, *d_x.shape[3:])
            d_bias = biases.add_gradient(d_bias, b.bias, whole_heads, p.heads, query, key, (i * b.t, j * b.s))
            d_x = _flat(d_x if slope is None else d_x * slope)
            d_k = _add_at(d_k, j, _product(p, "bkht,bkts->bkhs", q_turned, d_x))
            return d_q + _product(p, "bkts,bksh->bkth", d_x, b.keys(j)), d_k, d_v, d_bias

        zero = varying_over(jnp.zeros(q.shape, p.dtype), axes)
        d_q, *sums_with_block = _loop(b, i, step, (zero, *sums))
        return tuple(sums_with_block), b.queries_first(to_bits((d_q * p.scale).astype(p.q.dtype)))

    zeros = [jnp.zeros((*x.shape[:3], x.shape[4], x.shape[3]), p.dtype) for x in (b.k, b.v)]
    zeros = varying_over((*zeros, biases.zero_gradient(b.bias, p.dtype)), axes)
    (d_k, d_v, d_bias), d_q = jax.lax.scan(one, zeros, jnp.arange(b.first.shape[0], dtype=jnp.int32))
    d_q = from_bits(b.joined(d_q, p.shape.queries), p.q.dtype)
    turned = (x.astype(p.q.dtype).transpose(0, 1, 4, 2, 3) for x in (d_k, d_v * kept))
    d_k, d_v = (b.joined(x, p.shape.keys) for x in turned)
    return Learned(d_q, d_k, d_v, _like_bias(p.bias, d_bias))


def _add_at(total: jax.Array, j: jax.Array | int, part: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(total, total[j] + part, j, 0)


def _like_bias(bias: biases.Given, gradient: Any) -> biases.Given:
    """The accumulated gradient in the bias's own shape and type."""
    if bias is None:
        return None
    if isinstance(bias, biases.Bias):
        return biases.Bias(bias.function, jax.tree.map(lambda d, x: d.astype(x.dtype), gradient, bias.tables))
    return gradient[:, :, : bias.shape[2], : bias.shape[3]].astype(bias.dtype)
