"""What each objective teaches: a small model learns a real text by heart, and without the objective's key part not."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from zoo.models.bert import BertConfig
from zoo.models.t5 import T5Config
from zoo.models.xlnet import XLNetConfig
from zoo.train.data import topics
from zoo.train.data.draws import uniform
from zoo.train.data.masking import Masking
from zoo.train.data.permuted_text import factorisation
from zoo.train.data.sentence_pairs import NEXT, OTHER, SentencePairs, joined
from zoo.train.data.span_corruption import Spans, noise_mask, with_sentinels
from zoo.train.data.vocabulary import Vocabulary, vocabulary
from zoo.train.data.words import Boundaries
from zoo.train.objectives import MaskedLM, PermutationLM, SequenceToSequence

Batch = dict[str, np.ndarray]

ROWS, COPIES, LENGTH, STEPS = 8, 4, 32, 200


def trained(objective: Any, model: Any, batch: Callable[[int], Batch], steps: int = STEPS, rate: float = 1e-2) -> Any:
    """`model` after `steps` of Adam on batch(0), batch(1) and so on, one program."""
    schedule = optax.cosine_onecycle_schedule(steps, rate)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def step(carry: Any, batch: Any) -> Any:
        model, state = carry

        def mean(model: Any) -> jax.Array:
            loss = objective.loss(model, batch, jax.random.key(0))
            return loss.total / loss.weight

        updates, state = optimizer.update(jax.grad(mean)(model), state)
        return (optax.apply_updates(model, updates), state), None

    @jax.jit
    def run(model: Any, batches: Any) -> Any:
        return jax.lax.scan(step, (model, optimizer.init(model)), batches)[0][0]

    return run(model, jax.tree.map(lambda *each: np.stack(each), *map(batch, range(steps))))


def figures(objective: Any, model: Any, batch: Batch) -> dict[str, float]:
    loss = jax.jit(lambda model, batch: objective.loss(model, batch, None))(model, batch)
    total, weight, metrics = jax.tree.map(float, loss)
    return objective.summary(total, weight, metrics)


@dataclass(frozen=True)
class Text:
    """Topics of Python's language reference, word by word: what a Tokenizer says of itself, and documents of ids."""

    texts: list[str]
    documents: list[np.ndarray]
    special: ClassVar[dict[str, int]] = {}

    @property
    def vocab_size(self) -> int:
        return len(self.texts)

    @property
    def end_of_text(self) -> int:
        return len(self.texts) - 1


@pytest.fixture(scope="module")
def text() -> Text:
    topic = list(topics.read_topics().values())
    documents = [document.split()[:70] for document in topic[5:9]]
    texts, ids = np.unique(np.concatenate(documents), return_inverse=True)
    pieces = np.split(ids.astype(np.int32), np.cumsum([len(document) for document in documents])[:-1])
    return Text([*(f" {word}" for word in texts.tolist()), ""], pieces)


@pytest.fixture(scope="module")
def pairs(text: Text) -> tuple[Batch, Vocabulary]:
    """Eight rows of pairs, half of them of texts that follow each other, and the vocabulary."""
    words = vocabulary(text, ("pad", "classify", "separate", "mask"))
    stream = np.concatenate([[text.end_of_text, *document] for document in text.documents])
    starts = np.flatnonzero(stream == text.end_of_text)
    # Lines are too long for so short rows: every word may end a sentence.
    boundaries = replace(Boundaries.of(text.texts, words.size), line=np.ones(words.size, bool))
    made = SentencePairs(stream, starts, boundaries, LENGTH - 3, ROWS, 0).pairs(np.arange(60))
    chosen = [pair for kind in (NEXT, OTHER) for pair in [pair for pair in made if pair[2] == kind][: ROWS // 2]]
    tokens, types, lengths = joined(
        chosen, LENGTH, **{role: words.roles[role] for role in ("classify", "separate", "pad")}
    )
    real = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
    kind = np.array([pair[2] for pair in chosen], np.int32)
    return {"tokens": tokens, "token_types": types, "segments": real, "next_sentence": kind}, words


def masked(batch: Batch, words: Vocabulary, step: int, **shares: float) -> Batch:
    """The rows of a batch, each with several maskings."""
    batch = {name: np.repeat(each, COPIES, axis=0) for name, each in batch.items()}
    tokens = batch["tokens"]
    masking = Masking(words.roles["mask"], words.text, round(0.15 * LENGTH), **shares)
    maskable = (batch["segments"] > 0) & ~words.is_special()[tokens]
    places = np.where(maskable, np.arange(LENGTH), -1)
    seen, places, weights = masking(tokens, places, step * len(tokens) + np.arange(len(tokens)), 0)
    targets = np.take_along_axis(tokens, places, axis=1)
    return batch | {"tokens": seen, "places": places, "targets": targets, "weights": weights}


def bert(words: Vocabulary) -> Any:
    sizes = {"num_layers": 2, "width": 64, "num_heads": 4, "mlp_width": 128, "max_length": LENGTH}
    dropouts = {"dropout": 0.0, "attention_dropout": 0.0}
    return BertConfig(vocab_size=words.size, head="pretraining", **sizes, **dropouts).build(nnx.Rngs(0))


@pytest.mark.parametrize("ablated", [False, True], ids=["masked", "shown"])
def test_masked_words_of_a_text_known_by_heart(pairs: tuple[Batch, Vocabulary], ablated: bool) -> None:
    """Where what is predicted was never masked in training, a model learns to copy, and fills no masks."""
    batch, words = pairs
    shares = {"kept": 1.0, "replaced": 0.0} if ablated else {}
    model = trained(MaskedLM(), bert(words), lambda step: masked(batch, words, step, **shares), 130)
    hidden = masked(batch, words, 10_000, kept=0.0, replaced=0.0)
    found = figures(MaskedLM(), model, hidden)
    if ablated:
        assert figures(MaskedLM(), model, masked(batch, words, 10_000, **shares))["loss"] < 0.1
        assert found["accuracy"] < 0.5
    else:
        assert found["accuracy"] > 0.95 and found["loss"] < 0.3
        assert found["next_sentence_accuracy"] == 1.0


def rows_of(text: Text, rows: int, length: int) -> np.ndarray:
    """The beginning of the text in so many rows, each several times: [ROWS * COPIES, length]."""
    cut = np.concatenate(text.documents)[: rows * length].reshape(rows, length)
    return np.repeat(cut, ROWS * COPIES // rows, axis=0)


def spans_batch(text: np.ndarray, words: Vocabulary, step: int, apart: bool = False) -> Batch:
    """Rows of text [B, T] with corrupted spans; `apart`: targets are of other spans than the source's."""
    index = step * len(text) + np.arange(len(text))
    spans = Spans.of(text.shape[1], 0.15, 1.0)  # Of one word each: none tells of the next.
    sentinels = np.array([words.roles[f"sentinel {i}"] for i in range(spans.spans)])
    pad, end = words.roles["pad"], words.roles["end"]
    targets = with_sentinels(text, ~noise_mask(spans, index, int(apart)), sentinels, end, spans.targets)
    return {
        "sources": with_sentinels(text, noise_mask(spans, index, 0), sentinels, end, spans.inputs),
        "tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=pad),
        "targets": targets,
        # Sentinels are known from their number alone.
        "weights": (targets < words.text).astype(np.float32),
    }


@pytest.mark.parametrize("ablated", [False, True], ids=["spans", "other spans"])
def test_spans_of_a_text_known_by_heart(text: Text, ablated: bool) -> None:
    """Where sentinels of source and target do not belong together in training, they do not tell what is missing."""
    words, rows = vocabulary(text, ("pad", "end"), sentinels=2), rows_of(text, 4, 16)
    sizes = {"num_layers": 2, "width": 64, "num_heads": 4, "head_dim": 16, "mlp_width": 128}
    model = T5Config(words.size, **sizes, dropout=0.0).build(nnx.Rngs(0))
    model = trained(SequenceToSequence(), model, lambda step: spans_batch(rows, words, step, ablated), 300)
    batch = spans_batch(rows, words, 10_000)
    # The first span alone: the last one ends its row.
    first = (batch["tokens"] == words.roles["sentinel 0"]).astype(np.float32)
    found = figures(SequenceToSequence(), model, batch | {"weights": first})
    assert found["accuracy"] < 0.5 if ablated else found["accuracy"] > 0.95


def permuted_batch(text: np.ndarray, step: int, forwards: bool = False) -> Batch:
    """Rows of text [B, T], a third of them to be predicted, in random orders; or all, from left to right."""
    index = step * len(text) + np.arange(len(text))
    predicted = np.argsort(uniform(index, text.shape[1], 1), axis=1) < text.shape[1] // 3
    order = factorisation(predicted, index, 0)
    if forwards:
        predicted, order = np.ones(text.shape, bool), np.broadcast_to(np.arange(text.shape[1]), text.shape)
    places = np.nonzero(predicted)[1].reshape(len(text), -1)
    return {
        "tokens": text,
        "token_types": np.zeros_like(text),
        "order": order.astype(np.int32),
        "places": places.astype(np.int32),
        "targets": np.take_along_axis(text, places, axis=1),
        "weights": np.ones(places.shape, np.float32),
    }


@pytest.mark.parametrize("ablated", [False, True], ids=["any order", "left to right"])
def test_words_in_any_order_of_a_text_known_by_heart(text: Text, ablated: bool) -> None:
    """Where orders are not permuted in training, a model knows what follows, not what stands between."""
    rows, sizes = rows_of(text, ROWS, 16), {"num_layers": 2, "width": 64, "num_heads": 4, "mlp_width": 128}
    model = XLNetConfig(text.vocab_size, head="lm", **sizes, dropout=0.0).build(nnx.Rngs(0))
    model = trained(PermutationLM(), model, lambda step: permuted_batch(rows, step, ablated))
    found = figures(PermutationLM(), model, permuted_batch(rows, 10_000))
    if ablated:
        assert figures(PermutationLM(), model, permuted_batch(rows, 10_000, ablated))["accuracy"] > 0.9
        assert found["accuracy"] < 0.5
    else:
        assert found["accuracy"] > 0.95
