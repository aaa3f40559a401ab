"""Which pairs of blocks a kernel visits, as one list of integers that its index maps read from scalar memory.

Pairs that the mask empties are not in the list, so that they are neither loaded nor computed. The list is made by the
compiled program itself: segments and lengths that are known only at run time shorten it too.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from zoo.kernels.mask import ResolvedMask, block_kinds

FIRST, LAST, WHOLE = 1, 2, 4
_FLAGS = 3

MOST_PAIRS = 2**17
"""Of all rows: half of a TPU's scalar memory."""


@dataclass(frozen=True)
class Code:
    """How one visit is held in an integer: block of queries, block of keys counted from the end, strips, flags.

    A block of keys is cut into `strips`; a bit each says whether the mask leaves anything of it.
    """

    queries: int
    keys: int
    strips: int

    @property
    def _flag_bits(self) -> int:
        return _FLAGS + self.strips

    @property
    def _key_bits(self) -> int:
        return (self.keys - 1).bit_length()

    @property
    def bits(self) -> int:
        return self._flag_bits + self._key_bits + (self.queries - 1).bit_length()

    def place(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Sorted, queries ascend and the keys of each descend."""
        return ((query << self._key_bits) | (self.keys - 1 - key)) << self._flag_bits

    def query(self, visit: jax.Array) -> jax.Array:
        return visit >> (self._key_bits + self._flag_bits)

    def key(self, visit: jax.Array) -> jax.Array:
        return self.keys - 1 - ((visit >> self._flag_bits) & ((1 << self._key_bits) - 1))

    def flags(self, visit: jax.Array) -> jax.Array:
        return visit & ((1 << self._flag_bits) - 1)

    def strip_flag(self, strip: jax.Array | int) -> jax.Array | int:
        """The bit that says whether the mask leaves anything of a strip."""
        return 1 << (_FLAGS + strip)


class WorkList(NamedTuple):
    """visits: int32 [rows pairs], row after row; steps: the visits of the longest row, int32 []."""

    visits: jax.Array
    steps: jax.Array


def build(mask: ResolvedMask, code: Code, rows: int, query_block: int, key_block: int) -> WorkList:
    """rows: 1 where all rows have one mask, else B.

    Every block of queries is visited, once with no strip where it has nothing to attend to. A row that is shorter than
    the longest ends in visits of its last pair without flags: nothing moves.
    """
    strip = key_block // code.strips
    kinds = block_kinds(mask, query_block, strip)
    shape = (rows, code.queries, code.keys, code.strips)
    strips, wholes = (jnp.broadcast_to(x.reshape(-1, *shape[1:]), shape) for x in kinds)
    needed, whole = strips.any(-1), wholes.all(-1)
    query, key = jnp.arange(code.queries, dtype=jnp.int32)[:, None], jnp.arange(code.keys, dtype=jnp.int32)
    visit = needed | (~needed.any(-1, keepdims=True) & (key == 0))
    order = jnp.where(visit, key, -1)
    first = order == order.max(-1, keepdims=True)
    last = visit & (key == jnp.where(visit, key, code.keys).min(-1, keepdims=True))
    flags = FIRST * first + LAST * last + WHOLE * whole
    flags += (strips << (_FLAGS + jnp.arange(code.strips, dtype=jnp.int32))).sum(-1)
    beyond = jnp.int32(2**31 - 1)
    visits = jnp.where(visit, code.place(query, key) + flags.astype(jnp.int32), beyond)
    visits = jnp.sort(visits.reshape(visits.shape[0], -1), axis=-1)
    final = jnp.where(visits == beyond, -1, visits).max(-1, keepdims=True)
    visits = jnp.where(visits == beyond, final - code.flags(final), visits)
    return WorkList(visits.reshape(-1), visit.sum((1, 2), dtype=jnp.int32).max())
