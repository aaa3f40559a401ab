"""Memory of `impl="ring"` on TPU slices that are not there, by length and number of chips.

    python -m benchmarks.ring_memory

Forward and backward, causal, one row of 8 heads of 128 in bfloat16, its length cut over all chips of a v5e slice. The
compiler's own figures (`memory_analysis`) for one chip: nothing is run. Needs the package libtpu and no TPU. Arguments
are q, k, v and the gradient of the output; results are the output and three gradients, as large again.
"""

import argparse
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks import tpu

MIB = 2**20

SLICES = {8: "v5e:2x4", 256: "v5e:16x16"}
"""Topologies by their number of chips."""


class Memory(NamedTuple):
    """Bytes of one chip."""

    arguments: int
    results: int
    temporaries: int


def compiled(length: int, chips: int, heads: int = 8, head_dim: int = 128) -> Any:
    """The program of one forward and backward pass over [1, length, heads, head_dim]."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from zoo import sharding
    from zoo.kernels import Mask, attention

    devices = topologies.get_topology_desc(platform="tpu", topology_name=SLICES[chips]).devices
    mesh = sharding.make_mesh({"sequence": chips}, devices)
    attend = functools.partial(attention, mask=Mask(causal=True), impl="ring")

    def step(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> tuple[jax.Array, tuple]:
        output, pull = jax.vjp(attend, q, k, v)
        return output, pull(gradient)

    place = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    shape = jax.ShapeDtypeStruct((1, length, heads, head_dim), jnp.bfloat16, sharding=place)
    with sharding.use(mesh):
        return jax.jit(step, out_shardings=place).lower(shape, shape, shape, shape).compile()


def memory(program: Any) -> Memory:
    found = program.memory_analysis()
    return Memory(found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes)


def table(lengths: Sequence[int], slices: Sequence[int]) -> Iterator[str]:
    """Lines of a Markdown table, MiB a chip."""
    yield from ("| length | chips | arguments, MiB | results, MiB | temporaries, MiB |", "|---:" * 5 + "|")
    for chips in slices:
        for length in lengths:
            sizes = " | ".join(f"{size / MIB:.1f}" for size in memory(compiled(length, chips)))
            yield f"| {length} | {chips} | {sizes} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(17, 21)])
    parser.add_argument("--chips", type=int, nargs="+", default=list(SLICES), choices=list(SLICES))
    chosen = parser.parse_args()
    tpu.prepare()
    for line in table(chosen.lengths, chosen.chips):
        print(line, flush=True)


if __name__ == "__main__":
    main()
