"""How attention kernels walk their grids: for `tpu_bound`, the steps of `tpu_flash` and of the splash kernels.

Splash attention is that of tokamax (grids over the blocks a static mask leaves, forward) and of JAX. What a step runs
is named as the regions stand in the compiled program.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.tpu_bound import Operand, Step, padded

F32, BF16 = 4, 2
LANES, SUBLANES = 128, 8


@dataclass(frozen=True)
class Call:
    """Causal self-attention, one row in bfloat16. window: of the last so many keys; document: length of packed ones."""

    name: str
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    document: int | None = None

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def row(self) -> int:
        """Bytes of one head of one query or key, as it lies in memory."""
        return padded(self.head_dim) * BF16


class Flash:
    """Walks of `tpu_flash`; spec: the kernel's static numbers for this call."""

    FORWARD = ("start", "whole", "masked", "strips", "finish")
    BACKWARD = ("clear", "start", "whole", "strips", "finish", "write")

    def __init__(self, call: Call, spec: Any) -> None:
        self.call, self.spec, self.blocks, self.code = call, spec, spec.blocks, spec.code

    def visits(self, mask: Any) -> Iterator[tuple[int, int, int]]:
        """(block of queries, block of keys, flags), in the kernel's order; mask: resolved, its arrays known."""
        import numpy as np

        from zoo.kernels import work_list

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
        q, k, row = self.blocks.queries, self.blocks.keys, self.call.row
        sides = [Operand(4 * q * F32), Operand(4 * k * F32)]
        results = [Operand(q * row, written=True), Operand(q * F32, written=True)]
        return [Operand(q * row), Operand(k * row), Operand(k * row), *sides, *results], self._forward(mask)

    def _forward(self, mask: Any) -> Iterator[Step]:
        from zoo.kernels.work_list import FIRST, LAST, WHOLE

        visits = list(self.visits(mask))
        for n in range(self.call.heads):
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
                kv = n // self.call.group, j
                yield Step(runs, ((n, i), kv, kv, i, j, (n, i), (n, i)))

    def backward(self, mask: Any) -> tuple[list[Operand], Iterator[Step]]:
        q, k, row = self.blocks.queries, self.blocks.keys, self.call.row
        keys = self.code.keys * k
        queries = [Operand(q * row)] * 3 + [Operand(2 * q * F32)]
        sides = [Operand(4 * q * F32), Operand(4 * k * F32)]
        results = [Operand(q * row, written=True), *[Operand(keys * row, written=True)] * 2]
        return [*queries, Operand(k * row), Operand(k * row), *sides, *results], self._backward(mask)

    def _backward(self, mask: Any) -> Iterator[Step]:
        from zoo.kernels.work_list import FIRST, LAST, WHOLE

        visits = list(self.visits(mask))
        pieces = [1, self.code.keys * self.code.strips]
        for n in range(self.call.heads):
            kv, member = divmod(n, self.call.group)
            for at, (i, j, flags) in enumerate(visits):
                runs: dict = {"clear": None} if member == 0 and at == 0 else {}
                runs |= {"start": None} if flags & FIRST else {}
                runs |= {"whole": None} if flags & WHOLE else {"strips": self._strips(flags)}
                runs |= {"finish": None} if flags & LAST else {}
                runs |= {"write": pieces} if member == self.call.group - 1 and at == len(visits) - 1 else {}
                query = (n, i)
                yield Step(runs, (*[query] * 4, (kv, j), (kv, j), i, j, query, kv, kv))


@dataclass(frozen=True)
class Sizes:
    """queries x keys of a block, keys of a tile; steps: `dq_reduction_steps` of tokamax's backward pass."""

    queries: int
    keys: int
    tile: int
    steps: int | None = None

    def __str__(self) -> str:
        return f"{self.queries} x {self.keys} / {self.tile}{', 3 parts' if self.steps else ''}"


class Splash:
    """Walks of splash attention's kernels over what a causal mask, with a window, leaves."""

    FORWARD = ("init", "whole", "partial", "end")

    def __init__(self, call: Call, sizes: Sizes) -> None:
        self.call, self.sizes = call, sizes

    @property
    def backward_regions(self) -> tuple[str, ...]:
        """Two blocks of queries or fewer are written in every step, as the kernel has it."""
        always = self.sizes.steps is None and self._counts[0] <= 2
        return ("init", "whole", "partial") + (() if always else ("write",))

    def _kind(self, i: int, j: int) -> str | None:
        """Of a block of queries and one of keys: "whole", "partial", or None where the static mask empties it."""
        q, k, window = self.sizes.queries, self.sizes.keys, self.call.window
        first_q, last_q, first_k, last_k = i * q, i * q + q - 1, j * k, j * k + k - 1
        if first_k > last_q or (window and last_k <= first_q - window):
            return None
        inside = last_k <= first_q and not (window and first_k <= last_q - window)
        return "whole" if inside else "partial"

    @property
    def _counts(self) -> tuple[int, int]:
        return self.call.length // self.sizes.queries, self.call.length // self.sizes.keys

    def forward(self, residuals: bool) -> tuple[list[Operand], Iterator[Step]]:
        q, k, row, segments = self.sizes.queries, self.sizes.keys, self.call.row, self.call.document is not None
        inputs = [Operand(q * row), Operand(k * row), Operand(k * row), Operand(q * LANES * F32)]
        if segments:
            inputs += [Operand(q * LANES * F32), Operand(SUBLANES * k * F32)]
        results = [Operand(q * row, written=True)] + [Operand(q * LANES * F32, written=True)] * residuals
        return inputs + results, self._forward(segments, residuals)

    def _forward(self, segments: bool, residuals: bool) -> Iterator[Step]:
        queries, keys = self._counts
        for n in range(self.call.heads):
            for i in range(queries):
                active = [(j, kind) for j in range(keys) if (kind := self._kind(i, j))]
                for at, (j, kind) in enumerate(active):
                    runs = {kind: None} | ({"init": None} if at == 0 else {})
                    runs |= {"end": None} if at == len(active) - 1 else {}
                    kv = n // self.call.group, j
                    yield Step(runs, ((n, i), kv, kv, i, *((i, j) if segments else ()), *[(n, i)] * (1 + residuals)))

    def backward(self) -> tuple[list[Operand], Iterator[Step]]:
        q, k, row, segments = self.sizes.queries, self.sizes.keys, self.call.row, self.call.document is not None
        per_row = Operand(SUBLANES * q * F32)
        inputs = [*[Operand(q * row)] * 2, *[per_row] * 3, Operand(k * row), Operand(k * row)]
        if segments:
            inputs += [per_row, Operand(k * LANES * F32)]
        wide = self.sizes.steps is None and self._counts[1] > 4
        part = Operand(q * row * (2 if wide else 1), written=True)
        before = [] if self.sizes.steps is None else [Operand(q * row)]
        return [*inputs, *before, part, *[Operand(k * row, written=True)] * 2], self._backward(segments)

    def _backward(self, segments: bool) -> Iterator[Step]:
        for n, i, j, kind, first, last in self._order():
            runs = {kind: None} if kind else {}
            runs |= ({"init": None} if first else {}) | ({"write": None} if last else {})
            kv, query = (n // self.call.group, j), (n, i)
            part = (n, i, j) if self.sizes.steps is None else (n, i, j % 3)
            parts = [part] * (1 if self.sizes.steps is None else 2)
            yield Step(runs, (*[query] * 4, i, kv, kv, *((i, j) if segments else ()), *parts, kv, kv))

    def _order(self) -> Iterator[tuple[int, int, int, str | None, bool, bool]]:
        """(head, block of queries, of keys, kind, whether sums start and end here)."""
        queries, keys = self._counts
        group = self.call.group
        if self.sizes.steps is None:
            for j in range(keys):
                for n in range(self.call.heads):
                    for i in range(queries):
                        first = n % group == 0 and i == 0
                        last = queries > 2 and n % group == group - 1 and i == queries - 1
                        yield n, i, j, self._kind(i, j), first, last
            return
        for n in range(self.call.heads):
            for j in range(keys):
                active = [(i, kind) for i in range(queries) if (kind := self._kind(i, j))]
                for at, (i, kind) in enumerate(active):
                    yield n, i, j, kind, at == 0, at == len(active) - 1
