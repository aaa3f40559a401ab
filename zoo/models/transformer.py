"""The Transformer of 2017, an encoder-decoder with post-norm blocks, and its published descendants Marian and BART.

Vaswani et al. 2017, "Attention Is All You Need" (arXiv 1706.03762). One table of vectors serves source, target and head
(section 3.4), and enters multiplied by sqrt(D); what the paper leaves open (kernels by Glorot's uniform rule, vectors
N(0, 1 / D), epsilon 1e-6, projections of attention without bias) is as in its released code, tensor2tensor.

Marian (Junczys-Dowmunt et al. 2018, arXiv 1804.00344) puts sines and cosines into two halves, and adds a bias to the
logits. BART (Lewis et al. 2019, arXiv 1910.13461) learns positions and normalises what enters.
"""

import dataclasses
from collections.abc import Collection, Mapping
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
from zoo.models.encoder_decoder_heads import check_head, classifier, head_flops, published_head, read_head
from zoo.models.published import (
    LABELS,
    Layout,
    PublishedError,
    SpecialTokens,
    activation,
    flag,
    head,
    number,
    published_activation,
    require,
    size,
)
from zoo.models.transformer_layout import layout

POSITIONS = ("interleaved", "halves", "learned")
"""Sines and cosines in turn; all sines, then all cosines; one vector for each position."""

HEADS = ("lm", "sequence_classification", "question_answering")
"""Of encoder_decoder_heads.HEADS; the latter two are published with BART."""

OFFSET = 2
"""Rows before position 0 in BART's tables of positions. Nothing reads them."""


@dataclass(frozen=True)
class TransformerConfig:
    """A Transformer's sizes; the defaults are those of the paper's base model.

    source_vocab_size: of sources, where they have vectors of their own; None: they share the target's.
    max_length: None where sinusoids go on for ever.
    num_layers, num_heads, mlp_width: of the encoder; the decoder's own, where they are not the same.
    positions: a name in POSITIONS.  scaled: whether vectors of words are multiplied by sqrt(D).
    embed_norm: whether what enters a stack is normalised.  final_norm: whether what leaves it is once more, as
        torch.nn.Transformer does.
    attention_bias: whether projections of attention have biases.
    tied: whether words are scored against the embeddings.  logits_bias: whether a bias is added to their scores. It is
        learned, as by Marian; Hugging Face's code holds it as it is.
    head: a name in HEADS.  labels: names of the classes of heads that score some.
    problem_type: how classes of a text are read, a name in zoo.models.published.PROBLEMS; None where it is not said.
    dropout: of embeddings and residual branches.  mlp_dropout: of hidden features.
    classifier_dropout: of what classes of a text are scored from.
    model_type: what it is published as, "marian" or "bart"; "transformer" has no published form.
    special_tokens: start is what the decoder begins with; the vector of pad gets no gradient from where it stands.
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
    positions: str = "interleaved"
    scaled: bool = True
    embed_norm: bool = False
    final_norm: bool = False
    attention_bias: bool = False
    tied: bool = True
    logits_bias: bool = False
    activation: str = "relu"
    norm_epsilon: float = 1e-6
    dropout: float = 0.1
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    classifier_dropout: float = 0.0
    head: str = "lm"
    labels: tuple[str, ...] = LABELS
    problem_type: str | None = None
    model_type: str = "transformer"
    special_tokens: SpecialTokens = SpecialTokens()
    remat: str = "none"
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        named = ("source_vocab_size", "max_length", "num_decoder_layers", "num_decoder_heads", "decoder_mlp_width")
        names = ("vocab_size", "num_layers", "width", "num_heads", "mlp_width", *named)
        check_sizes(**{name: value for name in names if (value := getattr(self, name)) is not None})
        if self.positions not in POSITIONS:
            raise LayerError(f"positions {self.positions!r} are unknown: choose one of {', '.join(POSITIONS)}")
        if self.positions == "learned" and self.max_length is None:
            raise LayerError("positions 'learned' with max_length None: say how many there are")
        if self.positions != "learned" and self.width % 2:
            raise LayerError(f"width {self.width} is odd, and sines need cosines: choose {self.width + 1}")
        check_head(self, HEADS)
        if self.head != "lm" and self.logits_bias:
            raise LayerError(f"logits_bias True with head {self.head!r}, which scores no words: leave it False")
        if self.model_type not in ("transformer", *_CLASSES):
            raise LayerError(f"model_type {self.model_type!r} is none of transformer, {', '.join(_CLASSES)}")

    def sizes(self, *, decoding: bool) -> tuple[int, int, int]:
        """Layers, heads and hidden features of the encoder, or of the decoder."""
        encoder = (self.num_layers, self.num_heads, self.mlp_width)
        own = (self.num_decoder_layers, self.num_decoder_heads, self.decoder_mlp_width)
        layers, heads, width = (y if decoding and y is not None else x for x, y in zip(encoder, own, strict=True))
        return layers, heads, width

    def build(self, rngs: nnx.Rngs) -> "Transformer":
        return Transformer(self, rngs=rngs)

    def forward_flops(self, shape: tuple[int, ...]) -> float:
        """FLOPs of the forward pass of one example, a multiply-add being two: matrix products alone.

        Pairs that the decoder's mask hides are not counted.

        shape: (S, T), tokens of the source and of the decoder; (T,) stands for as many of both.
        """
        source, length = shape if len(shape) == 2 else (*shape, *shape)
        layers, _, hidden = self.sizes(decoding=False)
        encoder = source * (4 * self.width**2 + 2 * self.width * hidden) + 2 * source**2 * self.width
        decoder_layers, _, hidden = self.sizes(decoding=True)
        # Queries and the output of cross-attention are the decoder's, its keys and values the source's.
        decoder = (6 * length + 2 * source) * self.width**2 + length * 2 * self.width * hidden
        decoder += (length**2 + 2 * length * source) * self.width
        return 2.0 * (layers * encoder + decoder_layers * decoder + head_flops(self, source, length))

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "TransformerConfig":
        """From the config.json of a Marian or BART; raises PublishedError for one that this module cannot be."""
        model_type = fields["model_type"]
        classes, family = _CLASSES[model_type], model_type.upper() if model_type == "bart" else "Marian"
        kind = head(fields, family, classes, "lm")
        fields = _DEFAULTS[model_type] | dict(fields)
        vocab_size = size(fields, "vocab_size")
        require(fields, family, **_ALONE, **_ALONE_OF[model_type])
        if fields.get("decoder_vocab_size") is not None:
            require(fields, f"{family} with vocab_size {vocab_size}", decoder_vocab_size=vocab_size)
        marian = model_type == "marian"
        return cls(
            vocab_size=vocab_size,
            max_length=size(fields, "max_position_embeddings"),
            num_layers=size(fields, "encoder_layers"),
            num_decoder_layers=size(fields, "decoder_layers"),
            width=size(fields, "d_model"),
            num_heads=size(fields, "encoder_attention_heads"),
            num_decoder_heads=size(fields, "decoder_attention_heads"),
            mlp_width=size(fields, "encoder_ffn_dim"),
            decoder_mlp_width=size(fields, "decoder_ffn_dim"),
            positions="halves" if marian else "learned",
            scaled=flag(fields, "scale_embedding", False),
            embed_norm=not marian,
            attention_bias=True,
            logits_bias=kind == "lm",
            head="lm" if kind == "bare" else kind,
            **read_head(
                {} if marian else {"num_labels": 2 if kind == "question_answering" else 3} | fields, family, kind
            ),
            activation=activation(fields, "activation_function", "gelu"),
            norm_epsilon=1e-5,
            dropout=number(fields, "dropout", 0.1),
            attention_dropout=number(fields, "attention_dropout", 0.0),
            mlp_dropout=number(fields, "activation_dropout", 0.0),
            model_type=model_type,
            special_tokens=SpecialTokens.from_published(fields),
        )

    def to_published(self) -> dict[str, Any]:
        """The config.json of this Marian or BART; raises PublishedError where it is none."""
        if self.model_type not in _CLASSES:
            raise PublishedError(f"model_type {self.model_type!r} has no published form: {', '.join(_CLASSES)} have")
        classes = _CLASSES[self.model_type]
        kind = "bare" if self.head == "lm" and not self.logits_bias else self.head
        if kind not in classes:
            kind = "lm"  # What differs from it is told below.
        encoder, decoder = self.sizes(decoding=False), self.sizes(decoding=True)
        fields = {
            "architectures": [classes[kind]],
            "model_type": self.model_type,
            "is_encoder_decoder": True,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_length,
            "encoder_layers": encoder[0],
            "decoder_layers": decoder[0],
            "d_model": self.width,
            "encoder_attention_heads": encoder[1],
            "decoder_attention_heads": decoder[1],
            "encoder_ffn_dim": encoder[2],
            "decoder_ffn_dim": decoder[2],
            # As Marian's files have it.
            "activation_function": "swish" if self.activation == "silu" else published_activation(self.activation),
            "scale_embedding": self.scaled,
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
            "activation_dropout": self.mlp_dropout,
            "tie_word_embeddings": True,
            "forced_eos_token_id": None,
        }
        fields |= published_head(self) | self.special_tokens.to_published()
        back = dataclasses.replace(type(self).from_published(fields), remat=self.remat, precision=self.precision)
        # What those families have one value of is in no field of theirs.
        for name in (one.name for one in dataclasses.fields(self)):
            found, theirs = getattr(self, name), getattr(back, name)
            if found != theirs and not (name in _DECODERS and found is None):
                raise PublishedError(f"{name} {found!r}: a published {self.model_type} has {theirs!r}")
        return fields

    def with_tensors(self, names: Collection[str]) -> "TransformerConfig":
        """As a file with these tensors has it: a BART with a bias of its logits is more than a bare one."""
        told = self.model_type != "bart" or self.head != "lm"
        bias = self.logits_bias if told else "final_logits_bias" in names
        return dataclasses.replace(self, logits_bias=bias)

    def published_layout(self) -> Layout:
        return layout(self)


_DECODERS = ("num_decoder_layers", "num_decoder_heads", "decoder_mlp_width")

_CLASSES = {
    "marian": {"lm": "MarianMTModel"},
    "bart": {
        "lm": "BartForConditionalGeneration",
        "bare": "BartModel",
        "sequence_classification": "BartForSequenceClassification",
        "question_answering": "BartForQuestionAnswering",
    },
}
"""Published classes by our names of their heads; the bare one scores words too, without a bias."""

_ALONE = {
    "is_encoder_decoder": True,
    "is_decoder": False,
    "tie_word_embeddings": True,
    "share_encoder_decoder_embeddings": True,
    "encoder_layerdrop": 0,
    "decoder_layerdrop": 0,
    "normalize_before": False,
    "add_final_layer_norm": False,
    "add_bias_logits": False,
}
_ALONE_OF = {
    "marian": {"static_position_embeddings": True, "normalize_embedding": False},
    "bart": {"static_position_embeddings": False, "normalize_embedding": True},
}

# What Hugging Face transformers takes where a config.json leaves it out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "marian": {
        "eos_token_id": 0,
        "pad_token_id": 58100,
        "decoder_start_token_id": 58100,
        "forced_eos_token_id": 0,
    },
    "bart": {
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    },
}


def kernel_init(config: TransformerConfig) -> Initializer:
    return normal(0.02) if config.model_type == "bart" else jax.nn.initializers.glorot_uniform()


def transformer_block(config: TransformerConfig, *, decoding: bool, rngs: nnx.Rngs) -> Block:
    """One layer of the encoder, or of the decoder."""
    _, heads, hidden = config.sizes(decoding=decoding)
    common = {"rngs": rngs, "precision": config.precision, "init": kernel_init(config)}

    def attention() -> MultiHeadAttention:
        rate, bias = config.attention_dropout, config.attention_bias
        return MultiHeadAttention(config.width, heads, bias=bias, dropout=rate, **common)

    return Block(
        attention(),
        FeedForward(config.width, hidden, activation=config.activation, dropout=config.mlp_dropout, **common),
        partial(LayerNorm, config.width, epsilon=config.norm_epsilon, precision=config.precision),
        cross_attention=attention() if decoding else None,
        norm_first=False,
        dropout=config.dropout,
    )


class WordBias(nnx.Module):
    """What is added to the score of each word, [V padded]."""

    def __init__(self, config: TransformerConfig, padded: int):
        dtype = jnp.dtype(config.precision.parameters)
        self.bias = nnx.Param(jnp.zeros(padded, dtype), axes=("vocab",), rows=config.vocab_size)


class Side(nnx.Module):
    """What stands around one stack: positions and a normalisation before it, a normalisation behind it, as there are.

    embed: vectors of words, where this side has its own.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int | None, *, rngs: nnx.Rngs):
        common = {"rngs": rngs, "precision": config.precision}
        learned, vectors = {"init": kernel_init(config), **common}, {"init": vector_init(config), **common}
        rows = OFFSET + (config.max_length or 0)
        norm = partial(LayerNorm, config.width, epsilon=config.norm_epsilon, precision=config.precision)
        self.embed = None if vocab_size is None else Embed(vocab_size, config.width, **vectors)
        self.positions = LearnedPositions(rows, config.width, **learned) if config.positions == "learned" else None
        self.embed_norm = norm() if config.embed_norm else None
        self.final_norm = norm() if config.final_norm else None


def vector_init(config: TransformerConfig) -> Initializer:
    return normal(config.width**-0.5 if config.scaled else 0.02)


class Transformer(EncoderDecoder):
    """Sources [B, S] and tokens [B, T] to logits [B, T, V], or to what else config.head gives."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        common = {"rngs": rngs, "precision": config.precision, "init": vector_init(config)}
        self.embed = Embed(config.vocab_size, config.width, **common)
        self.unembed = None if config.tied else Embed(config.vocab_size, config.width, **common)
        self.words = WordBias(config, self.embed.table.shape[0]) if config.logits_bias else None

        def stack(*, decoding: bool) -> Stack:
            make = partial(transformer_block, config, decoding=decoding)
            return Stack(
                lambda rngs: make(rngs=rngs), config.sizes(decoding=decoding)[0], remat=config.remat, rngs=rngs
            )

        self.source, self.encoder = Side(config, config.source_vocab_size, rngs=rngs), stack(decoding=False)
        self.target, self.decoder = Side(config, None, rngs=rngs), stack(decoding=True)
        self.classifier = classifier(config, init=kernel_init(config), rngs=rngs)

    def embedded(self, tokens: jax.Array, positions: jax.Array, key: jax.Array | None, *, decoding: bool) -> jax.Array:
        config, side = self.config, self.target if decoding else self.source
        x = (side.embed or self.embed)(tokens, pad=config.special_tokens.pad)
        if config.scaled:
            x = x * config.width**0.5
        if side.positions is not None:
            x = x + side.positions(positions + OFFSET)
        else:
            x = x + sinusoids(positions, config.width, halves=config.positions == "halves").astype(x.dtype)
        x = x if side.embed_norm is None else side.embed_norm(x)
        return dropout(x, config.dropout, key)

    def ended(self, x: jax.Array, key: jax.Array | None, *, decoding: bool) -> jax.Array:
        final_norm = (self.target if decoding else self.source).final_norm
        return x if final_norm is None else final_norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] to [..., V padded to a multiple of 128] float32, -inf at the entries that only pad."""
        logits = super().logits(hidden)
        return logits if self.words is None else logits + self.words.bias[...]

    def head(self) -> Head:
        """What `logits` scores with: a table [D, V padded], the embedding's own where tied, and a bias."""
        return super().head()._replace(bias=None if self.words is None else self.words.bias[...])


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
    attention_bias=True,
    logits_bias=True,
    activation="gelu",
    norm_epsilon=1e-5,
    model_type="bart",
    special_tokens=SpecialTokens(bos=0, eos=(2,), pad=1, start=2, first=0, last=2),
)

PRESETS = {
    "transformer-base": TransformerConfig(),
    "transformer-big": _BIG,
    "opus-mt-en-de": TransformerConfig(
        vocab_size=58101,
        max_length=512,
        positions="halves",
        attention_bias=True,
        logits_bias=True,
        activation="silu",
        norm_epsilon=1e-5,
        model_type="marian",
        special_tokens=SpecialTokens(eos=(0,), pad=58100, start=58100, last=0, banned=(58100,)),
    ),
    "bart-base": _BART,
    "bart-large": dataclasses.replace(_BART, num_layers=12, width=1024, num_heads=16, mlp_width=4096),
}
