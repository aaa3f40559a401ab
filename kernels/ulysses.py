"""`ulysses`: attention over a length that is cut over mesh axes, by exchanging the cut of the length for one of heads.

DeepSpeed-Ulysses (Jacobs et al. 2023, https://arxiv.org/abs/2309.14509): one all-to-all gives every device all
positions of some of the heads, which it attends with as if nothing were cut, and a second one gives the output back.
It moves less than a ring does, in one piece that no computation hides, and takes no more devices than there are heads.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from zoo.kernels import engine, ring, tpu_flash
from zoo.kernels.mask import Side
from zoo.kernels.problem import AttentionOutput, Problem, keeps_groups


def supports(problem: Problem) -> str | None:
    refusal = ring.supports(problem)
    if refusal is not None:
        return refusal
    n, shape = jax.lax.axis_size(problem.length_axes), problem.shape
    if shape.heads % n:
        return f"a device's {shape.heads} query heads do not divide over the {n} parts of the length: use impl='ring'"
    if not keeps_groups(shape.heads, shape.kv_heads, n):
        return f"{shape.heads} query heads in {shape.kv_heads} groups do not divide over {n} parts: use impl='ring'"
    return None


def temporaries(problem: Problem) -> int:
    """Bytes: q, k and v as exchanged, and the attention of whole lengths over some of the heads."""
    p, n = problem, jax.lax.axis_size(problem.length_axes)

    def whole(x: jax.Array) -> jax.ShapeDtypeStruct:
        rows, length, heads, width = x.shape
        return jax.ShapeDtypeStruct((rows, length * n, max(1, heads // n), width), x.dtype)

    laid = p.replace(q=whole(p.q), k=whole(p.k), v=whole(p.v))
    exchanged = p.q.dtype.itemsize * (laid.q.size + laid.k.size + laid.v.size)
    return exchanged + tpu_flash.temporaries_or_chunked(laid)


def attend(problem: Problem) -> AttentionOutput:
    """Exact, differentiable once, in reverse; inside shard_map over problem.length_axes, in contiguous parts."""
    p, axes, n = problem, problem.length_axes, jax.lax.axis_size(problem.length_axes)
    per_device = p.shape.heads // n
    to_heads = partial(jax.lax.all_to_all, axis_name=axes, split_axis=2, concat_axis=1, tiled=True)
    to_length = partial(jax.lax.all_to_all, axis_name=axes, split_axis=1, concat_axis=2, tiled=True)
    k, v = p.k, p.v
    if p.shape.kv_heads % n:
        # Several devices share a key/value head: each is sent the one that its query heads belong to.
        own = jnp.arange(n) * p.shape.kv_heads // n
        k, v = k[:, :, own], v[:, :, own]

    def whole(side: Side) -> Side:
        return jax.tree.map(lambda x: jax.lax.all_gather(x, axes, axis=x.ndim - 1, tiled=True), side)

    laid = p.replace(
        q=to_heads(p.q),
        k=to_heads(k),
        v=to_heads(v),
        mask=dataclasses.replace(p.mask, query=whole(p.mask.query), key=whole(p.mask.key)),
        heads=jax.lax.dynamic_slice_in_dim(p.heads, jax.lax.axis_index(axes) * per_device, per_device),
    )
    output, lse = engine.attend(tpu_flash.or_chunked(laid), laid)
    return AttentionOutput(to_length(output), to_length(lse))
