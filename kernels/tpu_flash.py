"""`tpu_flash`: attention in Pallas kernels for TPUs, linear memory, what a mask empties neither loaded nor computed.

The grid runs over rows, heads and the visits of the work list; the number of visits is known at run time. What the
kernels do at a visit stands in tpu_forward and tpu_backward, how their arrays lie in tpu_layout, and what a call tells
them in tpu_call.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from zoo.kernels import (
    chunked,
    tpu_backward,
    tpu_bias,
    tpu_blocks,
    tpu_call,
    tpu_forward,
    tpu_layout,
    tpu_pair_bias,
    work_list,
)
from zoo.kernels.bias import Bias, Given
from zoo.kernels.chunked import Chunked
from zoo.kernels.engine import ByPlatform, Engine, Learned, Output
from zoo.kernels.mask import ResolvedMask, Where
from zoo.kernels.memory import platform
from zoo.kernels.problem import Problem, padded
from zoo.kernels.tpu_bias import LOG2_E
from zoo.kernels.tpu_blocks import Blocks
from zoo.kernels.tpu_call import Call
from zoo.kernels.tpu_layout import Buffers
from zoo.kernels.tpu_visit import SUBLANES, Scalars


class TpuFlash(NamedTuple):
    """The engine. forward_blocks, backward_blocks: by the table of tpu_blocks where not given."""

    forward_blocks: Blocks | None = None
    backward_blocks: Blocks | None = None
    interpret: bool = False

    def forward(self, problem: Problem) -> Output:
        blocks = self.forward_blocks or tpu_blocks.find("forward", problem)

        def run(problem: Problem) -> Output:
            return _forward(Call.of(problem, blocks), self.interpret)

        return _where_distances_are_kept(run, Chunked().forward, problem)

    def backward(self, problem: Problem, output: Output, gradient: Output) -> Learned:
        blocks = self.backward_blocks or tpu_blocks.find("backward", problem)

        def run(problem: Problem, output: Output, gradient: Output) -> Learned:
            return _backward(problem, blocks, output, gradient, self.interpret)

        return _where_distances_are_kept(run, Chunked().backward, problem, output, gradient)


def _where_distances_are_kept(kernels: Callable, chunked: Callable, problem: Problem, *rest: Output) -> Any:
    """kernels(problem, *rest); `chunked` for a bias of the distance where the caller's positions do not keep that."""
    if problem.mask.rules.consecutive or not tpu_bias.by_distance(problem):
        return kernels(problem, *rest)
    return jax.lax.cond(tpu_bias.keeps_distance(problem.mask), kernels, chunked, problem, *rest)


def supports(problem: Problem) -> str | None:
    p, shape = problem, problem.shape
    if p.q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"its arguments are {p.q.dtype}: it takes bfloat16 and float32"
    if max(shape.head_dim, p.v.shape[-1]) > 256 or shape.head_dim % 8 or p.v.shape[-1] % 8:
        return f"its head sizes are {shape.head_dim} and {p.v.shape[-1]}: it takes multiples of 8 up to 256"
    if tpu_blocks.chip() is None:
        return f"{jax.devices()[0].device_kind} is not in its table: it knows {', '.join(tpu_blocks.CHIPS)}"
    refused = tpu_pair_bias.refusal(p)
    if refused is not None:
        return refused
    if captures(p.mask.rules.where):
        return "its mask's where= uses arrays from outside: a kernel takes functions of the two positions alone"
    rows, backward = tpu_call.mask_rows(p.mask), tpu_blocks.find("backward", p)
    part = min(shape.keys, keys_of_part(p, backward))
    for blocks, keys in ((tpu_blocks.find("forward", p), shape.keys), (backward, part)):
        code = tpu_call.code_of(blocks, shape.queries, keys)
        if code.bits > 31 or rows * code.queries * code.keys > work_list.MOST_PAIRS:
            return f"{rows} rows of {shape.queries} x {shape.keys} pairs make too long a list of blocks"
    return None


def temporaries(problem: Problem) -> int:
    """Bytes: a copy of every argument and result as the kernels read it, head sizes rounded up to whole lanes.

    That is for arrays that lie as [B, L, N, H]. Where they come from, and go to, products, as in a model, the compiler
    lays most of them as they are needed; small ones it keeps in VMEM.
    """
    p, shape, lanes = problem, problem.shape, tpu_blocks.LANES
    blocks = tpu_blocks.find("backward", p)
    widths = [-(-width // lanes) * lanes * p.q.dtype.itemsize for width in (shape.head_dim, p.v.shape[-1])]
    lengths = blocks.padded(shape.queries, shape.keys)
    queries, keys = (shape.batch * n * length for n, length in zip((shape.heads, shape.kv_heads), lengths, strict=True))
    parts = len(key_parts(p, blocks))
    partial_sums = parts * queries * widths[0] * 4 // p.q.dtype.itemsize if parts > 1 else 0
    of_bias = tpu_pair_bias.bytes_of(p) * (2 if parts > 1 else 1)
    return 2 * (queries + keys) * sum(widths) + partial_sums + of_bias


def or_chunked(problem: Problem) -> Engine:
    """These kernels where a TPU is compiled for and they take the call, else `chunked`."""
    return Chunked() if supports(problem) else ByPlatform(Chunked(), tpu=TpuFlash())


def temporaries_or_chunked(problem: Problem) -> int:
    """Bytes of what `or_chunked` gives on the platform that is compiled for."""
    here = platform() == "tpu" and supports(problem) is None
    return temporaries(problem) if here else chunked.temporaries(problem)


def captures(where: Where | None) -> bool:
    """Whether a pattern closes over arrays, which a kernel cannot take."""
    if where is None:
        return False
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return bool(jax.make_jaxpr(where)(one, one).consts)


Kernel = Callable[[Scalars, dict[str, Any]], None]


def _run(call: Call, direction: str, grid: tuple, kernel: Kernel, buffers: Buffers, interpret: bool) -> Any:
    """kernel(scalars, references by name) at every point of the grid."""
    count, (inputs, outputs, scratch) = len(Scalars._fields), buffers

    def body(*references: Any) -> None:
        named = dict(zip((*inputs, *outputs, *scratch), references[count:], strict=True))
        kernel(Scalars(*references[:count]), named)

    run = pl.pallas_call(
        body,
        out_shape=[x.array for x in outputs.values()],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=count,
            grid=grid,
            in_specs=[x.spec for x in inputs.values()],
            out_specs=[x.spec for x in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=[pltpu.PARALLEL] * 2 + [pltpu.ARBITRARY] * (len(grid) - 2),
            vmem_limit_bytes=tpu_blocks.vmem(),
        ),
        name=call.name(direction),
        interpret=interpret,
    )
    return run(*call.scalars, *(x.array for x in inputs.values()))


def _forward(call: Call, interpret: bool) -> Output:
    shape = call.problem.shape

    def kernel(scalars: Scalars, named: dict[str, Any]) -> None:
        b, n, step = (pl.program_id(i) for i in range(3))
        visit = call.visit(scalars, named, b, n, step)
        visit.before(step == 0)
        tpu_forward.step(tpu_forward.Operands(**named), visit)

    grid = (shape.batch, shape.heads, call.steps)
    out, lse = _run(call, "forward", grid, kernel, _forward_buffers(call), interpret)
    return Output(tpu_layout.restored(out, shape.queries, shape.heads), lse[:, :, 0, : shape.queries])


def _forward_buffers(call: Call) -> Buffers:
    p, spec, shape, blocks = call.problem, call.spec, call.problem.shape, call.spec.blocks
    t, h, value = blocks.queries, shape.head_dim, p.v.shape[-1]

    def query(b: Any, n: Any, step: Any, *scalars: Any) -> tuple:
        return b, call.query_block(scalars, b, step), n

    def key(b: Any, n: Any, step: Any, *scalars: Any) -> tuple:
        return b, call.key_block(scalars, b, step), n // spec.group

    inputs = {
        "q": tpu_layout.heads(p.q, call.queries, t, query),
        "k": tpu_layout.heads(p.k, call.keys, blocks.keys, key),
        "v": tpu_layout.heads(p.v, call.keys, blocks.keys, key),
        **call.sides(query, key),
    }
    lse = tpu_layout.shape_like((shape.batch, shape.heads, 1, call.queries), p.q, jnp.float32)
    outputs = {
        "out": tpu_layout.result((shape.batch, call.queries, shape.heads, value), p.q, t, query),
        "lse": tpu_layout.by_row(lse, t, query),
    }
    scratch = {
        "total": pltpu.VMEM((2, SUBLANES, t), jnp.float32),
        "acc": pltpu.VMEM((2, value, t), jnp.float32),
        "reference": pltpu.VMEM((1, t), jnp.float32),
        "scaled": pltpu.VMEM((h, t) if blocks.turned else (t, h), p.q.dtype),
        "state": pltpu.SMEM((3,), jnp.int32),
    }
    return Buffers(inputs, outputs, scratch).join(call.bias_buffers(query, key, backward=False))


def _backward(problem: Problem, blocks: Blocks, output: Output, gradient: Output, interpret: bool) -> Learned:
    """Keys in as many parts as the sums of their gradients need to fit VMEM; the parts' gradients of q are added."""
    p = problem
    lse = jnp.where(output.lse == -jnp.inf, jnp.inf, output.lse) * LOG2_E
    cut = key_parts(p, blocks)
    apart = tpu_bias.apart(p.mask) if tpu_bias.by_distance(p) else None
    parts = []
    for part in cut:
        of_part = p.replace(
            k=p.k[:, part], v=p.v[:, part], mask=mask_of_part(p.mask, part), bias=_of_part(p.bias, part)
        )
        call = Call.of(of_part, blocks, None if apart is None else apart + part.start)
        dtype = p.q.dtype if len(cut) == 1 else jnp.float32
        parts.append(_backward_part(call, output.out, lse, gradient, dtype, interpret))
    d_q, d_k, d_v, d_bias = (list(x) for x in zip(*parts, strict=True))
    return Learned(
        functools.reduce(jnp.add, d_q).astype(p.q.dtype),
        jnp.concatenate(d_k, 1),
        jnp.concatenate(d_v, 1),
        _of_bias(p.bias, d_bias),
    )


def _of_part(bias: Given, part: slice) -> Given:
    """What a part of the keys has of a bias."""
    return bias[..., part] if isinstance(bias, jax.Array) and bias.shape[3] > 1 else bias


def _of_bias(bias: Given, parts: Sequence[Any]) -> Given:
    """The gradient of a bias, of those from each part of the keys."""

    def total(x: jax.Array, *d: jax.Array) -> jax.Array:
        return functools.reduce(jnp.add, d).astype(x.dtype)

    if bias is None:
        return None
    if isinstance(bias, Bias):
        return Bias(bias.function, jax.tree.map(total, bias.tables, *parts))
    return total(bias, *parts) if bias.shape[3] == 1 else jnp.concatenate(parts, 3).astype(bias.dtype)


def key_parts(problem: Problem, blocks: Blocks) -> list[slice]:
    """The parts that a backward pass takes the keys in, as even as whole blocks allow."""
    keys = problem.shape.keys
    count = -(-keys // keys_of_part(problem, blocks))
    size = -(-keys // (count * blocks.keys)) * blocks.keys
    return [slice(start, min(start + size, keys)) for start in range(0, keys, size)]


def mask_of_part(mask: ResolvedMask, part: slice) -> ResolvedMask:
    return dataclasses.replace(mask, key=mask.key.part(part.start, part.stop - part.start))


def keys_of_part(problem: Problem, blocks: Blocks) -> int:
    """Keys whose sums in float32, and gradients twice, take three quarters of VMEM; at least a block.

    A bias takes its share of that: one of the distance if it is laid out for a whole head, else a visit's blocks.
    """
    lanes, size = tpu_blocks.LANES, problem.q.dtype.itemsize
    widths = (problem.shape.head_dim, problem.v.shape[-1])
    a_key = sum(-(-width // lanes) * lanes * (4 + 2 * size) for width in widths)
    budget = tpu_blocks.vmem() * 3 // 4
    if tpu_bias.by_distance(problem):
        a_distance = 2 * tpu_bias.DISTANCE_BYTES
        a_key += a_distance
        budget = max(budget - problem.shape.queries * a_distance, budget // 3)
    elif problem.bias is not None:
        budget = max(budget - tpu_pair_bias.block_bytes(blocks), budget // 3)
    return max(1, budget // (a_key * blocks.keys)) * blocks.keys


def _backward_part(
    call: Call, out: jax.Array, lse: jax.Array, gradient: Output, d_q_dtype: Any, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
    """Gradients of q, k, v and of a bias or its tables; lse in base 2, +inf of an empty row."""
    spec, shape = call.spec, call.problem.shape

    def kernel(scalars: Scalars, named: dict[str, Any]) -> None:
        b, k, g, step = (pl.program_id(i) for i in range(4))
        last_step = pl.num_programs(3) - 1
        ends = (g == 0) & (step == 0), (g == spec.group - 1) & (step == last_step)
        visit = call.visit(scalars, named, b, k * spec.group + g, step)
        visit.before(step == 0)
        tpu_backward.step(tpu_backward.Operands(**named), visit, ends)
        visit.after(step == last_step)

    grid = (shape.batch, shape.kv_heads, spec.group, call.steps)
    buffers = _backward_buffers(call, out, lse, gradient, d_q_dtype)
    d_q, d_k, d_v, *d_bias = _run(call, "backward", grid, kernel, buffers, interpret)
    return (
        tpu_layout.restored(d_q, shape.queries, shape.heads),
        tpu_layout.restored(d_k, shape.keys, shape.kv_heads),
        tpu_layout.restored(d_v, shape.keys, shape.kv_heads),
        None if call.bias is None else call.bias.gradient(*d_bias),
    )


def _backward_buffers(call: Call, out: jax.Array, lse: jax.Array, gradient: Output, d_q_dtype: Any) -> Buffers:
    p, spec, shape, blocks = call.problem, call.spec, call.problem.shape, call.spec.blocks
    t, s, h, value = blocks.queries, call.keys, shape.head_dim, p.v.shape[-1]

    def query(b: Any, k: Any, g: Any, step: Any, *scalars: Any) -> tuple:
        return b, call.query_block(scalars, b, step), k * spec.group + g

    def key(b: Any, k: Any, g: Any, step: Any, *scalars: Any) -> tuple:
        return b, call.key_block(scalars, b, step), k

    def all_keys(b: Any, k: Any, g: Any, step: Any, *scalars: Any) -> tuple:
        return b, tpu_layout.ZERO, k

    inputs = {
        "q": tpu_layout.heads(p.q, call.queries, t, query),
        "out": tpu_layout.heads(out, call.queries, t, query),
        "d_out": tpu_layout.heads(gradient.out, call.queries, t, query),
        "rows": tpu_layout.by_row(_padded_rows(call, lse, gradient.lse), t, query),
        "k": tpu_layout.heads(p.k, s, blocks.keys, key),
        "v": tpu_layout.heads(p.v, s, blocks.keys, key),
        **call.sides(query, key),
    }
    outputs = {
        "d_q": tpu_layout.result((shape.batch, call.queries, shape.heads, h), p.q, t, query, d_q_dtype),
        "d_k": tpu_layout.result((shape.batch, s, shape.kv_heads, h), p.q, s, all_keys),
        "d_v": tpu_layout.result((shape.batch, s, shape.kv_heads, value), p.q, s, all_keys),
    }

    def kept(length: int, width: int, dtype: Any) -> Any:
        return pltpu.VMEM((width, length) if blocks.turned else (length, width), dtype)

    scratch = {
        "delta": pltpu.VMEM((1, t), jnp.float32),
        "scaled": kept(t, h, p.q.dtype),
        **({"d_out_turned": kept(t, value, p.q.dtype)} if blocks.turned else {}),
        "sum_q": kept(t, h, jnp.float32),
        "sum_k": kept(s, h, jnp.float32),
        "sum_v": kept(s, value, jnp.float32),
    }
    return Buffers(inputs, outputs, scratch).join(call.bias_buffers(query, key, backward=True))


def _padded_rows(call: Call, lse: jax.Array, d_lse: jax.Array) -> jax.Array:
    """[B, N, 2, T padded]; a query that only pads has the weights exp(x - inf)."""
    return jnp.stack([padded(lse, call.queries, axis=2, value=jnp.inf), padded(d_lse, call.queries, axis=2)], axis=2)
