"""The tokens that an objective needs beside those of text: masks, separators, sentinels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from zoo.train.data.tokenizers import Tokenizer

NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "classify": ("[CLS]", "<cls>"),
    "separate": ("[SEP]", "<sep>"),
    "mask": ("[MASK]", "<mask>"),
    "begin": ("<s>", "<|startoftext|>"),
    "end": ("</s>",),
}
"""What tokenizers call the token of each role."""


@dataclass(frozen=True)
class Vocabulary:
    """size: of all tokens, what a model's embedding has.  text: ids below it are the tokenizer's, specials included.

    end_of_text: what parts documents.  roles: the id of each role's token.
    """

    size: int
    text: int
    end_of_text: int
    roles: Mapping[str, int]

    def is_special(self) -> np.ndarray:
        """bool [size]: tokens that stand for no text."""
        special = np.arange(self.size) >= self.text
        special[[self.end_of_text, *self.roles.values()]] = True
        return special


def vocabulary(tokenizer: Tokenizer, roles: Sequence[str], sentinels: int = 0) -> Vocabulary:
    """The tokenizer's vocabulary and, behind it, a token for each of `roles` that it has none for.

    sentinels: roles "sentinel 0" and so on, the first of them last in the vocabulary, as T5 has them, unless the
    tokenizer has them all as <extra_id_0> and so on.
    """
    special, size = tokenizer.special, tokenizer.vocab_size
    found = {}
    for role in roles:
        known = [special[name] for name in NAMES[role] if name in special]
        found[role] = known[0] if known else size
        size += not known
    named = [special.get(f"<extra_id_{i}>", -1) for i in range(sentinels)]
    if -1 in named:
        named = [size + sentinels - 1 - i for i in range(sentinels)]
        size += sentinels
    found |= {f"sentinel {i}": token for i, token in enumerate(named)}
    return Vocabulary(size, tokenizer.vocab_size, tokenizer.end_of_text, found)
