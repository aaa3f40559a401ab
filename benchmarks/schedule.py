"""Static schedules of attention kernels on TPUs that are not there: bundles per 512 x 512 scores of an interior block.

    pip install -e ".[aot]" && python -m benchmarks.schedule

Causal, head size 128, bfloat16; the kernels of this project beside splash attention, which JAX ships, at block sizes
that are good for each. The bias is a function of key - query, where ALiBi, T5's buckets and all others make one kernel;
that of pairs is an array. A bundle is what a core does in a cycle if nothing stalls: the figures rank inner loops on
one chip. Neither copies between memories nor stalls are in them, and nothing was run.

The floor is what the matrix unit's issue slots allow for the products alone, each in the cheapest of the forms tried.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import tpu

UNIT = 512 * 512
LENGTH, HEADS, HEAD_DIM = 16384, 2, 128


class Figures(NamedTuple):
    """blocks: queries x keys / keys of a tile. bundles and spills: per 512 x 512 scores. matmul: occupancy."""

    blocks: str
    bundles: float
    matmul: float
    spills: float


def _problem(bounded: bool = False, bias: str | None = None) -> Any:
    """bias: "distance", "pairs" or None."""
    import jax
    import jax.numpy as jnp

    from zoo.kernels import Bias, Mask
    from zoo.kernels.problem import build

    shape = jax.ShapeDtypeStruct((1, LENGTH, HEADS, HEAD_DIM), jnp.bfloat16)
    options: dict[str, Any] = {"logits_bound": 20.0} if bounded else {}
    if bias == "distance":
        slopes = jnp.full((HEADS,), 0.1)
        options["bias"] = Bias(lambda slopes, head, query, key: slopes[head] * (key - query), slopes)

    def problem(q: Any, k: Any, v: Any) -> Any:
        if bias != "pairs":
            return build(q, k, v, Mask(causal=True), **options)
        of_pairs = jnp.broadcast_to(q[:, None, :, :1, 0], (1, 1, LENGTH, LENGTH))
        return build(q, k, v, Mask(causal=True), bias=of_pairs)

    return shape, problem


def _flash_forward(chip: str, bounded: bool = False, bias: str | None = None) -> tuple[str, int]:
    from zoo.kernels import tpu_blocks
    from zoo.kernels.tpu_flash import TpuFlash

    shape, build = _problem(bounded, bias)
    tpu.compile_for(chip, lambda q, k, v: TpuFlash().forward(build(q, k, v)), shape, shape, shape)
    return _blocks(tpu_blocks.chosen("forward", chip, HEAD_DIM, LENGTH))


def _flash_backward(chip: str, bias: str | None = None) -> tuple[str, int]:
    import jax
    import jax.numpy as jnp

    from zoo.kernels import tpu_blocks
    from zoo.kernels.engine import Output
    from zoo.kernels.tpu_flash import TpuFlash

    shape, build = _problem(bias=bias)
    lse = jax.ShapeDtypeStruct((1, HEADS, LENGTH), jnp.float32)

    def run(q: Any, k: Any, v: Any, out: Any, lse: Any, d_out: Any) -> Any:
        return TpuFlash().backward(build(q, k, v), Output(out, lse), Output(d_out, jnp.zeros_like(lse)))

    tpu.compile_for(chip, run, shape, shape, shape, shape, lse, shape)
    return _blocks(tpu_blocks.chosen("backward", chip, HEAD_DIM, LENGTH))


def _blocks(blocks: Any) -> tuple[str, int]:
    return f"{blocks.queries} x {blocks.keys} / {blocks.step}", blocks.queries * blocks.keys


def _splash(chip: str, backward: bool) -> tuple[str, int]:
    import jax
    import jax.numpy as jnp

    from benchmarks.attention_cases import Case
    from benchmarks.splash import Sizes, jax_kernel

    if chip in ("v6e", "v7x"):
        sizes = Sizes(1024, 1024, 1024) if backward else Sizes(1024, 2048, 1024)
    else:
        sizes = Sizes(512, 512, 512) if backward else Sizes(512, 2048, 512)
    case = Case("causal", 1, LENGTH, LENGTH, HEADS, HEADS, HEAD_DIM, causal=True)
    kernel = jax_kernel(case, sizes, sizes if backward else None)
    shape = jax.ShapeDtypeStruct((HEADS, LENGTH, HEAD_DIM), jnp.bfloat16)

    def run(q: Any, k: Any, v: Any) -> Any:
        if not backward:
            return kernel(q, k, v, None)
        return jax.vjp(lambda q, k, v: kernel(q, k, v, None), q, k, v)[1](q)

    tpu.compile_for(chip, run, shape, shape, shape)
    return str(sizes), sizes.area


KERNELS: dict[tuple[str, str], tuple[Callable[[str], tuple[str, int]], str]] = {
    ("flaxzoo", "forward"): (_flash_forward, "flash_forward"),
    ("splash", "forward"): (functools.partial(_splash, backward=False), "splash"),
    ("flaxzoo", "forward, logits bounded"): (functools.partial(_flash_forward, bounded=True), "flash_forward"),
    ("flaxzoo", "forward, bias"): (functools.partial(_flash_forward, bias="distance"), "flash_forward"),
    ("flaxzoo", "forward, bias of pairs"): (functools.partial(_flash_forward, bias="pairs"), "flash_forward"),
    ("flaxzoo", "backward"): (_flash_backward, "flash_backward"),
    ("flaxzoo", "backward, bias"): (functools.partial(_flash_backward, bias="distance"), "flash_backward"),
    ("flaxzoo", "backward, bias of pairs"): (functools.partial(_flash_backward, bias="pairs"), "flash_backward"),
    ("splash", "backward"): (functools.partial(_splash, backward=True), "dkv"),
}


def measure(implementation: str, which: str, chip: str) -> Figures:
    """In a process that has not imported jax yet."""
    with tempfile.TemporaryDirectory() as folder:
        tpu.prepare(Path(folder))
        compile_kernel, name = KERNELS[implementation, which]
        blocks, area = compile_kernel(chip)
        inner = max((one.inner for one in tpu.programs(Path(folder), name)), key=lambda x: x.matmuls)
    return Figures(blocks, inner.own * UNIT / area, inner.matmul, inner.spills * UNIT / area)


def floor(chip: str) -> dict[str, float]:
    """Bundles of the products alone, per 512 x 512 scores: two forward, five backward."""
    with tempfile.TemporaryDirectory() as folder:
        tpu.prepare(Path(folder))
        _compile_products(chip, scores=1024, queries=512)
        slots = {one.name: one.inner.matmul * one.inner.own for one in tpu.programs(Path(folder))}
    scores, values = (
        min(each for name, each in slots.items() if name.startswith(kind)) * UNIT / (1024 * 512)
        for kind in ("scores", "values")
    )
    forward, backward = scores + values, 2 * scores + 3 * values
    return {which: forward if which.startswith("forward") else backward for _, which in KERNELS}


def _compile_products(chip: str, scores: int, queries: int) -> None:
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    s, t, h = scores, queries, HEAD_DIM
    forms = {
        "scores_nn": ((1, 0), (s, h), (h, t)),
        "scores_nt": ((1, 1), (s, h), (t, h)),
        "values_nn": ((1, 0), (s, t), (t, h)),
        "values_nt": ((1, 1), (h, t), (s, t)),
        "values_turned": ((1, 0), (h, s), (s, t)),
    }
    for dtype in (jnp.bfloat16, jnp.float32):
        for name, (over, *sizes) in forms.items():
            left, right = (jax.ShapeDtypeStruct(size, dtype) for size in sizes)
            out = jax.ShapeDtypeStruct((left.shape[1 - over[0]], right.shape[1 - over[1]]), jnp.float32)
            dims = (((over[0],), (over[1],)), ((), ()))

            def kernel(x: Any, y: Any, z: Any, dims: Any = dims) -> None:
                z[...] = jax.lax.dot_general(x[...], y[...], dims, preferred_element_type=jnp.float32)

            product = pl.pallas_call(kernel, out_shape=out, name=f"{name}_{jnp.dtype(dtype).name}")
            tpu.compile_for(chip, product, left, right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=["v5e", "v5p", "v6e"], choices=tpu.TOPOLOGIES)
    chips = parser.parse_args().chips
    figures = tpu.in_processes(measure, [(*kernel, chip) for chip in chips for kernel in KERNELS], share=1)
    least = tpu.in_processes(floor, [(chip,) for chip in chips], share=1)
    print("| chip | kernel | | blocks | bundles | floor | above it | matrix unit | spills |")
    print("|---|---|---|---|---:|---:|---:|---:|---:|")
    for (implementation, which, chip), one in figures.items():
        lowest = least[chip,][which]
        print(
            f"| {chip} | {which} | {implementation} | {one.blocks} | {one.bundles:.0f} | {lowest:.0f} | "
            f"{one.bundles / lowest - 1:.0%} | {one.matmul:.0%} | {one.spills:.0f} |"
        )


if __name__ == "__main__":
    main()
