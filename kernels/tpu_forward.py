"""The TPU kernel's forward pass: one visit of a block of queries to a block of keys.

FlashAttention (Dao et al. 2022, https://arxiv.org/abs/2205.14135) rescales what it has summed whenever a row's maximum
grows. Here most keys do neither: a row has a reference r, and exp2(x - r) is summed as it is. Where a query sees its
own key r is the score of that; else a row's first strip of keys is taken with the running maximum, which becomes r.
That is exact as long as no sum overflows, since a row's sum is about 1 at least from its first keys on, and whatever
underflows beside it is below its rounding. A sum above LIMIT is noticed afterwards, in a second set of accumulators:
the strip is then taken again with the running maximum, from the first set.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from zoo.kernels.tpu_visit import SUBLANES, Visit, product, scores
from zoo.kernels.work_list import FIRST, LAST, WHOLE

LIMIT = 2.0**32
"""Of a row's sum; it leaves weighted values room for values up to 2^95."""

UNSEEN = -1e30
"""Reference of a row that has no key yet: finite, so that it can be subtracted from -inf."""

_LN_2 = 0.6931471805599453


SET, DONE, SEEN = range(3)
"""State: the set that holds the sums; whether a piece of work is done; whether all rows have a reference."""


class Operands(NamedTuple):
    """References: q [t, H], k [s, H], v [s, H']; out [t, H'], lse [1, t]; and what is kept between visits.

    total [2, 8, t] and acc [2, H', t]: two sets of accumulators; reference [1, t]; scaled [t, H]: the scaled queries,
    transposed where turned; state [3]: see SET.
    """

    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any
    total: Any
    acc: Any
    reference: Any
    scaled: Any
    state: Any


def step(o: Operands, visit: Visit) -> None:
    spec, blocks, flags = visit.spec, visit.spec.blocks, visit.flags
    whole = (flags & WHOLE) != 0

    @pl.when((flags & FIRST) != 0)
    def _start() -> None:
        o.total[0] = jnp.zeros(o.total.shape[1:], jnp.float32)
        o.acc[0] = jnp.zeros(o.acc.shape[1:], jnp.float32)
        scaled = o.q[...].astype(jnp.float32) * spec.query_factor
        o.scaled[...] = (scaled.T if blocks.turned else scaled).astype(spec.dtype)
        o.state[SET], o.state[SEEN] = 0, int(spec.bounded or spec.sees_itself)
        if spec.sees_itself:
            own = o.k[pl.ds(visit.own_keys(), blocks.queries), :].astype(jnp.float32)
            o.reference[...] = (scaled.T * own.T).sum(0, keepdims=True)
        else:
            o.reference[...] = jnp.full(o.reference.shape, 0.0 if spec.bounded else UNSEEN, jnp.float32)

    o.state[DONE] = 0

    seen, tiles = o.state[SEEN] != 0, range(0, blocks.keys, blocks.step)

    @pl.when(whole & seen)
    def _whole() -> None:
        _steady(o, visit, tiles, blocks.step, masked=False)

    if spec.hides:

        @pl.when(~whole & seen & spec.code.all_strips(flags))
        def _masked() -> None:
            _steady(o, visit, tiles, blocks.step, masked=True)

    @pl.when(o.state[DONE] == 0)
    def _strips() -> None:
        def strip(i: jax.Array, _: None) -> None:
            # From the last: under a causal mask every query has a key in its first one.
            c = spec.code.strips - 1 - i

            @pl.when((flags & spec.code.strip_flag(c)) != 0)
            def _one() -> None:
                _strip(o, visit, pl.multiple_of(c * spec.strip, spec.strip))

        jax.lax.fori_loop(jnp.int32(0), jnp.int32(spec.code.strips), strip, None)

    @pl.when((flags & LAST) != 0)
    def _finish() -> None:
        now = o.state[SET]
        total = o.total[now].sum(0, keepdims=True)
        empty = total == 0
        total = jnp.where(empty, 1, total)
        o.out[...] = (o.acc[now] / (total * (1 - spec.dropout))).T.astype(o.out.dtype)
        o.lse[...] = jnp.where(empty, -jnp.inf, (o.reference[...] + jnp.log2(total)) * _LN_2)


def _strip(o: Operands, visit: Visit, key: jax.Array) -> None:
    """One strip of keys, masked."""
    spec = visit.spec
    o.state[DONE] = 0

    @pl.when(o.state[SEEN] != 0)
    def _against_reference() -> None:
        _steady(o, visit, [key], spec.strip, masked=True)

    if not spec.bounded:

        @pl.when(o.state[DONE] == 0)
        def _with_maximum() -> None:
            _rescaled(o, visit, key)


def _steady(o: Operands, visit: Visit, keys: Sequence[int] | Sequence[jax.Array], size: int, *, masked: bool) -> None:
    """Adds pieces of `size` keys against the rows' reference, into the other set; done unless a sum grows too large."""
    spec, now, fits = visit.spec, o.state[SET], jnp.bool_(True)
    for start in range(0, spec.blocks.queries, spec.blocks.rows):
        part = slice(start, start + spec.blocks.rows)
        total, acc = o.total[now, :, part], o.acc[now, :, part]
        for key in keys:
            x = _scores(o, visit, key, size, part, masked=masked)
            more, values = _sums(o, visit, jnp.exp2(x - o.reference[:, part]), key, part)
            total, acc = total + more, acc + values
        o.total[1 - now, :, part], o.acc[1 - now, :, part] = total, acc
        if not spec.bounded:
            fits &= jnp.max(total) < LIMIT

    @pl.when(fits)
    def _keep() -> None:
        o.state[SET], o.state[DONE] = 1 - now, 1


def _rescaled(o: Operands, visit: Visit, key: jax.Array) -> None:
    """Adds one strip of keys, masked, with the running maximum, which becomes the rows' reference."""
    spec, now = visit.spec, o.state[SET]
    whole = slice(0, spec.blocks.queries)
    x = _scores(o, visit, key, spec.strip, whole, masked=True)
    before = o.reference[...]
    top = jnp.maximum(before, x.max(0, keepdims=True))
    shrink = jnp.exp2(before - top)
    total, acc = _sums(o, visit, jnp.exp2(x - top), key, whole)
    o.reference[...] = top
    o.total[now] = o.total[now] * shrink + total
    o.acc[now] = o.acc[now] * shrink + acc
    o.state[SEEN] = (jnp.min(top) > UNSEEN).astype(jnp.int32)


def _scores(o: Operands, visit: Visit, key: Any, size: int, part: slice, *, masked: bool) -> jax.Array:
    """[s, t] in base 2."""
    spec, keys = visit.spec, o.k[pl.ds(key, size), :]
    turned = spec.blocks.turned
    products = (
        product(spec, keys, o.scaled[:, part], (1, 0)) if turned else product(spec, keys, o.scaled[part, :], (1, 1))
    )
    x, _ = scores(spec, products)
    if visit.bias is not None:
        x += visit.bias.tile(key, part.start, x.shape)
    return visit.masked(x, key, part.start) if masked else x


def _sums(o: Operands, visit: Visit, weights: jax.Array, key: Any, part: slice) -> tuple[jax.Array, jax.Array]:
    spec, (size, t) = visit.spec, weights.shape
    total = weights.reshape(size // SUBLANES, SUBLANES, t).sum(0)
    kept = visit.dropped(weights, key, part.start).astype(spec.dtype)
    return total, product(spec, o.v[pl.ds(key, size), :], kept, (0, 0))
