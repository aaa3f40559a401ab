"""`xla`: the plain equation over the whole [B, N, T, S] scores. The reference, and the choice at small sizes."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from zoo.kernels import bias as biases
from zoo.kernels import dropout as dropouts
from zoo.kernels.bias import Bias
from zoo.kernels.mask import Mask, allowed
from zoo.kernels.memory import saved
from zoo.kernels.problem import AttentionOutput, Problem, build, grouped


def score_bytes(problem: Problem) -> int:
    """Size of the [B, N, T, S] scores."""
    shape = problem.shape
    return shape.batch * shape.heads * shape.queries * shape.keys * problem.dtype.itemsize


def temporaries(problem: Problem) -> int:
    """Bytes: the arrays of whole scores that live at once, forward and backward; results are no temporaries.

    Scores, weights and the gradients of both; one more for float32's products; the slope of a soft cap; half a one for
    the hash of a dropout. Within a quarter of what compilers count, for a CPU more and for a GPU less.
    """
    p = problem
    arrays = 4 + (p.q.dtype.itemsize >= 4) + (p.soft_cap is not None) + 0.5 * (p.seed is not None)
    return int(arrays * score_bytes(p))


def attend(problem: Problem) -> AttentionOutput:
    """Quadratic memory; differentiable any number of times, forward and reverse."""
    p, shape, mask = problem, problem.shape, problem.mask
    weights, lse = _softmax(p)
    if p.seed is not None:
        keep = dropouts.keep(p.seed, p.dropout, p.batch, p.heads, mask.query.index, mask.key.index)
        weights = jnp.where(grouped(keep, shape.kv_heads), weights / (1 - p.dropout), 0)
    products = {"precision": p.precision, "preferred_element_type": p.dtype}
    out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(p.v.dtype), p.v, **products)
    out = saved(out.reshape(*p.q.shape[:3], -1).astype(p.q.dtype), "attention_out")
    lse = saved(lse[..., 0].transpose(0, 3, 1, 2).reshape(p.q.shape[:3]), "attention_lse")
    return AttentionOutput(out, lse)


def attention_weights(
    q: ArrayLike,
    k: ArrayLike,
    mask: Mask = Mask(),
    *,
    bias: Bias | ArrayLike | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> jax.Array:
    """What `attention` weights values with, [B, N, T, S] float32, to be looked at: quadratic in length.

    The arguments are those of `attention`. A query that attends to nothing has weights 0. Raises AttentionError.
    """
    k = jnp.asarray(k)
    problem = build(jnp.asarray(q), k, k, mask, bias=bias, soft_cap=soft_cap, scale=scale)
    weights, _ = _softmax(problem)
    return weights.reshape(weights.shape[0], -1, *weights.shape[3:])


def _softmax(problem: Problem) -> tuple[jax.Array, jax.Array]:
    """Weights [B, K, N / K, T, S] and the log-sum-exp of their scores, with a last axis of 1."""
    p, shape, mask = problem, problem.shape, problem.mask
    q = p.q.reshape(*p.q.shape[:2], shape.kv_heads, -1, shape.head_dim)
    scores = p.scale * jnp.einsum("btkgh,bskh->bkgts", q, p.k, precision=p.precision, preferred_element_type=p.dtype)
    if p.soft_cap is not None:
        scores = p.soft_cap * jnp.tanh(scores / p.soft_cap)
    if p.bias is not None:
        bias = biases.block(p.bias, p.heads, mask.query, mask.key)
        scores += grouped(bias, shape.kv_heads).astype(p.dtype)
    if mask.hides:
        scores = jnp.where(allowed(mask, mask.query, mask.key)[:, :, None], scores, -jnp.inf)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top))
    total = weights.sum(-1, keepdims=True)
    empty = total == 0
    weights /= jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(jnp.where(empty, 1, total)))
    return weights, lse
