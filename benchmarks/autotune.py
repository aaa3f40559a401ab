"""Block sizes for the TPU kernels: by the clock where there is a TPU, else by the modelled bound.

    python -m benchmarks.autotune --out blocks.json                        on a TPU VM
    python -m benchmarks.autotune --compile-for v5e --out blocks.json      anywhere (needs the extra `aot`)
    FLAXZOO_BLOCKS=blocks.json zoo train ...

Causal attention of 4 heads, in as many rows as make 32768 positions. Of each pass, head size and length some 40
candidates are tried beside the blocks of now, which stay where they are within 3 % of the best; `kernels/tpu_blocks.py`
reads what is written. Offline each candidate is a process of some seconds. A bound is no time.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from benchmarks import tpu, tpu_bound
from benchmarks.attention_cases import Case, draw, reason, shapes
from benchmarks.attention_compiled import target
from benchmarks.measure import interleaved
from benchmarks.tpu_walks import flash_parts
from zoo.kernels import tpu_blocks
from zoo.kernels.engine import Output
from zoo.kernels.problem import build
from zoo.kernels.tpu_blocks import Blocks, Entry
from zoo.kernels.tpu_flash import TpuFlash

HEADS, POSITIONS = 4, 32768
DIRECTIONS = ("forward", "backward")

WORTH = 0.97
"""Share of the time of now that a candidate has to be within to take its place."""


class Setting(NamedTuple):
    """What has blocks of its own; length: of queries and of keys."""

    direction: str
    head_dim: int
    length: int
    dtype: str

    @property
    def case(self) -> Case:
        rows = max(1, POSITIONS // self.length)
        return Case("tune", rows, self.length, self.length, HEADS, HEADS, self.head_dim, causal=True)


def candidates(direction: str, length: int) -> list[Blocks]:
    """Cut to the length. Larger blocks wait less for memory, and larger tiles spill more."""
    sizes = itertools.product((256, 512, 1024), (512, 1024, 2048), (256, 512, 1024), (512, 1024), (False, True))
    found = [Blocks(*one) for one in sizes]
    most = 2**21 if direction == "forward" else 2**20
    rows = (512,) if direction == "forward" else (256, 512)
    whole = [
        tpu_blocks.cut(blocks, length, length)
        for blocks in found
        if blocks.rows in (blocks.queries, *rows) and blocks.rows <= blocks.queries
        if blocks.step <= blocks.keys and blocks.queries * blocks.keys <= most
    ]
    return list(dict.fromkeys(whole))


def present(setting: Setting, chip: str) -> Blocks:
    """The blocks of now."""
    blocks = tpu_blocks.chosen(setting.direction, chip, setting.head_dim, setting.length, setting.dtype)
    return tpu_blocks.cut(blocks, setting.length, setting.length)


def call(setting: Setting, blocks: Blocks | None, interpret: bool = False) -> Callable[..., Any]:
    """A pass at these blocks, or at those of now: of q, k, v; backward also of output, log-sum-exp and gradient."""
    mask = setting.case.mask()

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return TpuFlash(forward_blocks=blocks, interpret=interpret).forward(build(q, k, v, mask))

    def backward(q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, lse: jax.Array, d_out: jax.Array) -> Any:
        engine = TpuFlash(backward_blocks=blocks, interpret=interpret)
        return engine.backward(build(q, k, v, mask), Output(out, lse), Output(d_out, jnp.zeros_like(lse)))

    return forward if setting.direction == "forward" else backward


Found = dict[Blocks, float | str]
"""Seconds of a pass at each of the blocks, or why there are none."""


def measured(setting: Setting, tried: list[Blocks], repeats: int, interpret: bool = False) -> Found:
    """By the clock, medians of turns."""
    q, k, v, gradient = draw(setting.case, setting.dtype)
    arguments: tuple = (q, k, v)
    if setting.direction == "backward":
        out, lse = jax.jit(call(setting._replace(direction="forward"), None, interpret))(q, k, v)
        arguments = (q, k, v, out, lse, gradient)
    runs, refused = {}, {}
    for blocks in tried:
        try:
            program = jax.jit(call(setting, blocks, interpret)).lower(*arguments).compile()
        except Exception as problem:  # Whatever a compiler raises is its answer.
            refused[blocks] = reason(problem)
            continue
        runs[blocks] = lambda program=program: program(*arguments)
    return refused | {blocks: times.wall for blocks, times in interleaved(runs, repeats).items()}


def bound(setting: Setting, blocks: Blocks, chip: str) -> float | str:
    """Modelled seconds, or why there are none; in a process new to TPUs."""
    q, k, v, gradient = shapes(setting.case, setting.dtype)
    lse = jax.ShapeDtypeStruct((setting.case.batch, HEADS, setting.length), jnp.float32)
    arguments = (q, k, v) if setting.direction == "forward" else (q, k, v, q, lse, gradient)
    with tempfile.TemporaryDirectory() as folder:
        tpu.prepare(Path(folder))
        try:
            parts = flash_parts(setting.case, setting.dtype, chip, setting.direction, blocks)
            compiled = tpu.compile_for(chip, call(setting, blocks), *arguments)
            return tpu_bound.bound(parts, tpu.programs(Path(folder)), compiled.as_text(), chip).kernels
        except Exception as problem:  # Whatever a compiler raises is its answer.
            return reason(problem)


def best_of(found: Found, now: Blocks) -> Blocks | None:
    """None where there are no seconds at all."""
    seconds = {blocks: x for blocks, x in found.items() if not isinstance(x, str)}
    if not seconds:
        return None
    best = min(seconds, key=lambda blocks: seconds[blocks])
    return best if now not in seconds or seconds[best] < WORTH * seconds[now] else now


def entries(best: Mapping[Setting, Blocks], chip: str) -> list[Entry]:
    """In the order in which they are tried; the longest length stands for all beyond."""
    found = []
    for setting, blocks in sorted(best.items()):
        alike = [x for x in best if x._replace(length=0) == setting._replace(length=0)]
        longest = setting.length == max(x.length for x in alike)
        limit = None if longest else setting.length
        found.append(Entry(setting.direction, *blocks, chip, setting.dtype, setting.head_dim, limit))
    return found


def results(settings: list[Setting], chip: str, compile_for: bool, repeats: int) -> Iterator[Found]:
    """Of every candidate, for each setting."""
    tried = {one: list(dict.fromkeys([present(one, chip), *candidates(one.direction, one.length)])) for one in settings}
    if not compile_for:
        for setting in track(settings, description="measuring"):
            yield measured(setting, tried[setting], repeats)
        return
    todo = [(setting, blocks, chip) for setting in settings for blocks in tried[setting]]
    found = tpu.in_processes(bound, todo, share=1)
    for setting in settings:
        yield {blocks: found[setting, blocks, chip] for blocks in tried[setting]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-for", metavar="CHIP", help="by the modelled bound: v4, v5e, v5p, v6e, v7x")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16"])
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    parser.add_argument("--repeats", type=int, help="timed turns, after one that warms up; default: 5")
    parser.add_argument("--out", type=Path, required=True, help="a new JSON file, for FLAXZOO_BLOCKS")
    given = parser.parse_args()
    if given.out.exists() or not given.out.parent.is_dir():
        parser.error(f"--out {given.out}: name a new file, in a folder that is there")
    if given.repeats is not None and (given.compile_for or given.repeats < 1):
        parser.error(f"--repeats {given.repeats}: turns are timed from 1 on, and none with --compile-for")
    if wrong := [x for x in given.head_dims if x % 8 or not 0 < x <= 256]:
        parser.error(f"--head-dims {wrong[0]}: the kernels take multiples of 8 up to 256")
    if wrong := [x for x in given.lengths if x < 512]:
        parser.error(f"--lengths {wrong[0]}: from 512 on there is a choice of blocks")
    chip = _chip(parser, given.compile_for)
    lists = given.directions, sorted(given.head_dims), sorted(given.lengths), given.dtypes
    settings = [Setting(*one) for one in itertools.product(*lists)]
    best: dict[Setting, Blocks] = {}
    print(f"{chip}, {'modelled bound, nothing was run' if given.compile_for else 'measured'}")
    print("| pass | head size | length | dtype | blocks | us | blocks of now | us | ratio |")
    print("|---|---:|---:|---|---|---:|---|---:|---:|")
    measures = results(settings, chip, bool(given.compile_for), given.repeats or 5)
    for setting, seconds in zip(settings, measures, strict=True):
        now = present(setting, chip)
        found = best_of(seconds, now)
        cells = [*map(str, setting), f"none: {seconds[now]}", "", shown(now), "", ""]
        if found is not None:
            best[setting] = found
            least, before = (np.nan if isinstance(x, str) else x for x in (seconds[found], seconds[now]))
            cells[4:] = shown(found), f"{1e6 * least:.0f}", shown(now), f"{1e6 * before:.0f}", f"{least / before:.2f}"
        print(f"| {' | '.join(cells)} |")
    if not best:
        sys.exit("nothing is written: the blocks of now stay")
    given.out.write_text(json.dumps([one._asdict() for one in entries(best, chip)], indent=1) + "\n")
    print(f"written to {given.out}: FLAXZOO_BLOCKS={given.out}")


def _chip(parser: argparse.ArgumentParser, name: str | None) -> str:
    if name is None:
        if jax.default_backend() != "tpu":
            parser.error("there is no TPU here: give --compile-for CHIP, to choose by the modelled bound")
        chip = tpu_blocks.chip()
        return chip or parser.error(f"{jax.devices()[0].device_kind} is not known: {', '.join(tpu_blocks.CHIPS)} are")
    try:
        chip = target(name)
    except ValueError as problem:
        parser.error(f"--compile-for {problem}")
    return (
        chip if chip in tpu.TOPOLOGIES else parser.error(f"--compile-for {name}: the blocks are those of TPU kernels")
    )


def shown(blocks: Blocks) -> str:
    """As schedules name them: queries x keys / a tile."""
    tile = f"{blocks.rows} x {blocks.step}" if blocks.rows != blocks.queries else blocks.step
    return f"{blocks.queries} x {blocks.keys} / {tile}{', turned' if blocks.turned else ''}"


if __name__ == "__main__":
    main()
