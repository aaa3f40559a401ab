"""Objectives: the loss and its written gradient against numpy, chunked against plain, and what is reported."""

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.diffusion import schedules
from zoo.train.experiment import UserError
from zoo.train.objectives import NextToken, NoisePrediction, chunked_sums, cross_entropy, spread_times

B, T, D, V = 3, 8, 5, 11


def reference(
    logits: np.ndarray, targets: np.ndarray, weights: np.ndarray, smoothing: float, z_loss: float
) -> tuple[float, np.ndarray]:
    """Total and its gradient, token by token, in float64; entries of -inf are outside the vocabulary."""
    total, gradient = 0.0, np.zeros_like(logits, np.float64)
    for index in np.ndindex(targets.shape):
        row = logits[index].astype(np.float64)
        inside = np.isfinite(row)
        z = np.exp(row[inside]).sum()
        p = np.where(inside, np.exp(np.where(inside, row, 0)) / z, 0)
        q = np.where(inside, smoothing / inside.sum(), 0)
        q[targets[index]] += 1 - smoothing
        total += weights[index] * (-(q[inside] * np.log(p[inside])).sum() + z_loss * np.log(z) ** 2)
        gradient[index] = weights[index] * (p - q + z_loss * 2 * np.log(z) * p)
    return total, gradient


@pytest.fixture
def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    logits = 3 * random.standard_normal((B, T, V)).astype(np.float32)
    logits[..., -2:] = -np.inf
    return logits, random.integers(0, V - 2, (B, T)), random.random((B, T)).astype(np.float32)


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.2, 0.03)])
def test_loss_and_gradient_equal_numpy(arrays, smoothing: float, z_loss: float):
    logits, targets, weights = arrays
    total, gradient = reference(logits, targets, weights, smoothing, z_loss)
    value = jax.value_and_grad(lambda x: cross_entropy(x, targets, weights, smoothing, z_loss), has_aux=True)
    (got, sums), got_gradient = jax.jit(value)(logits)
    assert got == pytest.approx(total, rel=1e-5)
    np.testing.assert_allclose(got_gradient, gradient, atol=1e-5)
    plain, _ = reference(logits, targets, weights, 0.0, 0.0)
    assert sums["nll"] == pytest.approx(plain, rel=1e-5)
    hits = logits.argmax(-1) == targets
    assert sums["correct"] == pytest.approx((weights * hits).sum(), rel=1e-6)


def test_extreme_logits_stay_finite():
    logits = jnp.array([[1e4, -1e4, 0.0]])
    grad = jax.grad(lambda x: 2 * cross_entropy(x, jnp.array([1]), jnp.ones(1))[0])(logits)
    np.testing.assert_allclose(grad, [[2.0, -2.0, 0.0]])


@pytest.mark.parametrize("chunk", [1, 2, 4, 8])
def test_chunked_equals_plain(chunk: int):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, head = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (D, V))
    batch = {"t": jax.random.randint(keys[2], (B, T), 0, V), "w": jax.random.uniform(keys[3], (B, T))}

    def sums(logits, batch):
        return cross_entropy(logits, batch["t"], batch["w"], 0.1, 0.01)

    def plain(head, hidden):
        return sums(hidden @ head["kernel"], batch)

    def chunked(head, hidden):
        return chunked_sums(lambda x: x @ head["kernel"], sums, hidden, batch, chunk)

    def scaled(f):  # a cotangent other than 1
        return lambda *x: (lambda out: (2.5 * out[0], out))(f(*x))

    arguments = ({"kernel": head, "unused": jnp.ones(2)}, hidden)
    expected, got = (jax.jit(jax.value_and_grad(scaled(f), (0, 1), has_aux=True))(*arguments) for f in (plain, chunked))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, expected)
    # Without differentiation it is another program.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), jax.jit(chunked)(*arguments), expected[0][1])


def test_chunks_bound_memory():
    """Eight chunks of [B, T, V] take less than a third of the whole's temporaries."""
    rows, length, width, vocab = 4, 128, 16, 4096

    def temporaries(chunk: int) -> int:
        def total(head, hidden, targets):
            batch = {"t": targets}
            sums = lambda logits, b: cross_entropy(logits, b["t"], jnp.ones(b["t"].shape))  # noqa: E731
            if chunk == length:
                return sums(hidden @ head, batch)[0]
            return chunked_sums(lambda x: x @ head, sums, hidden, batch, chunk)[0]

        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((width, vocab), (rows, length, width))]
        targets = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        return jax.jit(jax.grad(total, (0, 1))).lower(*shapes, targets).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(length // 8) < temporaries(length) / 3


class Constant:
    """A model that predicts the same distribution everywhere."""

    def __init__(self, logits: np.ndarray):
        self._logits = jnp.asarray(logits, jnp.float32)

    def hidden(self, tokens, *, positions, segments, key=None):
        return jnp.zeros((*tokens.shape, 1))

    def logits(self, hidden):
        return hidden + self._logits


def a_batch() -> dict[str, jax.Array]:
    targets = jnp.array([[0, 1, 2, 3], [0, 0, 0, 0]])
    return {
        "tokens": targets,
        "targets": targets,
        "segments": jnp.ones((2, 4), int),
        "positions": jnp.zeros((2, 4), int),
        "weights": jnp.array([[1.0, 1, 1, 1], [1, 1, 0, 0]]),
        "bytes": jnp.array([[1, 1, 1, 0], [4, 1, 1, 1]]),
    }


def test_summary_of_the_uniform_model():
    objective = NextToken()
    loss = objective.loss(Constant(np.zeros(8)), a_batch(), jax.random.key(0))
    figures = objective.summary(float(loss.total), float(loss.weight), {k: float(v) for k, v in loss.metrics.items()})
    assert loss.weight == 6
    assert figures["loss"] == pytest.approx(math.log(8), rel=1e-6)
    assert figures["perplexity"] == pytest.approx(8, rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(6 * 3 / 8, rel=1e-6)  # six tokens of three bits, eight bytes


def test_evaluation_measures_the_likelihood_alone():
    regularised = NextToken(label_smoothing=0.3, z_loss=0.1)
    model = Constant(np.arange(8.0))
    evaluated = regularised.loss(model, a_batch(), None)
    assert float(evaluated.total) == pytest.approx(float(NextToken().loss(model, a_batch(), None).total))
    assert float(evaluated.total) != pytest.approx(float(regularised.loss(model, a_batch(), jax.random.key(0)).total))


def test_chunks_must_divide_the_length():
    with pytest.raises(UserError, match=r"--objective.chunk 3 does not divide the length 4"):
        NextToken(chunk=3).loss(Constant(np.zeros(8)), a_batch(), None)


class Denoiser:
    """Predicts `share` of the noise, which it knows because images are 0; keeps the times that it was asked for."""

    config = SimpleNamespace(schedule="cosine", timesteps=1000)

    def __init__(self, share: float):
        self.share, self.times, self.key = share, None, None

    def __call__(self, x: jax.Array, t: jax.Array, *, key: Any) -> jax.Array:
        self.times, self.key = np.asarray(t), key
        sigma = jnp.sqrt(schedules.cosine(1000).variance(t))
        return self.share * x / sigma[:, None, None, None]


def blank(rows: int) -> dict[str, jax.Array]:
    return {"images": jnp.zeros((rows, 8, 8, 1)), "weights": jnp.ones(rows)}


@pytest.mark.parametrize("key", [None, jax.random.key(3)], ids=["evaluation", "training"])
def test_noise_prediction_is_the_mean_square_of_what_is_missed(key) -> None:
    objective, batch = NoisePrediction(), blank(256)
    none, half, all_of_it = (objective.loss(Denoiser(share), batch, key) for share in (0.0, 0.5, 1.0))
    assert float(none.weight) == 256
    # 16384 squares of standard normals: mean 1, standard error 0.011.
    assert objective.summary(float(none.total), 256.0, {})["loss"] == pytest.approx(1.0, abs=0.05)
    assert float(half.total) == pytest.approx(float(none.total) / 4, rel=1e-4)
    assert float(all_of_it.total) == pytest.approx(0.0, abs=1e-6)


def test_noise_prediction_weighs_images() -> None:
    batch = blank(6) | {"weights": jnp.array([1.0, 1, 0, 1, 0, 0])}
    objective = NoisePrediction()
    some, every = (objective.loss(Denoiser(0.0), b, None) for b in (batch, blank(6)))
    assert float(some.weight) == 3 and 0 < float(some.total) < float(every.total)
    poisoned = batch | {"images": batch["images"].at[2].set(7.0)}
    assert float(objective.loss(Denoiser(0.0), poisoned, None).total) == float(some.total)


def test_noise_prediction_evaluates_with_the_same_noise_at_the_same_times() -> None:
    objective, denoiser = NoisePrediction(), Denoiser(0.3)
    first = objective.loss(denoiser, blank(50), None)
    np.testing.assert_array_equal(denoiser.times, spread_times(50, 1000))
    assert denoiser.key is None
    assert float(objective.loss(denoiser, blank(50), None).total) == float(first.total)


def test_noise_prediction_trains_at_random_times_with_fresh_noise() -> None:
    objective, denoiser = NoisePrediction(), Denoiser(0.3)
    totals, times = set(), []
    for seed in range(4):
        totals.add(float(objective.loss(denoiser, blank(100), jax.random.key(seed)).total))
        times.append(denoiser.times)
        assert denoiser.key is not None
    assert len(totals) == 4
    drawn = np.concatenate(times)
    assert drawn.min() >= 0 and drawn.max() < 1000
    # 400 draws, uniform: mean 499.5, standard error 14.4.
    assert abs(drawn.mean() - 499.5) < 60 and len(set(drawn.tolist())) > 250


@pytest.mark.parametrize("timesteps", [10, 1000, 65536])
def test_every_run_of_rows_has_evenly_spread_times(timesteps) -> None:
    times = np.asarray(spread_times(200, timesteps))
    assert times.min() >= 0 and times.max() < timesteps
    for start, rows in ((0, 200), (0, 20), (37, 50)):
        # Gaps of multiples of the golden ratio are below (1 + golden ratio) / rows.
        ordered = np.sort(times[start : start + rows])
        assert np.diff(ordered).max() <= 2.7 * timesteps / rows + 1
        assert ordered[0] <= 2.7 * timesteps / rows and ordered[-1] >= timesteps * (1 - 2.7 / rows) - 1
