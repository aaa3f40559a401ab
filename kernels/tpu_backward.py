"""The TPU kernel's backward pass: one visit of a block of queries to a block of keys, for all three gradients at once.

Probabilities are computed again from the saved log-sum-exp (FlashAttention-2, Dao 2023, https://arxiv.org/abs/2307.08691,
algorithm 2). The gradients of k and v of one key/value head stay in VMEM while all query heads of its group pass, so
that no part of a gradient is written to be summed later.

A tile's five products leave a choice of what the matrix unit holds and what streams through it. Where `turned`, the
gradients are accumulated transposed and the tile's weights are what is held.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from zoo.kernels.tpu_visit import Visit, product, scores
from zoo.kernels.work_list import FIRST, LAST, WHOLE


class Operands(NamedTuple):
    """References: what is read, what is written, and what is kept between visits.

    q [t, H], out and d_out [t, H'], rows [2, t] (log-sum-exp in base 2, and its gradient), k [s, H], v [s, H'];
    d_q [t, H], d_k [S, H], d_v [S, H'];
    delta [1, t]: sum of d_out out, less the gradient of the log-sum-exp; scaled [t, H], the scaled queries; sums of
    d_q, d_k, d_v. The last four are transposed where turned, and d_out_turned is [H', t], elsewhere None.
    """

    q: Any
    out: Any
    d_out: Any
    rows: Any
    k: Any
    v: Any
    d_q: Any
    d_k: Any
    d_v: Any
    delta: Any
    scaled: Any
    sum_q: Any
    sum_k: Any
    sum_v: Any
    d_out_turned: Any = None


def step(o: Operands, visit: Visit, ends: tuple) -> None:
    """ends: whether this is the first, and the last, visit of the key/value head."""
    spec, flags, key_block = visit.spec, visit.flags, visit.key_block
    blocks, (first, last) = spec.blocks, ends

    @pl.when(first)
    def _clear() -> None:
        o.sum_k[...] = jnp.zeros(o.sum_k.shape, jnp.float32)
        o.sum_v[...] = jnp.zeros(o.sum_v.shape, jnp.float32)

    @pl.when((flags & FIRST) != 0)
    def _start() -> None:
        scaled = o.q[...].astype(jnp.float32) * spec.query_factor
        o.scaled[...] = (scaled.T if blocks.turned else scaled).astype(spec.dtype)
        # d score = weight (d weight - delta): what normalising, and lse, give back to every score of a row.
        out, d_out = (x[...].astype(jnp.float32).T for x in (o.out, o.d_out))
        o.delta[...] = (out * d_out).sum(0, keepdims=True) - o.rows[1:2, :]
        if blocks.turned:
            o.d_out_turned[...] = d_out.astype(spec.dtype)
        o.sum_q[...] = jnp.zeros(o.sum_q.shape, jnp.float32)

    @pl.when((flags & WHOLE) != 0)
    def _whole() -> None:
        for key in range(0, blocks.keys, blocks.step):
            for start in range(0, blocks.queries, blocks.rows):
                part = slice(start, start + blocks.rows)
                _tile(o, visit, key_block * blocks.keys + key, key, blocks.step, part, masked=False)

    @pl.when((flags & WHOLE) == 0)
    def _strips() -> None:
        def strip(c: jax.Array, _: None) -> None:
            @pl.when((flags & spec.code.strip_flag(c)) != 0)
            def _one() -> None:
                key = pl.multiple_of(c * spec.strip, spec.strip)
                offset = pl.multiple_of(key_block * blocks.keys + key, spec.strip)
                for start in range(0, blocks.queries, blocks.rows):
                    _tile(o, visit, offset, key, spec.strip, slice(start, start + blocks.rows), masked=True)

        jax.lax.fori_loop(jnp.int32(0), jnp.int32(spec.code.strips), strip, None)

    @pl.when((flags & LAST) != 0)
    def _finish() -> None:
        total = o.sum_q[...] * spec.scale
        o.d_q[...] = (total.T if blocks.turned else total).astype(o.d_q.dtype)

    @pl.when(last)
    def _write() -> None:
        def part(c: jax.Array, _: None) -> None:
            place = pl.ds(pl.multiple_of(c * spec.strip, spec.strip), spec.strip)
            for out, sums, factor in (
                (o.d_k, o.sum_k, spec.score_factor),
                (o.d_v, o.sum_v, 1 / (1 - spec.dropout)),
            ):
                total = sums[:, place].T if blocks.turned else sums[place, :]
                out[place, :] = (total * factor).astype(out.dtype)

        jax.lax.fori_loop(jnp.int32(0), jnp.int32(o.d_k.shape[0] // spec.strip), part, None)


def _tile(o: Operands, visit: Visit, offset: Any, key: Any, size: int, part: slice, *, masked: bool) -> None:
    """What `size` keys, from `offset` in all and from `key` in the block, and a part of the queries give each other."""
    spec, keys = visit.spec, pl.ds(key, size)
    turned = spec.blocks.turned
    q, d_out = (o.scaled[:, part], o.d_out_turned[:, part]) if turned else (o.scaled[part, :], o.d_out[part, :])
    over = (1, 0) if turned else (1, 1)
    x, capped = scores(spec, product(spec, o.k[keys, :], q, over))
    lse, delta = o.rows[0:1, part], o.delta[:, part]

    def hidden(x: jax.Array) -> jax.Array:
        return visit.masked(x, key, part.start) if masked else x

    if visit.bias is None:
        x = hidden(x) - lse
    else:
        # On v5e added to the scores it would take 7 % more bundles. Hidden last, it may hold anything at masked pairs.
        x = hidden(x - (lse - visit.bias.tile(key, part.start, x.shape)))
    weights = jnp.exp2(x)
    d_weights = product(spec, o.v[keys, :], d_out, over)
    if spec.dropout:
        d_weights = visit.dropped(d_weights, key, part.start) * (1 / (1 - spec.dropout))
    d_x = weights * (d_weights - delta)
    if visit.bias is not None:
        visit.bias.add(d_x, key, part.start)
    if capped is not None:
        d_x *= 1 - capped * capped
    weights = visit.dropped(weights, key, part.start)
    d_x, weights = d_x.astype(spec.dtype), weights.astype(spec.dtype)
    places = pl.ds(offset, size)
    if turned:
        o.sum_v[:, places] += product(spec, d_out, weights, (1, 1))
        o.sum_k[:, places] += product(spec, q, d_x, (1, 1))
        o.sum_q[:, part] += product(spec, o.k[keys, :], d_x, (0, 0))
    else:
        o.sum_v[places, :] += product(spec, weights, d_out, (1, 0))
        o.sum_k[places, :] += product(spec, d_x, q, (1, 0))
        o.sum_q[part, :] += product(spec, d_x, o.k[keys, :], (0, 0))
