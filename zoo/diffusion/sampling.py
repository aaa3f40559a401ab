"""Sampling: one `jax.lax.scan` that applies a sampler's table, and guidance of the network it asks."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zoo.diffusion.samplers import Table
from zoo.diffusion.schedules import ScheduleError
from zoo.diffusion.variance import divided, said_by, share
from zoo.sharding import constrain

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]
"""(x [B, Y, X, C], time [B], whole or real as the schedule has it) to what the network predicts, [B, Y, X, C].

Or [B, Y, X, 2 C], with what it says of the variance behind: samplers that do not use it leave it alone.
"""

Callback = Callable[[int, np.ndarray], None]
"""Told the number of each step as it ends, from 0, and x then; in the first process alone, and in no promised order."""


def sample(
    denoise: Denoiser,
    table: Table,
    shape: Sequence[int],
    key: jax.Array,
    *,
    image: jax.Array | None = None,
    mask: jax.Array | None = None,
    noise: jax.Array | None = None,
    callback: Callback | None = None,
) -> jax.Array:
    """Images of `shape` [B, Y, X, C], float32: a pure function, to be called under `jax.jit`.

    Noise depends on the key, the step and global indices alone, so that every sharding draws the same images.

    image [B, Y, X, C]: what a table that begins part of the way (`strength` below 1) begins from.
    mask [B, Y, X, 1], with an image: 1 where to paint, 0 where the image stays as it is. What stays is put back after
        each step at that step's noise, always the noise of the beginning (Lugmayr et al. 2022, equation 8).
    noise [B, Y, X, C]: standard normal, that of the beginning; None draws it.
    Raises ScheduleError where an image is needed and not given.
    """
    of_image, of_noise = table.path.first
    if image is None and (of_image or mask is not None):
        need = "a mask keeps" if mask is not None else "sampling at less than full strength begins with"
        raise ScheduleError(f"{need} parts of an image, and none is given: give image")
    first_key, fresh_key = jax.random.split(key)
    noise = _batched(jax.random.normal(first_key, tuple(shape)) if noise is None else noise)
    x = of_noise * noise
    if image is not None and of_image:
        x = of_image * image + x

    def fresh(step: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(fresh_key, step), x.shape)

    if image is None or mask is None:
        return walk(denoise, table, x, fresh, callback=callback)

    def keep(x: jax.Array, signal: jax.Array, sigma: jax.Array) -> jax.Array:
        return jnp.where(mask > 0, x, signal * image + sigma * noise)

    x = walk(denoise, table, x, fresh, project=keep, callback=callback)
    return keep(x, jnp.float32(1), jnp.float32(0))


def walk(
    denoise: Denoiser,
    table: Table,
    x: jax.Array,
    fresh: Callable[[jax.Array], jax.Array],
    *,
    project: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None,
    callback: Callback | None = None,
) -> jax.Array:
    """From the first x [B, Y, X, C] to the last, by a table; float32.

    fresh: step [] int32 to standard normal noise [B, Y, X, C]; not asked by tables that add none.
    project: (x, signal [], sigma []) at the end of a step, to the x that the next one begins with.
    """
    histories = (table.xs, table.images, table.noises, table.predictions)
    adds = bool(table.fresh.any())

    def body(carry: tuple, row: _Row) -> tuple[tuple, None]:
        x, past = carry
        predicted, said = divided(denoise(x, jnp.full(x.shape[0], row.time)), x.shape[-1])
        image = row.image[0] * x + row.image[1] * predicted
        if table.clip is not None:
            image = jnp.clip(image, -table.clip, table.clip)
        now = (x, image, row.noise[0] * x + row.noise[1] * predicted, predicted)
        held = [[new, *old] for new, old in zip(now, past, strict=True)]
        terms = [w[i] * lags[i] for w, lags in zip(row.weights, held, strict=True) for i in range(len(w))]
        x = sum(terms[1:], terms[0])
        if adds:
            deviation = row.fresh
            if row.learned is not None:
                log_small, span = row.learned
                deviation = deviation * jnp.exp((log_small + share(said_by(said)) * span) / 2)
            x = x + deviation * fresh(row.step)
        if project is not None:
            x = project(x, *row.end)
        if callback is not None:
            # It is called on one device, of the first process, which is handed all of x.
            jax.debug.callback(callback, row.step, constrain(x, *(None,) * x.ndim))
        past = [tuple(lags[: max(len(w) - 1, 0)]) for w, lags in zip(row.weights, held, strict=True)]
        return (_batched(x), tuple(past)), None

    x = _batched(x.astype(jnp.float32))
    zeros = tuple((jnp.zeros_like(x),) * max(weights.shape[1] - 1, 0) for weights in histories)
    return jax.lax.scan(body, (x, zeros), _rows(table))[0][0]


def guided(
    denoise: Callable[[jax.Array, jax.Array, Any], jax.Array],
    condition: Any,
    blank: Any,
    *,
    scale: float,
    rescale: float = 0.0,
) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans 2022): blank + scale * (conditional - blank), of what is predicted.

    denoise: (x, time, condition) to a prediction, for any number of rows. condition, blank: trees of arrays [B, ...],
    asked together as one batch of 2 B rows. With scale 1 `condition` alone is asked.
    What a network says of the variance, behind its prediction, is that of `condition`.
    rescale: share of the result that is given the conditional prediction's deviation, image by image, against too
        much contrast at large scales (Lin et al. 2024, equations 15 and 16).
    """
    if not 0 <= rescale <= 1:
        raise ScheduleError(f"guidance rescale {rescale} is not a share: choose from 0 to 1")
    if scale == 1.0:
        return lambda x, time: denoise(x, time, condition)

    # A row and its blank side by side, so that a batch that is cut over devices stays where it is.
    def paired(a: jax.Array, b: jax.Array) -> jax.Array:
        return _batched(jnp.stack([a, b], 1).reshape(2 * a.shape[0], *a.shape[1:]))

    both = jax.tree.map(paired, condition, blank)

    def guide(x: jax.Array, time: jax.Array) -> jax.Array:
        predicted = denoise(paired(x, x), paired(time, time), both)
        predicted = predicted.astype(jnp.float32).reshape(x.shape[0], 2, *predicted.shape[1:])
        said = predicted[:, 0, ..., x.shape[-1] :]
        given, without = predicted[:, 0, ..., : x.shape[-1]], predicted[:, 1, ..., : x.shape[-1]]
        mixed = without + scale * (given - without)
        if rescale:
            axes = tuple(range(1, mixed.ndim))
            deviation = jnp.std(given, axes, keepdims=True) / jnp.std(mixed, axes, keepdims=True)
            mixed = mixed * (rescale * deviation + 1 - rescale)
        return jnp.concatenate([mixed, said], -1)

    return guide


class _Row(NamedTuple):
    """What one step of the scan is told: numbers [], and weights [lags]."""

    step: Any
    time: Any
    image: Any
    noise: Any
    weights: Any
    fresh: Any
    learned: Any
    end: Any


def _rows(table: Table) -> _Row:
    """The table as the scan goes through it: float32, times whole where the schedule's are."""
    path, convert = table.path, table.path.convert
    whole = bool((path.times == np.round(path.times)).all())
    row = _Row(
        step=np.arange(path.steps, dtype=np.int32),
        time=path.times.astype(np.int32) if whole else path.times.astype(np.float32),
        image=np.stack([convert.image_x, convert.image_p], 1),
        noise=np.stack([convert.noise_x, convert.noise_p], 1),
        weights=[table.xs, table.images, table.noises, table.predictions],
        fresh=table.fresh,
        learned=None if table.learned is None else tuple(table.learned),
        end=tuple(path.end),
    )
    return jax.tree.map(lambda a: jnp.asarray(a, a.dtype if a.dtype == np.int32 else jnp.float32), row)


def _batched(x: jax.Array) -> jax.Array:
    return constrain(x, "act_batch", *(None,) * (x.ndim - 1))
