"""Attention: throughput, memory and error of every implementation, over the sizes that models have.

    python -m benchmarks.attention                        all cases up to 4096 keys, on whatever JAX runs on
    python -m benchmarks.attention --cases long packed --modes both --dtypes bfloat16 --longest 32768
    python -m benchmarks.attention --implementations chunked my_package.my_module:build
    python -m benchmarks.attention --compare BASE --fail-on-regression

Appends to a history (JSON lines), and writes a table as CSV, plots and a page beside it. BASE is a history, or a
commit in this one. benchmarks/README.md explains the columns, and how to add an implementation.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from benchmarks import attention_history as history
from benchmarks.attention_cases import Arrays, Case, cases, draw, error
from benchmarks.attention_torch import TorchAttention
from benchmarks.measure import interleaved, product_peak, setting
from zoo.kernels import AttentionError, attention

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Build = Callable[[Case], Attend | TorchAttention]

MODES = ("forward", "residuals", "backward", "both")

# Largest boolean mask that jax.nn is given, in bytes: with its scores it takes four times that and more.
LARGEST_MASK = 2**28


class Refused(Exception):
    """A case that an implementation cannot run; the message is the reason that its row shows."""


def zoo_build(impl: str) -> Build:
    """An implementation of zoo.kernels.attention."""
    return lambda case: lambda q, k, v: attention(q, k, v, case.mask(), impl=impl)


def jax_nn(case: Case) -> Attend:
    """jax.nn.dot_product_attention: causal attention where that is all, else the mask as an array."""
    if case.queries == case.keys and case.document is None:
        window = None if case.window is None else (case.window - 1, 0)
        return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=case.causal, local_window_size=window)
    if case.queries * case.keys > LARGEST_MASK:
        raise Refused(f"its mask takes {case.queries * case.keys / 2**20:.0f} MiB as an array")
    mask = case.allowed(*np.ogrid[: case.queries, : case.keys])[None, None]
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask))


def torch_sdpa(case: Case) -> TorchAttention:
    """torch's scaled_dot_product_attention, with the mask as an array where it is not just causal."""
    if case.queries * case.keys > LARGEST_MASK and (case.window or case.document):
        raise Refused(f"its mask takes {case.queries * case.keys / 2**20:.0f} MiB as an array")
    try:
        return TorchAttention(case)
    except ImportError:
        raise Refused("torch is not installed: pip install torch") from None


BUILD: dict[str, Build] = {
    "xla": zoo_build("xla"),
    "chunked": zoo_build("chunked"),
    "jax.nn": jax_nn,
    "torch": torch_sdpa,
}

DEFAULT = ("xla", "chunked", "jax.nn")


@dataclass(frozen=True)
class Program:
    """A program with its arguments, and what compiling told. answer(arrays): output and gradients, in mode "both"."""

    function: Callable[..., Any]
    arguments: tuple
    compile_seconds: float | None
    temporaries: int | None
    memory: int | None
    answer: Callable[..., Any]

    def run(self) -> Any:
        return self.function(*self.arguments)


def compiled(attend: Attend | TorchAttention, mode: str, arrays: Arrays) -> Program:
    """`mode` of one implementation; raises what it raises where it cannot."""
    if isinstance(attend, TorchAttention):
        return Program(*attend.run(mode, arrays), None, None, None, attend.answer)

    def with_residuals(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        return jax.vjp(attend, q, k, v)

    def both(arrays: Arrays) -> tuple:
        output, pull = with_residuals(*arrays[:3])
        return output, pull(arrays.gradient)

    function, arguments = {
        "forward": lambda: (attend, arrays[:3]),
        "residuals": lambda: (with_residuals, arrays[:3]),
        "backward": lambda: (
            lambda pull, gradient: pull(gradient),
            (jax.jit(with_residuals)(*arrays[:3])[1], arrays.gradient),
        ),
        "both": lambda: (both, (arrays,)),
    }[mode]()
    start = time.perf_counter()
    program = jax.jit(cast(Any, function)).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    temporaries = None if memory is None else memory.temp_size_in_bytes
    sizes = () if memory is None else (memory.argument_size_in_bytes, memory.output_size_in_bytes, temporaries)
    return Program(program, arguments, seconds, temporaries, sum(sizes) if sizes else None, program)


def run_case(
    case: Case,
    implementations: dict[str, Build],
    *,
    mode: str = "both",
    dtype: str = "bfloat16",
    repeats: int = 5,
    peak: float | None = None,
) -> list[dict[str, Any]]:
    """One row for each implementation, whose runs take turns; one that cannot run says why in `refused`.

    peak: FLOP/s of a matrix product, which `of_peak` is the share of. For use from code of your own as well.
    """
    arrays = draw(case, dtype)
    rows: dict[str, dict[str, Any]] = {}
    programs: dict[str, Program] = {}
    for name, build in implementations.items():
        rows[name] = {"case": case.name, "family": case.family, "length": case.keys, "mode": mode, "dtype": dtype}
        rows[name]["implementation"] = name
        try:
            programs[name] = program = compiled(build(case), mode, arrays)
            wrong = error(case, arrays, program.answer) if mode == "both" else None
        except (Refused, AttentionError, NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as problem:
            programs.pop(name, None)
            rows[name]["refused"] = str(problem).splitlines()[0]
            continue
        rows[name] |= {
            "compile_seconds": program.compile_seconds,
            "temporaries": program.temporaries,
            "memory": program.memory,
            "error": wrong,
        }
    flops = case.flops(mode)
    for name, times in interleaved({name: program.run for name, program in programs.items()}, repeats).items():
        rate = flops / times.wall
        rows[name] |= {"wall": times.wall, "cpu": times.cpu, "flops_per_second": rate}
        rows[name]["of_peak"] = None if peak is None else rate / peak
    return list(rows.values())


def implementation(name: str) -> Build:
    """One of BUILD, or `module:function`, a function of a Case that gives attend(q, k, v) or raises Refused."""
    if name in BUILD:
        return BUILD[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise SystemExit(f"implementation {name!r} is unknown: choose {', '.join(BUILD)}, or give module:function")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as problem:
        raise SystemExit(f"implementation {name!r} cannot be imported ({problem})") from None


def chosen_cases(families: Sequence[str] | None, longest: int) -> list[Case]:
    found = cases(longest)
    known = {case.family for case in cases(2**30)}
    for family in families or ():
        if family not in known:
            raise SystemExit(f"case {family!r} is unknown: choose among {', '.join(sorted(known))}")
    return [case for case in found if not families or case.family in families]


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    implementations = {name: implementation(name) for name in options.implementations}
    todo = [
        (case, dtype, mode)
        for dtype in options.dtypes
        for case in chosen_cases(options.cases, options.longest)
        for mode in options.modes
    ]
    peaks = {dtype: product_peak(dtype) for dtype in options.dtypes}
    where = setting() | {f"peak_{dtype}": peak for dtype, peak in peaks.items()}
    for case, dtype, mode in track(todo, description="attention", disable=not sys.stderr.isatty()):
        found = run_case(case, implementations, mode=mode, dtype=dtype, repeats=options.repeats, peak=peaks[dtype])
        yield from (where | row for row in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", metavar="FAMILY", help="families of cases; default: all")
    parser.add_argument("--implementations", nargs="+", default=DEFAULT, metavar="NAME")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["forward", "both"])
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--longest", type=int, default=4096, help="most keys of a case")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns, after one that warms up")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "attention")
    parser.add_argument("--compare", metavar="BASE", help="a history, or a commit in the one of --out")
    parser.add_argument("--fail-on-regression", action="store_true", help="exit with 1 where --compare found one")
    options = parser.parse_args()
    if options.fail_on_regression and not options.compare:
        parser.error("--fail-on-regression compares with a base: give --compare BASE")
    base = history.base(options.compare, options.out) if options.compare else []
    found = list(rows(options))
    history.append(options.out, found)
    history.show(found)
    print(f"\nwritten to {options.out}: {', '.join(history.write_report(options.out, found))}")
    if options.compare:
        regressions = history.compare(base, found)
        if regressions and options.fail_on_regression:
            sys.exit(1)


if __name__ == "__main__":
    main()
