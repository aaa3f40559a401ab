"""Biases of the distance between query and key alone, ALiBi, T5's buckets: which functions are, and sums by distance.

What a function depends on is read off its jaxpr.
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

_answers: WeakKeyDictionary[Callable[..., Any], dict[Any, bool]] = WeakKeyDictionary()
"""Of `depends_on_distance`, which a call asks some ten times: by function, which is taken to be pure, and shapes."""


def depends_on_distance(function: Callable[..., Any], tables: Any, heads: int) -> bool:
    """Whether function(tables, head, query, key) stays the same where query and key move by the same number."""
    tables = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tables)
    leaves, tree = jax.tree.flatten(tables)
    try:
        known = _answers.setdefault(function, {})
    except TypeError:  # Of a named tuple, say, there are no weak references.
        known = {}
    of_shapes = tree, tuple(leaves), heads
    if of_shapes not in known:
        known[of_shapes] = _of_distance(function, tables, heads)
    return known[of_shapes]


def _of_distance(function: Callable[..., Any], tables: Any, heads: int) -> bool:
    shapes = (1, heads, 1, 1), (1, 1, 1, 1), (1, 1, 1, 2)
    traced = jax.make_jaxpr(function)(tables, *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes))
    still = [0] * (len(traced.in_avals) - 2)
    return _moves(traced.jaxpr, [*still, 1, 1]) == [0] * len(traced.out_avals)


_CALLS = {"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2"}
_KEEP = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "copy", "pvary", "pcast"}
_ALIKE = {"max", "min", "concatenate", "clamp"}
_COMPARE = {"eq", "ne", "lt", "le", "gt", "ge"}

Move = int | None
"""How far a value moves where query and key both move by one; None: by what is not known."""


def _moves(jaxpr: Any, moves: Sequence[Move]) -> list[Move]:
    """Of a function's results, from those of its arguments."""
    known: dict[Any, Move] = dict(zip(jaxpr.invars, moves, strict=True)) | dict.fromkeys(jaxpr.constvars, 0)

    def of(atom: Any) -> Move:
        return 0 if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        known |= zip(equation.outvars, _results(equation, [of(x) for x in equation.invars]), strict=True)
    return [of(x) for x in jaxpr.outvars]


def _results(equation: Any, moves: list[Move]) -> list[Move]:
    name, count = equation.primitive.name, len(equation.outvars)
    if not any(move != 0 for move in moves):
        return [0] * count
    if name in _CALLS:
        inner = equation.params["jaxpr" if "jaxpr" in equation.params else "call_jaxpr"]
        return _moves(getattr(inner, "jaxpr", inner), moves)
    if None in moves:
        return [None] * count
    first, *rest = (move or 0 for move in moves)
    same = len({first, *rest}) == 1
    if name in _KEEP or (name in _ALIKE and same) or (name == "convert_element_type" and _exact(equation)):
        return [first]
    if name in _COMPARE and same:
        return [0]
    if name == "select_n" and first == 0 and len(set(rest)) == 1:
        return [rest[0]]
    sums: dict[str, list[Move]] = {"neg": [-first], "add": [first + sum(rest)], "sub": [first - sum(rest)]}
    return sums.get(name, [None] * count)


def _exact(equation: Any) -> bool:
    """Whether a conversion keeps every move: of an integer to one as wide, or to a float that holds it."""
    before, after = (x.aval.dtype for x in (equation.invars[0], equation.outvars[0]))
    return jnp.issubdtype(before, jnp.signedinteger) and after in (jnp.int32, jnp.int64, jnp.float32, jnp.float64)


def summed_by_distance(x: jax.Array) -> jax.Array:
    """x [..., T, S], entry i, j of the distance j - i: sums [..., T + S - 1] over each distance from 1 - T on.

    Rows are added in pairs, moved by what they are apart, and the sums again: neither a scatter nor a wider copy.
    """
    queries, keys = x.shape[-2:]
    before = ((0, 0),) * (x.ndim - 2)
    rows, apart = x[..., ::-1, :], 1
    while rows.shape[-2] > 1:
        rows = jnp.pad(rows, (*before, (0, rows.shape[-2] % 2), (0, 0)))
        upper = jnp.pad(rows[..., ::2, :], (*before, (0, 0), (0, apart)))
        rows, apart = upper + jnp.pad(rows[..., 1::2, :], (*before, (0, 0), (apart, 0))), 2 * apart
    return rows[..., 0, : queries + keys - 1]
