"""Objectives: what is summed and what is reported."""

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.diffusion import schedules
from zoo.diffusion.losses import variational_bound
from zoo.layers.linear import Head
from zoo.models.noising import Noising
from zoo.train.experiment import UserError
from zoo.train.objectives import (
    Classification,
    Denoising,
    MaskedLM,
    NextToken,
    PermutationLM,
    SequenceToSequence,
    spread_times,
)


class Constant:
    """A model that predicts the same distribution everywhere."""

    def __init__(self, logits: np.ndarray):
        self._logits = jnp.asarray(logits, jnp.float32)

    def hidden(self, tokens, *, positions, segments, key=None):
        return jnp.ones((*tokens.shape, 1))

    def head(self):
        return Head(self._logits[None], len(self._logits))


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


class Reader:
    """A model that gives every place the same scores, of words and of pairs; keeps what it was asked for."""

    def __init__(self, words: np.ndarray, pairs: np.ndarray | None = None):
        self._words = Constant(words)
        self.head, self._pairs = self._words.head, pairs

    def features(self, tokens: jax.Array, *, token_types: Any, segments: jax.Array, key: Any) -> Any:
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.float32)[None, :, None], (*tokens.shape, 1))
        return SimpleNamespace(hidden=places, pooled=None)

    def words(self, states: jax.Array) -> jax.Array:
        self.asked = np.asarray(states[..., 0])
        return jnp.ones_like(states)

    def next_sentence(self, pooled: None) -> jax.Array:
        return jnp.asarray(self._pairs, jnp.float32)

    def hidden(self, *inputs: jax.Array, **arguments: Any) -> jax.Array:
        self.given = inputs, arguments
        places = arguments.get("targets", inputs[-1])
        return jnp.ones((*places.shape, 1))


def a_masked_batch() -> dict[str, jax.Array]:
    return {
        "tokens": jnp.zeros((3, 6), int),
        "segments": jnp.ones((3, 6), int),
        "places": jnp.array([[1, 4], [2, 0], [0, 0]]),
        "targets": jnp.array([[0, 1], [0, 7], [7, 7]]),
        "weights": jnp.array([[1.0, 1], [1, 0], [0, 0]]),
    }


def test_masked_words_are_scored_at_their_places_alone():
    model = Reader(np.log(np.array([0.5, 0.25, *[0.05] * 5])))
    loss = MaskedLM().loss(model, a_masked_batch(), None)
    np.testing.assert_array_equal(model.asked, [[1, 4], [2, 0], [0, 0]])
    assert float(loss.weight) == 3 and float(loss.total) == pytest.approx(4 * math.log(2), rel=1e-6)
    figures = MaskedLM().summary(float(loss.total), 3.0, {k: float(v) for k, v in loss.metrics.items()})
    assert figures == pytest.approx({"loss": 4 / 3 * math.log(2), "perplexity": 2 ** (4 / 3), "accuracy": 2 / 3})


def test_the_means_of_words_and_pairs_are_added():
    """The third row only fills its batch."""
    pairs = np.log(np.array([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]))
    model = Reader(np.zeros(7), pairs)
    batch = a_masked_batch() | {"token_types": jnp.zeros((3, 6), int), "next_sentence": jnp.array([0, 0, 1])}
    loss = MaskedLM().loss(model, batch, None)
    expected = math.log(7) + (math.log(2) + math.log(4)) / 2
    assert float(loss.total / loss.weight) == pytest.approx(expected, rel=1e-6)
    figures = MaskedLM().summary(0.0, 3.0, {k: float(v) for k, v in loss.metrics.items()})
    assert figures["loss"] == pytest.approx(expected, rel=1e-6)
    assert figures["next_sentence_loss"] == pytest.approx(1.5 * math.log(2), rel=1e-6)
    assert figures["next_sentence_accuracy"] == 0.5


def test_what_models_of_sources_and_of_orders_are_given():
    batch = {name: jnp.zeros((2, 4), int) for name in ("sources", "tokens", "targets", "token_types", "order")}
    batch |= {"weights": jnp.ones((2, 4)), "places": jnp.zeros((2, 4), int)}
    for objective, names in ((SequenceToSequence(), ["source_segments"]), (PermutationLM(), ["order", "token_types"])):
        model = Reader(np.zeros(7))
        loss = objective.loss(model, batch, None)
        assert float(loss.weight) == 8 and float(loss.total) == pytest.approx(8 * math.log(7), rel=1e-6)
        assert set(names) <= set(model.given[1])
    smoothed = SequenceToSequence(label_smoothing=0.1, z_loss=0.1)
    model = Reader(np.arange(7.0))
    assert float(smoothed.loss(model, batch, None).total) != pytest.approx(
        float(smoothed.loss(model, batch, jax.random.key(0)).total)
    )


def test_smoothed_targets_are_shared_by_all_words() -> None:
    """Vaswani et al. 2017, section 5.4: cross entropy with (1 - e) of the target and e of the uniform distribution."""
    targets, weights = np.array([[0, 3, 6], [2, 2, 2]]), np.array([[1.0, 1, 1], [1, 0, 0]])
    batch = {"sources": targets, "tokens": targets, "targets": targets, "weights": weights}
    batch = {name: jnp.asarray(each) for name, each in batch.items()}
    loss = SequenceToSequence(label_smoothing=0.1).loss(Reader(np.arange(7.0)), batch, jax.random.key(0))
    log_p = np.arange(7.0) - np.log(np.exp(np.arange(7.0)).sum())
    goal = 0.9 * np.eye(7)[targets] + 0.1 / 7
    assert float(loss.total) == pytest.approx(-(weights[..., None] * goal * log_p).sum(), rel=1e-6)


class Denoiser:
    """Predicts `share` of the noise, which it knows because images are 0; keeps the times that it was asked for."""

    config = SimpleNamespace(noising=Noising("cosine"))

    def __init__(self, share: float):
        self.share, self.times, self.key = share, None, None

    def __call__(self, x: jax.Array, t: jax.Array, *, key: Any) -> jax.Array:
        self.times, self.key = np.asarray(t), key
        sigma = schedules.make(self.config.noising).at(t).sigma
        return self.share * x / sigma[:, None, None, None]


def blank(rows: int) -> dict[str, jax.Array]:
    return {"images": jnp.zeros((rows, 8, 8, 1)), "weights": jnp.ones(rows)}


@pytest.mark.parametrize("key", [None, jax.random.key(3)], ids=["evaluation", "training"])
def test_denoising_is_the_mean_square_of_what_is_missed(key) -> None:
    objective, batch = Denoising(), blank(256)
    none, half, all_of_it = (objective.loss(Denoiser(share), batch, key) for share in (0.0, 0.5, 1.0))
    assert float(none.weight) == 256
    # 16384 squares of standard normals: mean 1, standard error 0.011.
    assert objective.summary(float(none.total), 256.0, {})["loss"] == pytest.approx(1.0, abs=0.05)
    assert float(half.total) == pytest.approx(float(none.total) / 4, rel=1e-4)
    assert float(all_of_it.total) == pytest.approx(0.0, abs=1e-6)


def test_denoising_weighs_images() -> None:
    batch = blank(6) | {"weights": jnp.array([1.0, 1, 0, 1, 0, 0])}
    objective = Denoising()
    some, every = (objective.loss(Denoiser(0.0), b, None) for b in (batch, blank(6)))
    assert float(some.weight) == 3 and 0 < float(some.total) < float(every.total)
    poisoned = batch | {"images": batch["images"].at[2].set(7.0)}
    assert float(objective.loss(Denoiser(0.0), poisoned, None).total) == float(some.total)


def test_denoising_evaluates_with_the_same_noise_at_the_same_times() -> None:
    objective, denoiser = Denoising(), Denoiser(0.3)
    first = objective.loss(denoiser, blank(50), None)
    np.testing.assert_array_equal(denoiser.times, spread_times(50, 1000))
    assert denoiser.key is None
    assert float(objective.loss(denoiser, blank(50), None).total) == float(first.total)


def test_denoising_trains_at_random_times_with_fresh_noise() -> None:
    objective, denoiser = Denoising(), Denoiser(0.3)
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


class Labelled(Denoiser):
    """Of three classes and one for none; keeps the classes that it was asked for."""

    config = SimpleNamespace(noising=Noising("flow", target="velocity"), num_classes=3, null_class=True)

    def __call__(self, x: jax.Array, t: jax.Array, *, classes: jax.Array, key: Any) -> jax.Array:
        self.times, self.classes = np.asarray(t), np.asarray(classes)
        return jnp.zeros_like(x)


def test_denoising_gives_classes_and_drops_their_share() -> None:
    denoiser, batch = Labelled(0.0), blank(1000) | {"labels": jnp.arange(1000) % 3}
    objective = Denoising(class_dropout=0.2)
    objective.loss(denoiser, batch, None)
    np.testing.assert_array_equal(denoiser.classes, batch["labels"])
    objective.loss(denoiser, batch, jax.random.key(0))
    dropped = denoiser.classes == 3
    # Four standard errors.
    assert abs(dropped.mean() - 0.2) < 4 * 0.4 / np.sqrt(1000)
    np.testing.assert_array_equal(denoiser.classes[~dropped], batch["labels"][~dropped])


def test_bits_per_dimension_are_the_bound_of_real_rows() -> None:
    class Shrinking:
        config = SimpleNamespace(noising=Noising("cosine", 20))

        def __call__(self, x: jax.Array, t: jax.Array, *, key: Any) -> jax.Array:
            return 0.5 * x

    denoiser = Shrinking()
    images = jax.random.uniform(jax.random.key(1), (4, 2, 2, 1), minval=-1, maxval=1)
    batch = blank(4) | {"images": images, "weights": jnp.array([1.0, 1, 1, 0])}
    loss = Denoising(bits_per_dimension=True).loss(denoiser, batch, None)
    figures = Denoising().summary(float(loss.total), float(loss.weight), {"bits": float(loss.metrics["bits"])})
    bound = variational_bound(
        lambda x, t: denoiser(x, t, key=None), schedules.make(denoiser.config.noising), images, jax.random.key(0)
    )
    assert figures["bits_per_dimension"] == pytest.approx(float(bound.total[:3].mean()), rel=1e-5)
    assert not Denoising(bits_per_dimension=True).loss(denoiser, batch, jax.random.key(0)).metrics


class Saying:
    """Predicts half of x, and says of the variance that it is the larger one."""

    config = SimpleNamespace(noising=Noising("cosine", 20), learned_sigma=True)

    def __call__(self, x: jax.Array, t: jax.Array, *, key: Any) -> jax.Array:
        return jnp.concatenate([0.5 * x, jnp.ones_like(x)], -1)


class StraightSaying(Saying):
    config = SimpleNamespace(noising=Noising("flow", target="velocity"), learned_sigma=True)


def test_a_learned_variance_is_trained_and_counted() -> None:
    images = jax.random.uniform(jax.random.key(1), (4, 2, 2, 1), minval=-1, maxval=1)
    batch, key = blank(4) | {"images": images}, jax.random.key(0)
    plain, little, much = (float(Denoising(bound_weight=w).loss(Saying(), batch, key).total) for w in (0.0, 0.1, 0.2))
    assert plain < little and much - plain == pytest.approx(2 * (little - plain), rel=1e-4)
    loss = Denoising(bits_per_dimension=True).loss(Saying(), batch, None)
    bound = variational_bound(
        lambda x, t: Saying()(x, t, key=None),
        schedules.make(Saying.config.noising),
        images,
        jax.random.key(0),
        variance="learned",
    )
    assert float(loss.metrics["bits"]) == pytest.approx(float(bound.total.sum()), rel=1e-5)


def test_denoising_on_the_straight_path_has_real_times() -> None:
    denoiser, batch = Labelled(0.0), blank(2000) | {"labels": jnp.zeros(2000, int)}
    for times, deviation in (("uniform", 12**-0.5), ("logit_normal", 0.2083)):
        Denoising(times=times).loss(denoiser, batch, jax.random.key(1))
        share = denoiser.times / 1000
        assert share.min() > 0 and share.max() < 1
        assert abs(share.mean() - 0.5) < 0.03 and share.std() == pytest.approx(deviation, rel=0.05)
    Denoising().loss(denoiser, batch, None)
    assert denoiser.times.min() == 1 and denoiser.times.max() == 1000


def test_denoising_is_weighted_in_training_alone() -> None:
    plain, weighted = Denoising(), Denoising(weighting="min_snr")
    key = jax.random.key(0)
    assert float(weighted.loss(Denoiser(0.0), blank(50), None).total) == pytest.approx(
        float(plain.loss(Denoiser(0.0), blank(50), None).total)
    )
    assert float(weighted.loss(Denoiser(0.0), blank(50), key).total) < float(
        plain.loss(Denoiser(0.0), blank(50), key).total
    )


@pytest.mark.parametrize(
    ("objective", "model", "words"),
    [
        (Denoising(class_dropout=0.1), Denoiser(0.0), "class-dropout 0.1 needs a row for no class"),
        (Denoising(class_dropout=1.5), Labelled(0.0), "class-dropout 1.5 is not a share"),
        (Denoising(bound_weight=-1.0), Saying(), "bound-weight -1.0 is no weight: choose a number from 0"),
        (Denoising(), StraightSaying(), "learned-sigma is of schedules with steps, and the noise schedule is flow"),
        (Denoising(times="logit_normal"), Denoiser(0.0), "logit_normal is of the noise schedule flow, not cosine"),
    ],
)
def test_denoising_refuses_what_does_not_fit(objective, model, words) -> None:
    with pytest.raises(UserError, match=words):
        objective.loss(model, blank(2) | {"labels": jnp.zeros(2, int)}, jax.random.key(0))


class Certain:
    """A model of four classes with the same logits for every image; keeps the key that it was asked with."""

    logits = jnp.array([0.0, 2.0, 1.0, -1.0])

    def __call__(self, images: jax.Array, *, key: Any) -> Any:
        self.key = key
        return SimpleNamespace(logits=jnp.broadcast_to(self.logits, (len(images), 4)))


def labelled(*labels: int, weights: tuple[float, ...] = (1, 1, 1)) -> dict[str, jax.Array]:
    return blank(len(labels)) | {"labels": jnp.array(labels), "weights": jnp.array(weights, jnp.float32)}


def test_classification_is_cross_entropy_and_counts_what_is_right() -> None:
    model, objective = Certain(), Classification(label_smoothing=0.2)
    nll = -jax.nn.log_softmax(model.logits)
    loss = objective.loss(model, labelled(1, 0, 1, weights=(1, 1, 0)), None)
    assert model.key is None and float(loss.weight) == 2
    assert float(loss.total) == pytest.approx(float(nll[1] + nll[0]), rel=1e-6)
    figures = objective.summary(float(loss.total), 2.0, {"correct": float(loss.metrics["correct"])})
    assert figures == {"loss": pytest.approx(float(nll[1] + nll[0]) / 2, rel=1e-6), "accuracy": 0.5}


def test_classes_are_smoothed_in_training_alone() -> None:
    model, key = Certain(), jax.random.key(0)
    nll = -jax.nn.log_softmax(model.logits)
    target = jnp.array([0.05, 0.05, 0.85, 0.05])
    loss = Classification(label_smoothing=0.2).loss(model, labelled(2, 2, 2), key)
    assert model.key is key
    assert float(loss.total) == pytest.approx(3 * float(target @ nll), rel=1e-6)


@pytest.mark.parametrize("timesteps", [10, 1000, 65536])
def test_every_run_of_rows_has_evenly_spread_times(timesteps) -> None:
    times = np.asarray(spread_times(200, timesteps))
    assert times.min() >= 0 and times.max() < timesteps
    for start, rows in ((0, 200), (0, 20), (37, 50)):
        # Gaps of multiples of the golden ratio are below (1 + golden ratio) / rows.
        ordered = np.sort(times[start : start + rows])
        assert np.diff(ordered).max() <= 2.7 * timesteps / rows + 1
        assert ordered[0] <= 2.7 * timesteps / rows and ordered[-1] >= timesteps * (1 - 2.7 / rows) - 1
