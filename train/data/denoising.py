"""Denoising (Lewis et al. 2019, BART, section 2.2): sentences change places, and spans give way to one mask each.

Lengths of spans are from a Poisson distribution, of mean 3; one of no tokens is a mask that stands for nothing. How
many tokens are missing is for the model to find out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from zoo.train.data.draws import poisson, uniform
from zoo.train.data.packing import PackedText
from zoo.train.data.text import TokenizedText
from zoo.train.data.vocabulary import Vocabulary
from zoo.train.data.words import Boundaries
from zoo.train.experiment import DataInfo, UserError

_SENTENCES, _LENGTHS, _PLACES = 51, 52, 53  # streams of draws


def permuted(tokens: np.ndarray, starts: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """tokens [T] with its sentences, which begin at `starts` (bool [T]), in the order of uniform draws [T]."""
    sentences = np.split(tokens, np.flatnonzero(starts)[1:])
    order = np.argsort(draws[: len(sentences)], kind="stable")
    return np.concatenate([sentences[i] for i in order])


def span_lengths(budget: int, mean: float, draws: np.ndarray) -> np.ndarray:
    """Lengths of spans that hold `budget` tokens together, int64; the last is cut short. draws: uniform, enough.

    Spans of no tokens are left out where there would be more spans than tokens, so that no text gets longer.
    """
    lengths = poisson(draws, mean)
    total = np.cumsum(lengths)
    count = int(np.searchsorted(total, budget)) + 1
    lengths = lengths[:count].copy()
    lengths[-1] -= total[count - 1] - budget
    spare = budget - np.count_nonzero(lengths)
    return lengths[(lengths > 0) | (np.cumsum(lengths == 0) <= spare)]


def infilled(tokens: np.ndarray, lengths: np.ndarray, mask: int, draws: np.ndarray) -> np.ndarray:
    """tokens [T] with spans of these lengths replaced by one mask each, at random places that do not touch.

    Each span falls into another gap between the tokens that stay, in the order of uniform draws [T + 1].
    """
    stay = len(tokens) - int(lengths.sum())
    gaps = np.sort(np.argsort(draws[: stay + 1], kind="stable")[: len(lengths)])
    begins = gaps + np.cumsum(lengths) - lengths
    taken = np.zeros(len(tokens) + 1, np.int64)
    np.add.at(taken, begins, 1)
    np.add.at(taken, begins + lengths, -1)
    kept = np.cumsum(taken[:-1]) == 0
    return np.insert(tokens[kept], gaps, mask)


@dataclass(frozen=True)
class NoisyText:
    """A split as batches for SequenceToSequence; a Dataset. Rows are two tokens longer than the packed text's."""

    packed: PackedText
    boundaries: Boundaries
    vocabulary: Vocabulary
    masked: float
    mean_span: float
    permute: bool

    @property
    def info(self) -> DataInfo:
        return self.packed.info

    @property
    def batches(self) -> int:
        return self.packed.batches

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Rows `rows` of global batch `step`.

        sources: int32 [B, S], <s>, the noisy text, </s>, and padding, where source_segments, int32 [B, S], is 0.
        targets: int32 [B, T], <s>, the text, </s>.  tokens: int32 [B, T], the same later by one, behind </s>.
        weights: float32 [B, T]; of held-out text, 0 in the row that its end does not fill.
        """
        text = self.packed.batch(step, rows)
        index = step * self.packed.batch_size + np.asarray(rows, np.int64)
        clean, roles = text["tokens"], self.vocabulary.roles
        noisy = [self._noisy(row, int(number)) for row, number in zip(clean, index, strict=True)]
        sources = np.full((len(clean), clean.shape[1] + 2), roles["pad"], np.int32)
        for row, each in enumerate(noisy):
            sources[row, : len(each) + 2] = [roles["begin"], *each, roles["end"]]
        lengths = np.array([len(each) + 2 for each in noisy], np.int64).reshape(-1, 1)
        targets = np.pad(clean, ((0, 0), (1, 1)), constant_values=((0, 0), (roles["begin"], roles["end"])))
        whole = text["weights"].all(axis=1, keepdims=True)
        return {
            "sources": sources,
            "source_segments": (np.arange(sources.shape[1]) < lengths).astype(np.int32),
            "tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=roles["end"]),
            "targets": targets,
            "weights": np.broadcast_to(whole, targets.shape).astype(np.float32),
        }

    def _noisy(self, tokens: np.ndarray, index: int) -> np.ndarray:
        """tokens [T] with noise, at most as many."""
        seed, length = self.packed.seed or 0, len(tokens)
        if self.permute:
            starts = self.boundaries.sentence_starts(tokens)
            tokens = permuted(tokens, starts, uniform(index, length, seed, _SENTENCES))
        budget = round(self.masked * length)
        if not budget:
            return tokens
        lengths = span_lengths(budget, self.mean_span, uniform(index, 8 * length, seed, _LENGTHS))
        return infilled(tokens, lengths, self.vocabulary.roles["mask"], uniform(index, length + 1, seed, _PLACES))


@dataclass(frozen=True)
class NoisyTextData(TokenizedText):
    """Text with noise, to be written as it was; `length` is that of rows, with the tokens at their ends."""

    masked: float = 0.3
    """Share of tokens that spans hold."""
    mean_span: float = 3.0
    """Tokens of a span, on average."""
    permute: bool = True
    """Put sentences into another order."""

    roles: ClassVar[tuple[str, ...]] = ("pad", "begin", "end", "mask")

    def open(self, split: str, *, batch_size: int, seed: int) -> NoisyText:
        """`split` is "train" or "validation"."""
        if not 0 <= self.masked <= 0.5 or self.mean_span < 1:
            raise UserError(
                f"--data.masked {self.masked} and --data.mean-span {self.mean_span}: choose a share from 0 to 0.5, "
                "and a length from 1"
            )
        if self.length < 8:
            raise UserError(f"sequence length {self.length} is too short for noise: --data.length needs at least 8")
        packed = self.packed(split, batch_size=batch_size, seed=seed, length=self.length - 2)
        boundaries = Boundaries.of(self.load_tokenizer().texts, self.vocabulary.size)
        return NoisyText(packed, boundaries, self.vocabulary, self.masked, self.mean_span, self.permute)

    def special_tokens(self) -> dict[str, Any]:
        pad, begin, end, _ = (self.vocabulary.roles[role] for role in self.roles)
        return {"pad": pad, "bos": begin, "eos": (end,), "start": end}
