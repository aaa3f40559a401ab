"""Heads of encoder-decoders: what is scored from which states, and how published configs and tensors say so."""

import dataclasses
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.layers.dropout import dropout, split
from zoo.layers.linear import Initializer, LayerError, Linear
from zoo.models import published
from zoo.models.published import Weight, linear, number, published_labels, read_labels

HEADS = {
    "lm": "scores of the next word at each token of the decoder",
    "none": "none: the states of the decoder",
    "encoder": "none, and no decoder: the states of the source",
    "sequence_classification": "scores of classes, from the decoder's state at the source's last token of eos",
    "token_classification": "scores of classes of each token of the source; no decoder",
    "question_answering": "scores that an answer starts, and that it ends, at a token of the decoder",
}
"""What an encoder-decoder may give; a family says which of them it is published with."""

SOURCE_ALONE = ("encoder", "token_classification")
"""Heads of models without a decoder."""

AS_SOURCE = ("sequence_classification", "question_answering")
"""Heads whose decoder reads the source again, one token later, where it is given no tokens."""

SCORES_CLASSES = (*AS_SOURCE, "token_classification")
"""Heads that score classes."""


def check_head(config: Any, known: Collection[str]) -> None:
    """Raises LayerError as published.check_head does, and where classes of a text have no place to be scored at."""
    published.check_head(config, known)
    if config.head == "sequence_classification" and not config.special_tokens.eos:
        raise LayerError("special_tokens without eos: sequence_classification scores the state where a source ends")


def read_head(fields: Mapping[str, Any], family: str, head: str) -> dict[str, Any]:
    """labels, problem_type and classifier_dropout of a config.json, as far as a head has them."""
    if head not in SCORES_CLASSES:
        return {}
    found = read_labels(fields, family, head)
    if head != "question_answering":
        found["classifier_dropout"] = number(fields, "classifier_dropout", 0.0)
    return found


def published_head(config: Any) -> dict[str, Any]:
    """The fields that `read_head` reads.

    The two names that nobody gave are written too: a BART has three unless told.
    """
    if config.head not in SCORES_CLASSES:
        return {}
    fields = published_labels(config, always=True)
    return fields if config.head == "question_answering" else fields | {"classifier_dropout": config.classifier_dropout}


def head_flops(config: Any, source: int, length: int) -> float:
    """Multiply-adds of the head of one example of (S, T)."""
    classes = config.width * len(config.labels)
    return {
        "lm": length * config.width * config.vocab_size,
        "none": 0,
        "encoder": 0,
        "sequence_classification": config.width**2 + classes,
        "token_classification": source * classes,
        "question_answering": length * classes,
    }[config.head]


class Classifier(nnx.Module):
    """Scores of classes from states [..., D], float32: a linear map, with tanh of another before it of a whole text."""

    def __init__(self, config: Any, *, init: Initializer, rngs: nnx.Rngs):
        # As published, answers are scored without dropout.
        self.dropout = 0.0 if config.head == "question_answering" else config.classifier_dropout
        precision = dataclasses.replace(config.precision, compute="float32")
        make = partial(Linear, config.width, init=init, rngs=rngs, precision=precision)
        of_text = config.head == "sequence_classification"
        self.dense = make(config.width, axes=("embed", "embed")) if of_text else None
        self.scores = make(len(config.labels), axes=("embed", "classes"))

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        first, second = split(key, 2)
        x = dropout(x, self.dropout, first)
        if self.dense is not None:
            x = dropout(jnp.tanh(self.dense(x)), self.dropout, second)
        return self.scores(x)


def classifier(config: Any, *, init: Initializer, rngs: nnx.Rngs) -> Classifier | None:
    """What the config's head scores classes with; None of a head that scores none."""
    return Classifier(config, init=init, rngs=rngs) if config.head in SCORES_CLASSES else None


def classifier_weights(head: str) -> tuple[Weight, ...]:
    """The published tensors of a Classifier; none of a head that scores no classes."""
    names = {"token_classification": "classifier", "question_answering": "qa_outputs"}
    if head == "sequence_classification":
        dense = linear("classification_head.dense", "classifier.dense", "e d -> d e", "d -> d")
        return (*dense, *linear("classification_head.out_proj", "classifier.scores", "c d -> d c", "c -> c"))
    return linear(names[head], "classifier.scores", "c d -> d c", "c -> c") if head in names else ()
