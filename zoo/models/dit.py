"""DiT: a transformer over patches of noisy latents, every block of which time and class modulate.

Peebles and Xie 2023, "Scalable Diffusion Models with Transformers", arXiv 2212.09748; the block is their adaLN-zero.

Published files are diffusers', whose module has the embedding of time and class again in each block. Those converted
from the paper's weights hold the same one everywhere: they are read as the paper's model, with one embedding for all
blocks, and written back as they were. Time's sinusoids are diffusers' too: their frequencies end at 1 / 10000, where
the paper's code ends one step before it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from zoo.layers.attention import MultiHeadAttention
from zoo.layers.convolution import fan_average
from zoo.layers.feedforward import FeedForward
from zoo.layers.linear import LayerError, Linear, Precision, check_sizes, normal
from zoo.layers.modulation import Modulation, modulated
from zoo.layers.norms import LayerNorm
from zoo.layers.patches import cut_into_patches, patch_grid
from zoo.layers.positions import grid_sinusoids
from zoo.layers.transformer import Block, Stack
from zoo.layers.unet import check_images, sinusoidal_time, zeros
from zoo.models.noising import Noising
from zoo.models.published import Layout, PublishedError, Weight, flag, linear, number, require, size
from zoo.sharding import constrain

TIME_FEATURES = 256
MLP_RATIO = 4
EPSILON = 1e-6
"""Sinusoids of time, widths of the feed-forward network in widths of the model, and of norms: all as in the paper."""

ACTIVATIONS = {"gelu-approximate": "gelu_tanh", "gelu": "gelu"}
"""Published names and ours."""

_DEFAULTS = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "patch_size": 2,
    "sample_size": 32,
}
_OLDER_DEFAULTS = {
    "activation_fn": "geglu",
    "attention_bias": False,
    "attention_head_dim": 88,
    "norm_elementwise_affine": True,
    "norm_type": "layer_norm",
    "num_attention_heads": 16,
    "num_layers": 1,
}
_OLDER_ONLY = {
    "attention_type": "default",
    "caption_channels": None,
    "cross_attention_dim": None,
    "double_self_attention": False,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "use_additional_conditions": None,
    "use_linear_projection": False,
}
"""What fields that are left out mean in a DiTTransformer2DModel; in a Transformer2DModel, which DiTs and others were
published as before; and the fields of the latter alone, with the values that a DiT has."""


@dataclass(frozen=True)
class DiTConfig:
    """A DiT's sizes; the defaults are those of DiT-XL/2 for latents of 32 x 32, which are images of 256 x 256.

    image_size: the side of images whose patches stand at whole positions, 0, 1, 2 and so on. In those of another size
        as many patches as there are share the same range.
    learned_sigma: whether the prediction has, behind the channels of the images, as many again for the variance.
    num_classes: classes without the one that stands for none.  null_class: whether there is that one, the last row.
    shared_embedding: whether one embedding of time and class serves all blocks, as in the paper; else each has its own.
    feedforward_epsilon: of the normalisation before feed-forward networks; all others have 1e-6.
    noising: the noise that the network's time counts. Objectives and samplers read it here.
    remat: what the backward pass keeps, a name in zoo.layers.transformer.REMAT_POLICIES.
    """

    image_size: int = 32
    patch_size: int = 2
    image_channels: int = 4
    learned_sigma: bool = True
    num_layers: int = 28
    width: int = 1152
    num_heads: int = 16
    num_classes: int = 1000
    null_class: bool = True
    shared_embedding: bool = True
    qkv_bias: bool = True
    activation: str = "gelu_tanh"
    feedforward_epsilon: float = EPSILON
    noising: Noising = Noising()
    remat: str = "none"
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        names = ("image_size", "patch_size", "image_channels", "num_layers", "width", "num_heads", "num_classes")
        check_sizes(**{name: getattr(self, name) for name in names})
        if self.width % 4:
            raise LayerError(f"width {self.width} has no sinusoids of two axes: choose a multiple of 4")
        self.grid(self.image_size, self.image_size)  # Raises where an image is smaller than a patch.

    def grid(self, y: int, x: int) -> tuple[int, int]:
        """Patches down and across an image of Y x X."""
        return patch_grid((y, x), (self.patch_size, self.patch_size))

    @property
    def out_channels(self) -> int:
        return self.image_channels * (2 if self.learned_sigma else 1)

    def build(self, rngs: nnx.Rngs) -> "DiT":
        return DiT(self, rngs=rngs)

    def forward_flops(self, shape: tuple[int, ...]) -> float:
        """FLOPs of the forward pass of one image (Y, X, C): matrix products alone, a multiply-add being two.

        The paper's Gflops count a multiply-add as one: they are half of these.
        """
        y, x, _ = shape
        rows, columns = self.grid(y, x)
        length, width, area = rows * columns, self.width, self.patch_size**2
        embedding = TIME_FEATURES * width + width**2
        of_a_token = (4 + 2 * MLP_RATIO) * width**2 + 2 * length * width
        total = self.num_layers * (length * of_a_token + 6 * width**2) + 2 * width**2
        total += embedding * (1 if self.shared_embedding else self.num_layers + 1)
        return 2.0 * (total + length * area * width * (self.image_channels + self.out_channels))

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "DiTConfig":
        """From diffusers' config.json; raises PublishedError for one that this module cannot be.

        Whether blocks share their embedding is seen from the tensors alone, see `with_tensors`.
        """
        older = fields.get("_class_name") == "Transformer2DModel"
        fields = (_OLDER_DEFAULTS if older else _DEFAULTS) | dict(fields)
        require(fields, "DiT", norm_type="ada_norm_zero", norm_elementwise_affine=False, upcast_attention=False)
        require(fields, "DiT", dropout=0.0, **(_OLDER_ONLY if older else {}))
        if (name := fields["activation_fn"]) not in ACTIVATIONS:
            raise PublishedError(f"config.json has activation_fn {name!r}, which is none of {', '.join(ACTIVATIONS)}")
        channels, heads = size(fields, "in_channels"), size(fields, "num_attention_heads")
        return cls(
            image_size=size(fields, "sample_size"),
            patch_size=size(fields, "patch_size"),
            image_channels=channels,
            learned_sigma=_learned_sigma(fields, channels),
            num_layers=size(fields, "num_layers"),
            width=heads * size(fields, "attention_head_dim"),
            num_heads=heads,
            num_classes=size(fields, "num_embeds_ada_norm"),
            shared_embedding=False,
            qkv_bias=flag(fields, "attention_bias", True),
            activation=ACTIVATIONS[name],
            feedforward_epsilon=number(fields, "norm_eps", 1e-5),
        )

    def with_tensors(self, tensors: Mapping[str, Any]) -> "DiTConfig":
        """With one embedding for all blocks, where those of a file's blocks are the same bit for bit."""

        def same(name: str, layer: int) -> bool:
            one, other = (tensors.get(name.format(i)) for i in (0, layer))
            if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
                return False
            return one.read().tobytes() == other.read().tobytes()

        names = [weight.name for weight in _embedding(f"{BLOCK}.norm1.emb", "")]
        shared = all(same(name, layer) for layer in range(self.num_layers) for name in names)
        return dataclasses.replace(self, shared_embedding=shared)

    def to_published(self) -> dict[str, Any]:
        """The config.json of this DiT; raises PublishedError where it has no published form."""
        if not self.null_class:
            raise PublishedError("a DiT with null_class False has no published form: those have a row for no class")
        return {
            "_class_name": "DiTTransformer2DModel",
            "activation_fn": next(name for name, ours in ACTIVATIONS.items() if ours == self.activation),
            "attention_bias": self.qkv_bias,
            "attention_head_dim": self.width // self.num_heads,
            "dropout": 0.0,
            "in_channels": self.image_channels,
            "norm_elementwise_affine": False,
            "norm_eps": self.feedforward_epsilon,
            "norm_num_groups": 32,
            "norm_type": "ada_norm_zero",
            "num_attention_heads": self.num_heads,
            "num_embeds_ada_norm": self.num_classes,
            "num_layers": self.num_layers,
            "out_channels": self.out_channels if self.learned_sigma else None,
            "patch_size": self.patch_size,
            "sample_size": self.image_size,
            "upcast_attention": False,
        }

    def published_layout(self) -> Layout:
        return _layout(self)


def _learned_sigma(fields: Mapping[str, Any], channels: int) -> bool:
    out = fields.get("out_channels")
    if out not in (None, channels, 2 * channels):
        raise PublishedError(
            f"config.json has out_channels {out!r}, and a DiT here has as many as in_channels {channels}, or twice that"
        )
    return out == 2 * channels


class Embedding(nnx.Module):
    """Time and class as one vector: sinusoids of time through two linear maps, plus the class's vector."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.precision, width, init = config.precision, config.width, normal(0.02)
        common = {"rngs": rngs, "precision": config.precision, "init": init}
        self.expand = Linear(TIME_FEATURES, width, axes=(None, "mlp"), **common)
        self.mix = Linear(width, width, axes=("mlp", "time"), **common)
        rows = config.num_classes + config.null_class
        table = init(rngs.params(), (rows, width), jnp.dtype(config.precision.parameters))
        self.classes = nnx.Param(table, axes=("classes", "embed"))

    def __call__(self, time: jax.Array, classes: jax.Array) -> jax.Array:
        """time [B] and classes [B] int32: [B, D]. A class outside the table gives NaN."""
        features = sinusoidal_time(time, TIME_FEATURES, cosines_first=True)
        x = self.mix(jax.nn.silu(self.expand(features.astype(self.precision.compute))))
        table = constrain(self.classes[...], None, None)
        vectors = table.at[classes].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return constrain(x + vectors.astype(x.dtype), "act_batch", "act_embed")


class BlockModulation(nnx.Module):
    """The six vectors that modulate a block, from a condition [B, D], or from what an embedding of its own takes."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.embedding = None if config.shared_embedding else Embedding(config, rngs=rngs)
        self.modulation = Modulation(config.width, config.width, 6, rngs=rngs, precision=config.precision)

    def __call__(self, condition: Any) -> tuple[jax.Array, ...]:
        return self.modulation(condition if self.embedding is None else self.embedding(*condition))


def dit_block(config: DiTConfig, *, rngs: nnx.Rngs) -> Block:
    """One layer of a DiT."""
    common = {"rngs": rngs, "precision": config.precision, "init": fan_average}
    block = Block(
        MultiHeadAttention(config.width, config.num_heads, bias=config.qkv_bias, out_bias=True, **common),
        FeedForward(config.width, MLP_RATIO * config.width, activation=config.activation, **common),
        partial(_norm, config),
        modulation=partial(BlockModulation, config, rngs=rngs),
    )
    block.feedforward_norm = _norm(config, config.feedforward_epsilon)
    return block


def _norm(config: DiTConfig, epsilon: float = EPSILON) -> LayerNorm:
    return LayerNorm(config.width, epsilon=epsilon, scale=False, bias=False, precision=config.precision)


class DiT(nnx.Module):
    """What was added to images, as a raw prediction, from the noisy images, the time and their classes."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, side, common = config.width, config.patch_size, {"rngs": rngs, "precision": config.precision}
        axes = ("kernel_y", "kernel_x", None, "embed")
        self.patches = Linear((side, side, config.image_channels), width, axes=axes, init=fan_average, **common)
        self.embedding = Embedding(config, rngs=rngs) if config.shared_embedding else None
        self.stack = Stack(lambda rngs: dit_block(config, rngs=rngs), config.num_layers, remat=config.remat, rngs=rngs)
        self.norm = _norm(config)
        self.modulation = Modulation(width, width, 2, **common)
        # One flat axis, as in Modulation.
        self.out = Linear(width, side**2 * config.out_channels, axes=("embed", None), init=zeros, **common)

    def __call__(
        self,
        images: jax.Array,
        time: jax.Array,
        *,
        classes: jax.Array | None = None,
        context: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """images [B, Y, X, C], time [B] (0 the least noisy), classes [B] int32: [B, Y, X, out channels], float32.

        With learned_sigma the first C channels are the prediction, and those behind it speak of the variance (Nichol
        and Dhariwal 2021). key: there is no dropout, and it does nothing. Raises LayerError for what does not fit.
        """
        del key
        classes, grid = self._checked(images, classes, context)
        config, side = self.config, self.config.patch_size
        x = self.patches(cut_into_patches(images.astype(config.precision.compute), (side, side)))
        positions = grid_sinusoids(grid, config.width, side=config.image_size // side)
        x = constrain(x + positions.astype(x.dtype), "act_batch", "act_length", "act_embed")
        if self.embedding is None:
            # As published: the last layer reads the first block's.
            x = self.stack(x, condition=(time, classes)).x
            condition = self.stack.first_block().modulation.embedding(time, classes)
        else:
            condition = self.embedding(time, classes)
            x = self.stack(x, condition=condition).x
        x = self.out(modulated(self.norm(x), *self.modulation(condition)))
        x = rearrange(x, "b (i j) (y x c) -> b (i y) (j x) c", i=grid[0], j=grid[1], y=side, x=side)
        return constrain(x, "act_batch", "act_y", "act_x", None).astype(jnp.float32)

    def _checked(
        self, images: jax.Array, classes: jax.Array | None, context: jax.Array | None
    ) -> tuple[jax.Array, tuple[int, int]]:
        """The classes, and patches down and across."""
        side = self.config.patch_size
        check_images(images, self.config.image_channels)
        _, y, x, _ = images.shape
        if y % side or x % side:
            raise LayerError(f"images are {y} x {x}, not whole patches of {side} x {side}: choose multiples of {side}")
        if classes is None:
            none = f" ({self.config.num_classes} for none)" if self.config.null_class else ""
            raise LayerError(f"classes were left out, and a DiT is told one for each image: give [B] of them{none}")
        if context is not None:
            raise LayerError("context was given, and a DiT reads none: leave it out")
        return classes, self.config.grid(y, x)


BLOCK, PARAMETERS = "transformer_blocks.{}", "stack.blocks.*"


def _layout(config: DiTConfig) -> Layout:
    weights = [
        *linear("pos_embed.proj", "patches", "d c y x -> y x c d", "d -> d"),
        *linear("proj_out_1", "modulation.linear", "f d -> d f", "f -> f"),
        *linear("proj_out_2", "out", "f d -> d f", "f -> f"),
        *linear(f"{BLOCK}.norm1.linear", f"{PARAMETERS}.modulation.modulation.linear", "f d -> d f", "f -> f"),
        *linear(f"{BLOCK}.attn1.to_out.0", f"{PARAMETERS}.attention.out", "d (n h) -> n h d", "d -> d"),
        *linear(f"{BLOCK}.ff.net.0.proj", f"{PARAMETERS}.feedforward.up", "f d -> d f", "f -> f"),
        *linear(f"{BLOCK}.ff.net.2", f"{PARAMETERS}.feedforward.down", "d f -> f d", "d -> d"),
    ]
    bias = "(n h) -> n h" if config.qkv_bias else None
    for name, part in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
        weights += linear(f"{BLOCK}.attn1.{name}", f"{PARAMETERS}.attention.{part}", "(n h) d -> d n h", bias)
    if config.shared_embedding:  # The same parameters, a tensor for each block.
        for layer in range(config.num_layers):
            weights += _embedding(f"{BLOCK.format(layer)}.norm1.emb", "embedding")
    else:
        weights += _embedding(f"{BLOCK}.norm1.emb", f"{PARAMETERS}.modulation.embedding")
    return Layout(tuple(weights), stem="diffusion_pytorch_model")


def _embedding(name: str, module: str) -> list[Weight]:
    return [
        *linear(f"{name}.timestep_embedder.linear_1", f"{module}.expand", "d f -> f d", "d -> d"),
        *linear(f"{name}.timestep_embedder.linear_2", f"{module}.mix", "e d -> d e", "e -> e"),
        Weight(f"{name}.class_embedder.embedding_table.weight", (f"{module}.classes",), "r d -> r d"),
    ]


_SIZES: dict[str, dict[str, Any]] = {
    "s": {"num_layers": 12, "width": 384, "num_heads": 6},
    "b": {"num_layers": 12, "width": 768, "num_heads": 12},
    "l": {"num_layers": 24, "width": 1024, "num_heads": 16},
    "xl": {"num_layers": 28, "width": 1152, "num_heads": 16},
}

PRESETS = {
    **{
        f"dit-{name}-{patch}": DiTConfig(patch_size=patch, **sizes)
        for name, sizes in _SIZES.items()
        for patch in (2, 4, 8)
    },
    "dit-xl-2-512": DiTConfig(image_size=64),
    "dit-digits": DiTConfig(
        image_size=4,
        patch_size=1,
        learned_sigma=False,
        num_layers=4,
        width=96,
        num_heads=4,
        num_classes=10,
        noising=Noising("cosine", target="velocity"),
    ),
}
