"""What is held in memory, and as what: bits of half-precision arrays, what a backward pass keeps, what is given back.

XLA's CPU compiler knows 16-bit floats in products alone. Any other operation reads and writes them as float32, so that
cutting one layer out of a stack, or writing it there, converts the stack. Integers it moves as they are.
"""

import ctypes
import gc
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def platform() -> str:
    """What is compiled for, as far as a process knows: by the mesh that is set, else by its own devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def give_back() -> None:
    """What tracing left behind in cycles is freed, and what is free goes to the system; glibc keeps it for itself."""
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def loop_options(target: str) -> dict[str, str] | None:
    """Compiler options of a program whose loop is most of it: on CPUs, nothing that its steps share is made before it.

    target: the platform that is compiled for. XLA would convert the weights of all layers to bfloat16 ahead of their
    loop, and hand the keys of a source to each step of a decoder in an order that the step has to turn.
    """
    return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"} if target == "cpu" else None


def to_bits(x: jax.Array) -> jax.Array:
    """A 16-bit float as uint16; anything else as it is."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def from_bits(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The inverse of `to_bits`."""
    return jax.lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x


def materialized(x: jax.Array) -> jax.Array:
    """`x`, written once and not made again inside each reader; on accelerators the compiler chooses for itself.

    XLA's CPU compiler repeats elementwise work in every loop that reads it, one by one where the loop transposes. It
    drops barriers before it fuses loops; a branch, whose condition a barrier has hidden until then, stays.
    """

    def on_cpu(x: jax.Array) -> jax.Array:
        unknown = jax.lax.optimization_barrier(jnp.bool_(True))
        return jax.lax.cond(unknown, lambda x: x, jax.lax.optimization_barrier, x)

    return jax.lax.platform_dependent(x, cpu=on_cpu, default=lambda x: x)


@jax.custom_vjp
def gradient_materialized(x: jax.Array) -> jax.Array:
    """`x`, whose gradient is `materialized`."""
    return x


gradient_materialized.defvjp(lambda x: (x, None), lambda _, dy: (materialized(dy),))


def awaiting(x: jax.Array, cause: jax.Array) -> jax.Array:
    """`x`, written once, and on a single CPU not before `cause` is; on accelerators the compiler chooses.

    What depends on parameters alone, XLA's CPU compiler makes when a program begins, and holds until it is read. On a
    mesh nothing waits: one number of what is sharded would have to be sent to all.
    """
    if jax.sharding.get_abstract_mesh().size > 1 or not cause.size:
        return materialized(x)

    def on_cpu(x: jax.Array, cause: jax.Array) -> jax.Array:
        known = jax.lax.optimization_barrier(cause[(0,) * cause.ndim])
        return jax.lax.cond(known == known, lambda x: x, jax.lax.optimization_barrier, x)

    return jax.lax.platform_dependent(x, cause, cpu=on_cpu, default=lambda x, _: x)


def recomputed(f: Callable[..., jax.Array], told: Any, *arguments: Any) -> jax.Array:
    """`f(told, *arguments)`, of which the backward pass keeps the arguments alone, and computes the rest again.

    As jax.checkpoint has it, which XLA's CPU compiler undoes: outside of loops it merges what is computed twice. Here
    the second time awaits the gradient, by `told`, a tree of arrays: what depends on it is what is not kept. On
    accelerators the compiler chooses.
    """
    return cast(jax.Array, _recomputed(f, told, *arguments))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recomputed(f: Callable[..., jax.Array], *arguments: Any) -> jax.Array:
    return f(*arguments)


def _recomputed_forward(f: Callable[..., jax.Array], *arguments: Any) -> tuple[jax.Array, tuple]:
    return f(*arguments), arguments


def _recomputed_backward(f: Callable[..., jax.Array], arguments: tuple, dy: jax.Array) -> tuple:
    told = jax.tree.map(lambda x: awaiting(x, dy), arguments[0])
    return jax.vjp(f, told, *arguments[1:])[1](dy)


_recomputed.defvjp(_recomputed_forward, _recomputed_backward)


def named(x: jax.Array, name: str) -> jax.Array:
    """`x`, kept as its bits under `name` where the policy of an enclosing jax.checkpoint says so.

    No gradient passes: for the forward rule of a custom_vjp. Elsewhere it is `saved`.
    """
    return from_bits(checkpoint_name(to_bits(x), name), x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def saved(x: jax.Array, name: str) -> jax.Array:
    """`named`, with its gradient."""
    return named(x, name)


@saved.defjvp
def _saved_jvp(name: str, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return named(*primals, name), tangents[0]
