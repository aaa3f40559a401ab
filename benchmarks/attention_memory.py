"""Memory of attention against length: temporaries of the compiled program, and the exponent of their growth.

    python -m benchmarks.attention_memory
    python -m benchmarks.attention_memory --compile-for v5e --head-dim 128     (needs the extra `aot`, and no TPU)

Forward and backward, causal, 8 heads, bfloat16, for whatever `jax.default_backend()` is. The compiler's own figure
(`memory_analysis`): nothing is run, so that lengths far beyond this machine can be asked for. Temporaries do not
include arguments (q, k, v and the gradient of the output) and results (the output and three gradients).
"""

import argparse
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from benchmarks import tpu
from zoo.kernels import AttentionError, Mask, attention

MIB = 2**20


def temporaries(impl: str, length: int, heads: int = 8, head_dim: int = 64, chip: str | None = None) -> int:
    """Bytes of temporaries of one forward and backward pass over [1, length, heads, head_dim]; chip: a TPU's name."""
    shape = jax.ShapeDtypeStruct((1, length, heads, head_dim), jnp.bfloat16)

    def step(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> tuple[jax.Array, tuple]:
        output, pull = jax.vjp(lambda q, k, v: attention(q, k, v, Mask(causal=True), impl=impl), q, k, v)
        return output, pull(gradient)

    shapes = (shape,) * 4
    compiled = tpu.compile_for(chip, step, *shapes) if chip else jax.jit(step).lower(*shapes).compile()
    memory = compiled.memory_analysis()
    if memory is None:
        raise SystemExit(f"the backend {jax.default_backend()} does not say what memory a program takes: use cpu")
    return memory.temp_size_in_bytes


def table(lengths: Sequence[int], head_dim: int, chip: str | None) -> list[str]:
    """Lines of a Markdown table, a column pair for each implementation."""
    impls = ("xla", "chunked", "tpu_flash") if chip else ("xla", "chunked")
    lines = ["| length | " + " | ".join(f"{impl}, MiB | exponent" for impl in impls) + " |"]
    lines.append("|---:" * (1 + 2 * len(impls)) + "|")
    before: dict[str, tuple[int, int]] = {}
    for length in lengths:
        cells = [str(length)]
        for impl in impls:
            try:
                size = temporaries(impl, length, head_dim=head_dim, chip=chip)
            except AttentionError:
                cells += ["over budget", ""]
                continue
            exponent = ""
            if impl in before:
                old_length, old_size = before[impl]
                exponent = f"{math.log(size / old_size) / math.log(length / old_length):.2f}"
            before[impl] = length, size
            cells += [f"{size / MIB:.1f}", exponent]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--compile-for", choices=tpu.TOPOLOGIES, help="a TPU that need not be there")
    given = parser.parse_args()
    if given.compile_for:
        tpu.prepare()
    print(f"jax {jax.__version__}, {given.compile_for or jax.default_backend()}, 8 heads of {given.head_dim}")
    for line in table(given.lengths, given.head_dim, given.compile_for):
        print(line)


if __name__ == "__main__":
    main()
