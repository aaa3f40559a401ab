"""Objectives: what a model is trained for, as sums over a (micro-)batch and the figures people read off them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from zoo.diffusion import schedules
from zoo.diffusion.losses import denoising, variational_bound
from zoo.kernels import linear_cross_entropy
from zoo.layers.linear import Head
from zoo.sharding import constrain
from zoo.train.experiment import Batch, Loss, UserError


@dataclass(frozen=True)
class NextToken:
    """Cross entropy of the next token, over batches of tokens, targets, segments, positions, weights, bytes [B, T].

    The model gives `hidden(tokens, positions=, segments=, key=)` [B, T, D] and `head()`, the kernel [D, V] that scores
    them; their logits [B, T, V] are never held at once where V is large (`zoo.kernels.linear_cross_entropy`).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        hidden = model.hidden(batch["tokens"], positions=batch["positions"], segments=batch["segments"], key=key)
        weights = batch["weights"]
        # Evaluation measures the likelihood itself.
        smoothing, z_loss = (0.0, 0.0) if key is None else (self.label_smoothing, self.z_loss)
        total, metrics = word_losses(model.head(), hidden, batch, smoothing, z_loss)
        metrics["bytes"] = jnp.sum(weights * batch["bytes"])
        return Loss(total, jnp.sum(weights), metrics)

    def summary(self, total: float, weight: float, metrics: Mapping[str, float]) -> dict[str, float]:
        """loss: nats a token, as minimised (its regularisers included). The others are of the likelihood alone.

        bits_per_byte counts every token's nats over the bytes of text, so that it compares across tokenizers.
        accuracy: share of tokens whose target has the largest logit. log_z_squared: what z_loss keeps small.
        """
        bits = metrics["nll"] / math.log(2) / max(metrics["bytes"], 1.0)
        figures = word_figures(total, weight, metrics) | {"bits_per_byte": bits}
        return figures | ({"log_z_squared": metrics["z"] / max(weight, 1.0)} if self.z_loss else {})


@dataclass(frozen=True)
class MaskedLM:
    """Cross entropy of masked words and, where batches are of pairs, of what the second text is (Devlin et al. 2018).

    Batches are those of zoo.train.data.masked_text. The model gives `features(tokens, token_types=, segments=, key=)`,
    hidden [B, T, D] and pooled [B, D]; `words` and `head()`, which score the hidden states of the places that are
    predicted alone; and `next_sentence`, pooled states to scores [B, 2].
    """

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        """Sums are of words, and of pairs as many times: both means are added, of each micro-batch."""
        features = model.features(
            batch["tokens"], token_types=batch.get("token_types"), segments=batch["segments"], key=key
        )
        states = jnp.take_along_axis(features.hidden, batch["places"][..., None], axis=1)
        states = model.words(constrain(states, "act_batch", None, "act_embed"))
        total, metrics = word_losses(model.head(), states, batch)
        weight = jnp.sum(batch["weights"])
        if "next_sentence" in batch:
            real = jnp.any(batch["weights"] > 0, axis=1).astype(jnp.float32)
            scores, kinds = model.next_sentence(features.pooled), batch["next_sentence"]
            nll = -jnp.take_along_axis(jax.nn.log_softmax(scores), kinds[:, None], axis=1)[:, 0]
            metrics |= {
                "pairs": jnp.sum(real),
                "pair_nll": jnp.sum(real * nll),
                "pair_correct": jnp.sum(real * (jnp.argmax(scores, axis=1) == kinds)),
            }
            total += weight * metrics["pair_nll"] / jnp.maximum(metrics["pairs"], 1)
        return Loss(total, weight, metrics)

    def summary(self, total: float, weight: float, metrics: Mapping[str, float]) -> dict[str, float]:
        """loss: nats of a masked word and, where there are pairs, of a pair.

        perplexity, accuracy: of masked words.  next_sentence_loss, next_sentence_accuracy: of pairs.
        """
        figures = word_figures(metrics["nll"], weight, metrics)
        if "pairs" not in metrics:
            return figures
        pairs = max(metrics["pairs"], 1.0)
        of_pairs = metrics["pair_nll"] / pairs
        figures["loss"] += of_pairs
        return figures | {
            "next_sentence_loss": of_pairs,
            "next_sentence_accuracy": metrics["pair_correct"] / pairs,
        }


@dataclass(frozen=True)
class SequenceToSequence:
    """Cross entropy of a target's tokens given a source, over batches of sources [B, S] and tokens, targets,
    weights [B, T].

    Sources that pad come with source_segments [B, S]. The model gives `hidden(sources, tokens, source_segments=, key=)`
    [B, T, D] and `head()`: see zoo.models.encoder_decoder.
    label_smoothing: Vaswani et al. 2017, section 5.4.  z_loss: T5's, which keeps logits small.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        hidden = model.hidden(batch["sources"], batch["tokens"], source_segments=batch.get("source_segments"), key=key)
        smoothing, z_loss = (0.0, 0.0) if key is None else (self.label_smoothing, self.z_loss)
        total, metrics = word_losses(model.head(), hidden, batch, smoothing, z_loss)
        return Loss(total, jnp.sum(batch["weights"]), metrics)

    def summary(self, total: float, weight: float, metrics: Mapping[str, float]) -> dict[str, float]:
        """loss: nats a token of the target, as minimised.  perplexity, accuracy: of the likelihood alone."""
        return word_figures(total, weight, metrics)


@dataclass(frozen=True)
class PermutationLM:
    """Cross entropy of tokens in a random order, each given those before it (Yang et al. 2019).

    Batches are those of zoo.train.data.permuted_text. The model gives `hidden(tokens, token_types=, order=, targets=,
    key=)`, states [B, P, D] of the places `targets` [B, P], and `head()`.
    """

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        hidden = model.hidden(
            batch["tokens"], token_types=batch["token_types"], order=batch["order"], targets=batch["places"], key=key
        )
        total, metrics = word_losses(model.head(), hidden, batch)
        return Loss(total, jnp.sum(batch["weights"]), metrics)

    def summary(self, total: float, weight: float, metrics: Mapping[str, float]) -> dict[str, float]:
        """loss: nats of a predicted token.  perplexity, accuracy: of predicted tokens."""
        return word_figures(total, weight, metrics)


def word_losses(
    head: Head, hidden: jax.Array, batch: Batch, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum over a batch's targets [B, T], with its weights, and further sums: see linear_cross_entropy."""
    total, metrics = linear_cross_entropy(
        hidden,
        head.kernel,
        batch["targets"],
        batch["weights"],
        bias=head.bias,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        vocabulary=head.vocabulary,
        precision=head.precision,
    )
    return total, dict(metrics)


def word_figures(total: float, weight: float, metrics: Mapping[str, float]) -> dict[str, float]:
    """loss, and the perplexity and accuracy of what `word_losses` summed."""
    weight = max(weight, 1.0)
    return {
        "loss": total / weight,
        "perplexity": math.exp(min(metrics["nll"] / weight, 700.0)),
        "accuracy": metrics["correct"] / weight,
    }


@dataclass(frozen=True)
class Denoising:
    """Mean squared error of what a denoising network predicts at random times, over batches of images, weights [B].

    A network that says a variance as well (`learned_sigma` in its config) learns it from the variational bound, beside
    the error and without a say in the prediction (Nichol and Dhariwal 2021, equation 16).

    The noise and the target are the model's: `model.config.noising`. A model of classes (`num_classes` in its config)
    is given those of `labels` [B] as well, a model of texts (`text` in its config) `tokens` [B, S].
    weighting, gamma: "simple", or "min_snr" (Hang et al. 2023), see zoo.diffusion.losses.weights.
    bound_weight: what the bound counts beside the error there, in bits per dimension of the whole chain.
    times: "uniform", or on the schedule "flow" also "logit_normal", of Esser et al. 2024.
    class_dropout: share of images that come as of no class, for guidance (Ho and Salimans 2022).
    caption_dropout: share of images whose text is the empty one, for the same.
    bits_per_dimension: whether evaluations sum up the variational bound as well, of images of 8 bits. It asks the
    network as often as the schedule has steps.
    """

    weighting: Literal["simple", "min_snr"] = "simple"
    gamma: float = 5.0
    bound_weight: float = 1e-3
    times: Literal["uniform", "logit_normal"] = "uniform"
    class_dropout: float = 0.0
    caption_dropout: float = 0.0
    bits_per_dimension: bool = False

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        schedule = schedules.make(model.config.noising)
        images, weights = batch["images"], batch["weights"]
        self._check(model.config, schedule)
        rows = images.shape[0]
        if key is None:
            # The same times and noise at every evaluation, and plain errors: losses differ by the model alone.
            noise_key, drop_key, dropout_key, weighting = jax.random.key(0), None, None, "simple"
            times = spread_times(rows, schedule.timesteps) + schedule.least_time
        else:
            time_key, noise_key, drop_key, dropout_key = jax.random.split(key, 4)
            times, weighting = self._times(schedule, rows, time_key), self.weighting
        given = self._given(model.config, batch, drop_key)

        def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
            return model(x, t, key=dropout_key, **given)

        losses = denoising(
            denoise,
            schedule,
            images,
            times,
            jax.random.normal(noise_key, images.shape),
            weighting=weighting,
            gamma=self.gamma,
            bound_weight=self.bound_weight,
        )
        metrics = {}
        if key is None and self.bits_per_dimension:
            variance = "learned" if getattr(model.config, "learned_sigma", False) else "small"
            bound = variational_bound(denoise, schedule, images, noise_key, variance=variance)
            metrics["bits"] = jnp.sum(weights * bound.total)
        return Loss(jnp.sum(weights * losses), jnp.sum(weights), metrics)

    def summary(self, total: float, weight: float, metrics: Mapping[str, float]) -> dict[str, float]:
        """loss: squared error of what is predicted, a pixel and channel, weighted in training alone.

        Of noise, 1 is that of predicting none. Where a variance is learned, what its bound counts is added.
        bits_per_dimension: a bound on what a pixel and channel takes to store, where it is asked for; of images given
        their classes, where the model is told those.
        """
        weight = max(weight, 1.0)
        bits = {"bits_per_dimension": metrics["bits"] / weight} if "bits" in metrics else {}
        return {"loss": total / weight} | bits

    def _given(self, config: Any, batch: Batch, key: jax.Array | None) -> dict[str, jax.Array]:
        """What the network is told beside images and times; a share of it, with a key, is that there is nothing."""
        told: tuple[str, jax.Array, jax.Array, float] | None = None
        if (classes := getattr(config, "num_classes", None)) is not None:
            told = ("classes", batch["labels"], jnp.asarray(classes), self.class_dropout)
        elif getattr(config, "text", None) is not None:
            told = ("tokens", batch["tokens"], jnp.array(config.blank), self.caption_dropout)
        if told is None:
            return {}
        name, values, none, share = told
        if key is not None and share:
            drops = jax.random.bernoulli(key, share, values.shape[:1])
            values = jnp.where(drops.reshape(-1, *(1,) * (values.ndim - 1)), none.astype(values.dtype), values)
        return {name: values}

    def _times(self, schedule: schedules.Discrete | schedules.Flow, rows: int, key: jax.Array) -> jax.Array:
        if isinstance(schedule, schedules.Discrete):
            return jax.random.randint(key, (rows,), 0, schedule.timesteps)
        if self.times == "logit_normal":
            return schedule.timesteps * jax.nn.sigmoid(jax.random.normal(key, (rows,)))
        return schedule.timesteps * jax.random.uniform(key, (rows,))

    def _check(self, config: Any, schedule: schedules.Discrete | schedules.Flow) -> None:
        for name, share in (("class", self.class_dropout), ("caption", self.caption_dropout)):
            if not 0 <= share <= 1:
                raise UserError(f"--objective.{name}-dropout {share} is not a share: choose from 0 to 1")
        if self.caption_dropout and getattr(config, "text", None) is None:
            raise UserError(f"--objective.caption-dropout {self.caption_dropout} needs a model of texts: leave it at 0")
        if self.class_dropout and not getattr(config, "null_class", False):
            raise UserError(
                f"--objective.class-dropout {self.class_dropout} needs a row for no class: "
                "set the model's num_classes and null_class, or leave it at 0"
            )
        if not 0 <= self.bound_weight < math.inf:
            raise UserError(f"--objective.bound-weight {self.bound_weight} is no weight: choose a number from 0")
        if getattr(config, "learned_sigma", False) and isinstance(schedule, schedules.Flow):
            raise UserError(
                "--model.learned-sigma is of schedules with steps, and the noise schedule is flow: "
                "give --model.no-learned-sigma"
            )
        if self.times == "logit_normal" and isinstance(schedule, schedules.Discrete):
            raise UserError(
                f"--objective.times logit_normal is of the noise schedule flow, not {config.noising.schedule}"
            )


@dataclass(frozen=True)
class Classification:
    """Cross entropy of the class of an image, over batches of images, labels, weights [B].

    The model gives `model(images, key=).logits` [B, number of classes].
    label_smoothing: share of the target that all classes get alike (Szegedy et al. 2016), in training alone.
    """

    label_smoothing: float = 0.0

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        labels, weights = batch["labels"], batch["weights"]
        logits = model(batch["images"], key=key).logits
        likelihoods = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(likelihoods, labels[:, None], -1)[:, 0]
        smoothing = 0.0 if key is None else self.label_smoothing
        losses = (1 - smoothing) * nll - smoothing * likelihoods.mean(-1)
        correct = (logits.argmax(-1) == labels).astype(jnp.float32)
        return Loss(jnp.sum(weights * losses), jnp.sum(weights), {"correct": jnp.sum(weights * correct)})

    def summary(self, total: float, weight: float, metrics: Mapping[str, float]) -> dict[str, float]:
        """loss: nats an image, as minimised.  accuracy: share of images whose class has the largest logit."""
        weight = max(weight, 1.0)
        return {"loss": total / weight, "accuracy": metrics["correct"] / weight}


@dataclass(frozen=True)
class Autoencoding:
    """Error of images that went through a latent, and its divergence from noise, over batches of images, weights [B].

    The model gives `model(images, key=)`, images [B, Y, X, C] and a posterior with `kl()` [B]: zoo.models.autoencoder.
    It is the objective of Rombach et al. 2022 without its perceptual distance and its discriminator, so that details
    which are costly to get right come out smooth. Both terms are taken per pixel and channel.
    error: "absolute", the paper's, or "squared".  kl_weight: of the divergence, in nats.
    """

    kl_weight: float = 1e-6
    error: Literal["absolute", "squared"] = "absolute"

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        """With a key latents are drawn, without one they are the means."""
        images, weights = batch["images"], batch["weights"]
        out = model(images, key=key)
        difference = out.images - images
        each = jnp.abs(difference) if self.error == "absolute" else jnp.square(difference)
        errors, kl = each.mean((1, 2, 3)), out.posterior.kl()
        losses = errors + self.kl_weight * kl / math.prod(images.shape[1:])
        power = jnp.square(out.latents).mean((1, 2, 3))
        sums = {"error": errors, "kl": kl, "power": power}
        return Loss(
            jnp.sum(weights * losses), jnp.sum(weights), {name: jnp.sum(weights * x) for name, x in sums.items()}
        )

    def summary(self, total: float, weight: float, metrics: Mapping[str, float]) -> dict[str, float]:
        """loss: as minimised.  error: of a pixel and channel, in images from -1 to 1.  kl: nats an image.

        latent_rms: root mean square of latents; a model of them is told them divided by it (config.scaling_factor).
        """
        weight = max(weight, 1.0)
        figures = {"loss": total / weight, "error": metrics["error"] / weight, "kl": metrics["kl"] / weight}
        return figures | {"latent_rms": math.sqrt(metrics["power"] / weight)}


def spread_times(rows: int, timesteps: int) -> jax.Array:
    """[rows] int32 in 0 .. timesteps - 1 (at most 65536), of which every run of rows covers the range evenly.

    Multiples of the golden ratio modulo 1, in 32-bit arithmetic: a batch whose last rows only pad it has times of all
    sizes among its real ones.
    """
    fractions = jnp.arange(rows, dtype=jnp.uint32) * jnp.uint32(2654435769)
    return ((fractions >> 16) * jnp.uint32(timesteps) >> 16).astype(jnp.int32)
