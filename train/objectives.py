"""Objectives: what a model is trained for, as sums over a (micro-)batch and the figures people read off them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from zoo.diffusion import schedules
from zoo.diffusion.losses import noise_prediction
from zoo.train.experiment import Batch, Loss, UserError

Sums = dict[str, jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def cross_entropy(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[jax.Array, Sums]:
    """Weighted sum of token losses, differentiable in `logits` alone; the gradient is written out, see _backward.

    logits [..., V] (entries of -inf are no part of the vocabulary), targets [...] int32, weights [...].
    Loss of a token: -sum_v q_v log p_v + z_loss * log(Z)^2, where q puts 1 - label_smoothing on the target and spreads
    the rest evenly over the vocabulary (Szegedy et al. 2016, section 7), Z normalises p (PaLM, section 5).
    Returns the total and the sums `nll` (nats, without smoothing and z), `correct`, `z` (log(Z)^2), all float32.
    """
    return _forward(logits, targets, weights, label_smoothing, z_loss)[0]


def _forward(logits: Any, targets: Any, weights: Any, label_smoothing: float, z_loss: float) -> tuple[Any, Any]:
    logits = logits.astype(jnp.float32)
    largest = logits.max(-1)
    lse = largest + jnp.log(jnp.exp(logits - largest[..., None]).sum(-1))
    at_target = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    losses = lse - at_target + z_loss * lse**2
    if label_smoothing:
        real = logits > -jnp.inf
        losses += label_smoothing * (at_target - jnp.where(real, logits, 0).sum(-1) / real.sum(-1))
    sums = {
        "nll": jnp.sum(weights * (lse - at_target)),
        "correct": jnp.sum(weights * (at_target == largest)),
        "z": jnp.sum(weights * lse**2),
    }
    return (jnp.sum(weights * losses), sums), (logits, lse, targets, weights)


def _backward(label_smoothing: float, z_loss: float, residuals: Any, cotangents: Any) -> Any:
    """d total / d logits = w ((1 + 2 z log Z) p - q), in one pass over the logits; the sums are figures, not losses."""
    logits, lse, targets, weights = residuals
    p = jnp.exp(logits - lse[..., None])
    q = jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], 1 - label_smoothing, 0)
    if label_smoothing:
        real = logits > -jnp.inf
        q += label_smoothing * real / real.sum(-1, keepdims=True)
    scale = cotangents[0] * weights
    return scale[..., None] * ((1 + 2 * z_loss * lse)[..., None] * p - q), None, None


cross_entropy.defvjp(_forward, _backward)


def chunked_sums(
    head: Callable[[jax.Array], jax.Array],
    sums: Callable[[jax.Array, Batch], tuple[jax.Array, Sums]],
    hidden: jax.Array,
    batch: Batch,
    chunk: int,
) -> tuple[jax.Array, Sums]:
    """`sums(head(hidden), batch)` with the logits of `chunk` positions alive at a time, forward and backward.

    hidden [B, T, D], arrays of batch [B, T]; T must be a multiple of `chunk`. A chunk's gradients are computed with
    its loss, so that nothing is recomputed: the total is a scalar, its cotangent only scales them.
    Of n chunks, j holds the positions congruent to j modulo n, which leaves rows and positions where they are sharded.
    """
    chunks = hidden.shape[1] // chunk

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], chunk, chunks, *x.shape[2:])
        return jnp.moveaxis(x, 2, 0)

    pieces, cut_batch = cut(hidden), {name: cut(x) for name, x in batch.items()}
    head, parameters = jax.closure_convert(head, jax.eval_shape(lambda x: x[0], pieces))

    def one(parameters: Any, piece: jax.Array, batch: Batch) -> tuple[jax.Array, Sums]:
        return sums(head(piece, *parameters), batch)

    @jax.custom_vjp
    def total(parameters: Any, pieces: jax.Array, batch: Batch) -> tuple[jax.Array, Sums]:
        each = jax.lax.map(lambda xs: one(parameters, *xs), (pieces, batch))
        return jax.tree.map(lambda x: x.sum(0), each)

    def forward(parameters: Any, pieces: jax.Array, batch: Batch) -> tuple[Any, Any]:
        def body(gradient: Any, xs: Any) -> tuple[Any, Any]:
            out, (g_parameters, g_piece) = jax.value_and_grad(one, (0, 1), has_aux=True)(parameters, *xs)
            return jax.tree.map(jnp.add, gradient, g_parameters), (out, g_piece)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), parameters)
        gradient, (each, g_pieces) = jax.lax.scan(body, zeros, (pieces, batch))
        gradient = jax.tree.map(lambda g, x: g.astype(x.dtype), gradient, parameters)
        return jax.tree.map(lambda x: x.sum(0), each), (gradient, g_pieces)

    def backward(residuals: Any, cotangents: Any) -> Any:
        scaled = jax.tree.map(lambda g: (cotangents[0] * g).astype(g.dtype), residuals)
        return *scaled, None

    total.defvjp(forward, backward)
    return total(parameters, pieces, cut_batch)


@dataclass(frozen=True)
class NextToken:
    """Cross entropy of the next token, over batches of tokens, targets, segments, positions, weights, bytes [B, T].

    chunk: how many positions are scored against the vocabulary at a time, so that the logits [B, T, V] are never held
    at once; None scores all. For large vocabularies. Gradients of the head are summed over chunks in float32, and
    reduced across devices once a chunk.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk: int | None = None

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        length = batch["tokens"].shape[1]
        if self.chunk is not None and (self.chunk < 1 or length % self.chunk):
            raise UserError(f"--objective.chunk {self.chunk} does not divide the length {length}: choose a divisor")
        hidden = model.hidden(batch["tokens"], positions=batch["positions"], segments=batch["segments"], key=key)

        def sums(logits: jax.Array, batch: Batch) -> tuple[jax.Array, Sums]:
            # Evaluation measures the likelihood itself.
            smoothing, z_loss = (0.0, 0.0) if key is None else (self.label_smoothing, self.z_loss)
            return cross_entropy(logits, batch["targets"], batch["weights"], smoothing, z_loss)

        parts = {name: batch[name] for name in ("targets", "weights")}
        if self.chunk is None:
            total, metrics = sums(model.logits(hidden), parts)
        else:
            total, metrics = chunked_sums(model.logits, sums, hidden, parts, self.chunk)
        metrics["bytes"] = jnp.sum(batch["weights"] * batch["bytes"])
        return Loss(total, jnp.sum(batch["weights"]), metrics)

    def summary(self, total: float, weight: float, metrics: Mapping[str, float]) -> dict[str, float]:
        """loss: nats a token, as minimised (its regularisers included). The others are of the likelihood alone.

        bits_per_byte counts every token's nats over the bytes of text, so that it compares across tokenizers.
        accuracy: share of tokens whose target has the largest logit. log_z_squared: what z_loss keeps small.
        """
        weight = max(weight, 1.0)
        nats = metrics["nll"] / weight
        figures = {
            "loss": total / weight,
            "perplexity": math.exp(min(nats, 700.0)),
            "bits_per_byte": metrics["nll"] / math.log(2) / max(metrics["bytes"], 1.0),
            "accuracy": metrics["correct"] / weight,
        }
        return figures | ({"log_z_squared": metrics["z"] / weight} if self.z_loss else {})


@dataclass(frozen=True)
class NoisePrediction:
    """Mean squared error of the noise in images at random times (Ho et al. 2020), over batches of images, weights [B].

    The noise schedule is the model's: `model.config.schedule` and `.timesteps`.
    """

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        schedule = schedules.make(model.config.schedule, model.config.timesteps)
        images, weights = batch["images"], batch["weights"]
        rows = images.shape[0]
        if key is None:
            # The same times and noise at every evaluation: losses differ by the model alone.
            noise_key, dropout_key = jax.random.key(0), None
            times = spread_times(rows, schedule.timesteps)
        else:
            time_key, noise_key, dropout_key = jax.random.split(key, 3)
            times = jax.random.randint(time_key, (rows,), 0, schedule.timesteps)
        noise = jax.random.normal(noise_key, images.shape)
        losses = noise_prediction(lambda x, t: model(x, t, key=dropout_key), schedule, images, times, noise)
        return Loss(jnp.sum(weights * losses), jnp.sum(weights), {})

    def summary(self, total: float, weight: float, metrics: Mapping[str, float]) -> dict[str, float]:
        """loss: squared error of the predicted noise, a pixel and channel; 1 is that of predicting none."""
        return {"loss": total / max(weight, 1.0)}


def spread_times(rows: int, timesteps: int) -> jax.Array:
    """[rows] int32 in 0 .. timesteps - 1 (at most 65536), of which every run of rows covers the range evenly.

    Multiples of the golden ratio modulo 1, in 32-bit arithmetic: a batch whose last rows only pad it has times of all
    sizes among its real ones.
    """
    fractions = jnp.arange(rows, dtype=jnp.uint32) * jnp.uint32(2654435769)
    return ((fractions >> 16) * jnp.uint32(timesteps) >> 16).astype(jnp.int32)
