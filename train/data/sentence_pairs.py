"""Pairs of texts, of which the second follows the first or is from another document (Devlin et al. 2018, section 3.1).

As the released create_pretraining_data.py makes them, but by index: where that walks each document, chunk by chunk,
here the stream of documents is cut as in zoo.train.data.packing, and the chunk of a cut begins with the sentence that
the cut falls into. It goes on, sentence by sentence, until its length is reached or its document ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zoo.train.data.draws import below, uniform
from zoo.train.data.packing import Cuts
from zoo.train.data.words import Boundaries

NEXT, OTHER = 0, 1
"""Whether the second text follows the first or is another: the classes, in the order of published heads."""

_STREAM = 21  # of draws


@dataclass(frozen=True)
class SentencePairs:
    """tokens: the stream, a document <|endoftext|> and then its text.  documents: where each begins there, two or more.

    room: tokens of both texts together, at most.  short: share of pairs that are to be shorter, of any length from 2.
    """

    tokens: np.ndarray
    documents: np.ndarray
    boundaries: Boundaries
    room: int
    batch_size: int
    seed: int | None
    short: float = 0.1

    @property
    def cuts(self) -> Cuts:
        return Cuts(len(self.tokens), self.room, self.batch_size, self.seed)

    def pairs(self, index: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, int]]:
        """The texts [at least 1 token each] of global indices [B], and NEXT or OTHER."""
        return [self.pair(*each) for each in zip(index.tolist(), self.cuts.starts(index).tolist(), strict=True)]

    def pair(self, index: int, cut: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The pair whose chunk holds the stream's position `cut`; what is drawn for it follows from `index`."""
        short, length, split, kind, document, place = uniform(index, 6, self.seed or 0, _STREAM)
        target = 2 + int(below(length, self.room - 1)) if short < self.short else self.room
        here = int(np.searchsorted(self.documents, cut % len(self.tokens), side="right")) - 1
        sentences = self._sentences(here, cut % len(self.tokens), target)
        middle = sentences[1 + int(below(split, max(1, len(sentences) - 2)))]
        first, second = (sentences[0], middle), (middle, sentences[-1])
        # A single sentence has none that follows it.
        other = len(sentences) == 2 or kind < 0.5
        if other:
            there = (here + 1 + int(below(document, len(self.documents) - 1))) % len(self.documents)
            begin, end = self._span(there)
            place = begin + int(below(place, end - begin))
            second = (*self._sentences(there, place, target - (first[1] - first[0]))[[0, -1]],)
        a, b = truncated(first, second, self.room, index, self.seed or 0)
        return self.tokens[slice(*a)], self.tokens[slice(*b)], OTHER if other else NEXT

    def _span(self, document: int) -> tuple[int, int]:
        """Where the text of a document begins and ends in the stream."""
        after = document + 1
        end = self.documents[after] if after < len(self.documents) else len(self.tokens)
        return int(self.documents[document]) + 1, int(end)

    def _sentences(self, document: int, place: int, target: int) -> np.ndarray:
        """Where sentences begin, [n + 1] with the end of the last: n of them, from the one that `place` is in.

        As few as hold `target` tokens, or all to the document's end. Sentences of more than `room` tokens are cut.
        """
        begin, end = self._span(document)
        place = min(max(place, begin), end - 1)
        begin, end = max(begin, place - self.room), min(end, place + 2 * self.room)
        starts = begin + np.flatnonzero(self.boundaries.sentence_starts(self.tokens[begin:end]))
        first = int(np.searchsorted(starts, place, side="right")) - 1
        starts = np.append(starts[first:], end)
        enough = int(np.searchsorted(starts, starts[0] + target))
        return starts[: max(2, enough + 1)]


def truncated(
    a: tuple[int, int], b: tuple[int, int], room: int, index: int, seed: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Spans (begin, end) that together hold at most `room` tokens: token by token the longer one loses its first or its
    last, at random, so that texts begin and end anywhere."""
    lengths = [a[1] - a[0], b[1] - b[0]]
    kept = lengths.copy()
    while sum(kept) > room:
        kept[0 if kept[0] > kept[1] else 1] -= 1
    spans = []
    for stream, (begin, _), length, left in zip((1, 2), (a, b), lengths, kept, strict=True):
        front = int(np.count_nonzero(uniform(index, length - left, seed, _STREAM, stream) < 0.5))
        spans.append((begin + front, begin + front + left))
    return spans[0], spans[1]


def joined(
    pairs: Sequence[tuple[np.ndarray, np.ndarray, int]], length: int, *, classify: int, separate: int, pad: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[CLS] A [SEP] B [SEP], padded: int32 tokens [B, T], token types [B, T], 1 from B on, and lengths [B]."""
    tokens = np.full((len(pairs), length), pad, np.int32)
    types = np.zeros((len(pairs), length), np.int32)
    lengths = np.zeros(len(pairs), np.int32)
    for row, (a, b, _) in enumerate(pairs):
        end = lengths[row] = len(a) + len(b) + 3
        tokens[row, :end] = np.concatenate([[classify], a, [separate], b, [separate]])
        types[row, len(a) + 2 : end] = 1
    return tokens, types, lengths
