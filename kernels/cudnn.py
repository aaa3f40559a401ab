"""`cudnn`: cuDNN's fused attention on NVIDIA GPUs, through the public `jax.nn.dot_product_attention`.

It takes half-precision arguments and grouped heads, and masks that cuDNN knows by name (causal, causal windows,
lengths); any other mask, packed documents above all, as an array of pairs, while that is of moderate size. Compiling
for a GPU with it needs cuDNN in the process that traces, where `jax.nn` looks for it.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from zoo.kernels.engine import Learned, Output
from zoo.kernels.mask import allowed
from zoo.kernels.problem import Problem

PAIR_BYTES = 2**29
"""Bytes of an array [B, 1, T, S] of pairs, in the type of q, above which a mask that has no name is refused."""


class JaxNN(NamedTuple):
    """The engine. implementation: jax.nn's name of its own; "xla", which is quadratic in memory, is for tests.

    The log-sum-exp that it gives serves its own backward pass and nothing else: `supports` refuses calls that ask for
    one, since jax.nn rounds it to the type of q, and cuDNN takes no gradient of it.
    """

    implementation: Literal["cudnn", "xla"] = "cudnn"

    def forward(self, problem: Problem) -> Output:
        call = Call.of(problem, self.implementation)

        def run(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array) -> Output:
            out, pull = call.vjp(q, k, v, keys)
            places = _kept(out, pull)
            lse = jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
            return Output(call.rows(keys, out), jax.tree.leaves(pull)[places.lse] if places else lse)

        return _rows_joined(run)(problem.q, problem.k, problem.v, call.keys(problem))

    def backward(self, problem: Problem, output: Output, gradient: Output) -> Learned:
        """What jax.vjp keeps of a forward pass is exchanged for what is given, so that none is run.

        That rests on its result being a pytree, with the output and the log-sum-exp among the leaves. Where they are
        not found there (implementation="xla" keeps neither), the forward pass is run again.
        """
        call = Call.of(problem, self.implementation)

        def run(
            q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, out: jax.Array, lse: jax.Array, d: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            again, pull = call.vjp(q, k, v, keys)
            places = _kept(again, pull)
            if places:
                leaves, tree = jax.tree.flatten(pull)
                leaves[places.out], leaves[places.lse] = out, lse
                pull = tree.unflatten(leaves)
            return pull(call.rows(keys, d))

        given = (problem.q, problem.k, problem.v, call.keys(problem), output.out, output.lse, gradient.out)
        d_q, d_k, d_v = _rows_joined(run)(*given)
        return Learned(d_q, d_k, d_v, None)


class Call(NamedTuple):
    """The static arguments of one call of jax.nn. window: keys that a query sees to its left, beside its own.

    pairs: whether the mask is given as an array; cuDNN then skips by `causal` alone.
    """

    implementation: str
    scale: float
    causal: bool
    window: int | None
    padded: bool
    pairs: bool

    @classmethod
    def of(cls, problem: Problem, implementation: str) -> "Call":
        """Of a problem that `supports` has passed."""
        if _unnamed(problem):
            causal = problem.mask.rules.causal and problem.mask.prefix is None and _counted_from_0(problem)
            return cls(implementation, problem.scale, causal, None, padded=False, pairs=True)
        causal, left, _ = _band(problem)
        padded = problem.mask.lengths is not None
        return cls(implementation, problem.scale, causal, left, padded=padded, pairs=False)

    def keys(self, problem: Problem) -> jax.Array:
        """Which keys there are for each query, bool [B, 1, T, S], or how many in each row, int32 [B]."""
        shape, mask = problem.shape, problem.mask
        if self.pairs:
            pairs = allowed(mask, mask.query, mask.key)
            return jnp.broadcast_to(pairs, (shape.batch, 1, shape.queries, shape.keys))
        lengths = jnp.int32(shape.keys) if mask.lengths is None else mask.lengths
        return jnp.broadcast_to(lengths, problem.batch.shape)

    def vjp(self, q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array) -> tuple[jax.Array, Callable[..., Any]]:
        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return jax.nn.dot_product_attention(
                q,
                k,
                v,
                mask=keys if self.pairs else None,
                scale=self.scale,
                is_causal=self.causal,
                # A row of no keys is given one, and left out of the result.
                key_value_seq_lengths=jnp.clip(keys, 1, k.shape[1]) if self.padded else None,
                local_window_size=None if self.window is None else (self.window, 0),
                implementation=self.implementation,  # type: ignore[arg-type]
            )

        return jax.vjp(run, q, k, v)

    def rows(self, keys: jax.Array, x: jax.Array) -> jax.Array:
        """x [B, T, N, H], with zeros for the queries that have no key."""
        if self.pairs:
            return jnp.where(keys.any(-1).swapaxes(1, 2)[..., None], x, 0)
        return jnp.where(keys[:, None, None, None] > 0, x, 0) if self.padded else x


class _Places(NamedTuple):
    """Of the output, and of its log-sum-exp [B, N, T], among the leaves of what jax.vjp gives."""

    out: int
    lse: int


def _kept(out: jax.Array, pull: Callable[..., Any]) -> _Places | None:
    b, t, n, _ = out.shape
    leaves = list(enumerate(jax.tree.leaves(pull)))
    outs = [i for i, x in leaves if x is out]
    lses = [i for i, x in leaves if x.shape == (b, n, t) and x.dtype == jnp.float32]
    return _Places(outs[0], lses[0]) if len(outs) == len(lses) == 1 else None


def _rows_joined(run: Callable[..., Any]) -> Callable[..., Any]:
    """run(*arrays), which all begin with B; a dimension that jax.vmap maps over joins B.

    jax.nn's own rule for cuDNN fails where some arrays are mapped over and some are not.
    """

    @jax.custom_batching.custom_vmap
    def call(*arrays: jax.Array) -> Any:
        return run(*arrays)

    @call.def_vmap
    def _(size: int, mapped: Any, *arrays: jax.Array) -> tuple[Any, Any]:
        whole = [x if one else jnp.broadcast_to(x, (size, *x.shape)) for x, one in zip(arrays, mapped, strict=True)]
        result = call(*(x.reshape(-1, *x.shape[2:]) for x in whole))
        split = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), result)
        return split, jax.tree.map(lambda _: True, split)

    return call


def _band(problem: Problem) -> tuple[bool, int | None, int | None]:
    """The mask's causal, left and right, without limits that no query reaches; positions are counted from 0."""
    rules, shape = problem.mask.rules, problem.shape
    causal = rules.causal or rules.right == 0
    left = None if rules.left is None or rules.left >= shape.queries - 1 else rules.left
    reached = rules.right is not None and rules.right < (0 if causal else shape.keys - 1)
    return causal, left, rules.right if reached else None


def supports(problem: Problem) -> str | None:
    p = problem
    widths = (p.shape.head_dim, p.v.shape[-1])
    if p.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"its arguments are {p.q.dtype}: it takes bfloat16 and float16"
    if widths[0] != widths[1] or widths[0] % 8 or widths[0] > 256:
        return f"its head sizes are {widths[0]} and {widths[1]}: it takes one size, a multiple of 8 up to 256"
    if p.bias is not None:
        return "it has no bias"
    if p.soft_cap is not None:
        return "it has no soft cap"
    if p.seed is not None:
        return "it drops other probabilities than the dropout key says"
    if p.wants_lse:
        return "the log-sum-exp is asked for (return_lse or sinks), and cuDNN takes no gradient of it"
    unnamed, size = _unnamed(p), _pair_bytes(p)
    if unnamed is not None and size > PAIR_BYTES:
        return f"{unnamed}, and all pairs take {size / 2**20:.0f} MiB a device, above {PAIR_BYTES / 2**20:.0f}"
    return _refusal_of_jax(p.q.shape, p.k.shape, p.q.dtype, Call.of(p, "cudnn"))


def temporaries(problem: Problem) -> int:
    """Bytes: the log-sum-exp, and what cuDNN says that its backward pass works in.

    A float32 sum of the gradient of q, a number a row, the gradients of k and v by query head where heads share them,
    and the pairs of a mask that has no name. Not checked against a GPU: the compiler does not count the space that
    cuDNN asks for.
    """
    p, shape = problem, problem.shape
    rows = shape.batch * shape.heads * shape.queries
    group = shape.heads // shape.kv_heads
    by_head = p.q.dtype.itemsize * group * (p.k.size + p.v.size) if group > 1 else 0
    return 4 * p.q.size + 2 * 4 * rows + by_head + (_pair_bytes(p) if _unnamed(p) else 0)


def _pair_bytes(problem: Problem) -> int:
    shape = problem.shape
    return shape.batch * shape.queries * shape.keys * problem.q.dtype.itemsize


def _counted_from_0(problem: Problem) -> bool:
    return (problem.mask.query.start, problem.mask.key.start) == (0, 0)


def _unnamed(problem: Problem) -> str | None:
    """What of the mask cuDNN has no name for, None where it has."""
    mask, shape = problem.mask, problem.shape
    rules = mask.rules
    for there, name in (
        (mask.query.segments is not None, "segments"),
        (mask.prefix is not None, "prefix"),
        (rules.where is not None, "where="),
    ):
        if there:
            return f"its masks have no {name}"
    compares = rules.causal or rules.left is not None or rules.right is not None
    if compares and not _counted_from_0(problem):
        return "its masks count positions from 0, and here they are given or begin elsewhere"
    causal, left, right = _band(problem)
    if right is not None or (left is not None and (left < 0 or not causal)):
        return f"its masks have no window of ({rules.left}, {rules.right}): it takes causal windows"
    if left is not None and (mask.lengths is not None or shape.queries > shape.keys):
        return "a window with lengths, or over fewer keys than queries, leaves rows empty: cuDNN has no such window"
    return None


@functools.cache
def _refusal_of_jax(q: tuple[int, ...], k: tuple[int, ...], dtype: Any, call: Call) -> str | None:
    """What jax.nn says of these shapes on this machine: whether it finds cuDNN, and what that and the GPU can take."""
    arrays = (jax.ShapeDtypeStruct(shape, dtype) for shape in (q, k, k))
    pairs = jax.ShapeDtypeStruct((q[0], 1, q[1], k[1]), bool)

    def step(q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array) -> Any:
        out, pull = call.vjp(q, k, v, keys)
        return pull(out)

    try:
        jax.eval_shape(step, *arrays, pairs if call.pairs else jax.ShapeDtypeStruct(q[:1], jnp.int32))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"jax.nn refuses it on this machine: {' '.join(str(error).split())}"
    return None
