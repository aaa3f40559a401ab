"""What decoder-only families share: a causal stack between an embedding and a head, with a cache.

The head scores the next word, or the classes of a text, or there is none, as the config says. A family is a config,
which takes DecoderConfig's methods, and a module, which fills in Decoder's parts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.kernels import Mask
from zoo.layers.attention import KVCache
from zoo.layers.linear import Embed, Head, LayerError, Linear, check_sizes, normal
from zoo.layers.positions import SequenceError, check_length
from zoo.layers.transformer import Intermediates, Stack
from zoo.models.published import LABELS, head, published_labels, read_labels
from zoo.sharding import constrain

HEADS = ("lm", "none", "sequence_classification")
"""Scores of the next word at each token; none, the states alone; scores of classes from a text's last real token."""


class DecoderConfig:
    """Methods of a frozen dataclass that has these fields; one that leaves the last three out scores words alone."""

    vocab_size: int
    max_length: int
    num_layers: int
    width: int
    num_heads: int
    head_dim: int | None
    windows: tuple[int | None, ...]
    head: str = "lm"
    labels: tuple[str, ...] = LABELS
    problem_type: str | None = None

    @property
    def head_size(self) -> int:
        return self.head_dim or self.width // self.num_heads

    def check_sizes(self, *names: str) -> None:
        """Raises LayerError unless the fields named, where they are not None, and the windows are sizes."""
        sizes = {name: getattr(self, name) for name in names}
        sizes |= {f"windows[{i}]": window for i, window in enumerate(self.windows)}
        if not self.windows:
            raise LayerError("windows () is no period: give one for each layer of a period, None for dense attention")
        check_sizes(**{name: size for name, size in sizes.items() if size is not None})

    @staticmethod
    def read_head(fields: Mapping[str, Any], family: str, classes: Mapping[str, str]) -> dict[str, Any]:
        """head, labels and problem_type of a config.json; classes: published classes by the names in HEADS."""
        found: dict[str, Any] = {"head": head(fields, family, classes, "lm")}
        if found["head"] == "sequence_classification":
            found |= read_labels(fields, family, found["head"])
        return found

    def published_head(self, classes: Mapping[str, str]) -> dict[str, Any]:
        """The fields of config.json that `read_head` reads."""
        fields: dict[str, Any] = {"architectures": [classes[self.head]]}
        return fields | published_labels(self) if self.head == "sequence_classification" else fields

    def flops(self, length: int, weights: int) -> float:
        """FLOPs of a forward pass over `length` tokens through layers of `weights` parameters in matrices, and a head.

        Matrix products alone, a multiply-add being two. Scores that the mask removes are not counted: T^2 / 2 pairs in
        a dense layer, T W - W^2 / 2 in a band of W.
        """
        scores = {"lm": length * self.vocab_size, "none": 0, "sequence_classification": len(self.labels)}
        flops = 2.0 * self.width * scores[self.head]
        for window in self.windows:
            band = min(window or length, length)
            pairs = length * band - band**2 / 2
            layers = self.num_layers // len(self.windows)
            flops += layers * (2.0 * length * weights + 4.0 * pairs * self.num_heads * self.head_size)
        return flops


class DecoderOutput(NamedTuple):
    """logits: float32, of head "lm" [B, T, V], of "sequence_classification" [B, C]; None of "none".

    cache: the one given, with what this call appended.
    intermediates: where they were asked for; the last hidden states are those after the last normalisation.
    hidden: those states, [B, T, D], of head "none"; else None, and `features` has them.
    """

    logits: jax.Array | None
    cache: KVCache | None
    intermediates: Intermediates | None = None
    hidden: jax.Array | None = None


class DecoderFeatures(NamedTuple):
    """hidden: [B, T, D], after the last normalisation.  cache and intermediates: as in DecoderOutput."""

    hidden: jax.Array
    cache: KVCache | None
    intermediates: Intermediates | None = None


class Decoder(nnx.Module):
    """Tokens [B, T] to logits [B, T, V], or to what else the config's head gives.

    A family sets `config`, `embed`, `stack`, `norm`, and `unembed`, which is None where the embedding scores too; one
    with other heads sets `classifier`.
    Raises SequenceError where a sequence, or a cache, is longer than config.max_length.
    """

    config: Any
    embed: Embed
    stack: Stack
    norm: nnx.Module
    unembed: Embed | None
    classifier: Linear | None = None

    def __call__(self, tokens: jax.Array, *, key: jax.Array | None = None, **arguments: Any) -> DecoderOutput:
        """Logits of the token after each of tokens [B, T] int32, or what else the head gives; arguments of `features`.

        Classes are scored from the last token with a segment, of those given; without segments from the last one that
        is not special_tokens.pad.
        """
        hidden, cache, intermediates = self.features(tokens, key=key, **arguments)
        if self.config.head == "none":
            return DecoderOutput(None, cache, intermediates, hidden)
        if self.classifier is not None:
            last = self._last_real(tokens, arguments.get("segments"))
            of_last = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
            return DecoderOutput(self.classifier(of_last), cache, intermediates)
        return DecoderOutput(self.logits(hidden)[..., : self.config.vocab_size], cache, intermediates)

    def hidden(self, tokens: jax.Array, **arguments: Any) -> jax.Array:
        """The final hidden states [B, T, D], for a loss that takes them with `head`; arguments as of `features`."""
        return self.features(tokens, **arguments).hidden

    def features(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
        key: jax.Array | None = None,
        return_intermediates: bool = False,
    ) -> DecoderFeatures:
        """The final hidden states of tokens [B, T] int32.

        positions: [B, T], learned or rotary; counted from 0, or from the cache's lengths, unless given.
        segments: [B, T], the document of each token of a packed row, 0 where there is none: tokens attend within their
            document alone. Not with a cache.
        mask: restricts attention further; it is causal in any case.
        cache: of `init_cache`; tokens stand after what it holds.
        key: for dropout; None drops nothing.
        return_intermediates: also give the hidden states and attention weights of every layer.
        """
        check_length(tokens.shape[1], self.config.max_length)
        if cache is not None and segments is not None:
            raise SequenceError("segments given with a cache: a cached row is one document, so leave segments out")
        start = 0 if cache is None else cache.lengths[0][:, None]
        if positions is None:
            positions = start + jnp.arange(tokens.shape[1])[None]
        # Documents are contiguous, so that order and distance within one are those of the row: the mask compares
        # indices, which kernels can skip blocks by, rather than positions that start again.
        mask = (mask or Mask()) & Mask(causal=True, segments=segments)
        masks = [mask if window is None else mask & Mask(window=window) for window in self.config.windows]
        x, key = self.embedded(tokens, positions, key)
        x = constrain(x, "act_batch", "act_length", "act_embed")
        x, cache, seen = self.stack(
            x, masks=masks, cache=cache, positions=positions, key=key, return_intermediates=return_intermediates
        )
        hidden = self.norm(x)
        return DecoderFeatures(hidden, cache, None if seen is None else seen.with_last(hidden))

    def embedded(
        self, tokens: jax.Array, positions: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """What enters the stack, [B, T, D], and the key that is left for it."""
        return self.embed(tokens), key

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] to [..., V padded to a multiple of 128] float32, -inf at the entries that only pad."""
        return self._words().attend(hidden)

    def head(self) -> Head:
        """What `logits` scores with: a table [D, V padded], the embedding's own where tied."""
        return self._words().head()

    def _words(self) -> Embed:
        if self.config.head != "lm":
            raise LayerError(f"head {self.config.head!r} scores no words: build the model with head 'lm'")
        return self.unembed or self.embed

    def _last_real(self, tokens: jax.Array, segments: jax.Array | None) -> jax.Array:
        """Places [B] of the last tokens that do not only pad; 0 where all do."""
        real = tokens != self.config.special_tokens.pad if segments is None else segments != 0
        return jnp.max(jnp.where(real, jnp.arange(tokens.shape[1]), 0), axis=1)

    def init_cache(self, batch_size: int, length: int) -> KVCache:
        """An empty cache with room for `length` tokens a row."""
        if length > self.config.max_length:
            raise SequenceError(f"a cache of {length} tokens exceeds the model's max_length {self.config.max_length}")
        return self.stack.init_cache(batch_size, length)


def classifier(config: Any, *, rngs: nnx.Rngs) -> Linear | None:
    """What scores classes, without a bias and in float32; None where the config's head scores none."""
    if config.head != "sequence_classification":
        return None
    precision = dataclasses.replace(config.precision, compute="float32")
    axes = ("embed", "classes")
    return Linear(
        config.width, len(config.labels), axes=axes, bias=False, rngs=rngs, precision=precision, init=normal(0.02)
    )
