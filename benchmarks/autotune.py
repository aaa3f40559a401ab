"""Block sizes for the TPU kernels: by the clock where there is a TPU, else by the modelled bound.

    python -m benchmarks.autotune --out blocks.json                        on a TPU VM
    python -m benchmarks.autotune --compile-for v5e --out blocks.json      anywhere (needs the extra `aot`)
    FLAXZOO_BLOCKS=blocks.json zoo train ...

Causal attention of 4 heads. Of each pass, head size and length all candidates are tried beside the blocks of now, and
the best are written as `kernels/tpu_blocks.py` reads them. A bound is no time: it knows of no stalls.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from benchmarks import tpu, tpu_bound
from benchmarks.attention_cases import Case, draw, shapes
from benchmarks.attention_compiled import target
from benchmarks.measure import interleaved
from benchmarks.tpu_walks import flash_parts
from zoo.kernels import tpu_blocks
from zoo.kernels.engine import Output
from zoo.kernels.problem import build
from zoo.kernels.tpu_blocks import Blocks, Entry
from zoo.kernels.tpu_flash import TpuFlash

HEADS = 4
DIRECTIONS = ("forward", "backward")


class Setting(NamedTuple):
    """What has blocks of its own."""

    direction: str
    head_dim: int
    length: int
    dtype: str

    @property
    def case(self) -> Case:
        return Case("tune", 1, self.length, self.length, HEADS, HEADS, self.head_dim, causal=True)


def candidates(direction: str, length: int) -> list[Blocks]:
    """What the schedules tell apart: larger blocks wait less for memory, larger tiles spill more."""
    sizes = itertools.product((256, 512, 1024), (512, 1024, 2048), (256, 512, 1024), (512, 1024), (False, True))
    found = [Blocks(*one) for one in sizes]
    most = 2**21 if direction == "forward" else 2**20
    return [
        blocks
        for blocks in found
        if blocks.rows in (blocks.queries, 512, 256 if direction == "backward" else 512)
        and blocks.rows <= blocks.queries
        and blocks.step <= blocks.keys
        and max(blocks.queries, blocks.keys) <= length
        and blocks.queries * blocks.keys <= most
    ]


def present(setting: Setting, chip: str) -> Blocks:
    """The blocks of now."""
    return tpu_blocks.chosen(setting.direction, chip, setting.head_dim, setting.length, setting.dtype)


def call(setting: Setting, blocks: Blocks, interpret: bool = False) -> Callable[..., Any]:
    """A pass at these blocks: of q, k, v; backward also of the output, its log-sum-exp and its gradient."""
    mask = setting.case.mask()

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return TpuFlash(forward_blocks=blocks, interpret=interpret).forward(build(q, k, v, mask))

    def backward(q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, lse: jax.Array, d_out: jax.Array) -> Any:
        engine = TpuFlash(backward_blocks=blocks, interpret=interpret)
        return engine.backward(build(q, k, v, mask), Output(out, lse), Output(d_out, jnp.zeros_like(lse)))

    return forward if setting.direction == "forward" else backward


def measured(setting: Setting, tried: list[Blocks], repeats: int, interpret: bool = False) -> dict[Blocks, float]:
    """Seconds, medians of turns; what does not compile is left out."""
    q, k, v, gradient = draw(setting.case, setting.dtype)
    arguments: tuple = (q, k, v)
    if setting.direction == "backward":
        out, lse = jax.jit(call(setting._replace(direction="forward"), tried[0], interpret))(q, k, v)
        arguments = (q, k, v, out, lse, gradient)
    runs = {}
    for blocks in tried:
        try:
            program = jax.jit(call(setting, blocks, interpret)).lower(*arguments).compile()
        except jax.errors.JaxRuntimeError:
            continue
        runs[blocks] = lambda program=program: program(*arguments)
    return {blocks: times.wall for blocks, times in interleaved(runs, repeats).items()}


def bound(setting: Setting, blocks: Blocks, chip: str) -> float | None:
    """Seconds, or None where it does not compile; in a process that has compiled for no TPU yet."""
    q, k, v, gradient = shapes(setting.case, setting.dtype)
    lse = jax.ShapeDtypeStruct((1, HEADS, setting.length), jnp.float32)
    arguments = (q, k, v) if setting.direction == "forward" else (q, k, v, q, lse, gradient)
    with tempfile.TemporaryDirectory() as folder:
        tpu.prepare(Path(folder))
        try:
            compiled = tpu.compile_for(chip, call(setting, blocks), *arguments)
            parts = flash_parts(setting.case, setting.dtype, chip, setting.direction, blocks)
        except (jax.errors.JaxRuntimeError, ValueError):
            return None
        return tpu_bound.bound(parts, tpu.programs(Path(folder)), compiled.as_text(), chip).kernels


def entries(best: Mapping[Setting, Blocks], chip: str) -> list[Entry]:
    """In the order in which they are tried; the longest length and the largest head stand for all beyond."""
    found = []
    for setting, blocks in sorted(best.items()):
        alike = [x for x in best if (x.direction, x.dtype) == (setting.direction, setting.dtype)]
        longest = setting.length == max(x.length for x in alike)
        largest = setting.head_dim == max(x.head_dim for x in alike)
        limits = (None if largest else setting.head_dim, None if longest else setting.length)
        found.append(Entry(setting.direction, *blocks, chip, setting.dtype, *limits))
    return found


def results(settings: list[Setting], chip: str, compile_for: bool, repeats: int) -> Iterator[dict[Blocks, float]]:
    """Seconds of every candidate, for each setting."""
    tried = {one: list(dict.fromkeys([present(one, chip), *candidates(one.direction, one.length)])) for one in settings}
    if not compile_for:
        for setting in track(settings, description="measuring"):
            yield measured(setting, tried[setting], repeats)
        return
    todo = [(setting, blocks, chip) for setting in settings for blocks in tried[setting]]
    found = tpu.in_processes(bound, todo, share=1)
    for setting in settings:
        seconds = {blocks: found[setting, blocks, chip] for blocks in tried[setting]}
        yield {blocks: x for blocks, x in seconds.items() if x is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-for", metavar="CHIP", help="by the modelled bound: v4, v5e, v5p, v6e, v7x")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16"])
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    parser.add_argument("--repeats", type=int, default=5, help="timed turns, after one that warms up")
    parser.add_argument("--out", type=Path, required=True, help="a new JSON file, for FLAXZOO_BLOCKS")
    given = parser.parse_args()
    if given.out.exists():
        parser.error(f"--out {given.out} is there already: name a new file")
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
    for setting, seconds in zip(settings, results(settings, chip, given.compile_for, given.repeats), strict=True):
        now = present(setting, chip)
        best[setting] = min(seconds, key=lambda blocks: seconds[blocks])
        before = seconds.get(now, np.nan)
        figures = f"{1e6 * seconds[best[setting]]:.0f} | {shown(now)} | {1e6 * before:.0f}"
        ratio = seconds[best[setting]] / before
        print(f"| {' | '.join(map(str, setting))} | {shown(best[setting])} | {figures} | {ratio:.2f} |")
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
