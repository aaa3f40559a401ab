"""The list of visits: every pair of blocks that the mask leaves, once; the same made before the program and in it."""

import jax.numpy as jnp
import numpy as np
import pytest

from zoo.kernels import Mask, work_list
from zoo.kernels.mask import resolve
from zoo.kernels.work_list import FIRST, LAST, WHOLE, Code

MASKS = {
    "all": (Mask(), 512, 512),
    "causal": (Mask(causal=True), 640, 640),
    "window": (Mask(window=(150, 0)), 640, 640),
    "more keys": (Mask(causal=True), 300, 700),
    "more queries": (Mask(window=(100, 40)), 700, 300),
}


def pair_counts(mask: Mask, queries: int, keys: int) -> np.ndarray:
    """[T, S], from the definition of causal masks and windows."""
    distance = np.arange(queries)[:, None] - np.arange(keys)
    left, right = mask.limits
    keep = np.ones((queries, keys), bool)
    if mask.causal:
        keep &= distance >= 0
    if left is not None:
        keep &= distance <= left
    if right is not None:
        keep &= distance >= -right
    return keep


@pytest.mark.parametrize("name", MASKS)
def test_what_is_visited(name: str) -> None:
    mask, queries, keys = MASKS[name]
    t, s = 128, 256
    code = Code(-(-queries // t), -(-keys // s), strips=2)
    resolved = resolve(mask, 1, queries, keys)
    known = resolved.known()
    assert known is not None
    before, inside = (
        work_list.build(one.padded(code.queries * t, code.keys * s), code, 1, t, s) for one in (known, resolved)
    )
    assert isinstance(before.visits, np.ndarray)
    steps = int(before.steps)
    assert steps == int(inside.steps)
    np.testing.assert_array_equal(before.visits[:steps], inside.visits[:steps])

    keep = np.zeros((code.queries * t, code.keys * s), bool)
    keep[:queries, :keys] = pair_counts(mask, queries, keys)
    seen, ends = np.zeros_like(keep), []
    for visit in before.visits[:steps]:
        i, j, flags = code.query(visit), code.key(visit), code.flags(visit)
        rows = slice(i * t, (i + 1) * t)
        ends.append((int(i), bool(flags & FIRST), bool(flags & LAST)))
        if flags & WHOLE:
            assert keep[rows, j * s : (j + 1) * s][: queries - i * t].all()
        for strip in range(2):
            columns = slice(j * s + strip * 128, j * s + (strip + 1) * 128)
            if flags & code.strip_flag(strip):
                assert not seen[rows, columns].any()
                seen[rows, columns] = True
    assert not (keep & ~seen).any()
    assert [i for i, first, _ in ends if first] == [i for i, _, last in ends if last] == list(range(code.queries))


@pytest.mark.parametrize(
    "mask",
    [
        Mask(segments=np.ones((1, 64), int)),
        Mask(causal=True, positions=np.arange(64)),
        Mask(lengths=np.array([5])),
        Mask(causal=True, prefix=3),
    ],
)
def test_what_the_program_alone_may_know(mask: Mask) -> None:
    assert resolve(mask, 1, 64, 64).known() is None


def test_arrays_that_are_cut_or_moved_lose_their_start() -> None:
    resolved = resolve(Mask(causal=True), 1, 64, 64, first_query=32)
    known = resolved.known()
    assert known is not None and known.query.index[0] == 32
    assert resolved.moved().known() is None
    assert resolved.query.block(jnp.int32(8), 16).start is None
    part = resolved.query.part(8, 16)
    assert part.start == 40 and part.index[0] == 40
    assert resolve(Mask(), 1, 64, 64, first_query=jnp.int32(0)).known() is None
