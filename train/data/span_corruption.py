"""Span corruption (Raffel et al. 2019, T5, section 3.1.4): spans give way to sentinels, and are what is predicted.

As the released preprocessors make it (t5.data.preprocessors: random_spans_noise_mask, noise_span_to_unique_sentinel,
nonnoise_span_to_unique_sentinel, compute_input_and_target_lengths): how many tokens are noise, and in how many spans,
follows from the length alone, so that all rows have the same lengths and none pads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np

from zoo.train.data.draws import uniform
from zoo.train.data.packing import PackedText
from zoo.train.data.text import TokenizedText
from zoo.train.data.vocabulary import Vocabulary, vocabulary
from zoo.train.experiment import DataInfo, UserError

_NOISE, _TEXT = 31, 32  # streams of draws


class Spans(NamedTuple):
    """Of `length` tokens of text, `noise` are taken away in `spans` spans."""

    length: int
    noise: int
    spans: int

    @classmethod
    def of(cls, length: int, density: float, mean: float) -> "Spans":
        noise = min(max(round(length * density), 1), length - 1)
        spans = max(round(noise / mean), 1)
        return cls(length, noise, min(spans, noise, length - noise))

    @property
    def inputs(self) -> int:
        """Tokens left, a sentinel for each span, and the end."""
        return self.length - self.noise + self.spans + 1

    @property
    def targets(self) -> int:
        """Noise, a sentinel ahead of each span, and the end."""
        return self.noise + self.spans + 1


def fitting(inputs: int, density: float, mean: float) -> Spans:
    """Of the most text that makes no more than `inputs` input tokens; where half of it is noise, nor more targets."""
    length = max(2, inputs // 2)
    while Spans.of(length + 1, density, mean).inputs <= inputs:
        length += 1
    spans = Spans.of(length, density, mean)
    return Spans.of(length - 1, density, mean) if density == 0.5 and spans.targets > spans.inputs else spans


def noise_mask(spans: Spans, index: np.ndarray, seed: int) -> np.ndarray:
    """Which tokens are noise, bool [B, length]: text and noise in turns, beginning with text, each cut at random."""
    lengths = np.empty((len(index), 2 * spans.spans), np.int64)
    lengths[:, 0::2] = segmentation(spans.length - spans.noise, spans.spans, index, seed, _TEXT)
    lengths[:, 1::2] = segmentation(spans.noise, spans.spans, index, seed, _NOISE)
    ends = np.cumsum(lengths, axis=1)
    turn = (np.arange(spans.length)[None, :, None] >= ends[:, None, :]).sum(-1)
    return turn % 2 == 1


def segmentation(items: int, segments: int, index: np.ndarray, *key: int) -> np.ndarray:
    """Sizes of segments, int64 [B, segments]: every cut of `items` items, with none empty, is as likely."""
    order = np.argsort(uniform(index, items - 1, *key), axis=1, kind="stable")
    cuts = np.sort(order[:, : segments - 1], axis=1) + 1
    edges = np.pad(cuts, ((0, 0), (1, 1)), constant_values=((0, 0), (0, items)))
    return np.diff(edges, axis=1)


def with_sentinels(tokens: np.ndarray, taken: np.ndarray, sentinels: np.ndarray, end: int, width: int) -> np.ndarray:
    """tokens [B, T] with one sentinel in the place of each run of `taken` [B, T], and `end` behind; sentinels in order.

    [B, width], int32: every row has as many tokens taken, in as many runs.
    """
    first = taken & ~np.pad(taken, ((0, 0), (1, 0)))[:, :-1]
    shown = np.where(first, sentinels[np.maximum(np.cumsum(first, axis=1) - 1, 0)], tokens)
    kept = shown[first | ~taken].reshape(len(tokens), width - 1)
    return np.pad(kept, ((0, 0), (0, 1)), constant_values=end).astype(np.int32)


@dataclass(frozen=True)
class CorruptedSpans:
    """A split as batches for SequenceToSequence; a Dataset. The packed text's length is spans.length."""

    packed: PackedText
    spans: Spans
    vocabulary: Vocabulary

    @property
    def info(self) -> DataInfo:
        return self.packed.info

    @property
    def batches(self) -> int:
        return self.packed.batches

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Rows `rows` of global batch `step`.

        sources: int32 [B, S].  tokens: int32 [B, T], what the decoder reads: its targets, later by one, behind the
        padding token.  targets: int32 [B, T].  weights: float32 [B, T]; of held-out text, 0 in the row that its end
        does not fill.  Stretches hold what parts documents, as any token.
        """
        text = self.packed.batch(step, rows)
        index = step * self.packed.batch_size + np.asarray(rows, np.int64)
        noise = noise_mask(self.spans, index, self.packed.seed or 0)
        roles = self.vocabulary.roles
        sentinels = np.array([roles[f"sentinel {i}"] for i in range(self.spans.spans)], np.int32)
        targets = with_sentinels(text["tokens"], ~noise, sentinels, roles["end"], self.spans.targets)
        whole = text["weights"].all(axis=1, keepdims=True)
        return {
            "sources": with_sentinels(text["tokens"], noise, sentinels, roles["end"], self.spans.inputs),
            "tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=roles["pad"]),
            "targets": targets,
            "weights": np.broadcast_to(whole, targets.shape).astype(np.float32),
        }


@dataclass(frozen=True)
class SpanCorruptionData(TokenizedText):
    """Text with corrupted spans; `length` is that of the inputs."""

    noise_density: float = 0.15
    """Share of tokens that are taken away."""
    mean_span: float = 3.0
    """Tokens of a span, on average."""
    sentinels: int = 100
    """Tokens that stand for spans, at the end of the vocabulary."""

    roles: ClassVar[tuple[str, ...]] = ("pad", "end")

    @property
    def spans(self) -> Spans:
        if not 0 < self.noise_density < 1 or self.mean_span < 1:
            raise UserError(
                f"--data.noise-density {self.noise_density} and --data.mean-span {self.mean_span}: choose a share "
                "between 0 and 1, and a length from 1"
            )
        if self.length < 5:
            raise UserError(f"sequence length {self.length} is too short for spans: --data.length needs at least 5")
        spans = fitting(self.length, self.noise_density, self.mean_span)
        if spans.spans > self.sentinels:
            raise UserError(
                f"{spans.spans} spans of {self.length} tokens need as many sentinels: raise --data.sentinels"
                f" {self.sentinels}, or --data.mean-span"
            )
        return spans

    def open(self, split: str, *, batch_size: int, seed: int) -> CorruptedSpans:
        """`split` is "train" or "validation"."""
        spans = self.spans
        packed = self.packed(split, batch_size=batch_size, seed=seed, length=spans.length)
        return CorruptedSpans(packed, spans, self.vocabulary)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return vocabulary(self.load_tokenizer(), self.roles, self.sentinels)

    def special_tokens(self) -> dict[str, Any]:
        pad, end = (self.vocabulary.roles[role] for role in self.roles)
        return {"pad": pad, "eos": (end,), "start": pad}
