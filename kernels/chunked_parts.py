"""How `chunked` cuts a call: parts of some rows and heads, which a loop takes in turn, and blocks of queries and keys.

A part's blocks of scores stay in a CPU's cache, and what is held of the keys beside the arguments is a part's alone:
copies, and gradients in float32. Of the key blocks a part takes those that its own rows need. A row of scores is one
query of one of the G = N / K heads of a group; b, n, t and s are the sizes of a part's rows and key/value heads, and of
a block of queries and of keys.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from zoo.kernels import bias as biases
from zoo.kernels.mask import ResolvedMask, Side, block_kinds
from zoo.kernels.memory import from_bits, to_bits
from zoo.kernels.problem import Problem, padded

Results = TypeVar("Results")
Index = jax.Array | int

CPU_BYTES = 2**23
"""All blocks of scores that a step holds on a CPU: what stays in its cache."""

BYTES = 2**29
"""The same elsewhere: few, large steps of the loops."""


class Sizes(NamedTuple):
    """Rows and key/value heads in a part, queries and keys in a block: b, n, t, s."""

    rows: int
    kv_heads: int
    queries: int
    keys: int

    def settled(self, problem: Problem) -> "Sizes":
        """At most these: such that cut rows and heads evenly, and lengths with the least padding."""
        shape = problem.shape
        rows, kv_heads = _divisor(shape.batch, self.rows), _divisor(shape.kv_heads, self.kv_heads)
        return Sizes(rows, kv_heads, _block(shape.queries, self.queries), _block(shape.keys, self.keys))


def cpu_sizes(problem: Problem, held: int) -> Sizes:
    """For steps that hold `held` blocks of scores; the fastest of those tried, benchmarks/notes/attention_cpu.md.

    XLA's float32 products of fewer than about 400 rows keep to one core. Where sequences are shorter than that anyway,
    small blocks waste less of a causal diagonal, and one block is best where there is none. Heads in groups have rows
    enough in 256 queries; of very large groups, 2048 rows are as many as a step may hold.
    """
    shape, limit = problem.shape, CPU_BYTES // held
    if max(shape.queries, shape.keys) < 512:
        rules = problem.mask.rules
        size = 128 if rules.causal or rules.left is not None or rules.right is not None else 512
        return _fitting(problem, size, size, limit)
    group = shape.heads // shape.kv_heads
    return _fitting(problem, 512 if group == 1 else max(1, min(256, 2048 // group)), 256, limit)


def square_sizes(problem: Problem, held: int) -> Sizes:
    """For other platforms."""
    return _fitting(problem, 512, 512, BYTES // held)


def _fitting(problem: Problem, t: int, s: int, limit: int) -> Sizes:
    """As many heads, and then rows, as have blocks of scores of at most `limit` bytes together."""
    shape = problem.shape
    t, s = _block(shape.queries, t), _block(shape.keys, s)
    fit = max(1, limit // (shape.heads // shape.kv_heads * t * s * problem.dtype.itemsize))
    return Sizes(max(1, fit // shape.kv_heads), fit, t, s).settled(problem)


def _divisor(number: int, limit: int) -> int:
    """The greatest within the limit."""
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)


def _block(length: int, limit: int) -> int:
    """The block size that covers a length in the fewest blocks of at most `limit`, with the least padding."""
    count = -(-length // limit)
    return -(-length // count)


class Cut(NamedTuple):
    """A problem with its lengths padded to whole blocks.

    q [B, query_blocks t, N, H] and k, v [B, key_blocks s, K, H], as bits.
    """

    problem: Problem
    q: jax.Array
    k: jax.Array
    v: jax.Array
    mask: ResolvedMask
    bias: biases.Given
    sizes: Sizes

    @classmethod
    def of(cls, problem: Problem, sizes: Sizes) -> "Cut":
        """sizes: settled."""
        p = problem
        lengths = zip((p.shape.queries, p.shape.keys), (sizes.queries, sizes.keys), strict=True)
        queries, keys = (-(-length // size) * size for length, size in lengths)
        q, k, v = (padded(to_bits(x), size, axis=1) for x, size in ((p.q, queries), (p.k, keys), (p.v, keys)))
        return cls(p, q, k, v, p.mask.padded(queries, keys), biases.padded(p.bias, queries, keys), sizes)

    @property
    def query_blocks(self) -> int:
        return self.q.shape[1] // self.sizes.queries

    @property
    def key_blocks(self) -> int:
        return self.k.shape[1] // self.sizes.keys

    def over_parts(self, run: "Callable[[Part, Results], Results]", results: Results) -> Results:
        """results = run(part, results) for every part."""
        shape, sizes = self.problem.shape, self.sizes
        across = shape.kv_heads // sizes.kv_heads
        count = shape.batch // sizes.rows * across

        def one(c: Index, results: Results) -> Results:
            return run(self._part(c // across * sizes.rows, c % across * sizes.kv_heads), results)

        return one(0, results) if count == 1 else counted(count, one, results)

    def _part(self, row: Index, kv_head: Index) -> "Part":
        b, n, t, s = self.sizes
        mask = self.mask.rows(row, b)
        kinds = block_kinds(mask, t, s)
        needed, order = kinds.needed.any(0), jnp.arange(self.key_blocks, dtype=jnp.int32)

        def blocks(x: jax.Array) -> jax.Array:
            x = jax.lax.dynamic_slice(x, _corner(row, 0, kv_head, 0), (b, x.shape[1], n, x.shape[3]))
            return x.reshape(b, -1, s, n, x.shape[3]).transpose(1, 0, 3, 2, 4)

        return Part(
            cut=self,
            row=row,
            kv_head=kv_head,
            k=blocks(self.k),
            v=blocks(self.v),
            mask=mask,
            first=jnp.min(jnp.where(needed, order, self.key_blocks), axis=1),
            last=jnp.max(jnp.where(needed, order + 1, 0), axis=1),
            whole=kinds.whole.all(0),
        )


class Part(NamedTuple):
    """Rows and heads from row and kv_head on. k, v [key_blocks, b, n, s, H], as bits.

    first, last [query_blocks]: the range of key blocks that the mask leaves anything of; whole [query_blocks,
    key_blocks]: no masking needed.
    """

    cut: Cut
    row: Index
    kv_head: Index
    k: jax.Array
    v: jax.Array
    mask: ResolvedMask
    first: jax.Array
    last: jax.Array
    whole: jax.Array

    @property
    def group(self) -> int:
        shape = self.cut.problem.shape
        return shape.heads // shape.kv_heads

    @property
    def head(self) -> Index:
        """The first query head."""
        return self.kv_head * self.group

    @property
    def batch_indices(self) -> jax.Array:
        """Global, [b]."""
        return jax.lax.dynamic_slice_in_dim(self.cut.problem.batch, self.row, self.cut.sizes.rows)

    @property
    def head_indices(self) -> jax.Array:
        """Global, of query heads, [n G]."""
        return jax.lax.dynamic_slice_in_dim(self.cut.problem.heads, self.head, self.cut.sizes.kv_heads * self.group)

    def query_side(self, i: Index) -> Side:
        return self.mask.query.block(i * self.cut.sizes.queries, self.cut.sizes.queries)

    def key_side(self, j: Index) -> Side:
        return self.mask.key.block(j * self.cut.sizes.keys, self.cut.sizes.keys)

    def slices(self, i: Index, j: Index) -> biases.Slices:
        """Of a block in an array [B, N, query_blocks t, key_blocks s]."""
        b, n, t, s = self.cut.sizes
        return (self.row, b), (self.head, n * self.group), (i * t, t), (j * s, s)

    def over_keys(self, i: Index, body: Callable[[Index, Results], Results], carry: Results) -> Results:
        """body(j, carry) for the key blocks that block i of the queries needs."""
        if self.cut.key_blocks == 1:
            return body(0, carry)
        return jax.lax.fori_loop(self.first[i], self.last[i], body, carry)

    def keys(self, j: Index) -> jax.Array:
        return from_bits(self.k[j], self.cut.problem.q.dtype)

    def values(self, j: Index) -> jax.Array:
        return from_bits(self.v[j], self.cut.problem.q.dtype)

    def by_head(self, x: jax.Array) -> jax.Array:
        """[b, n, G t, x] as [b, n G, t, x]."""
        b, n, t, _ = self.cut.sizes
        return x.reshape(b, n * self.group, t, -1)

    def by_group(self, x: jax.Array) -> jax.Array:
        """The inverse."""
        b, n, t, _ = self.cut.sizes
        return x.reshape(b, n, self.group * t, -1)

    def queries(self, x: jax.Array, i: Index) -> jax.Array:
        """Block i of bits [B, query_blocks t, N, X] as [b, n, G t, X]."""
        b, n, t, _ = self.cut.sizes
        corner, sizes = _corner(self.row, i * t, self.head, 0), (b, t, n * self.group, x.shape[3])
        block = jax.lax.dynamic_slice(x, corner, sizes).transpose(0, 2, 1, 3)
        return from_bits(self.by_group(block), self.cut.problem.q.dtype)

    def put_queries(self, total: jax.Array, i: Index, x: jax.Array) -> jax.Array:
        """The inverse: [b, n, G t, X] written to block i of bits [B, query_blocks t, N, X]."""
        block = self.by_head(to_bits(x)).transpose(0, 2, 1, 3)
        return jax.lax.dynamic_update_slice(total, block, _corner(self.row, i * self.cut.sizes.queries, self.head, 0))

    def per_query(self, x: jax.Array, i: Index) -> jax.Array:
        """Block i of [B, N, query_blocks t] as [b, n G, t, 1]."""
        b, n, t, _ = self.cut.sizes
        return jax.lax.dynamic_slice(x, _corner(self.row, self.head, i * t), (b, n * self.group, t))[..., None]

    def put_per_query(self, total: jax.Array, i: Index, x: jax.Array) -> jax.Array:
        """[b, n G, t] written to block i of [B, N, query_blocks t]."""
        return jax.lax.dynamic_update_slice(total, x, _corner(self.row, self.head, i * self.cut.sizes.queries))

    def put_keys(self, total: jax.Array, turned: jax.Array) -> jax.Array:
        """All keys' blocks [key_blocks, b, n, X, s] written to bits [B, key_blocks s, K, X]."""
        x = to_bits(turned).transpose(1, 0, 4, 2, 3)
        x = x.reshape(x.shape[0], -1, *x.shape[3:])
        return jax.lax.dynamic_update_slice(total, x, _corner(self.row, 0, self.kv_head, 0))


def counted(count: int, body: Callable[[Index, Results], Results], results: Results) -> Results:
    """results = body(i, results) for i from 0 on."""
    numbers = jnp.arange(count, dtype=jnp.int32)
    return jax.lax.scan(lambda results, i: (body(i, results), None), results, numbers)[0]


def _corner(*starts: Index) -> tuple[jax.Array, ...]:
    """Of one type, as slices want it: with 64 bits enabled Python's integers are int64 beside the loops' int32."""
    return tuple(jnp.int32(start) for start in starts)
