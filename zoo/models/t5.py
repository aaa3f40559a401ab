"""T5: an encoder-decoder without absolute positions, whose scores carry a learned bias for each range of distances.

Raffel et al. 2019, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (arXiv
1910.10683), and the released weights, whose code settles what the paper leaves open: normalisations have no mean and no
bias, scores are not divided by sqrt(H), one table of biases serves all layers of a stack, and states are scaled by
1 / sqrt(D) before the tied head. T5 1.1, mT5 and Flan-T5 gate the feed-forward network and have a head of their own
(Shazeer 2020, arXiv 2002.05202).
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zoo.kernels import Bias
from zoo.kernels.bias import BiasFunction
from zoo.layers.attention import MultiHeadAttention
from zoo.layers.dropout import dropout
from zoo.layers.feedforward import FeedForward
from zoo.layers.linear import Embed, LayerError, Precision, check_sizes, normal
from zoo.layers.norms import RMSNorm
from zoo.layers.transformer import Block, Stack
from zoo.models.encoder_decoder import EncoderDecoder
from zoo.models.encoder_decoder_heads import (
    SOURCE_ALONE,
    check_head,
    classifier,
    classifier_weights,
    head_flops,
    published_head,
    read_head,
)
from zoo.models.published import (
    ACTIVATIONS,
    LABELS,
    Layout,
    PublishedError,
    SpecialTokens,
    Weight,
    flag,
    head,
    linear,
    norm,
    number,
    published_activation,
    require,
    size,
)

HEADS = {
    "lm": "ForConditionalGeneration",
    "none": "Model",
    "encoder": "EncoderModel",
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}
"""Heads, names in encoder_decoder_heads.HEADS, and how their published classes' names end."""


@dataclass(frozen=True)
class T5Config:
    """A T5's sizes; the defaults are those of T5 small of the paper.

    max_length: none: what a T5 may be given is not bounded by its parameters.
    num_layers: of the encoder; num_decoder_layers: of the decoder, as many where None.
    buckets: of distances, for which each head has a bias; max_distance: from which on all share the last bucket.
    gated: T5 1.1's feed-forward network.  tied: whether words are scored against the embeddings.
    scaled: whether states are scaled by 1 / sqrt(D) before that.
    head: a name in HEADS.  labels: names of the classes of heads that score some.
    problem_type: how classes of a text are read, a name in zoo.models.published.PROBLEMS; None where it is not said.
    dropout: of embeddings, residual branches, attention weights, hidden features and what leaves a stack.
    classifier_dropout: of what classes are scored from.
    special_tokens: start is what the decoder begins with.
    remat: what the backward pass keeps, a name in zoo.layers.transformer.REMAT_POLICIES.
    """

    vocab_size: int = 32128
    num_layers: int = 6
    num_decoder_layers: int | None = None
    width: int = 512
    num_heads: int = 8
    head_dim: int = 64
    mlp_width: int = 2048
    buckets: int = 32
    max_distance: int = 128
    activation: str = "relu"
    gated: bool = False
    tied: bool = True
    scaled: bool = True
    head: str = "lm"
    labels: tuple[str, ...] = LABELS
    problem_type: str | None = None
    norm_epsilon: float = 1e-6
    dropout: float = 0.1
    classifier_dropout: float = 0.0
    model_type: str = "t5"
    special_tokens: SpecialTokens = SpecialTokens(eos=(1,), pad=0, start=0)
    remat: str = "none"
    precision: Precision = Precision()

    max_length = None

    def __post_init__(self) -> None:
        names = ("vocab_size", "num_layers", "width", "num_heads", "head_dim", "mlp_width", "max_distance")
        check_sizes(num_decoder_layers=self.decoder_layers, **{name: getattr(self, name) for name in names})
        check_head(self, HEADS)
        if self.buckets < 4 or self.buckets % 4:
            raise LayerError(
                f"buckets {self.buckets} are no multiple of 4: half are for each side, half of those exact"
            )
        if self.max_distance <= self.buckets // 2:
            raise LayerError(
                f"max_distance {self.max_distance} is within the exact buckets: choose one above {self.buckets // 2}"
            )

    @property
    def decoder_layers(self) -> int:
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    def build(self, rngs: nnx.Rngs) -> "T5":
        return T5(self, rngs=rngs)

    def forward_flops(self, shape: tuple[int, ...]) -> float:
        """FLOPs of the forward pass of one example, a multiply-add being two: matrix products alone, hidden pairs not.

        shape: (S, T), tokens of the source and of the decoder; (T,) stands for as many of both.
        """
        source, length = shape if len(shape) == 2 else (*shape, *shape)
        heads = self.num_heads * self.head_dim
        attention, mlp = 4 * self.width * heads, (3 if self.gated else 2) * self.width * self.mlp_width
        encoder = source * (attention + mlp) + 2 * source**2 * heads
        # Queries and the output of cross-attention are the decoder's, its keys and values the source's.
        decoder = (
            length * (1.5 * attention + mlp) + source * 0.5 * attention + (length**2 + 2 * length * source) * heads
        )
        layers = 0 if self.head in SOURCE_ALONE else self.decoder_layers
        return 2.0 * (self.num_layers * encoder + layers * decoder + head_flops(self, source, length))

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "T5Config":
        """From the config.json of a T5 or mT5; raises PublishedError for one that this module cannot be."""
        model_type = fields["model_type"]
        require(fields, "T5", is_decoder=False, scalable_attention=True)
        default = {"t5": "relu", "mt5": "gated-gelu"}[model_type]
        projection = str(fields.get("feed_forward_proj", default))
        name = "gelu_new" if projection == "gated-gelu" else projection.removeprefix("gated-")
        if name not in ACTIVATIONS:
            raise PublishedError(
                f"config.json has feed_forward_proj {projection!r}, which is none of {', '.join(ACTIVATIONS)}, with "
                "gated- before it or not"
            )
        require(fields, f"T5 with feed_forward_proj {projection!r}", dense_act_fn=name)
        # A head of its own needs no scale, which is how older files say it. mT5 has none by either name.
        scaled = flag(fields, "scale_decoder_outputs", flag(fields, "tie_word_embeddings", True)) and model_type == "t5"
        kind = head(fields, model_type.upper(), _classes(model_type), "lm")
        if kind not in SOURCE_ALONE:  # Files of those say the one or the other.
            require(fields, "T5", is_encoder_decoder=True)
        layers = size(fields, "num_layers")
        return cls(
            vocab_size=size(fields, "vocab_size"),
            num_layers=layers,
            num_decoder_layers=size({"num_decoder_layers": layers} | dict(fields), "num_decoder_layers"),
            width=size(fields, "d_model"),
            num_heads=size(fields, "num_heads"),
            head_dim=size(fields, "d_kv"),
            mlp_width=size(fields, "d_ff"),
            buckets=size({"relative_attention_num_buckets": 32} | dict(fields), "relative_attention_num_buckets"),
            max_distance=size(
                {"relative_attention_max_distance": 128} | dict(fields), "relative_attention_max_distance"
            ),
            activation=ACTIVATIONS[name],
            gated=projection.startswith("gated-"),
            tied=scaled or kind != "lm",
            head=kind,
            **read_head(fields, "T5", kind),
            scaled=scaled,
            norm_epsilon=number(fields, "layer_norm_epsilon", 1e-6),
            dropout=number(fields, "dropout_rate", 0.1),
            model_type=model_type,
            special_tokens=SpecialTokens.from_published(
                {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0} | dict(fields)
            ),
        )

    def to_published(self) -> dict[str, Any]:
        """The config.json of this T5; raises PublishedError where there is no such thing."""
        name = published_activation(self.activation)
        if self.gated and name == "gelu":
            raise PublishedError("activation 'gelu' with gated: published T5s call 'gelu_tanh' by that name")
        if self.scaled and self.model_type == "mt5":
            raise PublishedError("scaled True: a published mT5 scores states as they are")
        projection = "gelu" if self.gated and name == "gelu_new" else name
        return {
            "architectures": [_classes(self.model_type)[self.head]],
            "model_type": self.model_type,
            "is_encoder_decoder": self.head not in SOURCE_ALONE,
            "vocab_size": self.vocab_size,
            "num_layers": self.num_layers,
            "num_decoder_layers": self.decoder_layers,
            "d_model": self.width,
            "num_heads": self.num_heads,
            "d_kv": self.head_dim,
            "d_ff": self.mlp_width,
            "relative_attention_num_buckets": self.buckets,
            "relative_attention_max_distance": self.max_distance,
            "feed_forward_proj": f"gated-{projection}" if self.gated else projection,
            "dense_act_fn": name,
            "is_gated_act": self.gated,
            "layer_norm_epsilon": self.norm_epsilon,
            "dropout_rate": self.dropout,
            "tie_word_embeddings": self.tied,
            **({"scale_decoder_outputs": self.scaled} if self.model_type == "t5" else {}),
            **published_head(self),
            **self.special_tokens.to_published(),
        }

    def with_tensors(self, names: Collection[str]) -> "T5Config":
        """As a file with these tensors has it: its config.json does not say whether the head is one of its own.

        Where states are scaled, as for the embeddings, a head in the file is a copy of them, which reading checks.
        """
        return dataclasses.replace(self, tied=self.head != "lm" or self.scaled or "lm_head.weight" not in names)

    def published_layout(self) -> Layout:
        return _layout(self)


def _classes(model_type: str) -> dict[str, str]:
    """Published classes by our names of their heads."""
    return {head: f"{model_type.upper()}{end}" for head, end in HEADS.items()}


def bucket(distance: jax.Array, count: int, max_distance: int) -> jax.Array:
    """The bucket of distances from 0, int32: half of `count` hold one each, the others ever longer ranges.

    The ranges grow as the logarithm does, up to max_distance, from which on all are one. Their ends are constants, made
    with the float32 logarithm of the published code: no platform's own logarithm moves them.
    """
    exact = count // 2
    distances = np.arange(exact, max_distance + 1)
    logs = np.log(distances.astype(np.float32) / np.float32(exact))
    found = exact + (logs / np.float32(math.log(max_distance / exact)) * np.float32(count - exact)).astype(np.int32)
    ends = [int(distances[np.argmax(found >= one)]) for one in range(exact + 1, count)]
    return jnp.minimum(distance, exact) + sum((distance >= end).astype(jnp.int32) for end in ends)


def _both_sides(table: jax.Array, head: jax.Array, query: jax.Array, key: jax.Array, *, max_distance: int) -> jax.Array:
    half = len(table) // 2
    after = jnp.where(key > query, half, 0)
    return table[after + bucket(jnp.abs(key - query), half, max_distance), head]


def _one_side(table: jax.Array, head: jax.Array, query: jax.Array, key: jax.Array, *, max_distance: int) -> jax.Array:
    return table[bucket(jnp.maximum(query - key, 0), len(table), max_distance), head]


class RelativeBias(nnx.Module):
    """What is added to the scores of each head for a key's distance from the query, learned by bucket, [buckets, N]."""

    def __init__(self, config: T5Config, *, causal: bool, rngs: nnx.Rngs):
        self.causal, self.max_distance = causal, config.max_distance
        shape, dtype = (config.buckets, config.num_heads), jnp.dtype(config.precision.parameters)
        self.table = nnx.Param(normal(config.width**-0.5)(rngs.params(), shape, dtype), axes=("positions", "heads"))

    def __call__(self) -> Bias:
        return Bias(_function(self.causal, self.max_distance), self.table[...].astype(jnp.float32))


@functools.cache
def _function(causal: bool, max_distance: int) -> BiasFunction:
    """One object for equal arguments: it is compared where programs are cached."""
    return partial(_one_side if causal else _both_sides, max_distance=max_distance)


def t5_block(config: T5Config, *, decoding: bool, rngs: nnx.Rngs) -> Block:
    """One layer of the encoder, or of the decoder; called with the stack's bias."""
    heads, width = config.num_heads * config.head_dim, config.width
    common = {"rngs": rngs, "precision": config.precision, "bias": False, "dropout": config.dropout}

    def attention() -> MultiHeadAttention:
        return MultiHeadAttention(
            width,
            config.num_heads,
            head_dim=config.head_dim,
            scale=1.0,
            init=normal(width**-0.5),
            query_init=normal((width * config.head_dim) ** -0.5),
            out_init=normal(heads**-0.5),
            **common,
        )

    feedforward = FeedForward(
        width,
        config.mlp_width,
        activation=config.activation,
        gated=config.gated,
        init=normal(width**-0.5),
        out_init=normal(config.mlp_width**-0.5),
        **common,
    )
    return Block(
        attention(),
        feedforward,
        partial(RMSNorm, width, epsilon=config.norm_epsilon, precision=config.precision),
        cross_attention=attention() if decoding else None,
        dropout=config.dropout,
    )


class T5(EncoderDecoder):
    """Sources [B, S] and tokens [B, T] to logits [B, T, V], or to what else config.head gives; of any length."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        common = {"rngs": rngs, "precision": config.precision}
        self.embed = Embed(config.vocab_size, config.width, init=normal(1.0), **common)
        own = config.head == "lm" and not config.tied
        self.unembed = Embed(config.vocab_size, config.width, init=normal(1.0), **common) if own else None
        norm = partial(RMSNorm, config.width, epsilon=config.norm_epsilon, precision=config.precision)

        def stack(num_layers: int, *, decoding: bool) -> Stack:
            make = partial(t5_block, config, decoding=decoding)
            return Stack(lambda rngs: make(rngs=rngs), num_layers, remat=config.remat, rngs=rngs)

        self.encoder, self.encoder_norm = stack(config.num_layers, decoding=False), norm()
        self.encoder_bias = RelativeBias(config, causal=False, rngs=rngs)
        decodes = config.head not in SOURCE_ALONE
        self.decoder = stack(config.decoder_layers, decoding=True) if decodes else None
        self.decoder_norm = norm() if decodes else None
        self.decoder_bias = RelativeBias(config, causal=True, rngs=rngs) if decodes else None
        self.classifier = classifier(config, init=normal(config.width**-0.5), rngs=rngs)

    def embedded(self, tokens: jax.Array, positions: jax.Array, key: jax.Array | None, *, decoding: bool) -> jax.Array:
        return dropout(self.embed(tokens), self.config.dropout, key)

    def ended(self, x: jax.Array, key: jax.Array | None, *, decoding: bool) -> jax.Array:
        norm = self.encoder_norm if self.decoder_norm is None or not decoding else self.decoder_norm
        return dropout(norm(x), self.config.dropout, key)

    def scored(self, x: jax.Array) -> jax.Array:
        return x * self.config.width**-0.5 if self.config.scaled and self.config.head == "lm" else x

    def bias(self, *, decoding: bool) -> Bias:
        return self.encoder_bias() if self.decoder_bias is None or not decoding else self.decoder_bias()


def _layout(config: T5Config) -> Layout:
    prefix = "transformer." if config.head in ("sequence_classification", "token_classification") else ""

    def attention(name: str, module: str) -> tuple[Weight, ...]:
        into = [linear(f"{name}.{x}", f"{module}.{part}", "(n h) d -> d n h") for x, part in _PARTS.items()]
        return (*(weight for one in into for weight in one), *linear(f"{name}.o", f"{module}.out", "d (n h) -> n h d"))

    def stack(name: str, sublayers: int) -> tuple[Weight, ...]:
        layer, block = f"{prefix}{name}.block.{{}}.layer", f"{name}.blocks.*"
        last = sublayers - 1
        into = {"wi_0": "gate", "wi_1": "up"} if config.gated else {"wi": "up"}
        table = f"{prefix}{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        return (
            *attention(f"{layer}.0.SelfAttention", f"{block}.attention"),
            Weight(table, (f"{name}_bias.table",), "c n -> c n"),
            *norm(f"{layer}.0.layer_norm", f"{block}.attention_norm", bias=False),
            *(attention(f"{layer}.1.EncDecAttention", f"{block}.cross_attention") if last == 2 else ()),
            *(norm(f"{layer}.1.layer_norm", f"{block}.cross_norm", bias=False) if last == 2 else ()),
            *(
                weight
                for theirs, ours in into.items()
                for weight in linear(
                    f"{layer}.{last}.DenseReluDense.{theirs}", f"{block}.feedforward.{ours}", "f d -> d f"
                )
            ),
            *linear(f"{layer}.{last}.DenseReluDense.wo", f"{block}.feedforward.down", "d f -> f d"),
            *norm(f"{layer}.{last}.layer_norm", f"{block}.feedforward_norm", bias=False),
            *norm(f"{prefix}{name}.final_layer_norm", f"{name}_norm", bias=False),
        )

    weights = (
        Weight(f"{prefix}shared.weight", ("embed.table",), "v d -> v d"),
        *stack("encoder", 2),
        *(() if config.head in SOURCE_ALONE else stack("decoder", 3)),
    )
    copies = [f"{prefix}encoder.embed_tokens.weight", f"{prefix}decoder.embed_tokens.weight"]
    # A table of biases that early releases have for cross-attention, and no code reads.
    unread = [r"(transformer\.)?decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"]
    if config.head != "lm":
        unread.append(r"lm_head\.weight")  # Of a file that was pretrained to score words.
    elif config.tied:
        copies.append("lm_head.weight")
    else:
        weights += (Weight("lm_head.weight", ("unembed.table",), "v d -> v d"),)
    if config.head in SOURCE_ALONE:
        unread.append(r"(transformer\.)?decoder\..*")
    weights += classifier_weights(config.head)
    return Layout(weights, prefix, tied=dict.fromkeys(copies, f"{prefix}shared.weight"), ignored=tuple(unread))


_PARTS = {"q": "query", "k": "key", "v": "value"}


def _t5(layers: int, width: int, num_heads: int, head_dim: int, mlp_width: int) -> T5Config:
    return T5Config(num_layers=layers, width=width, num_heads=num_heads, head_dim=head_dim, mlp_width=mlp_width)


def _t5_1_1(layers: int, width: int, num_heads: int, mlp_width: int, **fields: Any) -> T5Config:
    sizes = _t5(layers, width, num_heads, 64, mlp_width)
    return dataclasses.replace(sizes, activation="gelu_tanh", gated=True, tied=False, scaled=False, **fields)


_SIZES_1_1 = {
    "small": (8, 512, 6, 1024),
    "base": (12, 768, 12, 2048),
    "large": (24, 1024, 16, 2816),
    "xl": (24, 2048, 32, 5120),
    "xxl": (24, 4096, 64, 10240),
}

PRESETS = {
    "t5-small": T5Config(),
    "t5-base": _t5(12, 768, 12, 64, 3072),
    "t5-large": _t5(24, 1024, 16, 64, 4096),
    "t5-3b": _t5(24, 1024, 32, 128, 16384),
    "t5-11b": _t5(24, 1024, 128, 128, 65536),
    **{f"t5-v1_1-{name}": _t5_1_1(*sizes) for name, sizes in _SIZES_1_1.items()},
    **{f"flan-t5-{name}": _t5_1_1(*sizes) for name, sizes in _SIZES_1_1.items()},
    **{f"mt5-{name}": _t5_1_1(*sizes, vocab_size=250112, model_type="mt5") for name, sizes in _SIZES_1_1.items()},
}
