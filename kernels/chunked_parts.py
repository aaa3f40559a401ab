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
from zoo.kernels.mask import BlockKinds, ResolvedMask, Side, block_kinds
from zoo.kernels.memory import from_bits, to_bits
from zoo.kernels.problem import Problem

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


def cpu_sizes(problem: Problem, held: int) -> Sizes:
    """For steps that hold `held` blocks of scores; the fastest of those tried, benchmarks/notes/attention_cpu.md.

    XLA's products of fewer than 512 rows keep to one core. Where sequences are short, half of a causal diagonal block
    is more waste than that.
    """
    shape, limit = problem.shape, CPU_BYTES // held
    if max(shape.queries, shape.keys) < 1024:
        return _fitting(problem, 128, 128, limit)
    group = shape.heads // shape.kv_heads
    return _fitting(problem, max(512 // group, min(256, 2048 // group), 1), 256, limit)


def square_sizes(problem: Problem, held: int) -> Sizes:
    """For other platforms."""
    return _fitting(problem, 512, 512, BYTES // held)


def _fitting(problem: Problem, t: int, s: int, limit: int) -> Sizes:
    """As many heads, and then rows, as have blocks of scores within the limit."""
    shape = problem.shape
    fit = max(1, limit // (shape.heads // shape.kv_heads * t * s * problem.dtype.itemsize))
    return settled(problem, Sizes(max(1, fit // shape.kv_heads), fit, t, s))


def settled(problem: Problem, most: Sizes) -> Sizes:
    """The sizes that cut rows and heads evenly and lengths with the least padding, within `most`."""
    shape = problem.shape
    rows, kv_heads = _divisor(shape.batch, most.rows), _divisor(shape.kv_heads, most.kv_heads)
    return Sizes(rows, kv_heads, _block(shape.queries, most.queries), _block(shape.keys, most.keys))


def _divisor(number: int, limit: int) -> int:
    """The greatest within the limit."""
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)


def _block(length: int, limit: int) -> int:
    """The block size that covers a length in the fewest blocks of at most `limit`, with the least padding."""
    count = -(-length // limit)
    return -(-length // count)


class Cut(NamedTuple):
    """A problem with its lengths padded to whole blocks.

    q [B, queries t, N, H] and k, v [B, keys s, K, H], as bits; kinds: of the pairs of blocks; sizes: b, n, t, s.
    """

    problem: Problem
    q: jax.Array
    k: jax.Array
    v: jax.Array
    mask: ResolvedMask
    bias: biases.Given
    kinds: BlockKinds
    sizes: Sizes

    @property
    def queries(self) -> int:
        return self.q.shape[1] // self.sizes.queries

    @property
    def keys(self) -> int:
        return self.k.shape[1] // self.sizes.keys

    def over_parts(self, run: "Callable[[Part, Results], Results]", results: Results) -> Results:
        """results = run(part, results) for every part."""
        shape, sizes = self.problem.shape, self.sizes
        across = shape.kv_heads // sizes.kv_heads
        count = shape.batch // sizes.rows * across

        def one(c: Index, results: Results) -> Results:
            return run(self._part(c // across * sizes.rows, c % across * sizes.kv_heads), results)

        return one(0, results) if count == 1 else jax.lax.fori_loop(0, count, one, results)

    def _part(self, row: Index, kv_head: Index) -> "Part":
        b, n, _, s = self.sizes
        kinds = BlockKinds(*(x if x.shape[0] == 1 else jax.lax.dynamic_slice_in_dim(x, row, b) for x in self.kinds))
        needed, whole = kinds.needed.any(0), kinds.whole.all(0)
        order = jnp.arange(self.keys, dtype=jnp.int32)

        def blocks(x: jax.Array) -> jax.Array:
            x = jax.lax.dynamic_slice(x, (row, 0, kv_head, 0), (b, x.shape[1], n, x.shape[3]))
            return x.reshape(b, -1, s, n, x.shape[3]).transpose(1, 0, 3, 2, 4)

        return Part(
            cut=self,
            row=row,
            kv_head=kv_head,
            k=blocks(self.k),
            v=blocks(self.v),
            mask=self.mask.rows(row, b),
            first=jnp.min(jnp.where(needed, order, self.keys), axis=1),
            last=jnp.max(jnp.where(needed, order + 1, 0), axis=1),
            whole=whole,
        )


class Part(NamedTuple):
    """Rows and heads from row and kv_head on. k, v [keys, b, n, s, H], as bits.

    first, last [queries]: the range of key blocks that the mask leaves anything of; whole [queries, keys]: no masking
    needed.
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

    def place(self, i: Index, j: Index) -> biases.Place:
        """Of a block in an array [B, N, queries t, keys s]."""
        b, n, t, s = self.cut.sizes
        return (self.row, b), (self.head, n * self.group), (i * t, t), (j * s, s)

    def over_keys(self, i: Index, body: Callable[[Index, Results], Results], carry: Results) -> Results:
        """body(j, carry) for the key blocks that block i of the queries needs."""
        if self.cut.keys == 1:
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

    def rows(self, x: jax.Array, i: Index) -> jax.Array:
        """Block i of bits [B, queries t, N, X] as [b, n, G t, X]."""
        b, n, t, _ = self.cut.sizes
        corner, sizes = (self.row, i * t, self.head, 0), (b, t, n * self.group, x.shape[3])
        block = jax.lax.dynamic_slice(x, corner, sizes).transpose(0, 2, 1, 3)
        return from_bits(self.by_group(block), self.cut.problem.q.dtype)

    def put_rows(self, total: jax.Array, i: Index, x: jax.Array) -> jax.Array:
        """The inverse: [b, n, G t, X] written to block i of bits [B, queries t, N, X]."""
        block = self.by_head(to_bits(x)).transpose(0, 2, 1, 3)
        return jax.lax.dynamic_update_slice(total, block, (self.row, i * self.cut.sizes.queries, self.head, 0))

    def row_numbers(self, x: jax.Array, i: Index) -> jax.Array:
        """Block i of [B, N, queries t] as [b, n G, t, 1]."""
        b, n, t, _ = self.cut.sizes
        return jax.lax.dynamic_slice(x, (self.row, self.head, i * t), (b, n * self.group, t))[..., None]

    def put_row_numbers(self, total: jax.Array, i: Index, x: jax.Array) -> jax.Array:
        """[b, n G, t] written to block i of [B, N, queries t]."""
        return jax.lax.dynamic_update_slice(total, x, (self.row, self.head, i * self.cut.sizes.queries))

    def put_keys(self, total: jax.Array, turned: jax.Array) -> jax.Array:
        """All keys' blocks [keys, b, n, X, s] written to bits [B, keys s, K, X]."""
        x = to_bits(turned).transpose(1, 0, 4, 2, 3)
        x = x.reshape(x.shape[0], -1, *x.shape[3:])
        return jax.lax.dynamic_update_slice(total, x, (self.row, 0, self.kv_head, 0))


def cut(problem: Problem, most: Sizes) -> Cut:
    """most: of rows, heads, queries and keys; see `settled`."""
    p, sizes = problem, settled(problem, most)
    queries, keys = (-(-x // size) * size for x, size in zip(p.shape[1:3], sizes[2:], strict=True))
    mask = p.mask.padded(queries, keys)
    return Cut(
        problem=p,
        q=padded(to_bits(p.q), queries, axis=1),
        k=padded(to_bits(p.k), keys, axis=1),
        v=padded(to_bits(p.v), keys, axis=1),
        mask=mask,
        bias=biases.padded(p.bias, queries, keys),
        kinds=block_kinds(mask, sizes.queries, sizes.keys),
        sizes=sizes,
    )


def padded(x: jax.Array, length: int, axis: int) -> jax.Array:
    """Zeros at the end of an axis, up to `length`."""
    extra = length - x.shape[axis]
    return jnp.pad(x, [(0, extra if a == axis else 0) for a in range(x.ndim)]) if extra else x
