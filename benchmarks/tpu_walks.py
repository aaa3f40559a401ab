"""How attention kernels walk their grids: for `tpu_bound`, the steps of `tpu_flash` and of the splash kernels.

Splash attention is that of tokamax (grids over the blocks a static mask leaves, forward) and of JAX. What a step runs
is named as the regions stand in the compiled program.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from benchmarks import tpu
from benchmarks.attention_cases import Case, shapes
from benchmarks.tpu_bound import Operand, Part, Step, padded
from zoo.kernels import tpu_blocks, tpu_flash, tpu_layout, work_list
from zoo.kernels.mask import resolve
from zoo.kernels.problem import build
from zoo.kernels.tpu_blocks import Blocks
from zoo.kernels.work_list import FIRST, LAST, WHOLE

F32, BF16 = 4, 2
LANES, SUBLANES = 128, 8

PASSES = {
    "forward": ("forward",),
    "residuals": ("forward",),
    "backward": ("backward",),
    "both": ("forward", "backward"),
}
"""By what the suite calls a mode."""


def row_bytes(case: Case, itemsize: int) -> int:
    """Of one head of one query or key, as it lies in memory."""
    return padded(case.head_dim) * itemsize


class Flash:
    """Walks of `tpu_flash`; spec: the kernel's static numbers for this call."""

    FORWARD = ("start", "whole", "masked", "strips", "finish")
    BACKWARD = ("clear", "start", "whole", "strips", "finish", "write")

    def __init__(self, case: Case, spec: Any) -> None:
        self.heads, self.group = case.batch * case.heads, case.heads // case.kv_heads
        self.row = row_bytes(case, spec.dtype.itemsize)
        self.spec, self.blocks, self.code = spec, spec.blocks, spec.code

    def part(self, direction: str, mask: Any) -> Part:
        """mask: resolved, of one row."""
        regions, walk = (self.FORWARD, self.forward) if direction == "forward" else (self.BACKWARD, self.backward)
        return Part(f"flash_{direction}", regions, self.blocks.queries * self.blocks.keys, *walk(mask))

    def visits(self, mask: Any) -> Iterator[tuple[int, int, int]]:
        """(block of queries, block of keys, flags), in the kernel's order; mask: resolved, its arrays known."""
        known, code = mask.known() or mask, self.code
        full = known.padded(code.queries * self.blocks.queries, code.keys * self.blocks.keys)
        work = work_list.build(full, code, 1, self.blocks.queries, self.blocks.keys)
        for visit in np.asarray(work.visits)[: int(work.steps)]:
            yield int(code.query(visit)), int(code.key(visit)), int(code.flags(visit))

    def _strips(self, flags: int) -> list[int]:
        """Counts of the region, of its loop, and of what that skips."""
        taken = sum(bool(flags & self.code.strip_flag(c)) for c in range(self.code.strips))
        return [1, self.code.strips, taken]

    def forward(self, mask: Any) -> tuple[list[Operand], Iterator[Step]]:
        q, k, row = self.blocks.queries, self.blocks.keys, self.row
        sides = [Operand(4 * q * F32), Operand(4 * k * F32)]
        results = [Operand(q * row, written=True), Operand(q * F32, written=True)]
        return [Operand(q * row), Operand(k * row), Operand(k * row), *sides, *results], self._forward(mask)

    def _forward(self, mask: Any) -> Iterator[Step]:
        visits = list(self.visits(mask))
        for n in range(self.heads):
            for i, j, flags in visits:
                first = bool(flags & FIRST)
                seen = self.spec.sees_itself or not first
                runs: dict = {"start": None} if first else {}
                if seen and flags & WHOLE:
                    runs["whole"] = None
                elif seen and self.code.all_strips(flags):
                    runs["masked"] = None
                else:
                    # Of a row's first strip the maximum is taken, the others go by the reference that it gives.
                    counts = self._strips(flags)
                    with_maximum = min(not seen, counts[2])
                    runs["strips"] = [*counts, counts[2] - with_maximum, with_maximum]
                runs |= {"finish": None} if flags & LAST else {}
                kv = n // self.group, j
                yield Step(runs, ((n, i), kv, kv, i, j, (n, i), (n, i)))

    def backward(self, mask: Any) -> tuple[list[Operand], Iterator[Step]]:
        q, k, row = self.blocks.queries, self.blocks.keys, self.row
        keys = self.code.keys * k
        queries = [Operand(q * row)] * 3 + [Operand(2 * q * F32)]
        sides = [Operand(4 * q * F32), Operand(4 * k * F32)]
        results = [Operand(q * row, written=True), *[Operand(keys * row, written=True)] * 2]
        return [*queries, Operand(k * row), Operand(k * row), *sides, *results], self._backward(mask)

    def _backward(self, mask: Any) -> Iterator[Step]:
        visits = list(self.visits(mask))
        pieces = [1, self.code.keys * self.code.strips]
        for n in range(self.heads):
            kv, member = divmod(n, self.group)
            for at, (i, j, flags) in enumerate(visits):
                runs: dict = {"clear": None} if member == 0 and at == 0 else {}
                runs |= {"start": None} if flags & FIRST else {}
                runs |= {"whole": None} if flags & WHOLE else {"strips": self._strips(flags)}
                runs |= {"finish": None} if flags & LAST else {}
                runs |= {"write": pieces} if member == self.group - 1 and at == len(visits) - 1 else {}
                query = (n, i)
                yield Step(runs, (*[query] * 4, (kv, j), (kv, j), i, j, query, kv, kv))


def flash_parts(case: Case, dtype: str, chip: str, mode: str, blocks: Blocks | None = None) -> list[Part]:
    """Of a call of `tpu_flash`, at the block sizes that it chooses if none are given.

    ValueError: its keys are taken in parts, which a walk does not know.
    """
    row = replace(case, batch=1)  # All have the same mask.
    mask, parts = resolve(row.mask(), 1, case.queries, case.keys), []

    def lay_out(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
        problem = build(q, k, v, row.mask())
        for direction in PASSES[mode]:
            sizes = blocks or tpu_blocks.find(direction, problem)
            walk = Flash(case, tpu_layout.Call.of(problem, sizes).spec)
            parts.append(walk.part(direction, mask))
            if direction == "backward" and tpu_flash.keys_of_part(problem, sizes) < case.keys:
                raise ValueError("its keys are taken in parts")

    with tpu.meant(chip):
        jax.eval_shape(lay_out, *shapes(row, dtype)[:3])
    return parts


@dataclass(frozen=True)
class Sizes:
    """queries x keys of a block, keys of a tile; steps: `dq_reduction_steps` of tokamax's backward pass."""

    queries: int
    keys: int
    tile: int
    steps: int | None = None

    def __str__(self) -> str:
        return f"{self.queries} x {self.keys} / {self.tile}{', 3 parts' if self.steps else ''}"

    @property
    def area(self) -> int:
        return self.queries * self.keys


class Splash:
    """Walks of tokamax's splash attention over what a causal mask, with a window, leaves."""

    FORWARD = ("init", "whole", "partial", "end")

    def __init__(self, case: Case, sizes: Sizes) -> None:
        self.heads, self.group = case.batch * case.heads, case.heads // case.kv_heads
        self.row, self.window, self.segments = row_bytes(case, BF16), case.window, case.document is not None
        self.counts, self.sizes = (case.queries // sizes.queries, case.keys // sizes.keys), sizes

    @property
    def backward_regions(self) -> tuple[str, ...]:
        """Two blocks of queries or fewer are written in every step, as the kernel has it."""
        always = self.sizes.steps is None and self.counts[0] <= 2
        return ("init", "whole", "partial") + (() if always else ("write",))

    @property
    def wide(self) -> bool:
        """Whether the parts of the gradient of q are in float32."""
        return self.sizes.steps is None and self.counts[1] > 4

    def _kind(self, i: int, j: int) -> str | None:
        """Of a block of queries and one of keys: "whole", "partial", or None where the static mask empties it."""
        q, k, window = self.sizes.queries, self.sizes.keys, self.window
        first_q, last_q, first_k, last_k = i * q, i * q + q - 1, j * k, j * k + k - 1
        if first_k > last_q or (window and last_k <= first_q - window):
            return None
        inside = last_k <= first_q and not (window and first_k <= last_q - window)
        return "whole" if inside else "partial"

    def forward(self, residuals: bool) -> tuple[list[Operand], Iterator[Step]]:
        q, k, row, segments = self.sizes.queries, self.sizes.keys, self.row, self.segments
        inputs = [Operand(q * row), Operand(k * row), Operand(k * row), Operand(q * LANES * F32)]
        if segments:
            inputs += [Operand(q * LANES * F32), Operand(SUBLANES * k * F32)]
        results = [Operand(q * row, written=True)] + [Operand(q * LANES * F32, written=True)] * residuals
        return inputs + results, self._forward(segments, residuals)

    def _forward(self, segments: bool, residuals: bool) -> Iterator[Step]:
        queries, keys = self.counts
        for n in range(self.heads):
            for i in range(queries):
                active = [(j, kind) for j in range(keys) if (kind := self._kind(i, j))]
                for at, (j, kind) in enumerate(active):
                    runs = {kind: None} | ({"init": None} if at == 0 else {})
                    runs |= {"end": None} if at == len(active) - 1 else {}
                    kv = n // self.group, j
                    yield Step(runs, ((n, i), kv, kv, i, *((i, j) if segments else ()), *[(n, i)] * (1 + residuals)))

    def backward(self) -> tuple[list[Operand], Iterator[Step]]:
        q, k, row, segments = self.sizes.queries, self.sizes.keys, self.row, self.segments
        per_row = Operand(SUBLANES * q * F32)
        inputs = [*[Operand(q * row)] * 2, *[per_row] * 3, Operand(k * row), Operand(k * row)]
        if segments:
            inputs += [per_row, Operand(k * LANES * F32)]
        part = Operand(q * row * (2 if self.wide else 1), written=True)
        before = [] if self.sizes.steps is None else [Operand(q * row)]
        return [*inputs, *before, part, *[Operand(k * row, written=True)] * 2], self._backward(segments)

    def _backward(self, segments: bool) -> Iterator[Step]:
        for n, i, j, kind, first, last in self._order():
            runs = {kind: None} if kind else {}
            runs |= ({"init": None} if first else {}) | ({"write": None} if last else {})
            kv, query = (n // self.group, j), (n, i)
            part = (n, i, j) if self.sizes.steps is None else (n, i, j % 3)
            parts = [part] * (1 if self.sizes.steps is None else 2)
            yield Step(runs, (*[query] * 4, i, kv, kv, *((i, j) if segments else ()), *parts, kv, kv))

    def _order(self) -> Iterator[tuple[int, int, int, str | None, bool, bool]]:
        """(head, block of queries, of keys, kind, whether sums start and end here)."""
        queries, keys = self.counts
        if self.sizes.steps is None:
            for j in range(keys):
                for n in range(self.heads):
                    for i in range(queries):
                        first = n % self.group == 0 and i == 0
                        last = queries > 2 and n % self.group == self.group - 1 and i == queries - 1
                        yield n, i, j, self._kind(i, j), first, last
            return
        for n in range(self.heads):
            for j in range(keys):
                active = [(i, kind) for i in range(queries) if (kind := self._kind(i, j))]
                for at, (i, kind) in enumerate(active):
                    yield n, i, j, kind, at == 0, at == len(active) - 1


class JaxSplash(Splash):
    """Of JAX's: one body for whole and partial blocks, and steps without one, in which the next block is fetched."""

    FORWARD = ("init", "run", "end")
    wide = False

    @property
    def backward_regions(self) -> tuple[str, ...]:
        return ("init", "run", "end")

    def _forward(self, segments: bool, residuals: bool) -> Iterator[Step]:
        """The grid is as wide as the row of blocks that has the most."""
        queries, keys = self.counts
        rows = [[j for j in range(keys) if self._kind(i, j)] for i in range(queries)]
        width = max(map(len, rows))
        for n in range(self.heads):
            for i, row in enumerate(rows):
                for at in range(width):
                    j = row[at] if at < len(row) else 0
                    runs = ({"init": None} if at == 0 else {}) | ({"run": None} if at < len(row) else {})
                    runs |= {"end": None} if at == width - 1 else {}
                    kv = n // self.group, j
                    yield Step(runs, ((n, i), kv, kv, i, *((i, j) if segments else ()), *[(n, i)] * (1 + residuals)))

    def _backward(self, segments: bool) -> Iterator[Step]:
        """Each block of keys meets all of queries: where the kernel is fused, the grid is not cut."""
        queries, keys = self.counts
        columns = [[i for i in range(queries) if self._kind(i, j)] for j in range(keys)]
        for j, column in enumerate(columns):
            after = columns[(j + 1) % keys][0]
            for n in range(self.heads):
                member = n % self.group
                for i in range(queries):
                    ahead = next((x for x in column if x >= i), after)
                    runs = ({"init": None} if i == 0 and member == 0 else {}) | ({"run": None} if i in column else {})
                    runs |= {"end": None} if i == queries - 1 and member == self.group - 1 else {}
                    kv, query, sides = (n // self.group, j), (n, ahead), (ahead, j) if segments else ()
                    yield Step(runs, (*[query] * 4, ahead, kv, kv, *sides, (n, i, j), kv, kv))
