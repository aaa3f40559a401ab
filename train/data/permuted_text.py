"""Permutation language modelling (Yang et al. 2019, XLNet, sections 2.2, 2.3 and the released data_utils.py).

What a row predicts are spans of words, 1 / K of its tokens; all else is known from the beginning. Predicted tokens
become known in a random order, each predicted from what is known before it. Memories of a segment before are no part of
this: rows follow each other at random, and what a batch holds depends on its number alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zoo.train.data.draws import below, uniform
from zoo.train.data.packing import PackedText
from zoo.train.data.text import TokenizedText
from zoo.train.data.words import Boundaries
from zoo.train.experiment import DataInfo, UserError

_ORDER, _SPANS = 41, 42  # streams of draws


def predicted_spans(starts: np.ndarray, count: int, context: int, longest: int, draws: np.ndarray) -> np.ndarray:
    """Which of T tokens are predicted, bool [T], `count` of them; starts: bool [T], where words begin.

    Spans of n words, 1 to `longest` with probability proportional to 1 / n, each somewhere in a context of n * context
    tokens, from left to right (_sample_mask). draws: uniform, [2 T]. What is left of the count then goes to
    single tokens, at random, in the order of the last T of them.
    """
    length = len(starts)
    predicted = np.zeros(length, bool)
    shares = np.cumsum(1 / np.arange(1, longest + 1))
    words = np.flatnonzero(starts)
    here, done, left = 0, 0, iter(draws[: 2 * -(-length // 2)].reshape(-1, 2))
    while here < length and done < count:
        size, place = next(left)
        size = min(1 + int(np.searchsorted(shares, size * shares[-1], side="right")), count - done)
        before = int(below(place, size * context))
        first = int(np.searchsorted(words, here + before))
        if first + size >= len(words):
            break
        begin, end = int(words[first]), int(words[first + size])
        end = min(end, begin + count - done)
        predicted[begin:end] = True
        done += end - begin
        here = end + size * context - before
    free = np.flatnonzero(~predicted)
    singles = free[np.argsort(draws[-length:][free], kind="stable")]
    predicted[singles[: count - done]] = True
    return predicted


def factorisation(predicted: np.ndarray, index: np.ndarray, seed: int) -> np.ndarray:
    """When each of predicted [B, T] becomes known, int32: 0 what is not predicted, the others 1, 2, ... at random."""
    draws = np.where(predicted, 1 + uniform(index, predicted.shape[1], seed, _ORDER), 0)
    ranks = np.argsort(np.argsort(draws, axis=1, kind="stable"), axis=1, kind="stable")
    known = np.count_nonzero(~predicted, axis=1, keepdims=True)
    return np.where(predicted, ranks - known + 1, 0).astype(np.int32)


@dataclass(frozen=True)
class PermutedText:
    """A split as batches for PermutationLM; a Dataset."""

    packed: PackedText
    boundaries: Boundaries
    predictions: int
    context: int
    longest: int

    @property
    def info(self) -> DataInfo:
        return self.packed.info

    @property
    def batches(self) -> int:
        return self.packed.batches

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Rows `rows` of global batch `step`.

        tokens: int32 [B, T].  token_types: int32 [B, T], the document of each in its row.  order: int32 [B, T], when
        it becomes known.  places: int32 [B, P], ascending, of what is predicted.  targets: int32 [B, P].
        weights: float32 [B, P], 0 where a token pads.
        """
        text = self.packed.batch(step, rows)
        index = step * self.packed.batch_size + np.asarray(rows, np.int64)
        tokens, seed = text["tokens"], self.packed.seed or 0
        draws = uniform(index, 2 * self.packed.length, seed, _SPANS)
        starts = self.boundaries.word_starts(tokens)
        predicted = np.zeros(tokens.shape, bool)
        for row in range(len(tokens)):
            chosen = predicted_spans(starts[row], self.predictions, self.context, self.longest, draws[row])
            predicted[row] = chosen
        places = np.nonzero(predicted)[1].reshape(len(tokens), self.predictions).astype(np.int32)
        return {
            "tokens": tokens,
            "token_types": text["segments"],
            "order": factorisation(predicted, index, seed),
            "places": places,
            "targets": np.take_along_axis(tokens, places, axis=1),
            "weights": np.take_along_axis(text["weights"], places, axis=1),
        }


@dataclass(frozen=True)
class PermutedTextData(TokenizedText):
    """Text of which a part is predicted, in random orders."""

    context: int = 6
    """K: one token in so many is predicted."""
    longest_span: int = 5
    """Words of a predicted span, at most."""

    def open(self, split: str, *, batch_size: int, seed: int) -> PermutedText:
        """`split` is "train" or "validation"."""
        if self.context < 1 or self.longest_span < 1:
            raise UserError(
                f"--data.context {self.context} and --data.longest-span {self.longest_span}: choose both from 1"
            )
        packed = self.packed(split, batch_size=batch_size, seed=seed)
        boundaries = Boundaries.of(self.load_tokenizer().texts, self.vocabulary.size)
        return PermutedText(packed, boundaries, max(1, self.length // self.context), self.context, self.longest_span)
