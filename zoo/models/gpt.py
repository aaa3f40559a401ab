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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.kernels import Mask
from zoo.layers.attention import KVCache, MultiHeadAttention
from zoo.layers.dropout import dropout, split
from zoo.layers.feedforward import FeedForward
from zoo.layers.linear import Embed, Head, LayerError, Precision, check_sizes, normal
from zoo.layers.norms import LayerNorm
from zoo.layers.positions import LearnedPositions
from zoo.layers.transformer import Block, Stack
from zoo.models.published import (
    Layout,
    PublishedError,
    SpecialTokens,
    Weight,
    activation,
    number,
    published_activation,
    require,
    size,
)
from zoo.sharding import constrain


class SequenceError(ValueError):
    """A sequence that the model cannot take; the message names the lengths and the mend."""


@dataclass(frozen=True)
class GPTConfig:
    """A GPT's sizes; the defaults are GPT-2's smallest.

    max_length: positions.  head_dim, mlp_width: width / num_heads and 4 width where None.
    windows: attention of each layer of a period, repeated over depth: None is dense, W sees the last W positions.
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
    activation: str = "gelu_tanh"
    norm_epsilon: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float | None = None
    special_tokens: SpecialTokens = SpecialTokens()
    remat: str = "none"
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        names = ("vocab_size", "max_length", "num_layers", "width", "num_heads", "head_dim", "mlp_width")
        sizes = {name: getattr(self, name) for name in names}
        check_sizes(**{name: size for name, size in sizes.items() if size is not None})
        if not self.windows:
            raise LayerError("windows () is no period: give one for each layer of a period, None for dense attention")
        check_sizes(**{f"windows[{i}]": window for i, window in enumerate(self.windows) if window is not None})

    def build(self, rngs: nnx.Rngs) -> "GPT":
        return GPT(self, rngs=rngs)

    def forward_flops(self, shape: tuple[int, ...]) -> float:
        """FLOPs of the forward pass of one example of shape (T,): matrix products alone, a multiply-add being two.

        Scores that the mask removes are not counted: T^2 / 2 pairs in a dense layer, T W - W^2 / 2 in a band of W.
        """
        (length,) = shape
        attention_width = self.num_heads * (self.head_dim or self.width // self.num_heads)
        weights = 4 * self.width * attention_width + 2 * self.width * (self.mlp_width or 4 * self.width)
        flops = 2.0 * length * self.width * self.vocab_size
        for window in self.windows:
            band = min(window or length, length)
            pairs = length * band - band**2 / 2
            layers = self.num_layers // len(self.windows)
            flops += layers * (2.0 * length * weights + 4.0 * pairs * attention_width)
        return flops

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "GPTConfig":
        """From the config.json of a GPT-2; raises PublishedError for one that this module cannot be."""
        require(
            fields,
            "GPT-2",
            architectures=["GPT2LMHeadModel"],
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
        )

    def to_published(self) -> dict[str, Any]:
        """The config.json of this GPT as a GPT-2; raises PublishedError where GPT-2 has no such thing."""
        if self.windows != (None,) * len(self.windows):
            raise PublishedError(
                f"windows {self.windows}: GPT-2's published layout has dense layers alone, windows (None,)"
            )
        if self.head_dim not in (None, self.width // self.num_heads):
            raise PublishedError(f"head_dim {self.head_dim}: GPT-2's published layout has width / num_heads alone")
        attention_dropout = self.dropout if self.attention_dropout is None else self.attention_dropout
        return {
            "architectures": ["GPT2LMHeadModel"],
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
            "attn_pdrop": attention_dropout,
            "tie_word_embeddings": True,
        } | self.special_tokens.to_published()

    def published_layout(self) -> Layout:
        return GPT2


class GPTOutput(NamedTuple):
    """logits: [B, T, V] float32.  cache: the one given, with what this call appended."""

    logits: jax.Array
    cache: KVCache | None


class GPTFeatures(NamedTuple):
    """hidden: [B, T, D], after the last normalisation.  cache: the one given, with what this call appended."""

    hidden: jax.Array
    cache: KVCache | None


def gpt_block(config: GPTConfig, *, rngs: nnx.Rngs) -> Block:
    """One layer of a GPT, initialised for a stack of config.num_layers; called with mask=Mask(causal=True)."""
    common = {"rngs": rngs, "precision": config.precision}
    common["out_init"] = normal(0.02 / math.sqrt(2 * config.num_layers))
    attention = MultiHeadAttention(
        config.width,
        config.num_heads,
        head_dim=config.head_dim,
        dropout=config.dropout if config.attention_dropout is None else config.attention_dropout,
        **common,
    )
    mlp_width = config.mlp_width or 4 * config.width
    feedforward = FeedForward(config.width, mlp_width, activation=config.activation, **common)
    norm = partial(LayerNorm, config.width, epsilon=config.norm_epsilon, precision=config.precision)
    return Block(attention, feedforward, norm, dropout=config.dropout)


class GPT(nnx.Module):
    """Tokens [B, T] to logits [B, T, V].

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

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
        key: jax.Array | None = None,
    ) -> GPTOutput:
        """Logits of the token after each of tokens [B, T] int32. The arguments are those of `features`."""
        hidden, cache = self.features(tokens, positions=positions, segments=segments, mask=mask, cache=cache, key=key)
        return GPTOutput(self.logits(hidden)[..., : self.config.vocab_size], cache)

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        mask: Mask | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The final hidden states [B, T, D], for a loss that takes them with `head`."""
        return self.features(tokens, positions=positions, segments=segments, mask=mask, key=key).hidden

    def features(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
        key: jax.Array | None = None,
    ) -> GPTFeatures:
        """The final hidden states of tokens [B, T] int32.

        positions: [B, T], of the table; counted from 0, or from the cache's lengths, unless given.
        segments: [B, T], the document of each token of a packed row, 0 where there is none: tokens attend within their
            document alone. Not with a cache.
        mask: restricts attention further; it is causal in any case.
        cache: of `init_cache`; tokens stand after what it holds.
        key: for dropout; None drops nothing.
        """
        self._check(tokens, segments, cache)
        start = 0 if cache is None else cache.lengths[0][:, None]
        if positions is None:
            positions = start + jnp.arange(tokens.shape[1])[None]
        # Documents are contiguous, so that order and distance within one are those of the row: the mask compares
        # indices, which kernels can skip blocks by, rather than positions that start again.
        mask = (mask or Mask()) & Mask(causal=True, segments=segments)
        masks = [mask if window is None else mask & Mask(window=window) for window in self.config.windows]
        embed_key, stack_key = split(key, 2)
        x = dropout(self.embed(tokens) + self.positions(positions), self.config.dropout, embed_key)
        x = constrain(x, "act_batch", "act_length", "act_embed")
        x, cache = self.stack(x, masks=masks, cache=cache, key=stack_key)
        return GPTFeatures(self.norm(x), cache)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] to [..., V padded to a multiple of 128] float32, -inf at the entries that only pad."""
        logits = self.embed.attend(hidden)
        leading = ("act_batch", *("act_length",) * (logits.ndim - 2))[: logits.ndim - 1]
        return constrain(logits, *leading, "act_vocab")

    def head(self) -> Head:
        """What `logits` scores with: the embedding's table [D, V padded]."""
        return self.embed.head()

    def init_cache(self, batch_size: int, length: int) -> KVCache:
        """An empty cache with room for `length` tokens a row."""
        if length > self.config.max_length:
            raise SequenceError(f"a cache of {length} tokens exceeds the model's max_length {self.config.max_length}")
        return self.stack.init_cache(batch_size, length)

    def _check(self, tokens: jax.Array, segments: jax.Array | None, cache: KVCache | None) -> None:
        if tokens.shape[1] > self.config.max_length:
            raise SequenceError(
                f"a sequence of {tokens.shape[1]} tokens exceeds the model's max_length {self.config.max_length}: "
                f"cut it, or build the model with a larger max_length"
            )
        if cache is not None and segments is not None:
            raise SequenceError("segments given with a cache: a cached row is one document, so leave segments out")


def _linear(name: str, module: str, kernel: str, bias: str) -> tuple[Weight, Weight]:
    """A layer's projection, whose published kernel is [in, out] in GPT-2 alone; module may name three, side by side."""
    modules = [f"stack.blocks.*.{m}" for m in module.split()]
    return (
        Weight(f"transformer.h.{{}}.{name}.weight", tuple(f"{m}.kernel" for m in modules), kernel),
        Weight(f"transformer.h.{{}}.{name}.bias", tuple(f"{m}.bias" for m in modules), bias),
    )


def _norm(name: str, module: str) -> tuple[Weight, Weight]:
    return (
        Weight(f"transformer.{name}.weight", (f"{module}.scale",), "d -> d"),
        Weight(f"transformer.{name}.bias", (f"{module}.bias",), "d -> d"),
    )


GPT2 = Layout(
    (
        Weight("transformer.wte.weight", ("embed.table",), "v d -> v d"),
        Weight("transformer.wpe.weight", ("positions.table",), "t d -> t d"),
        *_norm("h.{}.ln_1", "stack.blocks.*.attention_norm"),
        *_linear(
            "attn.c_attn",
            "attention.query attention.key attention.value",
            "d (part n h) -> part d n h",
            "(part n h) -> part n h",
        ),
        *_linear("attn.c_proj", "attention.out", "(n h) d -> n h d", "d -> d"),
        *_norm("h.{}.ln_2", "stack.blocks.*.feedforward_norm"),
        *_linear("mlp.c_fc", "feedforward.up", "d f -> d f", "f -> f"),
        *_linear("mlp.c_proj", "feedforward.down", "f d -> f d", "d -> d"),
        *_norm("ln_f", "norm"),
    ),
    prefix="transformer.",
    tied={"lm_head.weight": "transformer.wte.weight"},
    buffers=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
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
