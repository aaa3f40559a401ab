"""`chunked`: exact attention over blocks of queries and keys in plain JAX, in memory linear in length both ways.

The online softmax and its gradient by recomputation are those of FlashAttention (Dao et al. 2022,
https://arxiv.org/abs/2205.14135; 2023, https://arxiv.org/abs/2307.08691). For each part of the rows and heads, and each
block of queries, a loop runs over the key blocks from the first to the last that the mask leaves anything of; those it
leaves whole are not masked. The backward pass is one such sweep. Letters for sizes are those of chunked_parts.

Every product is row-major times row-major or its transpose on the right: XLA's CPU products with a transposed left
operand run at a fifth of the speed. The gradients of k and v are therefore accumulated transposed, [.., H, s].
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zoo.kernels import bias as biases
from zoo.kernels import dropout as dropouts
from zoo.kernels.chunked_parts import Cut, Index, Part, Sizes, counted, cpu_sizes, square_sizes
from zoo.kernels.engine import Learned, Output
from zoo.kernels.mask import Side, allowed
from zoo.kernels.memory import awaiting, from_bits, platform, to_bits
from zoo.kernels.problem import Problem, padded, varying_axes, varying_over

HELD_FORWARD, HELD_BACKWARD = 2, 4
"""Blocks of scores that one step holds at a time; a soft cap, a bias and dropout add to them."""


class Chunked(NamedTuple):
    """The engine. sizes: of parts and blocks, at most; by the platform that is compiled for where not given."""

    sizes: Sizes | None = None

    def forward(self, problem: Problem) -> Output:
        return _by_platform(self.sizes, HELD_FORWARD, _forward, problem)

    def backward(self, problem: Problem, output: Output, gradient: Output) -> Learned:
        # Scores are not computed again before their gradient is there.
        problem = problem.replace(q=awaiting(problem.q, gradient.out))
        return _by_platform(self.sizes, HELD_BACKWARD, _backward, problem, output, gradient)


def temporaries(problem: Problem) -> int:
    """Bytes: four blocks of scores, six blocks of q's width, copies of a part's keys and sums of their gradients.

    More by one block each for a soft cap and a bias; by the sums for an array as bias; by the arguments as bits, where
    they are 16-bit floats. On TPUs an upper limit: VMEM holds a part.
    """
    p, shape, size, wide = problem, problem.shape, problem.q.dtype.itemsize, problem.dtype.itemsize
    sizes = cpu_sizes(p, HELD_BACKWARD) if platform() == "cpu" else square_sizes(p, HELD_BACKWARD)
    rows = sizes.rows * sizes.kv_heads * shape.heads // shape.kv_heads * sizes.queries
    blocks = HELD_BACKWARD + (p.soft_cap is not None) + (p.bias is not None)
    held = rows * wide * (blocks * sizes.keys + 6 * shape.head_dim)
    keys = p.k.size + p.v.size
    of_part = keys * sizes.rows * sizes.kv_heads // (shape.batch * shape.kv_heads)
    copies = (size + wide) * of_part
    if size < wide:
        copies += size * (2 * p.q.size + (keys if of_part < keys else 0))
    if isinstance(p.bias, jax.Array) and p.bias.dtype.itemsize < wide:
        copies += p.bias.size * (p.bias.dtype.itemsize + wide)
    return held + copies


def _by_platform(sizes: Sizes | None, held: int, run: Callable[..., Any], problem: Problem, *arguments: Output) -> Any:
    """run(problem cut by sizes, *arguments), the sizes fixed when a platform is compiled for."""

    def at(settled: Sizes) -> Callable[..., Any]:
        return lambda problem, *rest: run(Cut.of(problem, settled), *rest)

    if sizes is not None:
        return at(sizes.settled(problem))(problem, *arguments)
    on_cpu, elsewhere = cpu_sizes(problem, held), square_sizes(problem, held)
    if on_cpu == elsewhere:
        return at(on_cpu)(problem, *arguments)
    return jax.lax.platform_dependent(problem, *arguments, cpu=at(on_cpu), default=at(elsewhere))


def _product(p: Problem, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A product of operands in the arguments' type, summed in float32."""
    dtype = p.q.dtype
    return jnp.einsum(equation, x.astype(dtype), y.astype(dtype), precision=p.precision, preferred_element_type=p.dtype)


def _scaled_q(part: Part, i: Index) -> jax.Array:
    p = part.cut.problem
    rows = part.queries(part.cut.q, i)
    return (rows.astype(p.dtype) * p.scale).astype(rows.dtype)


def _scores(part: Part, q: jax.Array, i: Index, j: Index, query: Side, key: Side) -> tuple[jax.Array, jax.Array | None]:
    """Scores of one block [b, n G, t, s], masked with -inf, and the derivative of the soft cap or None."""
    p = part.cut.problem
    x = part.by_head(_product(p, "bnth,bnsh->bnts", q, part.keys(j)))
    slope = None
    if p.soft_cap is not None:
        capped = jnp.tanh(x / p.soft_cap)
        x, slope = p.soft_cap * capped, 1 - capped * capped
    if part.cut.bias is not None:
        x += biases.block(part.cut.bias, part.head_indices, query, key, part.slices(i, j)).astype(p.dtype)
    if part.mask.hides:

        def masked(_: Index, x: jax.Array) -> jax.Array:
            return jnp.where(allowed(part.mask, query, key), x, -jnp.inf)

        # A loop of at most one step works in place, where a branch that does nothing copies.
        x = jax.lax.fori_loop(0, 1 - part.whole[i, j].astype(jnp.int32), masked, x)
    return x, slope


def _dropped(part: Part, weights: jax.Array, query: Side, key: Side) -> jax.Array:
    """Dropout without its factor 1 / (1 - rate), which is applied once per row."""
    p = part.cut.problem
    if p.seed is None:
        return weights
    keep = dropouts.keep(p.seed, p.dropout, part.batch_indices, part.head_indices, query.index, key.index)
    return jnp.where(keep, weights, 0)


def _forward(cut: Cut) -> Output:
    p, axes = cut.problem, varying_axes(cut.q)

    def one(part: Part, i: Index, results: Output) -> Output:
        query, q = part.query_side(i), _scaled_q(part, i)

        def step(j: Index, carry: tuple) -> tuple:
            top, total, out = carry
            key = part.key_side(j)
            x, _ = _scores(part, q, i, j, query, key)
            new_top = jnp.maximum(top, x.max(-1))
            safe = jnp.where(new_top == -jnp.inf, 0, new_top)
            weights = jnp.exp(x - safe[..., None])
            shrink = jnp.exp(top - safe)
            total = total * shrink + weights.sum(-1)
            values = _product(p, "bnts,bnsh->bnth", part.by_group(_dropped(part, weights, query, key)), part.values(j))
            return new_top, total, out * part.by_group(shrink[..., None]) + values

        zero = jnp.zeros(part.by_head(q).shape[:-1], p.dtype)
        start = (zero - jnp.inf, zero, jnp.zeros((*q.shape[:3], part.v.shape[-1]), p.dtype))
        top, total, out = part.over_keys(i, step, varying_over(start, axes))
        empty = total == 0
        total = jnp.where(empty, 1, total)
        out = (out / (part.by_group(total[..., None]) * (1 - p.dropout))).astype(p.q.dtype)
        lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
        return Output(part.put_queries(results.out, i, out), part.put_per_query(results.lse, i, lse))

    rows = cut.q.shape[:3]
    results = Output(jnp.zeros((*rows, cut.v.shape[3]), cut.q.dtype), jnp.zeros((rows[0], rows[2], rows[1]), p.dtype))

    def of_part(part: Part, results: Output) -> Output:
        return counted(cut.query_blocks, partial(one, part), results)

    results = cut.over_parts(of_part, varying_over(results, axes))
    length = p.shape.queries
    return Output(from_bits(results.out[:, :length], p.q.dtype), results.lse[:, :, :length])


class _Gradients(NamedTuple):
    """Of q, k, v and the bias.

    Between parts q, k and v are bits, as in `Cut`. While a part is summed, k and v are its float32 sums, transposed
    [key_blocks, b, n, H, s]; in a step q is a block's, [b, n, G t, H].
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: Any


def _backward(cut: Cut, output: Output, gradient: Output) -> Learned:
    p, axes = cut.problem, varying_axes(cut.q)
    # exp(x - inf) is 0: rows with nothing to attend to, and those added to fill a block, have no gradient.
    lse = jnp.where(output.lse == -jnp.inf, jnp.inf, output.lse)
    # d score = weight (d weight - delta): what normalising, and lse, give back to every score of a row.
    delta = jnp.sum(gradient.out.astype(p.dtype) * output.out.astype(p.dtype), axis=-1).swapaxes(1, 2) - gradient.lse
    lse, delta = padded(lse, cut.q.shape[1], axis=2, value=jnp.inf), padded(delta, cut.q.shape[1], axis=2)
    d_out = padded(to_bits(gradient.out), cut.q.shape[1], axis=1)
    kept = 1 / (1 - p.dropout)

    def one(part: Part, i: Index, sums: _Gradients) -> _Gradients:
        query, q, rows_d_out = part.query_side(i), _scaled_q(part, i), part.queries(d_out, i)
        rows_lse, rows_delta = part.per_query(lse, i), part.per_query(delta, i)
        q_turned, d_out_turned = q.swapaxes(-1, -2), rows_d_out.swapaxes(-1, -2)

        def step(j: Index, sums: _Gradients) -> _Gradients:
            key = part.key_side(j)
            x, slope = _scores(part, q, i, j, query, key)
            weights = jnp.exp(x - rows_lse)
            d_v = _product(p, "bnht,bnts->bnhs", d_out_turned, part.by_group(_dropped(part, weights, query, key)))
            d_weights = part.by_head(_product(p, "bnth,bnsh->bnts", rows_d_out, part.values(j)))
            d_x = weights * (_dropped(part, d_weights, query, key) * kept - rows_delta)
            slices = part.slices(i, j)
            d_bias = biases.add_gradient(
                sums.bias, cut.bias, d_x, part.head_indices, query, key, slices, part.mask.rules.consecutive
            )
            d_x = part.by_group(d_x if slope is None else d_x * slope)
            d_k = _product(p, "bnht,bnts->bnhs", q_turned, d_x)
            d_q = sums.q + _product(p, "bnts,bnsh->bnth", d_x, part.keys(j))
            return _Gradients(d_q, _add_at(sums.k, j, d_k), _add_at(sums.v, j, d_v), d_bias)

        zero = varying_over(jnp.zeros(q.shape, p.dtype), axes)
        total = part.over_keys(i, step, sums._replace(q=zero))
        return total._replace(q=part.put_queries(sums.q, i, (total.q * p.scale).astype(p.q.dtype)))

    def of_part(part: Part, results: _Gradients) -> _Gradients:
        turned = [jnp.zeros((*x.shape[:3], x.shape[4], x.shape[3]), p.dtype) for x in (part.k, part.v)]
        d_k, d_v = varying_over(turned, axes)
        sums = counted(cut.query_blocks, partial(one, part), results._replace(k=d_k, v=d_v))
        d_k, d_v = (x.astype(p.q.dtype) for x in (sums.k, sums.v * kept))
        return sums._replace(k=part.put_keys(results.k, d_k), v=part.put_keys(results.v, d_v))

    d_q, d_k, d_v = (jnp.zeros_like(x) for x in (cut.q, cut.k, cut.v))
    zeros = _Gradients(d_q, d_k, d_v, biases.zero_gradient(cut.bias, p.dtype))
    sums = cut.over_parts(of_part, varying_over(zeros, axes))
    d_q = from_bits(sums.q[:, : p.shape.queries], p.q.dtype)
    d_k, d_v = (from_bits(x[:, : p.shape.keys], p.q.dtype) for x in (sums.k, sums.v))
    return Learned(d_q, d_k, d_v, _like_bias(p.bias, sums.bias))


def _add_at(total: jax.Array, j: Index, part: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(total, total[j] + part, j, 0)


def _like_bias(bias: biases.Given, gradient: Any) -> biases.Given:
    """The accumulated gradient in the bias's own shape and type."""
    if bias is None:
        return None
    if isinstance(bias, biases.Bias):
        return biases.Bias(bias.function, jax.tree.map(lambda d, x: d.astype(x.dtype), gradient, bias.tables))
    return gradient[:, :, : bias.shape[2], : bias.shape[3]].astype(bias.dtype)
