"""Which pairs of blocks a kernel visits, as one list of integers that its index maps read from scalar memory.

Pairs that the mask empties are not in the list, so that they are neither loaded nor computed. Where the mask is known
before the program runs, so is the list; else the program makes it: segments and lengths shorten it too.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax

from zoo.kernels.mask import ResolvedMask, array_module, block_kinds

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

    def all_strips(self, flags: jax.Array) -> jax.Array:
        return (flags >> _FLAGS) == (1 << self.strips) - 1


class WorkList(NamedTuple):
    """visits: int32 [rows pairs], row after row; steps: the visits of the longest row, int32 []. Of jax or of numpy."""

    visits: jax.Array
    steps: jax.Array | int


def build(mask: ResolvedMask, code: Code, rows: int, query_block: int, key_block: int) -> WorkList:
    """rows: 1 where all rows have one mask, else B.

    Every block of queries is visited, once with no strip where it has nothing to attend to. A row that is shorter than
    the longest ends in visits of its last pair without flags: nothing moves. A mask in numpy gives a list in numpy.
    """
    xp, strip = array_module(mask.query.index), key_block // code.strips
    kinds = block_kinds(mask, query_block, strip)
    shape = (rows, code.queries, code.keys, code.strips)
    strips, wholes = (xp.broadcast_to(x.reshape(-1, *shape[1:]), shape) for x in kinds)
    needed, whole = strips.any(-1), wholes.all(-1)
    query, key = xp.arange(code.queries, dtype="int32")[:, None], xp.arange(code.keys, dtype="int32")
    visit = needed | (~needed.any(-1, keepdims=True) & (key == 0))
    order = xp.where(visit, key, -1)
    first = order == order.max(-1, keepdims=True)
    last = visit & (key == xp.where(visit, key, code.keys).min(-1, keepdims=True))
    flags = FIRST * first + LAST * last + WHOLE * whole
    flags += (strips << (_FLAGS + xp.arange(code.strips, dtype="int32"))).sum(-1)
    beyond = xp.int32(2**31 - 1)
    visits = xp.where(visit, code.place(query, key) + flags.astype("int32"), beyond)
    visits = xp.sort(visits.reshape(visits.shape[0], -1), axis=-1)
    final = xp.where(visits == beyond, -1, visits).max(-1, keepdims=True)
    visits = xp.where(visits == beyond, final - code.flags(final), visits)
    return WorkList(visits.reshape(-1).astype("int32"), visit.sum((1, 2), dtype="int32").max())
