"""Where words and sentences begin, read off the texts of tokens, whatever the tokenizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_STOPS = tuple(".!?")


@dataclass(frozen=True)
class Boundaries:
    """Tables over a vocabulary, bool [V].

    inner: begins in the middle of a word, or could.  open: ends in a letter or digit, so that a word may go on.
    line: holds the end of a line.  stop: ends in a full stop, a question or an exclamation mark.
    """

    inner: np.ndarray
    open: np.ndarray
    line: np.ndarray
    stop: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str], size: int) -> "Boundaries":
        """`texts` as of a Tokenizer; tokens behind them, to `size`, are words of their own."""
        texts = [*texts, *[""] * (size - len(texts))]

        def table(holds: Callable[[str], bool]) -> np.ndarray:
            return np.array([holds(text) for text in texts], bool)

        return cls(
            inner=table(lambda text: _letter(text[:1])),
            open=table(lambda text: _letter(text[-1:])),
            line=table(lambda text: "\n" in text),
            stop=table(lambda text: text.rstrip().endswith(_STOPS)),
        )

    def word_starts(self, tokens: np.ndarray) -> np.ndarray:
        """bool, as tokens [..., T]: a WordPiece "##ing", or a letter behind a letter, goes on with a word."""
        starts = np.ones(tokens.shape, bool)
        starts[..., 1:] = ~(self.open[tokens[..., :-1]] & self.inner[tokens[..., 1:]])
        return starts

    def sentence_starts(self, tokens: np.ndarray) -> np.ndarray:
        """bool, as tokens [..., T]: the first, what follows a line, and what follows a stop and is no letter."""
        starts = np.zeros(tokens.shape, bool)
        starts[..., :1] = True
        before, after = tokens[..., :-1], tokens[..., 1:]
        starts[..., 1:] = self.line[before] | (self.stop[before] & ~self.inner[after])
        return starts


def _letter(character: str) -> bool:
    """Bytes beyond ASCII are parts of letters more often than not."""
    return character.isalnum() or character > "\x7f"
