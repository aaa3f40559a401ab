"""Modelled lower bounds of whole attention calls on TPUs that are not there, beside tokamax's splash attention.

    pip install -e ".[aot]"
    pip install --no-deps tokamax==0.0.12 qwix einshape typeguard==2.13.3
    pip install jaxtyping pydantic immutabledict
    python -m benchmarks.attention_bound --chips v5e v6e

One row of causal attention in bfloat16, arrays as each kernel reads them; `both` is forward and backward. A bound is
made of static schedules walked with real trip counts, of bytes at the published bandwidth, and of the kernels around
(`benchmarks/tpu_bound.py`). Of tokamax the least over block sizes that were tried, which of this project are those of
its table. Nothing was run on a TPU.
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import tpu, tpu_bound
from benchmarks.tpu_bound import Operand, Step
from benchmarks.tpu_walks import Call, Flash, Sizes, Splash

CALLS = [
    Call("causal 4096", 4096, 8, 8, 128),
    Call("causal 32768", 32768, 8, 8, 128),
    Call("packed 16384, documents of 1024", 16384, 8, 8, 128, document=1024),
    Call("window 1024 of 16384", 16384, 8, 8, 128, window=1024),
    Call("grouped 32:8, 4096", 4096, 32, 8, 128),
    Call("head size 64, 4096", 4096, 16, 16, 64),
    Call("head size 256, 4096", 4096, 4, 4, 256),
]

FORWARD_SIZES = [Sizes(512, 512, 512), Sizes(512, 1024, 512), Sizes(1024, 1024, 512), Sizes(2048, 2048, 512)]
BACKWARD_SIZES = [
    Sizes(512, 512, 512),
    Sizes(1024, 1024, 512),
    Sizes(2048, 2048, 512),
    Sizes(1024, 1024, 512, 3),
    Sizes(2048, 2048, 512, 3),
]


class Plan(NamedTuple):
    """What is compiled, and of each of its Pallas calls part of the name, the regions of a step and the walk."""

    function: Callable[..., Any]
    shapes: list
    parts: list[tuple[str, Sequence[str], tuple[list[Operand], Iterator[Step]]]]


class Bound(NamedTuple):
    """Seconds on one core: of the Pallas calls, and of what is around them."""

    kernels: float
    around: float

    @property
    def total(self) -> float:
        return self.kernels + self.around


def flash(call: Call, chip: str, mode: str) -> Plan:
    """This project's kernels, at the block sizes that they choose."""
    import jax
    import jax.numpy as jnp

    from zoo.kernels import Mask, attention, tpu_blocks, tpu_layout
    from zoo.kernels.mask import resolve
    from zoo.kernels.problem import build

    def joined(x: Any) -> Any:
        """[B, L, N, H] as the kernel reads it."""
        return x.reshape(*x.shape[:2], -1) if call.head_dim % 128 == 0 else x.swapaxes(1, 2)

    def split(x: Any) -> Any:
        return x.reshape(*x.shape[:2], -1, call.head_dim) if call.head_dim % 128 == 0 else x.swapaxes(1, 2)

    def mask(segments: Any) -> Mask:
        return Mask(causal=True, window=call.window, segments=segments)

    def run(segments: Any, q: Any, k: Any, v: Any) -> Any:
        return joined(attention(split(q), split(k), split(v), mask(segments), impl="tpu_flash"))

    q, kv = (
        jax.ShapeDtypeStruct((1, call.length, n, call.head_dim), jnp.bfloat16) for n in (call.heads, call.kv_heads)
    )
    segments = None if call.document is None else jax.ShapeDtypeStruct((1, call.length), jnp.int32)
    known = None if call.document is None else 1 + jnp.arange(call.length)[None] // call.document
    resolved = resolve(mask(known), 1, call.length, call.length)
    walks: dict[str, Flash] = {}

    def find(q: Any, k: Any, v: Any) -> None:
        for direction in ("forward", "backward"):
            problem = build(q, k, v, mask(known))
            laid_out = tpu_layout.Call.of(problem, tpu_blocks.find(direction, problem))
            walks[direction] = Flash(call, laid_out.spec)

    with tpu.meant(chip):
        jax.eval_shape(find, q, kv, kv)
    shapes = [segments, *(jax.eval_shape(joined, x) for x in (q, kv, kv))]
    parts = [("flash_forward", Flash.FORWARD, walks["forward"].forward(resolved))]
    if mode == "both":
        parts.append(("flash_backward", Flash.BACKWARD, walks["backward"].backward(resolved)))
    return Plan(_both(run) if mode == "both" else run, shapes, parts)


def tokamax(call: Call, chip: str, mode: str, forward: Sizes, backward: Sizes | None = None) -> Plan:
    """tokamax's splash attention, at these block sizes."""
    import jax
    import jax.numpy as jnp
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as splash
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    sizes = {"block_q": forward.queries, "block_kv": forward.keys, "block_kv_compute": forward.tile}
    if backward is not None:
        sizes |= {"block_q_dkv": backward.queries, "block_kv_dkv": backward.keys, "block_kv_dkv_compute": backward.tile}
        sizes |= {"dq_reduction_steps": backward.steps}
    square = (call.length, call.length)
    mask = masks.LocalMask(square, (call.window - 1, 0), 0) if call.window else masks.CausalMask(square)
    config = splash.SplashConfig(**sizes, use_experimental_scheduler=True)
    kernel = splash.make_splash_mha_single_device(mask, config=config)

    def run(segments: Any, q: Any, k: Any, v: Any) -> Any:
        return kernel(q, k, v, None if segments is None else splash.SegmentIds(segments, segments))

    q, kv = (jax.ShapeDtypeStruct((n, call.length, call.head_dim), jnp.bfloat16) for n in (call.heads, call.kv_heads))
    segments = None if call.document is None else jax.ShapeDtypeStruct((call.length,), jnp.int32)
    parts = [("fwd", Splash.FORWARD, Splash(call, forward).forward(residuals=backward is not None))]
    if backward is not None:
        walk = Splash(call, backward)
        parts.append(("dkv", walk.backward_regions, walk.backward()))
    return Plan(_both(run) if mode == "both" else run, [segments, q, kv, kv], parts)


def _both(run: Callable[..., Any]) -> Callable[..., Any]:
    def step(segments: Any, q: Any, k: Any, v: Any) -> Any:
        import jax

        output, pull = jax.vjp(lambda q, k, v: run(segments, q, k, v), q, k, v)
        return output, pull(q)

    return step


BUILD: dict[str, Callable[..., Plan]] = {"flaxzoo": flash, "tokamax": tokamax}


def bound(implementation: str, call: Call, chip: str, mode: str, *sizes: Sizes) -> Bound | str:
    """Of one call, or why it does not compile; in a process that has not imported jax yet."""
    with tempfile.TemporaryDirectory() as folder:
        tpu.prepare(Path(folder))
        try:
            plan = BUILD[implementation](call, chip, mode, *sizes)
            compiled = tpu.compile_for(chip, plan.function, *plan.shapes, row_major=True)
        except Exception as problem:
            return str(problem).splitlines()[0]
        programs = tpu.programs(Path(folder))
    core, kernels = tpu_bound.Core.of(chip), 0.0
    for name, regions, (operands, steps) in plan.parts:
        program = next(one for one in programs if name in one.name)
        kernels += tpu_bound.cycles(program, regions, operands, steps, core)
    return Bound(kernels / core.clock, tpu_bound.around(compiled.as_text()) / core.clock)


def cases(chip: str, mode: str, call: Call) -> list[tuple]:
    """Arguments of `bound` for this project and for all that is tried of tokamax."""
    sizes: list[tuple] = [(one,) for one in FORWARD_SIZES]
    if mode == "both":
        sizes = [(FORWARD_SIZES[2], one) for one in BACKWARD_SIZES]
    return [("flaxzoo", call, chip, mode), *(("tokamax", call, chip, mode, *one) for one in sizes)]


def row(chip: str, mode: str, call: Call, found: dict[tuple, Bound | str]) -> str:
    ours, *theirs = (found[case] for case in cases(chip, mode, call))
    bounds = [(one, case[-1]) for one, case in zip(theirs, cases(chip, mode, call)[1:], strict=True)]
    compiled = [(one.total, one, sizes) for one, sizes in bounds if isinstance(one, Bound)]
    cells = [chip, mode, call.name]
    cells += [f"{1e6 * x:.0f}" for x in (ours.kernels, ours.around)] if isinstance(ours, Bound) else [ours, ""]
    if not compiled:
        return f"| {' | '.join([*cells, str(bounds[0][0]), '', '', ''])} |"
    total, best, sizes = min(compiled, key=lambda one: one[0])
    cells += [f"{1e6 * x:.0f}" for x in (best.kernels, best.around)]
    cells += [str(sizes), f"{ours.total / total:.2f}" if isinstance(ours, Bound) else ""]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=["v5e", "v5p", "v6e"], choices=tpu_bound.MACS)
    parser.add_argument("--modes", nargs="+", default=["forward", "both"], choices=("forward", "both"))
    parser.add_argument("--calls", nargs="+", type=int, default=range(len(CALLS)), help="which of them, from 0")
    given = parser.parse_args()
    wanted = list(itertools.product(given.chips, given.modes, (CALLS[i] for i in given.calls)))
    found = tpu.in_processes(bound, [case for one in wanted for case in cases(*one)], share=1)
    print("| chip | mode | call | kernels, us | around | tokamax's kernels | around | its blocks | ratio of both |")
    print("|---|---|---|---:|---:|---:|---:|---|---:|")
    for one in wanted:
        print(row(*one, found))


if __name__ == "__main__":
    main()
