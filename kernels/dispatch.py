"""The one entry point of attention: checks its arguments, finds the layout, chooses an implementation, runs it."""

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from zoo.kernels import chunked, cudnn, engine, layout, reference, ring, tpu_flash, ulysses
from zoo.kernels.bias import Bias
from zoo.kernels.chunked import Chunked
from zoo.kernels.cudnn import JaxNN
from zoo.kernels.engine import ByPlatform, Engine
from zoo.kernels.mask import AttentionError, Mask
from zoo.kernels.problem import AttentionOutput, Problem, Shape, build, check_arrays, varying_axes, varying_over
from zoo.kernels.tpu_flash import TpuFlash

SCORE_BUDGET = 2**31
"""Bytes of scores per device above which `xla` refuses a call."""

SMALL_SCORES = 2**18
"""Bytes of scores per device up to which `auto` takes the plain equation."""


class Implementation(NamedTuple):
    """supports(problem) is None, or the reason why it cannot take it; problem's arrays are one device's part.

    temporaries(problem): bytes that it needs beside arguments and results, forward and backward, estimated.
    cuts_keys: whether it takes keys and values cut along the length, as the queries are.
    """

    attend: Callable[[Problem], AttentionOutput]
    supports: Callable[[Problem], str | None]
    temporaries: Callable[[Problem], int]
    cuts_keys: bool = False


def _within_budget(problem: Problem) -> str | None:
    size = reference.score_bytes(problem)
    if size <= SCORE_BUDGET:
        return None
    return f"its scores take {size / 2**30:.1f} GiB a device, above {SCORE_BUDGET / 2**30:.0f}: use impl='chunked'"


IMPLEMENTATIONS: dict[str, Implementation] = {
    "xla": Implementation(reference.attend, _within_budget, reference.temporaries),
    "chunked": Implementation(partial(engine.attend, Chunked()), lambda problem: None, chunked.temporaries),
    "tpu_flash": Implementation(
        partial(engine.attend, ByPlatform(TpuFlash(interpret=True), tpu=TpuFlash())),
        tpu_flash.supports,
        tpu_flash.temporaries,
    ),
    "cudnn": Implementation(partial(engine.attend, JaxNN()), cudnn.supports, cudnn.temporaries),
    "ring": Implementation(ring.attend, ring.supports, ring.temporaries, cuts_keys=True),
    "ulysses": Implementation(ulysses.attend, ulysses.supports, ulysses.temporaries, cuts_keys=True),
}

ENGINES: dict[str, Engine] = {"chunked": Chunked(), "tpu_flash": TpuFlash(), "cudnn": JaxNN()}
"""What `auto` joins where it takes one thing on one platform and another elsewhere."""


@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    mask: Mask = Mask(),
    *,
    bias: Bias | ArrayLike | None = None,
    soft_cap: float | None = None,
    logits_bound: float | None = None,
    sinks: ArrayLike | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    scale: float | None = None,
    impl: str = "auto",
    partition: layout.Partition = None,
    return_lse: Literal[False] = False,
) -> jax.Array: ...
@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    mask: Mask = Mask(),
    *,
    bias: Bias | ArrayLike | None = None,
    soft_cap: float | None = None,
    logits_bound: float | None = None,
    sinks: ArrayLike | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    scale: float | None = None,
    impl: str = "auto",
    partition: layout.Partition = None,
    return_lse: Literal[True],
) -> AttentionOutput: ...
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    mask: Mask = Mask(),
    *,
    bias: Bias | ArrayLike | None = None,
    soft_cap: float | None = None,
    logits_bound: float | None = None,
    sinks: ArrayLike | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    scale: float | None = None,
    impl: str = "auto",
    partition: layout.Partition = None,
    return_lse: bool = False,
) -> jax.Array | AttentionOutput:
    """softmax(soft_cap(scale q k^T) + bias, masked) v, with dropout of the probabilities.

    q: [B, T, N, H].  k: [B, S, K, H].  v: [B, S, K, H'] (H' is usually H); N a multiple of K: query head n attends
    with key/value head n // (N / K). All of one floating type, which the result [B, T, N, H'] has too; scores and sums
    are float32.

    mask: which query attends to which key. A query left with none gives output 0, no gradient, and lse -inf.
    bias: added to the scores: an array that broadcasts to [B, N, T, S], or a `Bias`. Gradients flow to either.
    soft_cap: c turns a score x into c tanh(x / c), before the bias (Gemma 2).
    logits_bound: a number that no scale q k^T exceeds in size, where the caller knows one (normalised q and k): kernels
        then need no running maximum. Too small a number gives wrong results. A soft cap is such a bound already.
    sinks: [N], a learned score per head that takes part in the softmax and has no value (GPT-OSS).
    dropout, dropout_key: probability and jax.random key; no key, no dropout. Which probabilities are dropped is a
        function of the key and the global indices: the same for every implementation and every sharding.
    scale: factor of the products, 1 / sqrt(H) where not given.
    impl: "auto", "xla", "chunked", "tpu_flash" (elsewhere than on a TPU it is interpreted, for tests) or "cudnn" (on
        CUDA GPUs alone); see `explain`.
        "ring" and "ulysses" cut k and v over the mesh axes of the length as q is (T equal S), where all others gather
        them: name one for lengths that a device cannot hold. `auto` takes neither.
    partition: how q's [B, T, N] are cut over the mesh: a PartitionSpec, or a NamedSharding where no mesh is set. Not
        needed under `zoo.sharding.use` or an Explicit mesh. Inside a caller's shard_map it names what that has cut.
    return_lse: also return the log-sum-exp [B, T, N] of the scores, without sinks; gradients flow through it.

    Raises AttentionError, one line, where arguments do not fit.
    """
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        near = difflib.get_close_matches(impl, ["auto", *IMPLEMENTATIONS], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"give auto, {' or '.join(IMPLEMENTATIONS)}"
        raise AttentionError(f"impl={impl!r} is unknown: {hint}")
    problem, place = _prepare(
        impl != "auto" and IMPLEMENTATIONS[impl].cuts_keys,
        jnp.asarray(q),
        jnp.asarray(k),
        jnp.asarray(v),
        mask,
        partition,
        bias=bias,
        soft_cap=soft_cap,
        logits_bound=logits_bound,
        dropout=dropout,
        dropout_key=dropout_key,
        scale=scale,
        wants_lse=return_lse or sinks is not None,
    )
    sinks = _check_sinks(sinks, problem.shape)
    output = _place(impl, place, problem, sinks)
    return output if return_lse else output.output


def _prepare(
    cuts_keys: bool, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, partition: layout.Partition, **options: Any
) -> tuple[Problem, layout.Layout]:
    shape = check_arrays(q, k, v)
    drops = options["dropout"] > 0 and options["dropout_key"] is not None
    needs_indices = drops or isinstance(options["bias"], Bias)
    place = layout.find(q, k, v, partition, needs_indices=needs_indices, cuts_keys=cuts_keys)
    origin = layout.origin(place, shape)
    return build(q, k, v, mask, origin=origin, length_axes=place.keys, **options), place


def _check_sinks(sinks: ArrayLike | None, shape: Shape) -> jax.Array | None:
    if sinks is None:
        return None
    sinks = jnp.asarray(sinks)
    if sinks.shape != (shape.heads,):
        raise AttentionError(f"sinks have shape {sinks.shape}: they must be ({shape.heads},), one score per query head")
    return sinks


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _place(impl: str, place: layout.Layout, problem: Problem, sinks: jax.Array | None) -> AttentionOutput:
    return layout.run(place, partial(_attend, impl), problem, sinks)


def _attend(impl: str, problem: Problem, sinks: jax.Array | None) -> AttentionOutput:
    """One device's part."""
    names = choose(problem) if impl == "auto" else Choice(impl, impl, impl)
    for name in dict.fromkeys(names):
        refusal = IMPLEMENTATIONS[name].supports(problem)
        if refusal is not None:
            raise AttentionError(f"impl={name!r} cannot take this call: {refusal}")
    attend = IMPLEMENTATIONS[names.elsewhere].attend
    if len(set(names)) > 1:
        engines = {platform: ENGINES[name] for platform, name in names._asdict().items()}
        attend = partial(engine.attend, ByPlatform(engines.pop("elsewhere"), **engines))
    problem, sinks = varying_over((problem, sinks), varying_axes((problem, sinks)))
    output, lse = attend(problem)
    if sinks is not None:
        # With a sink in the denominator every probability shrinks by e^lse / (e^lse + e^sink).
        share = jax.nn.sigmoid(lse - sinks.astype(lse.dtype))
        output = (output * share[..., None]).astype(output.dtype)
    return AttentionOutput(output, lse)


class Choice(NamedTuple):
    """What `auto` takes on TPUs, on CUDA GPUs, and on any other platform."""

    tpu: str
    cuda: str
    elsewhere: str

    def where(self, name: str) -> str | None:
        """The platforms that take this one, in words."""
        if name == self.elsewhere:
            return "everywhere" if len(set(self)) == 1 else "elsewhere"
        return {self.tpu: "on TPUs", self.cuda: "on CUDA GPUs"}.get(name)


def choose(problem: Problem) -> Choice:
    """The plain equation for small scores and decoding, else what is linear in memory, a bias of pairs aside."""
    small = reference.score_bytes(problem) <= SMALL_SCORES or problem.shape.queries == 1
    if small and IMPLEMENTATIONS["xla"].supports(problem) is None:
        return Choice("xla", "xla", "xla")

    def or_chunked(name: str) -> str:
        return name if IMPLEMENTATIONS[name].supports(problem) is None else "chunked"

    return Choice(tpu=or_chunked("tpu_flash"), cuda=or_chunked("cudnn"), elsewhere="chunked")


class Candidate(NamedTuple):
    """One implementation's answer to a call.

    refusal: why it cannot take it, or None. chosen: where impl="auto" takes it: "everywhere", "on TPUs", "on CUDA
    GPUs", "elsewhere", or None for nowhere. temporaries: bytes that it needs on one device beside arguments and
    results, forward and backward: an estimate, None where it is refused.
    """

    name: str
    refusal: str | None
    chosen: str | None
    temporaries: int | None


def explain(
    q: ArrayLike | jax.ShapeDtypeStruct,
    k: ArrayLike | jax.ShapeDtypeStruct,
    v: ArrayLike | jax.ShapeDtypeStruct,
    mask: Mask = Mask(),
    *,
    bias: Bias | ArrayLike | None = None,
    soft_cap: float | None = None,
    logits_bound: float | None = None,
    sinks: ArrayLike | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    scale: float | None = None,
    partition: layout.Partition = None,
    return_lse: bool = False,
) -> list[Candidate]:
    """Every implementation of a call of `attention` and, where it was refused, why. Takes arrays or their shapes.

    Runs nothing. Raises AttentionError as `attention` does.
    """
    answers: dict[str, Candidate] = {}

    def record(place: layout.Layout, cuts_keys: bool, problem: Problem, sinks: jax.Array | None) -> AttentionOutput:
        choice, gathered = choose(problem), layout.gathered_bytes(place, problem)
        for name, one in IMPLEMENTATIONS.items():
            if one.cuts_keys == cuts_keys:
                refusal = one.supports(problem)
                size = one.temporaries(problem) + gathered if refusal is None else None
                answers[name] = Candidate(name, refusal, choice.where(name), size)
        if not cuts_keys:
            return _attend("auto", problem, sinks)
        rows = problem.q.shape[:3]
        return AttentionOutput(jnp.zeros((*rows, problem.v.shape[3]), problem.q.dtype), jnp.zeros(rows, problem.dtype))

    def trace(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, bias: Any, key: jax.Array | None) -> None:
        options = {
            "bias": bias,
            "soft_cap": soft_cap,
            "logits_bound": logits_bound,
            "dropout": dropout,
            "dropout_key": key,
            "scale": scale,
            "wants_lse": return_lse or sinks is not None,
        }
        for cuts_keys in (False, True):
            problem, place = _prepare(cuts_keys, q, k, v, mask, partition, **options)
            layout.run(place, partial(record, place, cuts_keys), problem, None)

    jax.eval_shape(trace, q, k, v, mask, bias, dropout_key)
    return list(answers.values())
