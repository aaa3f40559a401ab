"""`ring`: attention over a length that is cut over mesh axes, with keys and values passed from device to device.

Ring Attention (Liu et al. 2023, https://arxiv.org/abs/2310.01889): every device keeps its queries, and in n steps sees
the keys and values of all n devices. No device holds more than two parts of them, and each step's transfer is under
way while the step computes. The partial results of the steps are merged by their log-sum-exp; backward, the gradients
of keys and values travel with them.

Under a causal mask the last of contiguous parts would have n times the work of the first. There the length is laid in
zig-zag order first (as in zig-zag ring attention; the idea of Striped Attention, Brandon et al. 2023,
https://arxiv.org/abs/2311.09431): of 2n pieces, device i takes pieces i and 2n - 1 - i, so that all devices have the
same work in every step. L is the length of a device's part.
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from zoo.kernels import engine, tpu_flash
from zoo.kernels.bias import Bias
from zoo.kernels.engine import Engine, Learned, Output
from zoo.kernels.problem import AttentionOutput, Problem, varying_axes, varying_over

Tree = TypeVar("Tree")


def supports(problem: Problem) -> str | None:
    if not problem.length_axes:
        return (
            "no mesh axis cuts T = S: name one with partition=PartitionSpec(batch, length, heads), "
            "or use a mesh of sequence=N"
        )
    if problem.bias is not None and not isinstance(problem.bias, Bias):
        return "it takes no array as bias: give a Bias, which is a function of positions"
    return None


def temporaries(problem: Problem) -> int:
    """Bytes: those of a part's own attention, and what is passed on.

    The gradients of k and v are summed in float32 twice, of which one is on its way, and so are k and v; the gradient
    of q is summed once; q, the output and its gradient are laid in zig-zag order.
    """
    p = problem
    size, wide = p.q.dtype.itemsize, p.dtype.itemsize
    passed = (2 * wide + size) * (p.k.size + p.v.size) + (wide + 3 * size) * p.q.size
    return passed + tpu_flash.temporaries_or_chunked(p)


def attend(problem: Problem) -> AttentionOutput:
    """Exact, differentiable once, in reverse; inside shard_map over problem.length_axes, in contiguous parts."""
    p, axes = problem, problem.length_axes
    ring = Ring(tpu_flash.or_chunked(p), axes)
    # A part of odd length has no halves: its work stays uneven.
    if not p.mask.rules.causal or p.shape.queries % 2:
        return engine.attend(ring, p)
    lay = partial(to_zigzag, axes)
    sides = (p.mask.query, p.mask.key)
    query, key = _like(sides, lay(_rows(sides), axis=-1))
    rules = p.mask.rules._replace(consecutive=False)
    mask = dataclasses.replace(p.mask, query=query, key=key, rules=rules)
    laid = p.replace(q=lay(p.q), k=lay(p.k), v=lay(p.v), mask=mask)
    return AttentionOutput(*(from_zigzag(axes, x) for x in engine.attend(ring, laid)))


class Ring(NamedTuple):
    """The engine of a problem that holds one device's part of queries and of keys, in any order.

    A part of the keys with the output and log-sum-exp of all of them has exactly its share of the gradients.
    """

    local: Engine
    axes: tuple[str, ...]

    def forward(self, problem: Problem) -> Output:
        p = problem
        out = jnp.zeros((*p.q.shape[:3], p.v.shape[3]), p.dtype)
        lse = jnp.full((p.shape.batch, p.shape.heads, p.shape.queries), -jnp.inf, p.dtype)
        keys, total = _Keys.of(p), varying_over(Output(out, lse), varying_axes(p.q))

        def step(_: Any, carry: tuple[_Keys, Output]) -> tuple[_Keys, Output]:
            keys, total = carry
            # Asked for before the computation, which does not wait for it.
            following = self._next(keys)
            return following, _merged(total, self.local.forward(keys.within(p)))

        keys, total = jax.lax.fori_loop(0, self._size - 1, step, (keys, total))
        out, lse = _merged(total, self.local.forward(keys.within(p)))
        return Output(out.astype(p.q.dtype), lse)

    def backward(self, problem: Problem, output: Output, gradient: Output) -> Learned:
        """The sums of a part's gradients arrive one step after the part, while its next share is computed."""
        p = problem

        def share(keys: _Keys) -> Learned:
            learned = self.local.backward(keys.within(p), output, gradient)
            return jax.tree.map(lambda x: x.astype(p.dtype), learned)

        def step(_: Any, carry: tuple[_Keys, Learned]) -> tuple[_Keys, Learned]:
            keys, sums = carry
            following, d_k, d_v = self._next(keys), self._next(sums.k), self._next(sums.v)
            return following, jax.tree.map(jnp.add, sums._replace(k=d_k, v=d_v), share(keys))

        keys = _Keys.of(p)
        first = self._next(keys), share(keys)
        _, sums = jax.lax.fori_loop(1, self._size, step, first)
        sums = sums._replace(k=self._next(sums.k), v=self._next(sums.v))
        learned = Learned(p.q, p.k, p.v, p.bias)
        return jax.tree.map(lambda total, x: total.astype(x.dtype), sums, learned)

    @property
    def _size(self) -> int:
        return jax.lax.axis_size(self.axes)

    def _next(self, tree: Tree) -> Tree:
        """Every device's arrays on the device after it."""
        n = self._size
        return _permuted(tree, self.axes, [(i, (i + 1) % n) for i in range(n)])


class _Keys(NamedTuple):
    """One device's part of the keys: k, v, and what the mask knows of them, as one array."""

    k: jax.Array
    v: jax.Array
    side: jax.Array

    @classmethod
    def of(cls, problem: Problem) -> "_Keys":
        return cls(problem.k, problem.v, _rows(problem.mask.key))

    def within(self, problem: Problem) -> Problem:
        key = _like(problem.mask.key, self.side)
        return problem.replace(k=self.k, v=self.v, mask=dataclasses.replace(problem.mask, key=key))


def _rows(sides: Any) -> jax.Array:
    """Arrays [L] and [b, L] as one [rows, L], so that one transfer moves them."""
    return jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in jax.tree.leaves(sides)])


def _like(sides: Tree, rows: jax.Array) -> Tree:
    """The inverse of `_rows`, for arrays of the shapes in `sides`."""
    leaves, tree = jax.tree.flatten(sides)
    parts, start = [], 0
    for leaf in leaves:
        count = leaf.size // leaf.shape[-1]
        parts.append(rows[start : start + count].reshape(leaf.shape))
        start += count
    return tree.unflatten(parts)


def _merged(total: Output, part: Output) -> Output:
    """The output over two parts of the keys, in the type of `total`; a row empty in both stays so."""
    lse = jnp.logaddexp(total.lse, part.lse)
    top = jnp.where(lse == -jnp.inf, 0, lse)
    before, added = (jnp.exp(x.lse - top).swapaxes(1, 2)[..., None] * x.out for x in (total, part))
    return Output(before + added, lse)


def to_zigzag(axes: tuple[str, ...], x: jax.Array, axis: int = 1) -> jax.Array:
    """From pieces 2i and 2i + 1 of 2n on device i to pieces i and 2n - 1 - i."""
    first, second = jnp.split(x, 2, axis)
    to_first, to_second = _routes(jax.lax.axis_size(axes))
    even, odd = _permuted(first, axes, to_first), _permuted(second, axes, to_second)
    return jnp.concatenate(_in_turn(axes, even, odd), axis)


def from_zigzag(axes: tuple[str, ...], x: jax.Array, axis: int = 1) -> jax.Array:
    """The inverse of `to_zigzag`."""
    back = [[(there, here) for here, there in route] for route in _routes(jax.lax.axis_size(axes))]
    halves = zip(_in_turn(axes, *jnp.split(x, 2, axis)), back, strict=True)
    return jnp.concatenate([_permuted(half, axes, route) for half, route in halves], axis)


def _permuted(tree: Tree, axes: tuple[str, ...], route: list[tuple[int, int]]) -> Tree:
    """jax.lax.ppermute of places counted along `axes`; JAX wants axes, and places, in the order of the mesh."""
    ordered = tuple(axis for axis in jax.sharding.get_abstract_mesh().axis_names if axis in axes)
    sizes = [jax.lax.axis_size(axis) for axis in axes]
    places = np.arange(math.prod(sizes)).reshape(sizes).transpose([axes.index(axis) for axis in ordered]).reshape(-1)
    at = {int(place): i for i, place in enumerate(places)}
    return jax.lax.ppermute(tree, ordered, [(at[here], at[there]) for here, there in route])


def _routes(n: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Where the device that holds pieces 2i and 2i + 1 sends the one, and the other: each a permutation."""

    def holder(piece: int) -> int:
        return min(piece, 2 * n - 1 - piece)

    return [(i, holder(2 * i)) for i in range(n)], [(i, holder(2 * i + 1)) for i in range(n)]


def _in_turn(axes: tuple[str, ...], even: jax.Array, odd: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Swapped on every other device: of the pieces i and 2n - 1 - i the first is even where i is."""
    swap = jax.lax.axis_index(axes) % 2 == 1
    return jnp.where(swap, odd, even), jnp.where(swap, even, odd)
