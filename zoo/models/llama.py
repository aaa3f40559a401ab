"""Llama 2 and 3, Mistral, Qwen 2 and 3: decoder-only transformers with RMSNorm, rotary positions and SwiGLU.

They are configurations of one module, which is Llama's (Touvron et al. 2023, "LLaMA" and "Llama 2"; Grattafiori et al.
2024, "The Llama 3 Herd of Models") with grouped queries (Ainslie et al. 2023) and what each adds to it:

- Llama 3.1 and 3.2: rotary frequencies scaled by wavelength, Llama3Scaling. Others of zoo.layers.positions fit as well.
- Mistral 7B v0.1 (Jiang et al. 2023): a sliding window in every layer; later versions have none.
- Qwen 2 and 2.5 (Yang et al. 2024): biases of queries, keys and values; a window in some layers where asked for.
- Qwen 3 (Yang et al. 2025): no biases, and a normalisation over each head of queries and keys.

Initialisation is that of the published code: N(0, 0.02^2), biases 0, norms 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from flax import nnx

from zoo.layers.attention import MultiHeadAttention
from zoo.layers.feedforward import FeedForward
from zoo.layers.linear import Embed, LayerError, Precision, check_sizes
from zoo.layers.norms import RMSNorm
from zoo.layers.positions import Llama3Scaling, Rotary
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
    flag,
    linear,
    norm,
    number,
    published_activation,
    require,
    size,
)
from zoo.models.published_rotary import Scaling, read_rotary, rotary_fields

CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"bos_token_id": 1, "eos_token_id": 2}),
    "mistral": (
        "Mistral",
        {"num_key_value_heads": 8, "sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "qwen2": ("Qwen2", {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128}),
}
"""Published classes by model_type: the name, and what a config.json means that leaves a field out."""

FULL, SLIDING = "full_attention", "sliding_attention"

LONGEST_PERIOD = 8
"""Layers of a published pattern of windows, at most: a stack compiles each of a period, and one layer serves most."""


@dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """Sizes and parts of a Llama; the defaults are Llama 2 7B's.

    max_length: positions that it was trained for.  num_kv_heads, head_dim: num_heads and width / num_heads where None.
    windows: attention of each layer of a period, repeated over depth: None is dense, W sees the last W positions.
    head: a name in zoo.models.decoder.HEADS.  labels: names of the classes of "sequence_classification".
    problem_type: how classes are read, a name in zoo.models.published.PROBLEMS; None where it is not said.
    rope_theta, rope_scaling: of rotary positions, see Rotary.
    qkv_bias, out_bias: biases of attention's projections.  qk_norm: RMSNorm over each head of queries and of keys.
    tied: whether the embedding scores too; else the head has a table of its own.
    attention_dropout: of attention weights.
    special_tokens: what generation stops at, unless told.
    published: the class of config.json that it is written as, a name in CLASSES.
    remat: what the backward pass keeps, a name in zoo.layers.transformer.REMAT_POLICIES.
    """

    vocab_size: int = 32000
    max_length: int = 4096
    num_layers: int = 32
    width: int = 4096
    num_heads: int = 32
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int = 11008
    windows: tuple[int | None, ...] = (None,)
    head: str = "lm"
    labels: tuple[str, ...] = LABELS
    problem_type: str | None = None
    activation: str = "silu"
    norm_epsilon: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    attention_dropout: float = 0.0
    special_tokens: SpecialTokens = SpecialTokens(bos=1, eos=(2,))
    published: str = "llama"
    remat: str = "none"
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        self.check_sizes("vocab_size", "max_length", "num_layers", "width", "num_heads", "num_kv_heads", "head_dim")
        check_sizes(mlp_width=self.mlp_width)
        check_head(self, HEADS)
        if self.head_size % 2:
            raise LayerError(f"head_dim {self.head_size} is odd, and rotary positions turn pairs: choose an even one")
        if self.published not in CLASSES:
            raise LayerError(f"published {self.published!r} is unknown: choose one of {', '.join(CLASSES)}")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def build(self, rngs: nnx.Rngs) -> "Llama":
        return Llama(self, rngs=rngs)

    def forward_flops(self, shape: tuple[int, ...]) -> float:
        """FLOPs of the forward pass of one example of shape (T,), as DecoderConfig.flops counts them."""
        (length,) = shape
        attention = 2 * (self.num_heads + self.kv_heads) * self.head_size
        return self.flops(length, self.width * (attention + 3 * self.mlp_width))

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "LlamaConfig":
        """From the config.json of a class in CLASSES; raises PublishedError for one that this module cannot be."""
        published = fields["model_type"]
        name, defaults = CLASSES[published]
        fields = defaults | dict(fields)
        require(fields, name, mlp_bias=False, quantization_config=None)
        bias = published in ("llama", "qwen3") and flag(fields, "attention_bias", False)
        rope_theta, rope_scaling = read_rotary(fields, name)
        return cls(
            vocab_size=size(fields, "vocab_size"),
            max_length=size(fields, "max_position_embeddings"),
            num_layers=size(fields, "num_hidden_layers"),
            width=size(fields, "hidden_size"),
            num_heads=size(fields, "num_attention_heads"),
            num_kv_heads=size(fields, "num_key_value_heads", optional=True),
            head_dim=size(fields, "head_dim", optional=True),
            mlp_width=size(fields, "intermediate_size"),
            windows=_windows(fields, published),
            activation=activation(fields, "hidden_act", "silu"),
            norm_epsilon=number(fields, "rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            qkv_bias=published == "qwen2" or bias,
            out_bias=bias,
            qk_norm=published == "qwen3",
            tied=flag(fields, "tie_word_embeddings", False),
            attention_dropout=number(fields, "attention_dropout", 0.0),
            special_tokens=SpecialTokens.from_published(fields),
            published=published,
            **cls.read_head(fields, name, _classes(name)),
        )

    def to_published(self) -> dict[str, Any]:
        """The config.json of this model; raises PublishedError where its class, `published`, has no such thing."""
        name = CLASSES[self.published][0]
        own: dict[str, Any] = {
            "llama": {"qk_norm": False, "out_bias": self.qkv_bias, "windows": (None,)},
            "mistral": {"qk_norm": False, "qkv_bias": False, "out_bias": False, "windows": self.windows[:1]},
            "qwen2": {"qk_norm": False, "qkv_bias": True, "out_bias": False},
            "qwen3": {"qk_norm": True, "out_bias": self.qkv_bias},
        }[self.published]
        if "windows" in own:
            own["windows"] *= len(self.windows)
        for one, value in own.items():
            if getattr(self, one) != value:
                raise PublishedError(f"{one} {getattr(self, one)}: {name}'s published layout has {value} alone")
        if self.published == "llama" and self.width % self.num_heads:
            raise PublishedError(
                f"width {self.width}: Llama's published layout has multiples of num_heads {self.num_heads} alone"
            )
        fields: dict[str, Any] = {
            **self.published_head(_classes(name)),
            "model_type": self.published,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_length,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.width,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.mlp_width,
            "hidden_act": published_activation(self.activation),
            "rms_norm_eps": self.norm_epsilon,
            "rope_parameters": rotary_fields(self.rope_theta, self.rope_scaling),
            "attention_dropout": self.attention_dropout,
            "tie_word_embeddings": self.tied,
        }
        # Qwen 2 has a head size of its own where it is not width / num_heads: its code heeds the field, and lacks it.
        if self.published != "qwen2" or self.head_size * self.num_heads != self.width:
            fields["head_dim"] = self.head_size
        if self.published in ("llama", "qwen3"):
            fields["attention_bias"] = self.qkv_bias
        if self.published == "mistral":
            fields["sliding_window"] = self.windows[0]
        if self.published in ("qwen2", "qwen3"):
            fields |= self._published_windows(name)
        return fields | self.special_tokens.to_published()

    def _published_windows(self, name: str) -> dict[str, Any]:
        widths = sorted({window for window in self.windows if window is not None})
        if len(widths) > 1:
            raise PublishedError(f"windows {self.windows}: {name}'s published layout has one width in all layers")
        types = [FULL if window is None else SLIDING for window in self.windows]
        return {
            "use_sliding_window": bool(widths),
            "sliding_window": widths[0] if widths else None,
            "layer_types": types * (self.num_layers // len(types)),
        }

    def published_layout(self) -> Layout:
        # The class without a head has its tensors at the top of their names.
        prefix = "" if self.head == "none" else "model."
        layer, block = f"{prefix}layers.{{}}", "stack.blocks.*"
        heads = "(n h) d -> d n h", "(n h) -> n h" if self.qkv_bias else None
        layers = [
            *norm(f"{layer}.input_layernorm", f"{block}.attention_norm", bias=False),
            *linear(f"{layer}.self_attn.q_proj", f"{block}.attention.query", *heads),
            *linear(f"{layer}.self_attn.k_proj", f"{block}.attention.key", *heads),
            *linear(f"{layer}.self_attn.v_proj", f"{block}.attention.value", *heads),
            *linear(
                f"{layer}.self_attn.o_proj",
                f"{block}.attention.out",
                "d (n h) -> n h d",
                "d -> d" if self.out_bias else None,
            ),
            *norm(f"{layer}.post_attention_layernorm", f"{block}.feedforward_norm", bias=False),
            *linear(f"{layer}.mlp.gate_proj", f"{block}.feedforward.gate", "f d -> d f"),
            *linear(f"{layer}.mlp.up_proj", f"{block}.feedforward.up", "f d -> d f"),
            *linear(f"{layer}.mlp.down_proj", f"{block}.feedforward.down", "d f -> f d"),
        ]
        if self.qk_norm:
            layers += norm(f"{layer}.self_attn.q_norm", f"{block}.attention.query_norm", bias=False)
            layers += norm(f"{layer}.self_attn.k_norm", f"{block}.attention.key_norm", bias=False)
        scores, tied = (), {}
        if self.head == "sequence_classification":
            scores = linear("score", "classifier", "c d -> d c")
        elif self.head == "lm" and self.tied:
            tied = {"lm_head.weight": "model.embed_tokens.weight"}
        elif self.head == "lm":
            scores = (Weight("lm_head.weight", ("unembed.table",), "v d -> v d"),)
        return Layout(
            (
                Weight(f"{prefix}embed_tokens.weight", ("embed.table",), "v d -> v d"),
                *layers,
                *norm(f"{prefix}norm", "norm", bias=False),
                *scores,
            ),
            prefix=prefix,
            tied=tied,
            ignored=(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
        )


def _classes(name: str) -> dict[str, str]:
    """Published classes by our names of their heads, of one of CLASSES."""
    ends = {"lm": "ForCausalLM", "none": "Model", "sequence_classification": "ForSequenceClassification"}
    return {head: f"{name}{end}" for head, end in ends.items()}


def _windows(fields: Mapping[str, Any], published: str) -> tuple[int | None, ...]:
    """The shortest period of windows that repeats over the layers of a config.json."""
    if published == "llama":
        return (None,)
    if published == "mistral":
        require(fields, "Mistral", layer_types=None)
        return (size(fields, "sliding_window", optional=True),)
    used = flag(fields, "use_sliding_window", False)
    window = size(fields, "sliding_window", optional=True) if used else None
    layers, types = size(fields, "num_hidden_layers"), fields.get("layer_types")
    if types is None:
        dense = layers if window is None else min(int(number(fields, "max_window_layers", 28)), layers)
        if dense in (0, layers):
            return (window if dense == 0 else None,)
        if layers > LONGEST_PERIOD:
            raise PublishedError(
                f"config.json has max_window_layers {dense}, which gives the last {layers - dense} of {layers} layers "
                f"a window: layers here repeat a period of at most {LONGEST_PERIOD}"
            )
        types = [FULL] * dense + [SLIDING] * (layers - dense)
    if not isinstance(types, list) or len(types) != layers or not {FULL, SLIDING}.issuperset(map(str, types)):
        raise PublishedError(
            f"config.json has layer_types {types!r}: the model needs {FULL!r} or {SLIDING!r} for each of "
            f"num_hidden_layers {layers}"
        )
    if SLIDING in types and window is None:
        raise PublishedError(
            f"config.json has layer_types with {SLIDING!r}, and use_sliding_window {used} with sliding_window "
            f"{fields.get('sliding_window')}: it names no window"
        )
    for period in range(1, min(layers, LONGEST_PERIOD) + 1):
        if layers % period == 0 and types == types[:period] * (layers // period):
            return tuple(window if kind == SLIDING else None for kind in types[:period])
    raise PublishedError(
        f"config.json has layer_types {types!r}: layers here repeat a period of at most {LONGEST_PERIOD}"
    )


def llama_block(config: LlamaConfig, *, rngs: nnx.Rngs) -> Block:
    """One layer of a Llama; called with mask=Mask(causal=True)."""
    common = {"rngs": rngs, "precision": config.precision}
    norm = partial(RMSNorm, epsilon=config.norm_epsilon, precision=config.precision)
    attention = MultiHeadAttention(
        config.width,
        config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rotary=Rotary(config.rope_theta, scaling=config.rope_scaling),
        bias=config.qkv_bias,
        out_bias=config.out_bias,
        head_norm=norm if config.qk_norm else None,
        dropout=config.attention_dropout,
        **common,
    )
    feedforward = FeedForward(
        config.width, config.mlp_width, activation=config.activation, gated=True, bias=False, **common
    )
    return Block(attention, feedforward, partial(norm, config.width))


class Llama(Decoder):
    """Tokens [B, T] to logits [B, T, V], or to what else config.head gives.

    Raises SequenceError where a sequence, or a cache, is longer than config.max_length.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        common = {"rngs": rngs, "precision": config.precision}
        self.embed = Embed(config.vocab_size, config.width, **common)
        self.stack = Stack(
            lambda rngs: llama_block(config, rngs=rngs),
            config.num_layers,
            period=len(config.windows),
            remat=config.remat,
            rngs=rngs,
        )
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon, precision=config.precision)
        own = config.head == "lm" and not config.tied
        self.unembed = Embed(config.vocab_size, config.width, **common) if own else None
        self.classifier = classifier(config, rngs=rngs)


def _llama3(num_layers: int, width: int, num_heads: int, mlp_width: int, **others: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=8,
        mlp_width=mlp_width,
        rope_theta=500000.0,
        special_tokens=SpecialTokens(bos=128000, eos=(128001,)),
        **others,
    )


def _mistral(**others: Any) -> LlamaConfig:
    return LlamaConfig(max_length=32768, num_kv_heads=8, mlp_width=14336, published="mistral", **others)


def _qwen(num_layers: int, width: int, num_heads: int, num_kv_heads: int, mlp_width: int, **others: Any) -> LlamaConfig:
    return LlamaConfig(
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        mlp_width=mlp_width,
        norm_epsilon=1e-6,
        rope_theta=1e6,
        **others,
    )


_QWEN2: dict[str, Any] = {
    "qkv_bias": True,
    "published": "qwen2",
    "special_tokens": SpecialTokens(bos=151643, eos=(151643,)),
}
_QWEN3: dict[str, Any] = {
    "vocab_size": 151936,
    "max_length": 40960,
    "head_dim": 128,
    "qk_norm": True,
    "published": "qwen3",
    "special_tokens": SpecialTokens(bos=151643, eos=(151645,)),
}

PRESETS = {
    "llama-2-7b": LlamaConfig(),
    "llama-2-13b": LlamaConfig(num_layers=40, width=5120, num_heads=40, mlp_width=13824),
    "llama-2-70b": LlamaConfig(num_layers=80, width=8192, num_heads=64, num_kv_heads=8, mlp_width=28672),
    "llama-3-8b": _llama3(32, 4096, 32, 14336, max_length=8192),
    "llama-3-70b": _llama3(80, 8192, 64, 28672, max_length=8192),
    "llama-3.1-8b": _llama3(32, 4096, 32, 14336, max_length=131072, rope_scaling=Llama3Scaling(8.0)),
    "llama-3.2-1b": _llama3(16, 2048, 32, 8192, max_length=131072, rope_scaling=Llama3Scaling(32.0), tied=True),
    "llama-3.2-3b": _llama3(28, 3072, 24, 8192, max_length=131072, rope_scaling=Llama3Scaling(32.0), tied=True),
    "mistral-7b-v0.1": _mistral(windows=(4096,)),
    "mistral-7b-v0.3": _mistral(vocab_size=32768, rope_theta=1e6),
    "qwen2.5-0.5b": _qwen(24, 896, 14, 2, 4864, vocab_size=151936, max_length=32768, tied=True, **_QWEN2),
    "qwen2.5-7b": _qwen(28, 3584, 28, 4, 18944, vocab_size=152064, max_length=131072, **_QWEN2),
    "qwen3-0.6b": _qwen(28, 1024, 16, 8, 3072, tied=True, **_QWEN3),
    "qwen3-8b": _qwen(36, 4096, 32, 8, 12288, **_QWEN3),
}
