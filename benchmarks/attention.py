"""Attention: throughput, memory and error of every implementation, over the sizes that models have.

    python -m benchmarks.attention                        all cases up to 4096 keys, on whatever JAX runs on
    python -m benchmarks.attention --cases long packed --modes both --dtypes bfloat16 --longest 32768
    python -m benchmarks.attention --implementations chunked my_package.my_module:build
    python -m benchmarks.attention --compile-for v5e      what can be known without that TPU (v5p, v6e, tpu7x, h100)
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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from benchmarks import attention_history as history
from benchmarks.attention_cases import Arrays, Case, Refused, cases, draw, error, reason
from benchmarks.attention_torch import TorchAttention
from benchmarks.measure import interleaved, memory, product_peak, setting
from benchmarks.splash import Sizes, jax_kernel
from zoo.kernels import attention
from zoo.kernels.memory import platform

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Build = Callable[[Case], Attend | TorchAttention]

MODES = ("forward", "residuals", "backward", "both")

# Largest boolean mask that jax.nn is given, in bytes: with its scores it takes four times that and more.
LARGEST_MASK = 2**28


def zoo_build(impl: str) -> Build:
    """An implementation of zoo.kernels.attention."""
    return lambda case: lambda q, k, v: attention(q, k, v, case.mask(), impl=impl)


def mask_array(case: Case) -> np.ndarray:
    """bool [1, 1, T, S]."""
    if case.queries * case.keys > LARGEST_MASK:
        raise Refused(f"its mask takes {case.queries * case.keys / 2**20:.0f} MiB as an array")
    return case.allowed(*np.ogrid[: case.queries, : case.keys])[None, None]


def jax_nn(case: Case) -> Attend:
    """jax.nn.dot_product_attention."""
    return by_flags(jax.nn.dot_product_attention, case)


def by_flags(attention: Callable[..., jax.Array], case: Case) -> Attend:
    """With jax.nn's arguments: flags where they say the mask, else the mask as an array."""
    if case.needs_array(windows=True):
        mask = mask_array(case)
        return lambda q, k, v: attention(q, k, v, mask=jnp.asarray(mask))
    window = None if case.window is None else (case.window - 1, 0)
    return lambda q, k, v: attention(q, k, v, is_causal=case.causal, local_window_size=window)


def torch_sdpa(case: Case) -> TorchAttention:
    """torch's scaled_dot_product_attention, with the mask as an array where it is not just causal."""
    try:
        return TorchAttention(case, mask_array(case) if case.needs_array(windows=False) else None)
    except ImportError:
        raise Refused("torch is not installed: pip install torch") from None


def splash(case: Case) -> Attend:
    """The attention that JAX ships for TPUs, at block sizes that are good on most of them."""
    block = next((x for x in (1024, 512, 256, 128) if case.keys % x == 0), 128)
    sizes = Sizes(block, block, block)
    document = None if case.document is None else np.arange(case.keys, dtype=np.int32) // case.document

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        kernel = jax_kernel(case, sizes, sizes)
        q, k, v = (x.swapaxes(1, 2) for x in (q * case.head_dim**-0.5, k, v))
        segments = None if document is None else (document, document)
        return jax.vmap(lambda q, k, v: kernel(q, k, v, segments))(q, k, v).swapaxes(1, 2)

    return attend


def tokamax(case: Case) -> Attend:
    """tokamax's attention, where it is installed; what it runs is its own choice."""
    if platform() != jax.default_backend():
        raise Refused("it chooses by the devices that are here")
    try:
        from absl import flags
        from tokamax import dot_product_attention
    except (ImportError, SyntaxError):  # The latter with a typeguard that is not its own.
        raise Refused("tokamax is not installed, or not with its own typeguard: see benchmarks/README.md") from None
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Else it reads the command line of this program.
    return by_flags(dot_product_attention, case)


BUILD: dict[str, Build] = {
    **{impl: zoo_build(impl) for impl in ("auto", "xla", "chunked", "cudnn", "tpu_flash")},
    "jax.nn": jax_nn,
    "splash": splash,
    "tokamax": tokamax,
    "torch": torch_sdpa,
}

DEFAULT = {
    "cpu": ("xla", "chunked", "jax.nn"),
    "gpu": ("xla", "chunked", "cudnn", "jax.nn", "tokamax"),
    "tpu": ("tpu_flash", "chunked", "jax.nn", "splash", "tokamax"),
}
"""By platform."""


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


def stage(attend: Attend, mode: str, arrays: Arrays, evaluate: Callable[..., Any]) -> tuple[Callable[..., Any], tuple]:
    """The function of a mode, and its arguments. evaluate(function, *arguments): arrays, or their shapes."""

    def with_residuals(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        return jax.vjp(attend, q, k, v)

    def both(arrays: Arrays) -> tuple:
        output, pull = with_residuals(*arrays[:3])
        return output, pull(arrays.gradient)

    def pulled(pull: Callable[..., Any], gradient: jax.Array) -> Any:
        return pull(gradient)

    if mode == "backward":
        return pulled, (evaluate(with_residuals, *arrays[:3])[1], arrays.gradient)
    return {"forward": (attend, arrays[:3]), "residuals": (with_residuals, arrays[:3]), "both": (both, (arrays,))}[mode]


def compiled(attend: Attend | TorchAttention, mode: str, arrays: Arrays) -> Program:
    """`mode` of one implementation; raises what it raises where it cannot."""
    if isinstance(attend, TorchAttention):
        return Program(*attend.run(mode, arrays), None, None, None, attend.answer)
    function, arguments = stage(attend, mode, arrays, lambda function, *arguments: jax.jit(function)(*arguments))
    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    return Program(program, arguments, seconds, *memory(program), program)


def label(case: Case, mode: str, dtype: str, implementation: str) -> dict[str, Any]:
    """What says which row one is."""
    row = {"case": case.name, "family": case.family, "length": case.keys, "mode": mode, "dtype": dtype}
    return row | {"implementation": implementation}


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
        rows[name] = label(case, mode, dtype, name)
        try:
            programs[name] = program = compiled(build(case), mode, arrays)
            wrong = error(case, arrays, program.answer) if mode == "both" else None
        except Exception as problem:  # Whatever an implementation raises is its answer.
            programs.pop(name, None)
            rows[name]["refused"] = reason(problem)
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
    chosen = [case for case in found if not families or case.family in families]
    if not chosen:
        raise SystemExit(f"no case of {', '.join(families or known)} has at most {longest} keys: raise --longest")
    return chosen


def measured(todo: Sequence[tuple[Case, str, str]], names: Sequence[str], repeats: int) -> Iterator[dict[str, Any]]:
    """Rows of the cases, each with dtype and mode, on what JAX runs on."""
    implementations = {name: implementation(name) for name in names}
    peaks = {dtype: product_peak(dtype) for dtype in {dtype: None for _, dtype, _ in todo}}
    where = setting() | {f"peak_{dtype}": peak for dtype, peak in peaks.items()}
    for case, dtype, mode in track(todo, description="attention", disable=not sys.stderr.isatty()):
        found = run_case(case, implementations, mode=mode, dtype=dtype, repeats=repeats, peak=peaks[dtype])
        yield from (where | row for row in found)


def compiled_for(todo: Sequence[tuple[Case, str, str]], names: Sequence[str], chips: Sequence[str]) -> Iterator[dict]:
    """Rows of the cases, each with dtype and mode, of what is not there."""
    from benchmarks import attention_compiled  # It imports this module.

    try:
        targets = [attention_compiled.target(name) for name in chips]
    except ValueError as problem:
        raise SystemExit(f"--compile-for {problem}") from None
    for chip in targets:
        default = [name for name in DEFAULT[attention_compiled.platform(chip)] if name != "tokamax"]
        yield from attention_compiled.rows(todo, names or default, chip)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", metavar="FAMILY", help="families of cases; default: all")
    parser.add_argument("--implementations", nargs="+", default=(), metavar="NAME", help="default: by platform")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["forward", "both"])
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--longest", type=int, default=4096, help="most keys of a case")
    parser.add_argument("--repeats", type=int, help="timed turns, after one that warms up; default: 5")
    parser.add_argument(
        "--compile-for", nargs="+", metavar="CHIP", help="compile for what is not there, and run nothing"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "attention")
    parser.add_argument("--compare", metavar="BASE", help="a history, or a commit in the one of --out")
    parser.add_argument("--fail-on-regression", action="store_true", help="exit with 1 where --compare found one")
    options = parser.parse_args()
    if options.fail_on_regression and not options.compare:
        parser.error("--fail-on-regression compares with a base: give --compare BASE")
    base = history.base(options.compare, options.out) if options.compare else []
    if options.repeats is not None and (options.compile_for or options.repeats < 1):
        parser.error(f"--repeats {options.repeats}: turns are timed from 1 on, and none with --compile-for")
    for name in options.implementations:
        implementation(name)
    cases = chosen_cases(options.cases, options.longest)
    todo = [(case, dtype, mode) for dtype in options.dtypes for case in cases for mode in options.modes]
    if options.compile_for:
        found = list(compiled_for(todo, options.implementations, options.compile_for))
    else:
        names = options.implementations or DEFAULT.get(jax.default_backend(), DEFAULT["cpu"])
        found = list(measured(todo, names, options.repeats or 5))
    history.add_growth(found)
    history.append(options.out, found)
    history.show(found)
    print(f"\nwritten to {options.out}: {', '.join(history.write_report(options.out, found))}")
    if options.compare:
        regressions = history.compare(base, found)
        if regressions and options.fail_on_regression:
            sys.exit(1)


if __name__ == "__main__":
    main()
