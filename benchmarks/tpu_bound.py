"""A lower bound of a Pallas call's time on a TPU: its static schedule walked with real trip counts, and what it moves.

Per grid step it is the larger of the bundles that the step runs and of the bytes that are copied meanwhile, at the
chip's published bandwidth; the first step's copies come before it and the last step's after. Kernels around the call
count with the compiler's own estimate. Stalls are in none of this: it is a bound to compare kernels by, not a time.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.tpu import Program, Region

MACS = {"v4": 65536, "v5e": 65536, "v5p": 65536, "v6e": 262144, "v7x": 262144}
"""Multiply-adds of a core in a cycle: four units of 128 x 128, and from v6e on as much as four of 256 x 256."""


class Core(NamedTuple):
    """Of one core: cycles in a second, and of its share of the chip's memory bytes in a cycle, and bytes."""

    clock: float
    bandwidth: float
    memory: int

    @classmethod
    def of(cls, chip: str) -> "Core":
        """By the FLOP/s and bandwidth that jax knows of the chip."""
        from jax.experimental.pallas import tpu as pltpu

        version = pltpu.ChipVersion({"v7x": "7x"}.get(chip, chip))
        known = pltpu.get_tpu_info_for_chip(version, 1)
        clock = known.bf16_ops_per_second / (2 * MACS[chip])
        return cls(clock, known.mem_bw_bytes_per_second / clock, known.hbm_capacity_bytes)


class Step(NamedTuple):
    """One step of a grid: how often each region runs, and which block of each operand it is at.

    runs: by a region's name, the counts of `Region.bundles`, or None.
    """

    runs: Mapping[str, Sequence[int] | None]
    blocks: tuple[Any, ...]


class Operand(NamedTuple):
    """bytes: of a block. A block is read, or written, when the next step is at another one."""

    bytes: int
    written: bool = False


class Part(NamedTuple):
    """One Pallas call of a program: part of its name, the regions of a step, what is copied, and its walk.

    area: pairs of a query and a key in a block.
    """

    name: str
    regions: Sequence[str]
    area: int
    operands: Sequence[Operand]
    steps: Iterator[Step]

    def program(self, programs: Sequence[Program]) -> Program:
        found = [one for one in programs if self.name in one.name]
        if not found:
            raise ValueError(f"no kernel among {', '.join(one.name for one in programs)} is {self.name}")
        return found[0]


class Bound(NamedTuple):
    """Seconds on one core: of the Pallas calls, and of what is around them."""

    kernels: float
    around: float

    @property
    def total(self) -> float:
        return self.kernels + self.around


def bound(parts: Sequence[Part], programs: Sequence[Program], compiled_text: str, chip: str) -> Bound:
    """programs: of the compiled program, which have every part among them. ValueError: where they do not fit."""
    core, kernels = Core.of(chip), 0.0
    for part in parts:
        kernels += cycles(part.program(programs), part.regions, part.operands, part.steps, core)
    return Bound(kernels / core.clock, around(compiled_text) / core.clock)


def cycles(
    program: Program,
    names: Sequence[str],
    operands: Sequence[Operand],
    steps: Iterable[Step],
    core: Core,
) -> float:
    """names: of the regions of a grid step, in the order in which they stand. ValueError: where they do not fit."""
    loop, step_body = _grid(program.body)
    # A result that the compiler keeps in VMEM is copied there, after the rest.
    parts, copies = step_body.parts[: len(names)], step_body.parts[len(names) :]
    if len(parts) != len(names) or any(part.matmuls for part in copies):
        raise ValueError(f"{program.name} has {len(step_body.parts)} regions in a step, not {', '.join(names)}")
    regions = dict(zip(names, parts, strict=True))
    fixed = program.body.end - program.body.start - (loop.end - loop.start)
    always = loop.own + (step_body.own if step_body is not loop else 0)
    total, before, written = float(fixed), None, 0.0
    pending = 0.0
    for step in steps:
        changed = [before is None or old != new for old, new in zip(before or step.blocks, step.blocks, strict=True)]
        read = sum(x.bytes for x, new in zip(operands, changed, strict=True) if new and not x.written)
        done = (
            0 if before is None else sum(x.bytes for x, new in zip(operands, changed, strict=True) if new and x.written)
        )
        # This step's blocks were copied while the step before ran, and the results of that one leave during this one.
        total += max(pending, (read + written) / core.bandwidth)
        pending = always + sum(regions[name].bundles(counts) for name, counts in step.runs.items())
        pending += sum(part.bundles() for part in copies) if done else 0
        before, written = step.blocks, float(done)
    last = sum(x.bytes for x in operands if x.written)
    return total + max(pending, written / core.bandwidth) + last / core.bandwidth


def _grid(body: Region) -> tuple[Region, Region]:
    """The loop over the grid, and the region within it that a step runs: its copies stand outside."""
    loop = max((x for x in body.all() if x.loop), key=lambda x: x.end - x.start)
    inner = max(loop.parts, key=lambda x: x.matmuls)
    return (loop, inner) if any(part.matmuls for part in inner.parts) else (loop, loop)


_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')


def around(compiled_text: str) -> float:
    """Cycles of everything but Pallas calls in a compiled program, by the compiler's own estimates."""
    entry = compiled_text[compiled_text.index("\nENTRY ") :]
    if " while(" in entry:
        raise ValueError("the program has a loop outside of its kernels: its turns are not known")
    return float(sum(int(found) for found in _ESTIMATE.findall(entry)))


def padded(width: int) -> int:
    """Lanes that a row of this many values takes."""
    return -(-width // 128) * 128
