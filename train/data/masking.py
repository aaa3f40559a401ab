"""Masked words (Devlin et al. 2018, section 3.1 and the released create_pretraining_data.py): which, and by what."""

from dataclasses import dataclass

import numpy as np

from zoo.train.data.draws import below, uniform


@dataclass(frozen=True)
class Masking:
    """rate: of tokens that are predicted, at most `predictions` a row.  Of them kept stay as they are, and replaced
    become a random token of [0, vocabulary); the others become `mask`.
    """

    mask: int
    vocabulary: int
    predictions: int
    rate: float = 0.15
    kept: float = 0.1
    replaced: float = 0.1

    def __call__(
        self, tokens: np.ndarray, words: np.ndarray, index: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows tokens [B, T] with global numbers index [B] to tokens as the model sees them, places and weights [B, P].

        words: int [B, T] below T, alike for tokens that are chosen together, -1 for what is never chosen.
        places: int32, ascending, 0 where the weight is: rows predict `rate` of what they hold, special tokens included.
        """
        order = uniform(index, tokens.shape[1], seed, _CHOICE)
        places = np.zeros((len(tokens), self.predictions), np.int32)
        weights = np.zeros(places.shape, np.float32)
        for row in range(len(tokens)):
            chosen = choose(words[row], order[row], self._count(tokens[row], words[row]))
            places[row, : len(chosen)], weights[row, : len(chosen)] = chosen, 1
        return self._corrupted(tokens, places, weights > 0, index, seed), places, weights

    def _count(self, tokens: np.ndarray, words: np.ndarray) -> int:
        return min(self.predictions, max(1, round(self.rate * np.count_nonzero(words >= 0))))

    def _corrupted(
        self, tokens: np.ndarray, places: np.ndarray, real: np.ndarray, index: np.ndarray, seed: int
    ) -> np.ndarray:
        fate = uniform(index, places.shape[1], seed, _FATE)
        other = below(uniform(index, places.shape[1], seed, _OTHER), self.vocabulary)
        was = np.take_along_axis(tokens, places, axis=1)
        shown = np.where(fate < self.kept, was, np.where(fate < self.kept + self.replaced, other, self.mask))
        corrupted = tokens.copy()
        rows = np.broadcast_to(np.arange(len(tokens))[:, None], places.shape)
        corrupted[rows[real], places[real]] = shown[real]
        return corrupted


_CHOICE, _FATE, _OTHER = 11, 12, 13  # streams of draws


def choose(words: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """At most `count` places of words [T], whole words each, ascending; words come in the order of uniform draws.

    A word that would exceed the count is passed over, as released. -1 is no word.
    """
    sizes = np.bincount(words[words >= 0])
    chosen, left = np.zeros(len(sizes) + 1, bool), count  # The last entry is that of -1.
    present = np.flatnonzero(sizes)
    for word in present[np.argsort(order[present], kind="stable")].tolist():
        if not left:
            break
        if sizes[word] <= left:
            chosen[word] = True
            left -= sizes[word]
    return np.flatnonzero(chosen[words])
