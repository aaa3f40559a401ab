"""The Transformer: an encoder-decoder of attention alone, and its two published descendants, Marian and BART.

Vaswani et al. 2017, "Attention Is All You Need" (arXiv 1706.03762): post-norm blocks, sinusoidal positions, one table
of embeddings for sources, targets and scores, scaled by sqrt(D) on the way in. Marian (Junczys-Dowmunt et al. 2018) is
that with another order of sinusoids and a bias of the scores. BART (Lewis et al. 2020, arXiv 1910.13461) has learned
positions and normalises embeddings. torch.nn.Transformer normalises once more behind each stack.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.layers.attention import MultiHeadAttention
from zoo.layers.dropout import dropout
from zoo.layers.feedforward import FeedForward
from zoo.layers.linear import Embed, Head, Initializer, LayerError, Precision, check_sizes, normal
from zoo.layers.norms import LayerNorm
from zoo.layers.positions import LearnedPositions, sinusoids
from zoo.layers.transformer import Block, Stack
from zoo.models.encoder_decoder import EncoderDecoder
from zoo.models.published import (
    Layout,
    PublishedError,
    SpecialTokens,
    Weight,
    activation,
    flag,
    linear,
    norm,
    number,
    published_activation,
    require,
    size,
)
from zoo.sharding import constrain

POSITIONS = ("sinusoids", "halved_sinusoids", "learned")
"""Sines and cosines in turn (the paper), all sines before all cosines (Marian), or a learned table (BART)."""

OFFSET = 2
"""Rows of BART's table of positions before that of the first token, which nothing reads."""


@dataclass(frozen=True)
class TransformerConfig:
    """A Transformer's sizes; the defaults are those of the paper's base model, English to German.

    source_vocab_size: of a table of its own for sources; None: they share the targets'.
    max_length: positions, where they are learned; None where there is no limit.
    num_decoder_layers, num_decoder_heads, decoder_mlp_width: as the encoder's where None.
    positions: a name in POSITIONS.  scaled: embeddings times sqrt(D).  embed_norm: embeddings are normalised.
    final_norm: states are normalised behind each stack.  tied: words are scored against the embeddings.
    logits_bias: one number a word is added to its score: learned with a head of its own, else given and not trained.
    dropout: of embeddings and residual branches.  mlp_dropout: of hidden features.
    init_stddev: of all weights; None: Glorot and Bengio's uniform, and D^-0.5 for embeddings.
    special_tokens: start is what the decoder begins with; pad learns nothing from where it stands.
    remat: what the backward pass keeps, a name in zoo.layers.transformer.REMAT_POLICIES.
    """

    vocab_size: int = 37000
    source_vocab_size: int | None = None
    max_length: int | None = None
    num_layers: int = 6
    num_decoder_layers: int | None = None
    width: int = 512
    num_heads: int = 8
    num_decoder_heads: int | None = None
    mlp_width: int = 2048
    decoder_mlp_width: int | None = None
    positions: str = "sinusoids"
    scaled: bool = True
    embed_norm: bool = False
    final_norm: bool = False
    tied: bool = True
    logits_bias: bool = False
    activation: str = "relu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    init_stddev: float | None = None
    special_tokens: SpecialTokens = SpecialTokens()
    remat: str = "none"
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        names = ("vocab_size", "source_vocab_size", "max_length", "num_layers", "num_decoder_layers", "width")
        names += ("num_heads", "num_decoder_heads", "mlp_width", "decoder_mlp_width")
        sizes = {name: getattr(self, name) for name in names}
        check_sizes(**{name: size for name, size in sizes.items() if size is not None})
        if self.positions not in POSITIONS:
            raise LayerError(f"positions {self.positions!r} is unknown: choose one of {', '.join(POSITIONS)}")
        if self.positions == "learned" and self.max_length is None:
            raise LayerError("positions 'learned' without max_length: say how many there are")

    @property
    def decoder_sizes(self) -> tuple[int, int, int]:
        """Layers, heads and feed-forward width of the decoder."""
        encoder = (self.num_layers, self.num_heads, self.mlp_width)
        given = (self.num_decoder_layers, self.num_decoder_heads, self.decoder_mlp_width)
        return tuple(e if d is None else d for e, d in zip(encoder, given, strict=True))  # pyright: ignore

    def build(self, rngs: nnx.Rngs) -> "Transformer":
        return Transformer(self, rngs=rngs)

    def forward_flops(self, shape: tuple[int, ...]) -> float:
        """FLOPs of the forward pass of one example, a multiply-add being two: matrix products alone.

        shape: (S, T), tokens of the source and of the decoder; (T,) stands for as many of both.
        """
        source, length = shape if len(shape) == 2 else (*shape, *shape)
        layers, _, mlp_width = self.decoder_sizes
        square = self.width**2
        encoder = source * (4 * square + 2 * self.width * self.mlp_width) + 2 * source**2 * self.width
        # Queries and the output of cross-attention are the decoder's, its keys and values the source's.
        decoder = length * (6 * square + 2 * self.width * mlp_width) + source * 2 * square
        decoder += (length**2 + 2 * length * source) * self.width
        return 2.0 * (self.num_layers * encoder + layers * decoder + length * self.width * self.vocab_size)

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "TransformerConfig":
        """From the config.json of a Marian or BART; raises PublishedError for one that this module cannot be."""
        kind = fields["model_type"]
        require(
            fields,
            kind,
            architectures=[_CLASSES[kind]],
            is_encoder_decoder=True,
            is_decoder=False,
            tie_word_embeddings=True,
            share_encoder_decoder_embeddings=True,
            decoder_vocab_size=fields.get("vocab_size"),
            encoder_layerdrop=0.0,
            decoder_layerdrop=0.0,
            static_position_embeddings=kind == "marian",
            normalize_before=False,
            normalize_embedding=kind == "bart",
            add_final_layer_norm=False,
            add_bias_logits=False,
            extra_pos_embeddings=OFFSET,
        )
        bart = kind == "bart"
        return cls(
            vocab_size=size(fields, "vocab_size"),
            max_length=size(fields, "max_position_embeddings"),
            num_layers=size(fields, "encoder_layers"),
            num_decoder_layers=size(fields, "decoder_layers"),
            width=size(fields, "d_model"),
            num_heads=size(fields, "encoder_attention_heads"),
            num_decoder_heads=size(fields, "decoder_attention_heads"),
            mlp_width=size(fields, "encoder_ffn_dim"),
            decoder_mlp_width=size(fields, "decoder_ffn_dim"),
            positions="learned" if bart else "halved_sinusoids",
            scaled=flag(fields, "scale_embedding", False),
            embed_norm=bart,
            logits_bias=True,
            activation=activation(fields, "activation_function", "gelu"),
            dropout=number(fields, "dropout", 0.1),
            attention_dropout=number(fields, "attention_dropout", 0.0),
            mlp_dropout=number(fields, "activation_dropout", 0.0),
            init_stddev=number(fields, "init_std", 0.02),
            special_tokens=SpecialTokens.from_published(fields),
        )

    @property
    def published(self) -> str:
        """The published model that this is, "marian" or "bart"; raises PublishedError where there is none."""
        told = (self.positions, self.embed_norm, self.final_norm, self.tied, self.logits_bias, self.source_vocab_size)
        for kind, positions in (("marian", "halved_sinusoids"), ("bart", "learned")):
            if told == (positions, kind == "bart", False, True, True, None):
                return kind
        raise PublishedError(
            "the published Transformers are Marian (halved_sinusoids, logits_bias) and BART (learned positions, "
            f"embed_norm, logits_bias), both tied, without final_norm and source_vocab_size: this is none, {self}"
        )

    def to_published(self) -> dict[str, Any]:
        """The config.json of this Marian or BART; raises PublishedError where it is neither."""
        kind, (layers, heads, mlp_width) = self.published, self.decoder_sizes
        if self.max_length is None:
            raise PublishedError("max_length None: a published Transformer says how many positions it has")
        fields = {
            "architectures": [_CLASSES[kind]],
            "model_type": kind,
            "is_encoder_decoder": True,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_length,
            "encoder_layers": self.num_layers,
            "decoder_layers": layers,
            "d_model": self.width,
            "encoder_attention_heads": self.num_heads,
            "decoder_attention_heads": heads,
            "encoder_ffn_dim": self.mlp_width,
            "decoder_ffn_dim": mlp_width,
            "activation_function": published_activation(self.activation),
            "scale_embedding": self.scaled,
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
            "activation_dropout": self.mlp_dropout,
            "tie_word_embeddings": True,
        }
        fields |= {} if self.init_stddev is None else {"init_std": self.init_stddev}
        fields |= {"decoder_vocab_size": self.vocab_size} if kind == "marian" else {}
        return fields | self.special_tokens.to_published()

    def published_layout(self) -> Layout:
        return _layout(self.published)


_CLASSES = {"marian": "MarianMTModel", "bart": "BartForConditionalGeneration"}


def transformer_block(
    config: TransformerConfig, num_heads: int, mlp_width: int, *, decoding: bool, rngs: nnx.Rngs
) -> Block:
    """One layer of the encoder, or of the decoder."""
    common = {"rngs": rngs, "precision": config.precision, "init": _init(config)}
    attention = partial(MultiHeadAttention, config.width, num_heads, dropout=config.attention_dropout, **common)
    return Block(
        attention(),
        FeedForward(config.width, mlp_width, activation=config.activation, dropout=config.mlp_dropout, **common),
        partial(LayerNorm, config.width, precision=config.precision),
        cross_attention=attention() if decoding else None,
        norm_first=False,
        dropout=config.dropout,
    )


def _init(config: TransformerConfig) -> Initializer:
    given = config.init_stddev
    return jax.nn.initializers.glorot_uniform() if given is None else normal(given)


class Transformer(EncoderDecoder):
    """Sources [B, S] and tokens [B, T] to logits [B, T, V].

    Raises SequenceError where a sequence, or a cache, is longer than config.max_length, if there is one.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        common = {"rngs": rngs, "precision": config.precision}
        embed = partial(Embed, width=config.width, init=normal(config.init_stddev or config.width**-0.5), **common)
        norm = partial(LayerNorm, config.width, precision=config.precision)
        self.embed = embed(config.vocab_size)
        self.source_embed = None if config.source_vocab_size is None else embed(config.source_vocab_size)
        self.unembed = None if config.tied else embed(config.vocab_size)
        rows = self.embed.table.shape[0]
        bias = jnp.zeros(rows, jnp.dtype(config.precision.parameters))
        self.logits_bias = nnx.Param(bias, axes=("vocab",), rows=config.vocab_size) if config.logits_bias else None

        def stack(layers: int, heads: int, mlp_width: int, *, decoding: bool) -> Stack:
            make = partial(transformer_block, config, heads, mlp_width, decoding=decoding)
            return Stack(lambda rngs: make(rngs=rngs), layers, remat=config.remat, rngs=rngs)

        def positions() -> LearnedPositions | None:
            if config.positions != "learned" or config.max_length is None:
                return None
            return LearnedPositions(config.max_length + OFFSET, config.width, init=_init(config), **common)

        self.encoder = stack(config.num_layers, config.num_heads, config.mlp_width, decoding=False)
        self.decoder = stack(*config.decoder_sizes, decoding=True)
        self.encoder_positions, self.decoder_positions = positions(), positions()
        self.encoder_embed_norm, self.decoder_embed_norm = (norm() if config.embed_norm else None for _ in range(2))
        self.encoder_norm, self.decoder_norm = (norm() if config.final_norm else None for _ in range(2))

    def embedded(self, tokens: jax.Array, positions: jax.Array, key: jax.Array | None, *, decoding: bool) -> jax.Array:
        config = self.config
        embed = self.embed if decoding or self.source_embed is None else self.source_embed
        learned, norm = (
            (self.decoder_positions, self.decoder_embed_norm)
            if decoding
            else (self.encoder_positions, self.encoder_embed_norm)
        )
        x = embed(tokens, pad=config.special_tokens.pad).astype(jnp.float32)
        x = x * math.sqrt(config.width) if config.scaled else x
        if learned is not None:
            x = x + learned(positions + OFFSET)
        else:
            waves = sinusoids(positions, config.width)
            halved = config.positions == "halved_sinusoids"
            x = x + (jnp.concatenate([waves[..., 0::2], waves[..., 1::2]], -1) if halved else waves)
        x = x.astype(config.precision.compute)
        return dropout(x if norm is None else norm(x), config.dropout, key)

    def ended(self, x: jax.Array, key: jax.Array | None, *, decoding: bool) -> jax.Array:
        norm = self.decoder_norm if decoding else self.encoder_norm
        return x if norm is None else norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        logits = super().logits(hidden)
        bias = self._bias()
        return logits if bias is None else constrain(logits + bias, *(None,) * (logits.ndim - 1), "act_vocab")

    def head(self) -> Head:
        return super().head()._replace(bias=self._bias())

    def _bias(self) -> jax.Array | None:
        """[V padded]. Marian's and BART's is a constant of the published modules."""
        if self.logits_bias is None:
            return None
        return jax.lax.stop_gradient(self.logits_bias[...]) if self.config.tied else self.logits_bias[...]


def _attention(name: str, module: str) -> tuple[Weight, ...]:
    into = [
        weight
        for part in ("query", "key", "value")
        for weight in linear(f"{name}.{part[0]}_proj", f"{module}.{part}", "(n h) d -> d n h", "(n h) -> n h")
    ]
    return (*into, *linear(f"{name}.out_proj", f"{module}.out", "d (n h) -> n h d", "d -> d"))


def _stack(name: str, *, bart: bool) -> tuple[Weight, ...]:
    layer, block = f"model.{name}.layers.{{}}", f"{name}.blocks.*"
    before = (
        Weight(f"model.{name}.embed_positions.weight", (f"{name}_positions.table",), "t d -> t d"),
        *norm(f"model.{name}.layernorm_embedding", f"{name}_embed_norm"),
    )
    across = (
        *_attention(f"{layer}.encoder_attn", f"{block}.cross_attention"),
        *norm(f"{layer}.encoder_attn_layer_norm", f"{block}.cross_norm"),
    )
    return (
        *(before if bart else ()),
        *_attention(f"{layer}.self_attn", f"{block}.attention"),
        *norm(f"{layer}.self_attn_layer_norm", f"{block}.attention_norm"),
        *(across if name == "decoder" else ()),
        *linear(f"{layer}.fc1", f"{block}.feedforward.up", "f d -> d f", "f -> f"),
        *linear(f"{layer}.fc2", f"{block}.feedforward.down", "d f -> f d", "d -> d"),
        *norm(f"{layer}.final_layer_norm", f"{block}.feedforward_norm"),
    )


def _layout(kind: str) -> Layout:
    weights = (
        Weight("model.shared.weight", ("embed.table",), "v d -> v d"),
        *_stack("encoder", bart=kind == "bart"),
        *_stack("decoder", bart=kind == "bart"),
        Weight("final_logits_bias", ("logits_bias",), "1 v -> v"),
    )
    copies = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
    sines = (r"model\.(encoder|decoder)\.embed_positions\.weight",) if kind == "marian" else ()
    return Layout(weights, tied=dict.fromkeys(copies, "model.shared.weight"), ignored=sines)


_BIG = TransformerConfig(width=1024, num_heads=16, mlp_width=4096, dropout=0.3)
_BART = TransformerConfig(
    vocab_size=50265,
    max_length=1024,
    width=768,
    num_heads=12,
    mlp_width=3072,
    positions="learned",
    scaled=False,
    embed_norm=True,
    logits_bias=True,
    activation="gelu",
    init_stddev=0.02,
    special_tokens=SpecialTokens(bos=0, eos=(2,), pad=1, start=2, last=2),
)
_MARIAN = TransformerConfig(
    vocab_size=58101,
    max_length=512,
    positions="halved_sinusoids",
    logits_bias=True,
    activation="silu",
    init_stddev=0.02,
    special_tokens=SpecialTokens(eos=(0,), pad=58100, start=58100, last=0, banned=(58100,)),
)

PRESETS = {
    "transformer-base": TransformerConfig(),
    "transformer-big": _BIG,
    "bart-base": _BART,
    "bart-large": dataclasses.replace(_BART, num_layers=12, width=1024, num_heads=16, mlp_width=4096),
    "opus-mt-en-de": _MARIAN,
}
