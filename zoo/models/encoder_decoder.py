"""What encoder-decoder families share: a stack that reads a source, a causal one that attends to it, and their cache.

Sources are [B, S] and the tokens of the decoder [B, T]. The config's `head` says what is scored; a config without one
scores words.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.kernels import Bias, Mask
from zoo.layers.attention import KVCache
from zoo.layers.dropout import split
from zoo.layers.linear import Embed, Head, LayerError
from zoo.layers.positions import SequenceError, check_length
from zoo.layers.transformer import Intermediates, Stack
from zoo.models.encoder_decoder_heads import AS_SOURCE, SOURCE_ALONE, Classifier
from zoo.sharding import constrain


@partial(jax.tree_util.register_dataclass, data_fields=("own", "source", "source_segments"), meta_fields=())
@dataclass(frozen=True)
class Cache:
    """What a decoder has seen.

    own: of its self-attention, [L, B, K, slots, H].
    source: keys and values of the encoded source, [L, B / G, K, S, H]: G rows, one after another, share each of them.
    source_segments: [B / G, S] int32, 0 where a source token only pads.
    """

    own: KVCache
    source: KVCache
    source_segments: jax.Array

    @property
    def lengths(self) -> jax.Array:
        """Tokens that each row holds, [L, B]."""
        return self.own.lengths

    def cut(self, lengths: jax.Array) -> "Cache":
        """With the decoder's first lengths [B] tokens of each row alone."""
        return dataclasses.replace(self, own=self.own.cut(lengths))

    def repeated(self, count: int) -> "Cache":
        """With `count` copies of each row, one after another, which share its source."""
        return dataclasses.replace(self, own=self.own.repeated(count))

    def rows(self, rows: jax.Array) -> "Cache":
        """A cache whose row r is row rows[r] of this one, which must be one that has the same source."""
        return dataclasses.replace(self, own=self.own.rows(rows))


class Encoded(NamedTuple):
    """hidden: [B, S, D], what the decoder attends to.  segments: [B, S] int32, 0 where a token only pads.

    intermediates: of the encoder, where they were asked for.
    """

    hidden: jax.Array
    segments: jax.Array
    intermediates: Intermediates | None = None


class EncoderDecoderOutput(NamedTuple):
    """logits: float32, of words [B, T, V]; of classes, of a text [B, C], of each token of the source [B, S, C], or that
        an answer starts, and that it ends, at a token [B, T, 2]. None where the head scores nothing.

    cache: the one given, with what this call appended.  encoded: the source.
    intermediates: of the decoder, where they were asked for; those of the encoder are in `encoded`.
    hidden: of a model that scores nothing: the decoder's states [B, T, D], or the source's where there is no decoder.
    """

    logits: jax.Array | None
    cache: Cache | None
    encoded: Encoded | None
    intermediates: Intermediates | None = None
    hidden: jax.Array | None = None


class EncoderDecoderFeatures(NamedTuple):
    """hidden: [B, T, D], as `logits` and `head` score it.  The others are as in EncoderDecoderOutput."""

    hidden: jax.Array
    cache: Cache | None
    encoded: Encoded | None
    intermediates: Intermediates | None = None


class EncoderDecoder(nnx.Module):
    """Sources [B, S] and tokens [B, T] to logits [B, T, V], or to what else the config's head gives.

    A family sets `config`, `embed`, `encoder` and `decoder`, whose blocks have cross-attention, and `unembed`, which is
    None where the embedding scores too; it overrides what stands before and behind its stacks. One with other heads
    sets `classifier`, and `decoder` to None with those of SOURCE_ALONE.
    Raises SequenceError where a sequence, or a cache, is longer than config.max_length (None: there is no limit).
    """

    config: Any
    embed: Embed
    encoder: Stack
    decoder: Stack | None
    unembed: Embed | None
    classifier: Classifier | None = None

    def __call__(
        self,
        sources: jax.Array | None,
        tokens: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
        **arguments: Any,
    ) -> EncoderDecoderOutput:
        """Logits of the token after each of tokens [B, T] int32, or what else the head gives.

        tokens: with the heads of AS_SOURCE, the source one token later unless given; with those of SOURCE_ALONE, none.
        The other arguments are those of `features`.
        """
        key, head_key = (key, None) if self.classifier is None else split(key, 2)
        if self._kind in SOURCE_ALONE:
            if sources is None or tokens is not None:
                raise SequenceError(f"head {self._kind!r} has no decoder: give sources, and no tokens")
            segments = arguments.pop("source_segments", None)
            encoded = self.encode(sources, segments=segments, key=key, **arguments)
            if self.classifier is None:
                return EncoderDecoderOutput(None, None, encoded, None, encoded.hidden)
            return EncoderDecoderOutput(self.classifier(encoded.hidden, head_key), None, encoded)
        if tokens is None:
            tokens = self._one_later(sources)
        hidden, cache, encoded, intermediates = self.features(tokens, sources=sources, key=key, **arguments)
        if self._kind == "none":
            return EncoderDecoderOutput(None, cache, encoded, intermediates, hidden)
        if self.classifier is not None:
            states = self._at_end(hidden, sources) if self._kind == "sequence_classification" else hidden
            return EncoderDecoderOutput(self.classifier(states, head_key), cache, encoded, intermediates)
        return EncoderDecoderOutput(self.logits(hidden)[..., : self.config.vocab_size], cache, encoded, intermediates)

    def hidden(self, sources: jax.Array, tokens: jax.Array, **arguments: Any) -> jax.Array:
        """States [B, T, D], for a loss that takes them with `head`; arguments as of `features`."""
        return self.features(tokens, sources=sources, **arguments).hidden

    def features(
        self,
        tokens: jax.Array,
        *,
        sources: jax.Array | None = None,
        source_segments: jax.Array | None = None,
        segments: jax.Array | None = None,
        encoded: Encoded | None = None,
        cache: Cache | None = None,
        mask: Mask | None = None,
        key: jax.Array | None = None,
        return_intermediates: bool = False,
    ) -> EncoderDecoderFeatures:
        """The decoder's final states of tokens [B, T] int32.

        sources: [B, S] int32; or else encoded, of `encode`; or else a cache, which holds them.
        source_segments: [B, S], 0 where a source token only pads; with `segments`, which text of a packed row it is of.
        segments: [B, T], of a packed row, whose tokens attend to their own text and source alone. Not with a cache.
        cache: of `init_cache`; tokens stand after what it holds.
        mask: restricts the decoder's self-attention further; it is causal in any case.
        key: for dropout; None drops nothing.
        return_intermediates: also give the hidden states and attention weights of every layer.
        """
        if sum(given is not None for given in (sources, encoded, cache)) != 1:
            raise SequenceError("give one of sources, encoded and cache: what the decoder attends to")
        if segments is not None and cache is not None:
            raise SequenceError("segments given with a cache: a cached row is one text, so leave segments out")
        if self.decoder is None:
            raise LayerError(f"head {self._kind!r} has no decoder: `encode` gives what the model has")
        check_length(tokens.shape[1], self.config.max_length)
        encoder_key, embed_key, stack_key, end_key = split(key, 4)
        if sources is not None:
            encoded = self.encode(
                sources,
                segments=source_segments,
                positions=None if segments is None or source_segments is None else _restarted(source_segments),
                key=encoder_key,
                return_intermediates=return_intermediates,
            )
        if cache is not None:
            context, context_segments, own = cache.source, cache.source_segments, cache.own
            positions = own.lengths[0][:, None] + jnp.arange(tokens.shape[1])[None]
        else:
            assert encoded is not None
            context, context_segments, own = encoded.hidden, encoded.segments, None
            positions = jnp.arange(tokens.shape[1])[None] if segments is None else _restarted(segments)
        x = self.embedded(tokens, positions, embed_key, decoding=True)
        x, own, seen = self.decoder(
            constrain(x, "act_batch", "act_length", "act_embed"),
            masks=[(mask or Mask()) & Mask(causal=True, segments=segments)],
            bias=self.bias(decoding=True),
            context=context,
            context_mask=_context_mask(tokens, segments, context_segments),
            cache=own,
            key=stack_key,
            return_intermediates=return_intermediates,
        )
        x = self.ended(x, end_key, decoding=True)
        cache = None if cache is None or own is None else dataclasses.replace(cache, own=own)
        seen = None if seen is None else seen.with_last(x)
        return EncoderDecoderFeatures(self.scored(x), cache, encoded, seen)

    def encode(
        self,
        sources: jax.Array,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        key: jax.Array | None = None,
        return_intermediates: bool = False,
    ) -> Encoded:
        """The states of sources [B, S] int32.

        segments: [B, S], 0 where a token only pads.  positions: [B, S], counted from 0 unless given.  The others are
        those of `features`.
        """
        check_length(sources.shape[1], self.config.max_length)
        segments = jnp.ones(sources.shape, jnp.int32) if segments is None else segments.astype(jnp.int32)
        embed_key, stack_key, end_key = split(key, 3)
        positions = jnp.arange(sources.shape[1])[None] if positions is None else positions
        x = self.embedded(sources, positions, embed_key, decoding=False)
        x, _, seen = self.encoder(
            constrain(x, "act_batch", "act_length", "act_embed"),
            masks=[Mask(segments=segments)],
            bias=self.bias(decoding=False),
            key=stack_key,
            return_intermediates=return_intermediates,
        )
        x = self.ended(x, end_key, decoding=False)
        return Encoded(x, segments, None if seen is None else seen.with_last(x))

    def init_cache(self, encoded: Encoded, length: int) -> Cache:
        """A cache for an encoded source, with room for `length` tokens a row."""
        if self.decoder is None:
            raise LayerError(f"head {self._kind!r} has no decoder, and nothing to cache")
        longest = self.config.max_length
        if longest is not None and length > longest:
            raise SequenceError(f"a cache of {length} tokens exceeds the model's max_length {longest}")
        own = self.decoder.init_cache(len(encoded.hidden), length)
        return Cache(own, self.decoder.keys_and_values(encoded.hidden), encoded.segments)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] to [..., V padded to a multiple of 128] float32, -inf at the entries that only pad."""
        return self._words().attend(hidden)

    def head(self) -> Head:
        """What `logits` scores with: a table [D, V padded], the embedding's own where tied."""
        return self._words().head()

    def embedded(self, tokens: jax.Array, positions: jax.Array, key: jax.Array | None, *, decoding: bool) -> jax.Array:
        """What enters the encoder, or the decoder, [B, T, D], of tokens at positions that broadcast to [B, T]."""
        raise NotImplementedError

    def ended(self, x: jax.Array, key: jax.Array | None, *, decoding: bool) -> jax.Array:
        """What leaves the encoder, or the decoder, of the states x [B, T, D] behind its stack."""
        return x

    def scored(self, x: jax.Array) -> jax.Array:
        """What words are scored from, of the states x [B, T, D] that leave the decoder."""
        return x

    def bias(self, *, decoding: bool) -> Bias | None:
        """Of the scores of self-attention in every block of the encoder, or of the decoder."""
        return None

    @property
    def _kind(self) -> str:
        return getattr(self.config, "head", "lm")

    def _words(self) -> Embed:
        if self._kind != "lm":
            raise LayerError(f"head {self._kind!r} scores no words: build the model with head 'lm'")
        return self.unembed or self.embed

    def _one_later(self, sources: jax.Array | None) -> jax.Array:
        """Sources [B, S], one token later, behind the token that a decoder begins with."""
        start = self.config.special_tokens.start
        if sources is None or self._kind not in AS_SOURCE or start is None:
            raise SequenceError(
                f"no tokens for the decoder: only with head {' or '.join(AS_SOURCE)}, sources, and a start among "
                "special_tokens it reads the source again"
            )
        return jnp.pad(sources[:, :-1], ((0, 0), (1, 0)), constant_values=start)

    def _at_end(self, hidden: jax.Array, sources: jax.Array | None) -> jax.Array:
        """The states of hidden [B, S, D] where the last token of eos stands in sources: [B, D]; NaN without one."""
        if sources is None or sources.shape != hidden.shape[:2]:
            raise SequenceError(
                f"states {hidden.shape[:2]} for sources {None if sources is None else sources.shape}: classes are "
                "scored where a source ends, so that the decoder takes as many tokens"
            )
        ends = jnp.isin(sources, jnp.array(self.config.special_tokens.eos))
        last = jnp.max(jnp.where(ends, jnp.arange(sources.shape[1]), -1), axis=1)[:, None, None]
        found = jnp.take_along_axis(hidden, jnp.maximum(last, 0), axis=1)[:, 0]
        return jnp.where(last[:, 0] < 0, jnp.nan, found)


def _context_mask(tokens: jax.Array, segments: jax.Array | None, context_segments: jax.Array) -> Mask:
    """Tokens [B, T] attend to their own text in a packed row, else to all that is real of a source [B / G, S]."""
    if segments is not None:
        return Mask(segments=(segments, context_segments))
    real = (context_segments != 0).astype(jnp.int32)
    return Mask(segments=(jnp.ones((len(real), tokens.size // len(real)), jnp.int32), real))


def _restarted(segments: jax.Array) -> jax.Array:
    """Positions [B, T] that count from 0 in each run of equal segments [B, T]."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    begins = jnp.concatenate([jnp.ones_like(index[:, :1]), segments[:, 1:] != segments[:, :-1]], 1)
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
