"""Packed text: sequences of one length cut from the stream of documents, in any order, by index.

The stream is the token file: each document is <|endoftext|> and then its tokens, so that the input at stream position
p is token p and its target token p + 1; a document's first input and its last target are <|endoftext|>. An epoch cuts
the stream (closed to a ring) every `length` tokens from a random phase, and shuffles the cuts. What stands beside a
document in its row does not matter to it, since attention and positions know their document alone; therefore the
order of documents on the ring is left as it is, and an epoch costs no memory, whatever the number of documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zoo.train.data.permutation import random_bits, shuffled
from zoo.train.experiment import DataInfo


@dataclass(frozen=True)
class Cuts:
    """Stretches of `length` tokens, cut from a stream of `size`, in batches of `batch_size`.

    seed: of phases and orders; None walks the stream once, in order, to its end.
    """

    size: int
    length: int
    batch_size: int
    seed: int | None

    @property
    def sequences(self) -> int:
        """Stretches of one pass. In training up to length - 1 tokens, other ones each time, are left out of a pass."""
        whole, rest = divmod(self.size, self.length)
        return whole + (self.seed is None and rest > 0)

    @property
    def batches(self) -> int:
        """Batches of one pass; in training the last, short one is filled from the next pass and not counted."""
        whole, rest = divmod(self.sequences, self.batch_size)
        return max(1, whole + (self.seed is None and rest > 0))

    def starts(self, index: np.ndarray) -> np.ndarray:
        """Where on the stream, closed to a ring, the stretches of global indices [rows] begin, int64 [rows]."""
        if self.seed is None:
            return index * self.length
        passes, chosen = shuffled(index, self.sequences, self.seed)
        numbers, inverse = np.unique(passes, return_inverse=True)
        phases = [int(random_bits(self.seed, int(number), 1)[0]) % self.size for number in numbers]
        return np.array(phases, np.int64)[inverse] + chosen * self.length


@dataclass(frozen=True)
class PackedText:
    """A split of text as batches of `length` tokens; a Dataset of zoo.train.experiment.

    tokens: the stream, at least `length` long. byte_lengths: int32 [V]. seed: of phases and orders; None walks the
    stream once, in order, to its last token, and pads (a validation split).
    """

    info: DataInfo
    tokens: np.ndarray
    byte_lengths: np.ndarray
    end_of_text: int
    length: int
    batch_size: int
    seed: int | None

    @property
    def cuts(self) -> Cuts:
        return Cuts(len(self.tokens), self.length, self.batch_size, self.seed)

    @property
    def sequences(self) -> int:
        """Sequences of one pass."""
        return self.cuts.sequences

    @property
    def batches(self) -> int:
        """Batches of one pass."""
        return self.cuts.batches

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Rows `rows` of global batch `step`, each array [len(rows), T].

        tokens, targets: int32. segments: int32, 1 and up for the documents of a row, 0 for padding. positions: int32,
        from 0 in each document's piece. weights: float32, 1 where there is a target. bytes: int32, of text that the
        target stands for.
        """
        index = step * self.batch_size + np.asarray(rows, np.int64)
        positions = self.cuts.starts(index)[:, None] + np.arange(self.length)
        real = positions < len(self.tokens) if self.seed is None else np.ones(positions.shape, bool)
        inputs = np.where(real, self._at(positions), self.end_of_text)
        targets = np.where(real, self._at(positions + 1), self.end_of_text)

        begins = inputs == self.end_of_text
        begins[:, 0] = True
        column = np.broadcast_to(np.arange(self.length), begins.shape)
        restart = np.maximum.accumulate(np.where(begins, column, 0), axis=1)
        return {
            "tokens": inputs.astype(np.int32),
            "targets": targets.astype(np.int32),
            "segments": np.where(real, np.cumsum(begins, axis=1), 0).astype(np.int32),
            "positions": np.where(real, column - restart, 0).astype(np.int32),
            "weights": real.astype(np.float32),
            "bytes": np.where(real, self.byte_lengths[targets], 0).astype(np.int32),
        }

    def _at(self, positions: np.ndarray) -> np.ndarray:
        """Tokens of the ring."""
        return self.tokens[positions % len(self.tokens)]
