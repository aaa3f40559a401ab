"""GPT-2 and GPT-3: decoder-only transformers with learned positions, pre-norm blocks and a tied head.

GPT-2: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", and its published weights.
GPT-3: Brown et al. 2020, "Language Models are Few-Shot Learners", table 2.1: GPT-2 with context 2048, in which layers
alternate between dense and locally banded attention. What the paper leaves open is chosen as follows:

- 1.3B: 24 heads of 128 do not make the stated width 2048; here it has 16 heads of 128.
- 13B: 40 heads of 128 make 5120, the table says 5140; here it is 5120 wide.
- The band's width is not stated; here a token of a banded layer sees itself and the 255 before it (256, as in
  GPT-Neo, EleutherAI's replication), and the first layer is dense.

Initialisation is GPT-2's: N(0, 0.02^2), positions N(0, 0.01^2) as in the released code, biases 0, and the projections
that end a residual branch scaled by 1 / sqrt(2 L), 2 L being the number of branches. Neither paper names a dropout
rate, so that it is 0 unless asked for.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from flax import nnx

from zoo.layers.attention import MultiHeadAttention
from zoo.layers.dropout import dropout, split
from zoo.layers.feedforward import FeedForward
from zoo.layers.linear import Embed, Precision, normal
from zoo.layers.norms import LayerNorm
from zoo.layers.positions import LearnedPositions
from zoo.layers.transformer import Block, Stack
from zoo.models.decoder import HEADS, Decoder, DecoderConfig, classifier
from zoo.models.published import (
    LABELS,
    Layout,
    PublishedError,
    SpecialTokens,
    Weight,
    activation,
    check_head,
    linear,
    norm,
    number,
    published_activation,
    require,
    size,
)

CLASSES = {
    "lm": "GPT2LMHeadModel",
    "none": "GPT2Model",
    "sequence_classification": "GPT2ForSequenceClassification",
}
"""Heads, names in zoo.models.decoder.HEADS, and their classes of Hugging Face transformers."""


@dataclass(frozen=True)
class GPTConfig(DecoderConfig):
    """A GPT's sizes; the defaults are GPT-2's smallest.

    max_length: positions.  head_dim, mlp_width: width / num_heads and 4 width where None.
    windows: attention of each layer of a period, repeated over depth: None is dense, W sees the last W positions.
    head: a name in CLASSES.  labels: names of the classes of "sequence_classification".
    problem_type: how classes are read, a name in zoo.models.published.PROBLEMS; None where it is not said.
    dropout: of embeddings and residual branches.  attention_dropout: of attention weights, the same where None.
    special_tokens: what generation stops at, unless told.
    remat: what the backward pass keeps, a name in zoo.layers.transformer.REMAT_POLICIES.
    """

    vocab_size: int = 50257
    max_length: int = 1024
    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    head_dim: int | None = None
    mlp_width: int | None = None
    windows: tuple[int | None, ...] = (None,)
    head: str = "lm"
    labels: tuple[str, ...] = LABELS
    problem_type: str | None = None
    activation: str = "gelu_tanh"
    norm_epsilon: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float | None = None
    special_tokens: SpecialTokens = SpecialTokens()
    remat: str = "none"
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        self.check_sizes("vocab_size", "max_length", "num_layers", "width", "num_heads", "head_dim", "mlp_width")
        check_head(self, HEADS)

    def build(self, rngs: nnx.Rngs) -> "GPT":
        return GPT(self, rngs=rngs)

    def forward_flops(self, shape: tuple[int, ...]) -> float:
        """FLOPs of the forward pass of one example of shape (T,), as DecoderConfig.flops counts them."""
        (length,) = shape
        attention_width = self.num_heads * self.head_size
        weights = 4 * self.width * attention_width + 2 * self.width * (self.mlp_width or 4 * self.width)
        return self.flops(length, weights)

    @property
    def attention_rate(self) -> float:
        """Dropout of attention weights."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "GPTConfig":
        """From the config.json of a GPT-2; raises PublishedError for one that this module cannot be."""
        require(
            fields,
            "GPT-2",
            scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False,
            add_cross_attention=False,
            tie_word_embeddings=True,
        )
        dropout = number(fields, "resid_pdrop", 0.1)
        require(fields, f"GPT-2 with resid_pdrop {dropout}", embd_pdrop=dropout)
        return cls(
            vocab_size=size(fields, "vocab_size"),
            max_length=size(fields, "n_positions"),
            num_layers=size(fields, "n_layer"),
            width=size(fields, "n_embd"),
            num_heads=size(fields, "n_head"),
            mlp_width=size(fields, "n_inner", optional=True),
            activation=activation(fields, "activation_function", "gelu_new"),
            norm_epsilon=number(fields, "layer_norm_epsilon", 1e-5),
            dropout=dropout,
            attention_dropout=number(fields, "attn_pdrop", 0.1),
            special_tokens=SpecialTokens.from_published(fields),
            **cls.read_head(fields, "GPT-2", CLASSES),
        )

    def to_published(self) -> dict[str, Any]:
        """The config.json of this GPT as a GPT-2; raises PublishedError where GPT-2 has no such thing."""
        if self.windows != (None,) * len(self.windows):
            raise PublishedError(
                f"windows {self.windows}: GPT-2's published layout has dense layers alone, windows (None,)"
            )
        if self.head_dim not in (None, self.width // self.num_heads):
            raise PublishedError(f"head_dim {self.head_dim}: GPT-2's published layout has width / num_heads alone")
        return {
            **self.published_head(CLASSES),
            "model_type": "gpt2",
            "vocab_size": self.vocab_size,
            "n_positions": self.max_length,
            "n_layer": self.num_layers,
            "n_embd": self.width,
            "n_head": self.num_heads,
            "n_inner": self.mlp_width,
            "activation_function": published_activation(self.activation),
            "layer_norm_epsilon": self.norm_epsilon,
            "resid_pdrop": self.dropout,
            "embd_pdrop": self.dropout,
            "attn_pdrop": self.attention_rate,
            "tie_word_embeddings": True,
        } | self.special_tokens.to_published()

    def published_layout(self) -> Layout:
        return _layout(self.head)


def gpt_block(config: GPTConfig, *, rngs: nnx.Rngs) -> Block:
    """One layer of a GPT, initialised for a stack of config.num_layers; called with mask=Mask(causal=True)."""
    common = {"rngs": rngs, "precision": config.precision}
    common["out_init"] = normal(0.02 / math.sqrt(2 * config.num_layers))
    attention = MultiHeadAttention(
        config.width,
        config.num_heads,
        head_dim=config.head_dim,
        dropout=config.attention_rate,
        **common,
    )
    mlp_width = config.mlp_width or 4 * config.width
    feedforward = FeedForward(config.width, mlp_width, activation=config.activation, **common)
    norm = partial(LayerNorm, config.width, epsilon=config.norm_epsilon, precision=config.precision)
    return Block(attention, feedforward, norm, dropout=config.dropout)


class GPT(Decoder):
    """Tokens [B, T] to logits [B, T, V], or to what else config.head gives.

    Raises SequenceError where a sequence, or a cache, is longer than config.max_length.
    """

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.config = config
        common = {"rngs": rngs, "precision": config.precision}
        self.embed = Embed(config.vocab_size, config.width, **common)
        self.positions = LearnedPositions(config.max_length, config.width, init=normal(0.01), **common)
        self.stack = Stack(
            lambda rngs: gpt_block(config, rngs=rngs),
            config.num_layers,
            period=len(config.windows),
            remat=config.remat,
            rngs=rngs,
        )
        self.norm = LayerNorm(config.width, epsilon=config.norm_epsilon, precision=config.precision)
        self.unembed = None
        self.classifier = classifier(config, rngs=rngs)

    def embedded(
        self, tokens: jax.Array, positions: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        embed_key, stack_key = split(key, 2)
        x = self.embed(tokens) + self.positions(positions)
        return dropout(x, self.config.dropout, embed_key), stack_key


_BLOCK = "stack.blocks.*"
_QKV = tuple(f"{_BLOCK}.attention.{part}" for part in ("query", "key", "value"))


def _layout(head: str) -> Layout:
    """GPT-2's tensors; the class without a head has them at the top of its names, the others in `transformer`."""
    prefix = "" if head == "none" else "transformer."
    layer = f"{prefix}h.{{}}"
    # Published kernels are [in, out], as in GPT-2 alone.
    weights = (
        Weight(f"{prefix}wte.weight", ("embed.table",), "v d -> v d"),
        Weight(f"{prefix}wpe.weight", ("positions.table",), "t d -> t d"),
        *norm(f"{layer}.ln_1", f"{_BLOCK}.attention_norm"),
        *linear(f"{layer}.attn.c_attn", _QKV, "d (part n h) -> part d n h", "(part n h) -> part n h"),
        *linear(f"{layer}.attn.c_proj", f"{_BLOCK}.attention.out", "(n h) d -> n h d", "d -> d"),
        *norm(f"{layer}.ln_2", f"{_BLOCK}.feedforward_norm"),
        *linear(f"{layer}.mlp.c_fc", f"{_BLOCK}.feedforward.up", "d f -> d f", "f -> f"),
        *linear(f"{layer}.mlp.c_proj", f"{_BLOCK}.feedforward.down", "f d -> f d", "d -> d"),
        *norm(f"{prefix}ln_f", "norm"),
    )
    if head == "sequence_classification":
        weights += linear("score", "classifier", "c d -> d c")
    return Layout(
        weights,
        prefix=prefix,
        tied={"lm_head.weight": f"{prefix}wte.weight"} if head == "lm" else {},
        ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
    )


def _gpt3(num_layers: int, width: int, num_heads: int) -> GPTConfig:
    return GPTConfig(max_length=2048, num_layers=num_layers, width=width, num_heads=num_heads, windows=(None, 256))


PRESETS = {
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(num_layers=24, width=1024, num_heads=16),
    "gpt2-large": GPTConfig(num_layers=36, width=1280, num_heads=20),
    "gpt2-xl": GPTConfig(num_layers=48, width=1600, num_heads=25),
    "gpt3-125m": _gpt3(12, 768, 12),
    "gpt3-350m": _gpt3(24, 1024, 16),
    "gpt3-760m": _gpt3(24, 1536, 16),
    "gpt3-1.3b": _gpt3(24, 2048, 16),
    "gpt3-2.7b": _gpt3(32, 2560, 32),
    "gpt3-6.7b": _gpt3(32, 4096, 32),
    "gpt3-13b": _gpt3(40, 5120, 40),
    "gpt3-175b": _gpt3(96, 12288, 96),
}
