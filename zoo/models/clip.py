"""CLIP's text tower: a causal pre-norm transformer, read where the text ends (Radford et al. 2021, arXiv 2103.00020).

It also tells Stable Diffusion what to draw: 1.x reads the last hidden states of OpenAI's ViT-L/14, 2.x those of
OpenCLIP's ViT-H/14 before its last layer. Initialisation is that of the released code.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.kernels import Mask
from zoo.layers.attention import MultiHeadAttention
from zoo.layers.feedforward import FeedForward
from zoo.layers.linear import Embed, LayerError, Linear, Precision, check_sizes, normal
from zoo.layers.norms import LayerNorm
from zoo.layers.positions import LearnedPositions, check_length
from zoo.layers.transformer import Block, Intermediates, Stack
from zoo.models.published import (
    Layout,
    PublishedError,
    SpecialTokens,
    Weight,
    activation,
    head,
    linear,
    norm,
    number,
    published_activation,
    size,
)
from zoo.sharding import constrain

CLASSES = {"none": "CLIPTextModel", "projection": "CLIPTextModelWithProjection"}
"""Published classes of the text tower by our names of their heads."""

OLD_END = 2
"""What published configs of old gave as the end of a text, which is not the token that ends it: see `ends`."""


@dataclass(frozen=True)
class CLIPTextConfig:
    """A text tower's sizes; the defaults are those of ViT-L/14, bare.

    head: "none", or "projection", a linear map of the pooled state into the space that images share.
    projection_width: of that space.
    special_tokens: the one that ends a text is where it is pooled.
    prefix: what the names of the bare tower's tensors begin with in files: nothing, as transformers 5 writes them, or
        "text_model.", as in older files.
    remat: what the backward pass keeps, a name in zoo.layers.transformer.REMAT_POLICIES.
    """

    vocab_size: int = 49408
    max_length: int = 77
    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    mlp_width: int = 3072
    head: str = "none"
    projection_width: int = 768
    activation: str = "gelu_sigmoid"
    norm_epsilon: float = 1e-5
    attention_dropout: float = 0.0
    special_tokens: SpecialTokens = SpecialTokens(bos=49406, eos=(49407,), pad=49407)
    prefix: str = ""
    remat: str = "none"
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        names = ("vocab_size", "max_length", "num_layers", "width", "num_heads", "mlp_width", "projection_width")
        check_sizes(**{name: getattr(self, name) for name in names})
        if self.head not in CLASSES:
            raise LayerError(f"head {self.head!r} is unknown: choose one of {', '.join(CLASSES)}")
        if len(self.special_tokens.eos) != 1:
            raise LayerError(
                f"special_tokens have the ends {self.special_tokens.eos}: a text is pooled at one, name it"
            )

    def build(self, rngs: nnx.Rngs) -> "CLIPText":
        return CLIPText(self, rngs=rngs)

    def forward_flops(self, shape: tuple[int, ...]) -> float:
        """FLOPs of the forward pass of one text of shape (T,): matrix products alone, a multiply-add being two.

        Scores that the causal mask removes are not counted.
        """
        (length,) = shape
        of_a_token = 4 * self.width**2 + 2 * self.width * self.mlp_width + length * self.width
        projected = self.width * self.projection_width if self.head == "projection" else 0
        return 2.0 * (self.num_layers * length * of_a_token + projected)

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "CLIPTextConfig":
        """From the config.json of a CLIP text tower; raises PublishedError for one that this module cannot be."""
        fields = {
            "vocab_size": 49408,
            "max_position_embeddings": 77,
            "num_hidden_layers": 12,
            "hidden_size": 512,
            "num_attention_heads": 8,
            "intermediate_size": 2048,
            "projection_dim": 512,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "pad_token_id": 1,
        } | dict(fields)
        special_tokens = SpecialTokens.from_published(fields)
        if len(special_tokens.eos) != 1:
            raise PublishedError(
                f"config.json has eos_token_id {fields['eos_token_id']!r}, and a CLIP text tower here has one"
            )
        kind = head(fields, "CLIP text tower", CLASSES, "none")
        return cls(
            vocab_size=size(fields, "vocab_size"),
            max_length=size(fields, "max_position_embeddings"),
            num_layers=size(fields, "num_hidden_layers"),
            width=size(fields, "hidden_size"),
            num_heads=size(fields, "num_attention_heads"),
            mlp_width=size(fields, "intermediate_size"),
            head=kind,
            projection_width=size(fields, "projection_dim"),
            activation=activation(fields, "hidden_act", "quick_gelu"),
            norm_epsilon=number(fields, "layer_norm_eps", 1e-5),
            attention_dropout=number(fields, "attention_dropout", 0.0),
            special_tokens=special_tokens,
        )

    def with_tensors(self, names: Collection[str]) -> "CLIPTextConfig":
        """As a file with these tensors has it: its config.json does not say how their names begin."""
        prefixed = self.head == "none" and any(name.startswith("text_model.") for name in names)
        return replace(self, prefix="text_model." if prefixed else "")

    def to_published(self) -> dict[str, Any]:
        """The config.json of this text tower."""
        return {
            "architectures": [CLASSES[self.head]],
            "model_type": "clip_text_model",
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_length,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.width,
            "num_attention_heads": self.num_heads,
            "intermediate_size": self.mlp_width,
            "projection_dim": self.projection_width,
            "hidden_act": published_activation(self.activation),
            "layer_norm_eps": self.norm_epsilon,
            "attention_dropout": self.attention_dropout,
            **self.special_tokens.to_published(),
        }

    def published_layout(self) -> Layout:
        return _layout(self)


class CLIPTextOutput(NamedTuple):
    """hidden: [B, T, D], after the last normalisation.  pooled: [B, D], of them the one where the text ends.

    projected: [B, E] of the pooled state, with head "projection", else None.
    intermediates: where they were asked for. As published, the last of its hidden states are those that leave the last
        block, and `hidden` is what the normalisation makes of them.
    """

    hidden: jax.Array
    pooled: jax.Array
    projected: jax.Array | None
    intermediates: Intermediates | None = None


def text_block(config: CLIPTextConfig, *, rngs: nnx.Rngs) -> Block:
    """One layer of the text tower."""
    width, common = config.width, {"rngs": rngs, "precision": config.precision}
    ends = normal((2 * config.num_layers * width) ** -0.5)
    attention = MultiHeadAttention(
        width,
        config.num_heads,
        dropout=config.attention_dropout,
        init=normal(width**-0.5),
        out_init=ends,
        **common,
    )
    feedforward = FeedForward(
        width,
        config.mlp_width,
        activation=config.activation,
        init=normal((2 * width) ** -0.5),
        out_init=ends,
        **common,
    )
    norm = partial(LayerNorm, width, epsilon=config.norm_epsilon, precision=config.precision)
    return Block(attention, feedforward, norm)


class CLIPText(nnx.Module):
    """Tokens [B, T] to hidden states and, pooled where each text ends, to one vector a text.

    Raises SequenceError where texts are longer than config.max_length.
    """

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, common = config.width, {"rngs": rngs, "precision": config.precision}
        self.embed = Embed(config.vocab_size, width, init=normal(0.02), **common)
        self.positions = LearnedPositions(config.max_length, width, init=normal(0.01), **common)
        self.stack = Stack(lambda rngs: text_block(config, rngs=rngs), config.num_layers, remat=config.remat, rngs=rngs)
        self.norm = LayerNorm(width, epsilon=config.norm_epsilon, precision=config.precision)
        project = partial(Linear, width, config.projection_width, axes=("embed", "embed"), bias=False)
        self.projection = project(init=normal(width**-0.5), **common) if config.head == "projection" else None

    def __call__(
        self,
        tokens: jax.Array,
        *,
        mask: Mask = Mask(),
        key: jax.Array | None = None,
        return_intermediates: bool = False,
    ) -> CLIPTextOutput:
        """The states of tokens [B, T] int32, in which whatever pads stands behind the token that ends the text.

        mask: restricts attention further; it is causal in any case, so that a text does not see what pads.
        key: for dropout; None drops nothing.
        return_intermediates: also give the hidden states and attention weights of every layer.
        """
        check_length(tokens.shape[1], self.config.max_length)
        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1])[None])
        x = constrain(x, "act_batch", "act_length", "act_embed")
        masks = [mask & Mask(causal=True)]
        x, _, intermediates = self.stack(x, masks=masks, key=key, return_intermediates=return_intermediates)
        hidden = self.norm(x)
        pooled = jnp.take_along_axis(hidden, ends(tokens, self.config)[:, None, None], axis=1)[:, 0]
        pooled = constrain(pooled, "act_batch", "act_embed")
        projected = None if self.projection is None else self.projection(pooled)
        return CLIPTextOutput(hidden, pooled, projected, intermediates)


def ends(tokens: jax.Array, config: CLIPTextConfig) -> jax.Array:
    """Where each of the texts [B, T] ends, [B]: at the first token that does, or at 0 where there is none.

    Published configs once named token 2, which does not end texts; with it the largest token of a text is its end, as
    it is in CLIP's own vocabulary.
    """
    (end,) = config.special_tokens.eos
    return (tokens if end == OLD_END else tokens == end).argmax(1)


def _layout(config: CLIPTextConfig) -> Layout:
    layer, block = "encoder.layers.{}", "stack.blocks.*"
    weights = [
        Weight("embeddings.token_embedding.weight", ("embed.table",), "v d -> v d"),
        Weight("embeddings.position_embedding.weight", ("positions.table",), "t d -> t d"),
        *norm("final_layer_norm", "norm"),
        *norm(f"{layer}.layer_norm1", f"{block}.attention_norm"),
        *norm(f"{layer}.layer_norm2", f"{block}.feedforward_norm"),
        *linear(f"{layer}.self_attn.out_proj", f"{block}.attention.out", "d (n h) -> n h d", "d -> d"),
        *linear(f"{layer}.mlp.fc1", f"{block}.feedforward.up", "f d -> d f", "f -> f"),
        *linear(f"{layer}.mlp.fc2", f"{block}.feedforward.down", "d f -> f d", "d -> d"),
    ]
    for part, ours in (("q", "query"), ("k", "key"), ("v", "value")):
        name = f"{layer}.self_attn.{part}_proj"
        weights += linear(name, f"{block}.attention.{ours}", "(n h) d -> d n h", "(n h) -> n h")
    prefix = "text_model." if config.head == "projection" else config.prefix
    weights = [replace(weight, name=prefix + weight.name) for weight in weights]
    if config.head == "projection":
        weights += linear("text_projection", "projection", "e d -> d e")
    return Layout(tuple(weights), ignored=(r"(text_model\.)?embeddings\.position_ids",))


PRESETS = {
    "clip-vit-large-patch14-text": CLIPTextConfig(),
    "stable-diffusion-2-text": CLIPTextConfig(
        num_layers=23,
        width=1024,
        num_heads=16,
        mlp_width=4096,
        projection_width=512,
        activation="gelu",
        special_tokens=SpecialTokens(bos=0, eos=(OLD_END,), pad=1),
    ),
}
