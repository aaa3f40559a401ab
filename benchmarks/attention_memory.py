"""Memory of attention against length: temporaries of the compiled program, and the exponent of their growth.

    python -m benchmarks.attention_memory
    python -m benchmarks.attention_memory --compile-for v5e     (needs the extra `aot`, and no TPU)
    python -m benchmarks.attention_memory --compile-for h100    (needs the extra `aot-cuda`, and no GPU)

Forward and backward, causal, 8 heads of 64, bfloat16, for whatever `jax.default_backend()` is. The compiler's own
figure (`memory_analysis`): nothing is run, so that lengths far beyond this machine can be asked for. Temporaries do
not include arguments (q, k, v and the gradient of the output) and results (the output and three gradients).

For a TPU: 8 heads of 128, `tpu_flash` beside the splash attention that JAX ships, and arrays as each of them reads
them: [1, length, N H], and [N, length, H]. From [1, length, N, H] either needs a copy of every argument and result.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from benchmarks import cuda, tpu
from benchmarks.attention_cases import Case
from benchmarks.measure import memory
from benchmarks.splash import Sizes, jax_kernel
from zoo.kernels import AttentionError, Mask, attention

MIB = 2**20


def temporaries(impl: str, length: int, heads: int = 8, head_dim: int = 64, gpu: str | None = None) -> int:
    """Bytes of temporaries of one forward and backward pass over [1, length, heads, head_dim].

    gpu: one of cuda.TARGETS to compile for, in the place of what is there.
    """
    shape = jax.ShapeDtypeStruct((1, length, heads, head_dim), jnp.bfloat16)
    attend = partial(attention, impl=impl, partition=PartitionSpec() if gpu else None)

    def step(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> tuple[jax.Array, tuple]:
        output, pull = jax.vjp(lambda q, k, v: attend(q, k, v, Mask(causal=True)), q, k, v)
        return output, pull(gradient)

    shapes = (shape,) * 4
    program = cuda.compile_for(gpu, step, *shapes) if gpu else jax.jit(step).lower(*shapes).compile()
    size, _ = memory(program)
    if size is None:
        raise SystemExit(f"the backend {jax.default_backend()} does not say what memory a program takes: use cpu")
    return size


def tpu_temporaries(chip: str, length: int, impl: str = "tpu_flash", heads: int = 8, head_dim: int = 128) -> int:
    """Bytes of temporaries of one forward and backward pass, compiled for a TPU; impl: "tpu_flash" or "splash"."""
    run = _splash(length, heads, head_dim) if impl == "splash" else None
    shape = jax.ShapeDtypeStruct((heads, length, head_dim) if run else (1, length, heads * head_dim), jnp.bfloat16)

    def flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        split = (x.reshape(1, length, heads, head_dim) for x in (q, k, v))
        return attention(*split, Mask(causal=True), impl=impl).reshape(1, length, -1)

    def step(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> tuple[jax.Array, tuple]:
        output, pull = jax.vjp(run or flash, q, k, v)
        return output, pull(gradient)

    size, _ = memory(tpu.compile_for(chip, step, *(shape,) * 4))
    assert size is not None
    return size


def _splash(length: int, heads: int, head_dim: int) -> Callable[..., jax.Array]:
    """With separate kernels for the gradients of q and of k and v: the fused one keeps a part for each key block."""
    case, sizes = Case("causal", 1, length, length, heads, heads, head_dim, causal=True), Sizes(512, 2048, 512)
    kernel = jax_kernel(case, sizes, sizes, fused=False)
    return lambda q, k, v: kernel(q, k, v, None)


def table(lengths: Sequence[int], measures: Mapping[str, Callable[[int], int]]) -> list[str]:
    """Lines of a Markdown table, a column pair for each of the measures."""
    lines = ["| length | " + " | ".join(f"{impl}, MiB | exponent" for impl in measures) + " |"]
    lines.append("|---:" * (1 + 2 * len(measures)) + "|")
    before: dict[str, tuple[int, int]] = {}
    for length in lengths:
        cells = [str(length)]
        for impl, measure in measures.items():
            try:
                size = measure(length)
            except AttentionError:
                cells += ["over budget", ""]
                continue
            exponent = ""
            old_length, old_size = before.get(impl, (0, 0))
            if old_size and size:
                exponent = f"{math.log(size / old_size) / math.log(length / old_length):.2f}"
            before[impl] = length, size
            cells += [f"{size / MIB:.1f}", exponent]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--compile-for", choices=[*tpu.TOPOLOGIES, *cuda.TARGETS], help="what need not be there")
    given = parser.parse_args()
    chip = given.compile_for
    measures = {impl: partial(temporaries, impl) for impl in ("xla", "chunked")}
    if chip in cuda.TARGETS:
        measures = {impl: partial(temporaries, impl, gpu=chip) for impl in ("xla", "chunked")}
    elif chip:
        tpu.prepare()
        measures = {impl: partial(tpu_temporaries, chip, impl=impl) for impl in ("tpu_flash", "splash")}
    print(f"jax {jax.__version__}, {chip or jax.default_backend()}")
    for line in table(given.lengths, measures):
        print(line)


if __name__ == "__main__":
    main()
