"""Pairs of texts, a source and the target to be written from it: translation, summarization.

A row is one pair, padded. Rows are of two lengths, so that a step compiles once; a pair that is longer on either side
is left out, and counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from zoo.train.data.corpus import Corpus
from zoo.train.data.pair_sources import pair_source
from zoo.train.data.permutation import shuffled
from zoo.train.data.text import TokenizedText
from zoo.train.data.text_sources import TextSource
from zoo.train.data.vocabulary import Vocabulary
from zoo.train.experiment import DataInfo, UserError


@dataclass(frozen=True)
class PairBatches:
    """A split as batches for SequenceToSequence; a Dataset.

    tokens: the stream of a corpus whose documents are sources and targets in turn, each behind <|endoftext|>.
    edges: int64 [number of pairs, 3], where in it a source begins, its target does, and the pair ends.
    length, target_length: of rows, the token at their end included.
    seed: of orders, one for each pass; None walks the pairs once and pads (a validation split).
    """

    info: DataInfo
    tokens: np.ndarray
    edges: np.ndarray
    vocabulary: Vocabulary
    length: int
    target_length: int
    batch_size: int
    seed: int | None

    @property
    def batches(self) -> int:
        """Batches of one pass; in training the last, short one is filled from the next pass and not counted."""
        whole, rest = divmod(len(self.edges), self.batch_size)
        return max(1, whole + (self.seed is None and rest > 0))

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Rows `rows` of global batch `step`.

        sources: int32 [B, S], the source, </s>, and padding, where source_segments, int32 [B, S], is 0.
        targets: int32 [B, T], the target, </s>, and padding.  tokens: int32 [B, T], the same later by one, behind the
        padding token.  weights: float32 [B, T], 0 at padding, and in rows that only fill the last batch held out.
        """
        index = step * self.batch_size + np.asarray(rows, np.int64)
        count, roles = len(self.edges), self.vocabulary.roles
        chosen = index % count if self.seed is None else shuffled(index, count, self.seed)[1]
        begin, middle, end = self.edges[chosen].T
        sources, source_lengths = self._texts(begin, middle, self.length)
        targets, target_lengths = self._texts(middle, end, self.target_length)
        real = (self.seed is not None) | (index < count)
        written = np.arange(self.target_length) < target_lengths[:, None]
        return {
            "sources": sources,
            "source_segments": (np.arange(self.length) < source_lengths[:, None]).astype(np.int32),
            "tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=roles["pad"]),
            "targets": targets,
            "weights": (written & real[:, None]).astype(np.float32),
        }

    def _texts(self, begin: np.ndarray, end: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents as rows [B, length] that end in </s>, padded, and how long they are, [B]."""
        rows = np.full((len(begin), length), self.vocabulary.roles["pad"], np.int32)
        for row, first, last in zip(rows, begin.tolist(), end.tolist(), strict=True):
            row[: last - first] = [*self.tokens[first + 1 : last], self.vocabulary.roles["end"]]
        return rows, end - begin


@dataclass(frozen=True)
class PairData(TokenizedText):
    """Pairs of a source and a target; one tokenizer reads both, and `length` is that of rows of sources."""

    source: str = "python_trees"
    """python_trees (statements of this Python's library and their syntax trees), a TFDS name[/config][:version], or a
    file or folder of .tsv (source, a tab, target) and .jsonl."""
    text_field: str = "source,target"
    """What holds source and target in JSON lines and in TFDS features, such as en,de."""
    target_length: int | None = None
    """Tokens of a row of targets; those of sources unless given."""

    roles: ClassVar[tuple[str, ...]] = ("pad", "end")

    def open(self, split: str, *, batch_size: int, seed: int) -> PairBatches:
        """`split` is "train" or "validation"."""
        corpus = self._corpus()
        edges, kept = self._edges(corpus, split)
        if not kept.any():
            shortest = (edges[:, 1:] - edges[:, :-1]).min(axis=0)
            raise UserError(
                f"no {split} pair of {self.source} is within {self.length} tokens of source and "
                f"{self._target_length} of target: the shortest sides are {shortest[0]} and {shortest[1]}; raise "
                "--data.length or --data.target-length"
            )
        return PairBatches(
            info=self.info(split),
            tokens=corpus.token_file(split),
            edges=edges[kept],
            vocabulary=self.vocabulary,
            length=self.length,
            target_length=self._target_length,
            batch_size=batch_size,
            seed=seed if split == "train" else None,
        )

    @property
    def example_shape(self) -> tuple[int, ...]:
        return (self.length, self._target_length)

    def fit(self, model: Any) -> Any:
        """As other text; targets have positions too."""
        longest = max(self.length, self._target_length)
        limit = getattr(model, "max_length", None)
        if limit is not None and longest > limit:
            raise UserError(
                f"rows of {longest} tokens are longer than the model's {limit} positions: lower --data.length and "
                "--data.target-length, or raise --model.max-length"
            )
        return super().fit(model)

    def info(self, split: str) -> DataInfo:
        """What a person is told of "train" or "validation"; examples are pairs within the lengths."""
        _, kept = self._edges(self._corpus(), split)
        return replace(super().info(split), examples=int(kept.sum()))

    def special_tokens(self) -> dict[str, Any]:
        pad, end = (self.vocabulary.roles[role] for role in self.roles)
        return {"pad": pad, "eos": (end,), "start": pad}

    @property
    def _target_length(self) -> int:
        return self.length if self.target_length is None else self.target_length

    def _source(self) -> TextSource:
        return pair_source(self.source, self.text_field, self.validation_fraction)

    def _edges(self, corpus: Corpus, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Where each pair begins, its target does, and it ends, int64 [pairs, 3], and which are within the lengths.

        What stands ahead of a document, <|endoftext|>, is as long as what is to stand behind it, </s>.
        """
        starts = corpus.document_starts(split)
        ends = np.append(starts[2::2], corpus.splits[split].tokens)
        edges = np.stack([starts[0::2], starts[1::2], ends], axis=1)
        source, target = (edges[:, 1:] - edges[:, :-1]).T
        return edges, (source <= self.length) & (target <= self._target_length)

    def _detail(self, split: str, found: Corpus) -> str:
        edges, kept = self._edges(found, split)
        longer = len(edges) - int(kept.sum())
        said = (
            f"{len(edges):,} pairs, {longer:,} left out as longer than {self.length} and {self._target_length} tokens"
        )
        return f"{said}; {super()._detail(split, found).split(', ', 1)[1]}"
