"""How `tpu_flash` walks its grids: for `tpu_bound`, the steps of its kernels, by the names of a step's regions."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from benchmarks import tpu
from benchmarks.attention_cases import Case, shapes
from benchmarks.tpu_bound import Operand, Part, Step, padded
from zoo.kernels import tpu_blocks, tpu_call, tpu_flash, work_list
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
    """Walks of `tpu_flash`; spec: the kernel's static numbers for this call; d_q_size: bytes of its gradient of a q."""

    FORWARD = ("start", "whole", "masked", "strips", "finish")
    BACKWARD = ("clear", "start", "whole", "strips", "finish", "write")

    def __init__(self, case: Case, spec: Any, d_q_size: int) -> None:
        self.heads, self.group = case.batch * case.heads, case.heads // case.kv_heads
        self.row, self.d_q_row = row_bytes(case, spec.dtype.itemsize), row_bytes(case, d_q_size)
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
        results = [Operand(q * self.d_q_row, written=True), *[Operand(keys * row, written=True)] * 2]
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

    Where a backward pass takes its keys in parts, each is a Part, of which gradients of q are float32; all are walked
    with the schedule of the first.
    """
    row = replace(case, batch=1)  # All have the same mask.
    mask, parts = resolve(row.mask(), 1, case.queries, case.keys), []

    def lay_out(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
        problem = build(q, k, v, row.mask())
        for direction in PASSES[mode]:
            sizes = blocks or tpu_blocks.find(direction, problem)
            backward = direction == "backward"
            cut = tpu_flash.key_parts(problem, sizes) if backward else [slice(0, case.keys)]
            for part in cut:
                of_part = problem.replace(k=k[:, part], v=v[:, part], mask=tpu_flash.mask_of_part(problem.mask, part))
                spec = tpu_call.Call.of(of_part, sizes).spec
                walk = Flash(case, spec, F32 if len(cut) > 1 else spec.dtype.itemsize)
                parts.append(walk.part(direction, tpu_flash.mask_of_part(mask, part)))

    with tpu.meant(chip):
        jax.eval_shape(lay_out, *shapes(row, dtype)[:3])
    return parts
