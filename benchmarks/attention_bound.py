"""Modelled lower bounds of whole attention calls on TPUs that are not there, beside the splash attention of others.

    pip install -e ".[aot]"                                   and tokamax, as benchmarks/README.md says
    python -m benchmarks.attention_bound --chips v5e v6e
    python -m benchmarks.attention_bound --peer splash        JAX's, for which tokamax is not needed

One row of causal attention in bfloat16, arrays as each kernel reads them; `both` is forward and backward. A bound is
made of static schedules walked with real trip counts, of bytes at the published bandwidth, and of the kernels around
(`benchmarks/tpu_bound.py`). Of a peer the least over block sizes that were tried, which of this project are those of
its table. Nothing was run on a TPU.
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import tpu, tpu_bound
from benchmarks.attention_cases import Case, reason
from benchmarks.splash import JaxSplash, Kernel, Sizes, Splash, jax_kernel, tokamax_kernel
from benchmarks.tpu_bound import Bound, Part
from benchmarks.tpu_walks import flash_parts
from zoo.kernels import Mask, attention

CALLS = {
    "causal 4096": Case("causal", 1, 4096, 4096, 8, 8, 128, causal=True),
    "causal 32768": Case("causal", 1, 32768, 32768, 8, 8, 128, causal=True),
    "packed 16384, documents of 1024": Case("packed", 1, 16384, 16384, 8, 8, 128, causal=True, document=1024),
    "window 1024 of 16384": Case("window", 1, 16384, 16384, 8, 8, 128, causal=True, window=1024),
    "grouped 32:8, 4096": Case("grouped", 1, 4096, 4096, 32, 8, 128, causal=True),
    "head size 64, 4096": Case("head 64", 1, 4096, 4096, 16, 16, 64, causal=True),
    "head size 256, 4096": Case("head 256", 1, 4096, 4096, 4, 4, 256, causal=True),
}

TRIED = {
    ("tokamax", "forward"): [
        (Sizes(512, 512, 512),),
        (Sizes(512, 1024, 512),),
        (Sizes(1024, 1024, 512),),
        (Sizes(2048, 2048, 512),),
    ],
    ("tokamax", "both"): [
        (Sizes(1024, 1024, 512), Sizes(512, 512, 512)),
        (Sizes(1024, 1024, 512), Sizes(1024, 1024, 512)),
        (Sizes(1024, 1024, 512), Sizes(2048, 2048, 512)),
        (Sizes(1024, 1024, 512), Sizes(1024, 1024, 512, 3)),
        (Sizes(1024, 1024, 512), Sizes(2048, 2048, 512, 3)),
    ],
    ("splash", "forward"): [(Sizes(512, 512, 512),), (Sizes(512, 2048, 512),), (Sizes(1024, 1024, 1024),)],
    ("splash", "both"): [
        (Sizes(512, 2048, 512), Sizes(512, 512, 512)),
        (Sizes(512, 2048, 512), Sizes(1024, 1024, 1024)),
        (Sizes(512, 2048, 512), Sizes(512, 2048, 512)),
    ],
}
"""Block sizes of the peers: forward, and of the backward pass where there is one."""


class Plan(NamedTuple):
    """What is compiled, and its Pallas calls."""

    function: Callable[..., Any]
    shapes: list
    parts: list[Part]


def flash(call: Case, chip: str, mode: str) -> Plan:
    """This project's kernels, at the block sizes that they choose; documents are known when the program runs."""

    def joined(x: Any) -> Any:
        """[B, L, N, H] as the kernel reads it."""
        return x.reshape(*x.shape[:2], -1) if call.head_dim % 128 == 0 else x.swapaxes(1, 2)

    def split(x: Any) -> Any:
        return x.reshape(*x.shape[:2], -1, call.head_dim) if call.head_dim % 128 == 0 else x.swapaxes(1, 2)

    def run(segments: Any, q: Any, k: Any, v: Any) -> Any:
        mask = Mask(causal=True, window=call.window, segments=segments)
        return joined(attention(split(q), split(k), split(v), mask, impl="tpu_flash"))

    q, kv = (jax.ShapeDtypeStruct((1, call.keys, n, call.head_dim), jnp.bfloat16) for n in (call.heads, call.kv_heads))
    segments = None if call.document is None else jax.ShapeDtypeStruct((1, call.keys), jnp.int32)
    arrays = [segments, *(jax.eval_shape(joined, x) for x in (q, kv, kv))]
    return Plan(_both(run) if mode == "both" else run, arrays, flash_parts(call, "bfloat16", chip, mode))


def tokamax(call: Case, chip: str, mode: str, forward: Sizes, backward: Sizes | None = None) -> Plan:
    """tokamax's splash attention, at these block sizes."""
    return _splash(Splash, tokamax_kernel(call, forward, backward), call, forward, backward)


def splash(call: Case, chip: str, mode: str, forward: Sizes, backward: Sizes | None = None) -> Plan:
    """The splash attention that JAX ships, at these block sizes, with its fused backward pass."""
    return _splash(JaxSplash, jax_kernel(call, forward, backward), call, forward, backward)


def _splash(walk: type[Splash], kernel: Kernel, call: Case, forward: Sizes, backward: Sizes | None) -> Plan:
    def run(segments: Any, q: Any, k: Any, v: Any) -> Any:
        return kernel(q, k, v, None if segments is None else (segments, segments))

    operands, steps = walk(call, forward).forward(residuals=backward is not None)
    parts = [Part("fwd", walk.FORWARD, forward.area, operands, steps)]
    if backward is not None:
        back = walk(call, backward)
        parts.append(Part("dkv", back.backward_regions, backward.area, *back.backward()))
    return Plan(run if backward is None else _both(run), _by_head(call), parts)


def _by_head(call: Case) -> list:
    """Shapes of segments, q, k and v, as splash attention reads them."""
    q, kv = (jax.ShapeDtypeStruct((n, call.keys, call.head_dim), jnp.bfloat16) for n in (call.heads, call.kv_heads))
    return [None if call.document is None else jax.ShapeDtypeStruct((call.keys,), jnp.int32), q, kv, kv]


def _both(run: Callable[..., Any]) -> Callable[..., Any]:
    def step(segments: Any, q: Any, k: Any, v: Any) -> Any:
        output, pull = jax.vjp(lambda q, k, v: run(segments, q, k, v), q, k, v)
        return output, pull(q)

    return step


BUILD: dict[str, Callable[..., Plan]] = {"flaxzoo": flash, "tokamax": tokamax, "splash": splash}


def bound(implementation: str, call: Case, chip: str, mode: str, *sizes: Sizes) -> Bound | str:
    """Of one call, or why it does not compile; in a process that has compiled for no TPU yet."""
    with tempfile.TemporaryDirectory() as folder:
        tpu.prepare(Path(folder))
        try:
            plan = BUILD[implementation](call, chip, mode, *sizes)
            compiled = tpu.compile_for(chip, plan.function, *plan.shapes, row_major=True)
        except Exception as problem:
            return reason(problem)
        return tpu_bound.bound(plan.parts, tpu.programs(Path(folder)), compiled.as_text(), chip)


def cases(peer: str, chip: str, mode: str, call: Case) -> list[tuple]:
    """Arguments of `bound` for this project and for all that is tried of a peer."""
    return [("flaxzoo", call, chip, mode), *((peer, call, chip, mode, *sizes) for sizes in TRIED[peer, mode])]


def row(peer: str, chip: str, mode: str, name: str, found: dict[tuple, Bound | str]) -> str:
    todo = cases(peer, chip, mode, CALLS[name])
    ours, *theirs = (found[case] for case in todo)
    bounds = [(one, case[-1]) for one, case in zip(theirs, todo[1:], strict=True)]
    compiled = [(one.total, one, sizes) for one, sizes in bounds if isinstance(one, Bound)]
    cells = [chip, mode, name]
    cells += [f"{1e6 * x:.0f}" for x in (ours.kernels, ours.around)] if isinstance(ours, Bound) else [ours, ""]
    if not compiled:
        return f"| {' | '.join([*cells, str(bounds[0][0]), '', '', ''])} |"
    total, best, sizes = min(compiled, key=lambda one: one[0])
    cells += [f"{1e6 * x:.0f}" for x in (best.kernels, best.around)]
    cells += [str(sizes), f"{ours.total / total:.2f}" if isinstance(ours, Bound) else ""]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="tokamax", choices=("tokamax", "splash"))
    parser.add_argument("--chips", nargs="+", default=["v5e", "v5p", "v6e"], choices=tpu_bound.MACS)
    parser.add_argument("--modes", nargs="+", default=["forward", "both"], choices=("forward", "both"))
    parser.add_argument("--calls", nargs="+", default=CALLS, choices=CALLS, metavar="NAME", help=f"of {list(CALLS)}")
    given = parser.parse_args()
    wanted = [(given.peer, *one) for one in itertools.product(given.chips, given.modes, given.calls)]
    todo = [case for peer, chip, mode, name in wanted for case in cases(peer, chip, mode, CALLS[name])]
    found = tpu.in_processes(bound, todo, share=1)
    print(
        f"| chip | mode | call | kernels, us | around | {given.peer}'s kernels | around | its blocks | ratio of both |"
    )
    print("|---|---|---|---:|---:|---:|---:|---|---:|")
    for one in wanted:
        print(row(*one, found))


if __name__ == "__main__":
    main()
