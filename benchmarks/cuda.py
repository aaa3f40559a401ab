"""Compiling for NVIDIA GPUs that are not there. Needs the extra `aot-cuda`, and neither a GPU nor its driver.

A GPU is known to the compiler by its description in gpu_targets/. What does not fit its memory is no error: compare
`memory_analysis()` with the card. cuDNN's calls compile where jax.nn finds cuDNN (the package nvidia-cudnn-cu12), but
nothing asks cuDNN whether it takes them, or what space it works in.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TARGETS = {path.stem: path for path in sorted((Path(__file__).parent / "gpu_targets").glob("*.txtpb"))}
"""Descriptions by the name of the GPU."""


def mesh_of(gpu: str) -> Mesh:
    """One GPU."""
    target = TARGETS[gpu].read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    return topologies.make_mesh(topology, (1,), ("one",))


def compile_for(gpu: str, function: Callable[..., Any], *shapes: Any) -> Any:
    """The compiled program of one GPU for arguments of these shapes."""
    mesh = mesh_of(gpu)
    place = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*placed).compile()
