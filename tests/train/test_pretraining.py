"""What each objective teaches: a small model learns a real text by heart, and without the objective's key part not."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from zoo.layers.attention import MultiHeadAttention
from zoo.layers.feedforward import FeedForward
from zoo.layers.linear import Embed, normal
from zoo.layers.norms import LayerNorm
from zoo.layers.positions import LearnedPositions
from zoo.layers.transformer import Block, Stack
from zoo.models.bert import BertConfig
from zoo.models.encoder_decoder import EncoderDecoder
from zoo.train.data import topics
from zoo.train.data.masking import Masking
from zoo.train.data.sentence_pairs import NEXT, OTHER, SentencePairs, joined
from zoo.train.data.span_corruption import Spans, noise_mask, with_sentinels
from zoo.train.data.vocabulary import Vocabulary, vocabulary
from zoo.train.data.words import Boundaries
from zoo.train.objectives import MaskedLM, SequenceToSequence

Batch = dict[str, np.ndarray]

ROWS, COPIES, LENGTH, STEPS = 8, 2, 32, 250


def trained(objective: Any, model: Any, batch: Callable[[int], Batch], steps: int, rate: float = 5e-3) -> Any:
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
    model = trained(MaskedLM(), bert(words), lambda step: masked(batch, words, step, **shares), steps=STEPS)
    hidden = masked(batch, words, 10_000, kept=0.0, replaced=0.0)
    found = figures(MaskedLM(), model, hidden)
    print(found)
    if ablated:
        assert figures(MaskedLM(), model, masked(batch, words, 10_000, **shares))["loss"] < 0.1
        assert found["accuracy"] < 0.5
    else:
        assert found["accuracy"] > 0.95 and found["loss"] < 0.3
        assert found["next_sentence_accuracy"] == 1.0


@dataclass(frozen=True)
class CopierConfig:
    """Of a pre-norm encoder-decoder with learned positions."""

    vocab_size: int
    max_length: int = 64
    width: int = 64
    num_layers: int = 2

    def build(self, rngs: nnx.Rngs) -> "Copier":
        return Copier(self, rngs)


class Copier(EncoderDecoder):
    def __init__(self, config: CopierConfig, rngs: nnx.Rngs):
        self.config, width = config, config.width
        init = normal(width**-0.5)

        def block(rngs: nnx.Rngs, cross: bool) -> Block:
            attention = [MultiHeadAttention(width, 4, rngs=rngs, init=init) for _ in range(1 + cross)]
            feedforward = FeedForward(width, 2 * width, rngs=rngs, init=init)
            return Block(
                attention[0], feedforward, lambda: LayerNorm(width), cross_attention=attention[1] if cross else None
            )

        self.embed, self.unembed = Embed(config.vocab_size, width, rngs=rngs), None
        self.positions = LearnedPositions(config.max_length, width, rngs=rngs)
        self.encoder = Stack(lambda rngs: block(rngs, False), config.num_layers, rngs=rngs)
        self.decoder = Stack(lambda rngs: block(rngs, True), config.num_layers, rngs=rngs)
        self.norm = LayerNorm(width)

    def embedded(self, tokens: jax.Array, positions: jax.Array, key: Any, *, decoding: bool) -> jax.Array:
        return self.embed(tokens) + self.positions(positions)

    def ended(self, x: jax.Array, key: Any, *, decoding: bool) -> jax.Array:
        return self.norm(x)


def spans_batch(text: np.ndarray, words: Vocabulary, step: int, shown: bool = False) -> Batch:
    """Rows of text [B, T] with corrupted spans; `shown`: what a sentinel stands for is left behind it."""
    spans = Spans.of(text.shape[1], 0.2, 1.0)  # Of one word each: none tells of the next.
    noise = noise_mask(spans, step * len(text) + np.arange(len(text)), 0)
    sentinels = np.array([words.roles[f"sentinel {i}"] for i in range(spans.spans)])
    pad, end = words.roles["pad"], words.roles["end"]
    sources = with_sentinels(text, noise, sentinels, end, spans.inputs)
    if shown:
        firsts = [np.flatnonzero(np.diff(np.pad(row, (1, 0)).astype(int)) == 1) for row in noise]
        sources = np.stack([np.insert(row, first, sentinels) for row, first in zip(text, firsts, strict=True)])
    targets = with_sentinels(text, ~noise, sentinels, end, spans.targets)
    tokens = np.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=pad)
    # What is predicted is the noise: sentinels are known from their number alone.
    weights = (targets < words.text).astype(np.float32)
    return {"sources": sources, "tokens": tokens, "targets": targets, "weights": weights}


@pytest.mark.parametrize("ablated", [False, True], ids=["taken away", "shown"])
def test_spans_of_a_text_known_by_heart(text: Text, ablated: bool) -> None:
    """Where spans are left in the source, a model learns to copy, and does not know what is missing."""
    words = vocabulary(text, ("pad", "end"), sentinels=5)
    rows = np.repeat(np.concatenate(text.documents)[: ROWS * 24].reshape(ROWS, 24), COPIES, axis=0)
    model = CopierConfig(words.size).build(nnx.Rngs(0))
    objective = SequenceToSequence()
    model = trained(objective, model, lambda step: spans_batch(rows, words, step, ablated), steps=STEPS)
    found = figures(objective, model, spans_batch(rows, words, 10_000))
    print(found, figures(objective, model, spans_batch(rows, words, 10_000, ablated)))
    if ablated:
        assert figures(objective, model, spans_batch(rows, words, 10_000, ablated))["accuracy"] > 0.95
        assert found["accuracy"] < 0.5
    else:
        assert found["accuracy"] > 0.95
