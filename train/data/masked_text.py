"""Data for masked words: pairs of texts as BERT has them, or packed text without (Liu et al. 2019, RoBERTa).

Every pass masks anew, as RoBERTa does (section 4.1); held-out text is masked the same each time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from zoo.train.data.masking import Masking
from zoo.train.data.packing import PackedText
from zoo.train.data.sentence_pairs import SentencePairs, joined
from zoo.train.data.text import TokenizedText
from zoo.train.data.vocabulary import Vocabulary
from zoo.train.data.words import Boundaries
from zoo.train.experiment import DataInfo, UserError


@dataclass(frozen=True)
class MaskedText:
    """A split as batches for MaskedLM; a Dataset. `source` is of pairs, or of packed text."""

    info: DataInfo
    source: SentencePairs | PackedText
    length: int
    vocabulary: Vocabulary
    boundaries: Boundaries
    masking: Masking
    whole_words: bool

    @property
    def batches(self) -> int:
        return self.source.cuts.batches

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Rows `rows` of global batch `step`.

        tokens: int32 [B, T], with masks.  segments: int32 [B, T], 0 where a token pads; of documents, from 1, or 1.
        places: int32 [B, P], of tokens to predict.  targets: int32 [B, P], what they were.  weights: float32 [B, P].
        Of pairs also token_types: int32 [B, T], and next_sentence: int32 [B], NEXT or OTHER.
        """
        index = step * self.source.batch_size + np.asarray(rows, np.int64)
        batch = self._pairs(index) if isinstance(self.source, SentencePairs) else self._packed(step, rows)
        clean = batch["tokens"]
        maskable = (batch["segments"] > 0) & ~self.vocabulary.is_special()[clean]
        starts = self.boundaries.word_starts(clean) if self.whole_words else np.ones(clean.shape, bool)
        words = np.where(maskable, np.cumsum(starts, axis=1) - 1, -1)
        batch["tokens"], places, weights = self.masking(clean, words, index, self.source.seed or 0)
        batch["places"], batch["targets"] = places, np.take_along_axis(clean, places, axis=1)
        # Held-out text is walked once: rows behind its end only fill the last batch.
        real = (self.source.seed is not None) | (index < self.source.cuts.sequences)
        batch["weights"] = weights * real[:, None]
        return batch

    def _pairs(self, index: np.ndarray) -> dict[str, np.ndarray]:
        assert isinstance(self.source, SentencePairs)
        roles, pairs = self.vocabulary.roles, self.source.pairs(index)
        tokens, types, lengths = joined(
            pairs, self.length, **{role: roles[role] for role in ("classify", "separate", "pad")}
        )
        return {
            "tokens": tokens,
            "token_types": types,
            "segments": (np.arange(self.length) < lengths[:, None]).astype(np.int32),
            "next_sentence": np.array([kind for _, _, kind in pairs], np.int32).reshape(-1),
        }

    def _packed(self, step: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        assert isinstance(self.source, PackedText)
        batch = self.source.batch(step, rows)
        return {"tokens": batch["tokens"], "segments": batch["segments"]}


@dataclass(frozen=True)
class MaskedTextData(TokenizedText):
    """Text with masked words."""

    pairs: bool = True
    """Pairs of texts, for the prediction of the next sentence as well; else packed documents."""
    masked: float = 0.15
    """Share of tokens that are predicted."""
    kept: float = 0.1
    """Share of the predicted tokens that stay as they are."""
    replaced: float = 0.1
    """Share of the predicted tokens that another stands in for."""
    max_predictions: int | None = None
    """Predicted tokens in a row, at most; as many as `masked` asks for unless given."""
    whole_words: bool = False
    """Choose all tokens of a word, or none."""
    short: float = 0.1
    """Share of pairs that are shorter than a row has room for."""

    roles: ClassVar[tuple[str, ...]] = ("pad", "classify", "separate", "mask")

    def open(self, split: str, *, batch_size: int, seed: int) -> MaskedText:
        """`split` is "train" or "validation"."""
        self._check()
        words, packed = self.vocabulary, self.packed(split, batch_size=batch_size, seed=seed)
        boundaries = Boundaries.of(self.load_tokenizer().texts, words.size)
        source = self._sentence_pairs(split, packed, boundaries) if self.pairs else packed
        predictions = self.max_predictions or max(1, round(self.masked * self.length))
        mask = words.roles["mask"]
        masking = Masking(mask, words.text, predictions, self.masked, self.kept, self.replaced)
        return MaskedText(packed.info, source, self.length, words, boundaries, masking, self.whole_words)

    def fit(self, model: Any) -> Any:
        """`model` with the vocabulary of the data, the tokens for masks and separators included, and its padding."""
        self._check()
        return super().fit(model)

    def special_tokens(self) -> dict[str, Any]:
        return {"pad": self.vocabulary.roles["pad"]}

    def _sentence_pairs(self, split: str, packed: PackedText, boundaries: Boundaries) -> SentencePairs:
        documents = self.document_starts(split)
        if len(documents) < 2:
            raise UserError(
                f"the {split} text of {self.source} is one document, and pairs need another: give --data.no-pairs"
                f"{', or raise --data.validation-fraction' if split == 'validation' else ''}"
            )
        batch_size, seed = packed.batch_size, packed.seed
        return SentencePairs(packed.tokens, documents, boundaries, self.length - 3, batch_size, seed, self.short)

    def _check(self) -> None:
        if self.length < 8:
            raise UserError(f"sequence length {self.length} is too short for pairs: --data.length needs at least 8")
        for name in ("masked", "kept", "replaced", "short"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--data.{name} {getattr(self, name)} is no share: choose one from 0 to 1")
        if self.kept + self.replaced > 1:
            raise UserError(f"--data.kept {self.kept} and --data.replaced {self.replaced} are more than 1 together")
