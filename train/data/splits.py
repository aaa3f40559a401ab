"""Which examples of an undivided data set are held out: by content, so that equal examples stay on one side."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np

from zoo.train.experiment import UserError

SPLITS = ("train", "validation")

Example = TypeVar("Example")


def content_hash(content: str | bytes) -> int:
    """64 bits of the content's SHA-256."""
    data = content.encode() if isinstance(content, str) else content
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def held_out(hashes: Sequence[int] | np.ndarray, sizes: Sequence[int] | np.ndarray, fraction: float) -> np.ndarray:
    """Mask [number of examples] of a held-out set of about `fraction` of the total size.

    Examples are taken in the order of their hashes as long as they fit; those with equal hashes go together. Where the
    first ones are all too big, the smallest is held out. With one distinct example nothing is.
    """
    _, group = np.unique(np.asarray(hashes, np.uint64), return_inverse=True)
    totals = np.bincount(group, weights=sizes)
    if len(totals) < 2:
        return np.zeros(len(group), bool)
    budget = left = fraction * totals.sum()
    chosen = np.zeros(len(totals), bool)
    for index, size in enumerate(totals):
        if size <= left:
            chosen[index] = True
            left -= size
        if left < 0.01 * budget:
            break
    if not chosen.any():
        chosen[totals.argmin()] = True
    return chosen[group]


def check_fraction(fraction: float) -> None:
    """Raises UserError where `fraction` is none."""
    if not 0 < fraction < 1:
        raise UserError(f"validation fraction {fraction} is not between 0 and 1: 0.1 holds out a tenth")


class Undivided(Generic[Example]):
    """Examples without a split of their own, divided by `held_out`.

    read: yields the examples, in the same order at every call. One pass over them, at first use, decides the split; it
    keeps 16 bytes an example.
    weigh: what of an example is hashed, so that those alike in it stay on one side, and its size.
    """

    def __init__(
        self,
        read: Callable[[], Iterator[Example]],
        weigh: Callable[[Example], tuple[str | bytes, int]],
        fraction: float,
    ):
        self._read, self._weigh, self._fraction = read, weigh, fraction

    @cached_property
    def _mask(self) -> np.ndarray:
        weighed = map(self._weigh, self._read())
        rows = ((content_hash(content), size) for content, size in weighed)
        table = np.fromiter(rows, np.dtype([("hash", np.uint64), ("size", np.int64)]))
        return held_out(table["hash"], table["size"], self._fraction)

    def examples(self, split: str) -> Iterator[Example]:
        """The examples of "train" or "validation"."""
        for example, held in zip(self._read(), self._mask, strict=True):
            if held == (split == "validation"):
                yield example


class UndividedText(Undivided[str]):
    """Text documents without a split of their own; a single document is cut near its end."""

    def __init__(self, read: Callable[[], Iterator[str]], fraction: float):
        super().__init__(read, lambda text: (text, len(text)), fraction)

    def examples(self, split: str) -> Iterator[str]:
        if len(self._mask) != 1:
            yield from super().examples(split)
            return
        (text,) = self._read()
        end = int(len(text) * (1 - self._fraction))
        cut = text.rfind("\n", 0, end) + 1 or end
        yield text[:cut] if split == "train" else text[cut:]
