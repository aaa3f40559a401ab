"""ViT: a pre-norm transformer over patches of an image, and DINOv2's, which scales branches and has register tokens.

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"; Oquab et al. 2023, "DINOv2"; Darcet et al. 2024, "Vision
Transformers Need Registers". A class token stands before the patches unless classes are scored from the mean of the
patches alone (Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k").

An image of another size than the model's has its positions resampled bicubically, as Hugging Face transformers 5.23
does to square ones, up to rounding: from the four nearest, and antialiased where there are registers. The code that
DINOv2 without registers was released with adds 0.1 to the sides of the new grid before it divides: it differs a little.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.kernels import Mask
from zoo.layers.attention import MultiHeadAttention
from zoo.layers.dropout import dropout, split
from zoo.layers.feedforward import FeedForward
from zoo.layers.linear import LayerError, Linear, Precision, check_sizes
from zoo.layers.norms import LayerNorm
from zoo.layers.patches import ImageTokens, patch_grid
from zoo.layers.transformer import Block, Intermediates, LayerScale, Stack
from zoo.models.published import (
    LABELS,
    Layout,
    PublishedError,
    Weight,
    activation,
    check_head,
    flag,
    head,
    linear,
    norm,
    number,
    published_activation,
    published_labels,
    read_labels,
    require,
    size,
)
from zoo.sharding import constrain

HEADS = ("none", "pooler", "classification")
POOLS = ("class", "mean", "class_and_mean")

init = jax.nn.initializers.truncated_normal(0.02)


class Published(NamedTuple):
    """A class of Hugging Face transformers.  traits: those of a config that has this form, or the ones it settles."""

    name: str
    model_type: str
    traits: Mapping[str, Any]

    @property
    def prefix(self) -> str:
        """What the names of its tensors begin with; nothing where it has no classifier."""
        return f"{self.model_type}." if self.traits["head"] == "classification" else ""


_VIT = {"layer_scale": False, "gated": False, "registers": False, "mask_token": False, "antialias": False}
_DINO = {"layer_scale": True, "registers": False, "antialias": False}
_REGISTERS = {"layer_scale": True, "registers": True, "mask_token": True, "antialias": True}
_BARE, _SCORED = {"head": "none", "pool": "class"}, {"head": "classification", "pool": "class_and_mean"}

FORMS = (
    Published("ViTModel", "vit", _VIT | {"head": "pooler", "pool": "class"}),
    Published("ViTForImageClassification", "vit", _VIT | {"head": "classification", "pool": "class"}),
    Published("Dinov2Model", "dinov2", _DINO | _BARE),
    Published("Dinov2ForImageClassification", "dinov2", _DINO | _SCORED),
    Published("Dinov2WithRegistersModel", "dinov2_with_registers", _REGISTERS | _BARE),
    Published("Dinov2WithRegistersForImageClassification", "dinov2_with_registers", _REGISTERS | _SCORED),
)


@dataclass(frozen=True)
class ViTConfig:
    """A ViT's sizes; the defaults are those of ViT-B/16 for images of 224 x 224, bare but for its pooler.

    image_size, patch_size: (Y, X) in pixels. Images of other sizes have their positions resampled.
    head: "none"; "pooler", tanh of a linear map of what is pooled; "classification", scores of it.
    pool: what of the last states is pooled: the class token's, the mean of the patches', or both side by side. With
        "mean" there is no class token.
    labels: names of the classes.  problem_type: how they are read, a name in PROBLEMS; None where it is not said.
    registers: tokens between the class token and the patches, whose states nothing reads.
    mask_token: whether there is a vector that stands in for patches that are masked.
    layer_scale: what the learned factors of residual branches start from; None: there are none.
    gated: a feed-forward network of SwiGLU's kind, activation(gate) * up.
    qkv_bias: whether queries, keys and values have biases.
    antialias: how positions are resampled, see zoo.layers.patches.
    dropout: of embeddings and residual branches.  attention_dropout: of attention weights.
    remat: what the backward pass keeps, a name in zoo.layers.transformer.REMAT_POLICIES.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    image_channels: int = 3
    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    mlp_width: int = 3072
    head: str = "pooler"
    pool: str = "class"
    labels: tuple[str, ...] = LABELS
    problem_type: str | None = None
    registers: int = 0
    mask_token: bool = False
    layer_scale: float | None = None
    gated: bool = False
    activation: str = "gelu"
    qkv_bias: bool = True
    norm_epsilon: float = 1e-12
    antialias: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    remat: str = "none"
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(**{name: getattr(self, name) for name in ("image_channels", "num_layers", "width", "num_heads")})
        check_sizes(mlp_width=self.mlp_width)
        if self.registers < 0:
            raise LayerError(f"registers {self.registers} is no number of tokens: choose a whole number from 0")
        for name in ("image_size", "patch_size"):
            y, x = getattr(self, name)
            check_sizes(**{f"{name} down": y, f"{name} across": x})
        check_head(self, HEADS)
        if self.pool not in POOLS:
            raise LayerError(f"pool {self.pool!r} is unknown: choose one of {', '.join(POOLS)}")
        patch_grid(self.image_size, self.patch_size)  # Raises where an image is smaller than a patch.

    @property
    def class_tokens(self) -> int:
        return int(self.pool != "mean")

    @property
    def pooled_width(self) -> int:
        return self.width * (2 if self.pool == "class_and_mean" else 1)

    def build(self, rngs: nnx.Rngs) -> "ViT":
        return ViT(self, rngs=rngs)

    def forward_flops(self, shape: tuple[int, ...]) -> float:
        """FLOPs of the forward pass of one image (Y, X, C): matrix products alone, a multiply-add being two."""
        y, x, _ = shape
        rows, columns = patch_grid((y, x), self.patch_size)
        patches = rows * columns
        length = self.class_tokens + self.registers + patches
        of_a_token = 4 * self.width**2 + (2 + self.gated) * self.width * self.mlp_width + 2 * length * self.width
        total = self.num_layers * length * of_a_token
        total += patches * self.patch_size[0] * self.patch_size[1] * self.image_channels * self.width
        outputs = {"none": 0, "pooler": self.width, "classification": len(self.labels)}[self.head]
        return 2.0 * (total + self.pooled_width * outputs)

    @property
    def traits(self) -> dict[str, Any]:
        """What tells published classes apart."""
        return {
            "head": self.head,
            "pool": self.pool,
            "layer_scale": self.layer_scale is not None,
            "registers": self.registers > 0,
            "mask_token": self.mask_token,
            "gated": self.gated,
            "antialias": self.antialias,
        }

    def form(self) -> Published:
        """The published class of such a ViT; raises PublishedError where there is none."""

        def differing(form: Published) -> list[str]:
            return [name for name, value in form.traits.items() if self.traits[name] != value]

        nearest = min(FORMS, key=lambda form: len(differing(form)))
        if names := differing(nearest):
            told = ", ".join(f"{name} {getattr(self, name)!r}" for name in names)
            raise PublishedError(f"a ViT with {told} has no published form; the nearest is {nearest.name}")
        return nearest

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "ViTConfig":
        """From the config.json of a ViT or a DINOv2; raises PublishedError for one that this module cannot be."""
        model_type = fields.get("model_type", "vit")
        forms = {form.traits["head"]: form for form in FORMS if form.model_type == model_type}
        traits = forms[head(fields, model_type, {name: form.name for name, form in forms.items()})].traits
        width = size(fields, "hidden_size")
        own = _vit_fields(fields, width) if model_type == "vit" else _dino_fields(fields, width, traits)
        return cls(
            patch_size=_sides(fields, "patch_size", 16 if model_type != "dinov2" else 14),
            image_channels=size({"num_channels": 3} | dict(fields), "num_channels"),
            num_layers=size(fields, "num_hidden_layers"),
            width=width,
            num_heads=size(fields, "num_attention_heads"),
            head=traits["head"],
            pool=traits["pool"],
            **read_labels(fields, "ViT", traits["head"]),
            antialias=traits["antialias"],
            qkv_bias=flag(fields, "qkv_bias", True),
            attention_dropout=number(fields, "attention_probs_dropout_prob", 0.0),
            **own,
        )

    def to_published(self) -> dict[str, Any]:
        """The config.json of this ViT; raises PublishedError where it has no published form."""
        form = self.form()
        fields = {
            "architectures": [form.name],
            "model_type": form.model_type,
            "image_size": _written(self.image_size),
            "patch_size": _written(self.patch_size),
            "num_channels": self.image_channels,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.width,
            "num_attention_heads": self.num_heads,
            "layer_norm_eps": self.norm_epsilon,
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.attention_dropout,
            "qkv_bias": self.qkv_bias,
        }
        if not self.gated:
            fields["hidden_act"] = published_activation(self.activation)
        fields |= published_labels(self)
        if form.model_type == "vit":
            return fields | {"intermediate_size": self.mlp_width}
        if self.dropout:
            raise PublishedError(f"a DINOv2 with dropout {self.dropout} has no published form: its branches drop none")
        if self.image_size[0] != self.image_size[1]:
            raise PublishedError(f"a DINOv2 with image_size {self.image_size} has no published form: a square one has")
        if self.gated and self.activation != "silu":
            raise PublishedError(f"a gated DINOv2 with activation {self.activation!r} has no published form: silu has")
        fields |= {"mlp_ratio": _mlp_ratio(self), "layerscale_value": self.layer_scale, "use_swiglu_ffn": self.gated}
        if form.model_type == "dinov2":
            return fields | {"use_mask_token": self.mask_token}
        return fields | {"num_register_tokens": self.registers}

    def published_layout(self) -> Layout:
        return _layout(self)


def _vit_fields(fields: Mapping[str, Any], width: int) -> dict[str, Any]:
    require(fields, "ViT", pooler_act="tanh")
    if fields.get("pooler_output_size") not in (None, width):
        require(fields, "ViT", pooler_output_size=width)
    return {
        "image_size": _sides(fields, "image_size", 224),
        "mlp_width": size(fields, "intermediate_size"),
        "activation": activation(fields, "hidden_act", "gelu"),
        "norm_epsilon": number(fields, "layer_norm_eps", 1e-12),
        "dropout": number(fields, "hidden_dropout_prob", 0.0),
    }


def _dino_fields(fields: Mapping[str, Any], width: int, traits: Mapping[str, Any]) -> dict[str, Any]:
    # A dropout of embeddings alone, and whole branches dropped, are not here; no released file asks for them.
    require(fields, "DINOv2", drop_path_rate=0.0, hidden_dropout_prob=0.0)
    image_size = _sides(fields, "image_size", 224)
    if image_size[0] != image_size[1]:
        raise PublishedError(
            f"config.json has image_size {list(image_size)}, and a DINOv2 here has square images alone"
        )
    gated, registers = flag(fields, "use_swiglu_ffn", False), 0
    if traits["registers"]:
        registers = size({"num_register_tokens": 4} | dict(fields), "num_register_tokens")
    ratio = size({"mlp_ratio": 4} | dict(fields), "mlp_ratio")
    return {
        "image_size": image_size,
        "mlp_width": _mlp_width(width, ratio, gated),
        "gated": gated,
        "activation": "silu" if gated else activation(fields, "hidden_act", "gelu"),
        "norm_epsilon": number(fields, "layer_norm_eps", 1e-6),
        "layer_scale": number(fields, "layerscale_value", 1.0),
        "mask_token": traits.get("mask_token") or flag(fields, "use_mask_token", True),
        "registers": registers,
    }


def _mlp_width(width: int, ratio: int, gated: bool) -> int:
    """DINOv2's; gated, two thirds of it, rounded up to a multiple of 8."""
    return (int(width * ratio * 2 / 3) + 7) // 8 * 8 if gated else width * ratio


def _mlp_ratio(config: ViTConfig) -> int:
    for ratio in range(1, 2 * config.mlp_width // config.width + 2):
        if _mlp_width(config.width, ratio, config.gated) == config.mlp_width:
            return ratio
    raise PublishedError(
        f"a DINOv2 with mlp_width {config.mlp_width} has no published form: it follows from a whole ratio to the width"
    )


def _sides(fields: Mapping[str, Any], name: str, default: int) -> tuple[int, int]:
    """(Y, X) of a field that is one number for both, or a list of two."""
    value = fields.get(name, default)
    if not isinstance(value, list):
        return (size({name: value}, name),) * 2
    if len(value) != 2:
        raise PublishedError(f"config.json has {name} {value!r}: the model needs a number there, or two")
    y, x = (size({name: side}, name) for side in value)
    return y, x


def _written(sides: tuple[int, int]) -> int | list[int]:
    return sides[0] if sides[0] == sides[1] else list(sides)


class ViTOutput(NamedTuple):
    """hidden: [B, T, D], after the last normalisation: of the class token, the registers, and the patches row by row.

    pooled: [B, D], or [B, 2 D] of "class_and_mean"; with "pooler" as that leaves it.
    logits: [B, number of labels] float32 with "classification", else None.
    intermediates: where they were asked for. As published, the last of its hidden states are those that leave the last
        block, and `hidden` is what the normalisation makes of them.
    """

    hidden: jax.Array
    pooled: jax.Array
    logits: jax.Array | None
    intermediates: Intermediates | None = None


def vit_block(config: ViTConfig, *, rngs: nnx.Rngs) -> Block:
    """One layer of a ViT."""
    common = {"rngs": rngs, "precision": config.precision, "init": init}
    attention = MultiHeadAttention(
        config.width,
        config.num_heads,
        bias=config.qkv_bias,
        out_bias=True,
        dropout=config.attention_dropout,
        **common,
    )
    feedforward = FeedForward(
        config.width, config.mlp_width, activation=config.activation, gated=config.gated, **common
    )
    norm = partial(LayerNorm, config.width, epsilon=config.norm_epsilon, precision=config.precision)
    scale = None
    if config.layer_scale is not None:
        scale = partial(LayerScale, config.width, config.layer_scale, precision=config.precision)
    return Block(attention, feedforward, norm, branch_scale=scale, dropout=config.dropout)


class ViT(nnx.Module):
    """Images [B, Y, X, C] to hidden states, and to what the config's head makes of them.

    Pixels are as the model was trained on them: published ones are normalised by the mean and deviation that stand in
    the preprocessor_config.json beside the weights. Raises LayerError for images that the model cannot read.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, common = config.width, {"rngs": rngs, "precision": config.precision, "init": init}
        self.tokens = ImageTokens(
            config.image_size,
            config.patch_size,
            config.image_channels,
            width,
            class_tokens=config.class_tokens,
            registers=config.registers,
            mask_token=config.mask_token,
            antialias=config.antialias,
            **common,
        )
        self.stack = Stack(lambda rngs: vit_block(config, rngs=rngs), config.num_layers, remat=config.remat, rngs=rngs)
        self.norm = LayerNorm(width, epsilon=config.norm_epsilon, precision=config.precision)
        pooler = partial(Linear, config.pooled_width, width, axes=("embed", "embed"), **common)
        self.pooler = pooler() if config.head == "pooler" else None
        # Logits are float32.
        common["precision"] = dataclasses.replace(config.precision, compute="float32")
        scores = partial(Linear, config.pooled_width, len(config.labels), axes=("embed", "classes"), **common)
        self.classifier = scores() if config.head == "classification" else None

    def __call__(
        self,
        images: jax.Array,
        *,
        masked: jax.Array | None = None,
        mask: Mask = Mask(),
        key: jax.Array | None = None,
        return_intermediates: bool = False,
    ) -> ViTOutput:
        """What the head says of images [B, Y, X, C].

        masked: [B, patches], true where the mask token stands in for a patch.
        mask: restricts attention, over the class token, the registers and the patches in their order.
        key: for dropout; None drops nothing.
        return_intermediates: also give the hidden states and attention weights of every layer.
        """
        embed_key, stack_key = split(key, 2)
        x = dropout(self.tokens(images, masked), self.config.dropout, embed_key)
        x, _, intermediates = self.stack(x, masks=[mask], key=stack_key, return_intermediates=return_intermediates)
        x = self.norm(x)
        pooled, logits = self._pooled(x), None
        if self.pooler is not None:
            pooled = jnp.tanh(self.pooler(pooled).astype(jnp.float32)).astype(x.dtype)
        if self.classifier is not None:
            logits = self.classifier(pooled)
        return ViTOutput(x, constrain(pooled, "act_batch", "act_embed"), logits, intermediates)

    def _pooled(self, x: jax.Array) -> jax.Array:
        first = x[:, 0]
        if self.config.pool == "class":
            return first
        patches = x[:, self.config.class_tokens + self.config.registers :]
        mean = patches.astype(jnp.float32).mean(1).astype(x.dtype)
        return mean if self.config.pool == "mean" else jnp.concatenate([first, mean], -1)


def _layout(config: ViTConfig) -> Layout:
    form = config.form()
    weights = [
        Weight("embeddings.cls_token", ("tokens.class_tokens",), "1 t d -> t d"),
        Weight("embeddings.position_embeddings", ("tokens.positions.table",), "1 t d -> t d"),
        *linear("embeddings.patch_embeddings.projection", "tokens.patches", "d c y x -> y x c d", "d -> d"),
        *_layer(config, vit=form.model_type == "vit"),
        *norm("layernorm", "norm"),
    ]
    if config.mask_token:
        weights.append(Weight("embeddings.mask_token", ("tokens.mask_token",), "t d -> t d"))
    if config.registers:
        weights.append(Weight("embeddings.register_tokens", ("tokens.registers",), "1 t d -> t d"))
    if config.head == "pooler":
        weights += linear("pooler.dense", "pooler", "e d -> d e", "e -> e")
    weights = [dataclasses.replace(weight, name=form.prefix + weight.name) for weight in weights]
    if config.head == "classification":
        weights += linear("classifier", "classifier", "c d -> d c", "c -> c")
    return Layout(tuple(weights), prefix=form.prefix)


def _layer(config: ViTConfig, *, vit: bool) -> list[Weight]:
    layer, block = "encoder.layer.{}", "stack.blocks.*"
    bias = "(n h) -> n h" if config.qkv_bias else None
    weights = []
    for part in ("query", "key", "value"):
        weights += linear(f"{layer}.attention.attention.{part}", f"{block}.attention.{part}", "(n h) d -> d n h", bias)
    weights += linear(f"{layer}.attention.output.dense", f"{block}.attention.out", "d (n h) -> n h d", "d -> d")
    before, after = ("layernorm_before", "layernorm_after") if vit else ("norm1", "norm2")
    weights += norm(f"{layer}.{before}", f"{block}.attention_norm")
    weights += norm(f"{layer}.{after}", f"{block}.feedforward_norm")
    if config.gated:
        up, down = "mlp.weights_in", "mlp.weights_out"
        gate_and_up = (f"{block}.feedforward.gate", f"{block}.feedforward.up")
        weights += linear(f"{layer}.{up}", gate_and_up, "(part f) d -> part d f", "(part f) -> part f")
    else:
        up, down = ("intermediate.dense", "output.dense") if vit else ("mlp.fc1", "mlp.fc2")
        weights += linear(f"{layer}.{up}", f"{block}.feedforward.up", "f d -> d f", "f -> f")
    weights += linear(f"{layer}.{down}", f"{block}.feedforward.down", "d f -> f d", "d -> d")
    if config.layer_scale is not None:
        for i, branch in enumerate(("attention", "feedforward"), 1):
            name = f"{layer}.layer_scale{i}.lambda1"
            weights.append(Weight(name, (f"{block}.{branch}_scale.scale",), "d -> d"))
    return weights


_IMAGENET = tuple(f"LABEL_{i}" for i in range(1000))
_BASE = ViTConfig()
_SCORES = {"head": "classification", "labels": _IMAGENET}
_DINOV2 = ViTConfig(
    image_size=(518, 518), patch_size=(14, 14), head="none", layer_scale=1.0, mask_token=True, norm_epsilon=1e-6
)
_SIZES = {
    "small": {"width": 384, "num_heads": 6, "mlp_width": 1536},
    "base": {},
    "large": {"num_layers": 24, "width": 1024, "num_heads": 16, "mlp_width": 4096},
    "giant": {"num_layers": 40, "width": 1536, "num_heads": 24, "mlp_width": 4096, "gated": True, "activation": "silu"},
}

PRESETS = {
    "vit-digits": ViTConfig(
        image_size=(8, 8),
        patch_size=(2, 2),
        image_channels=1,
        num_layers=4,
        width=64,
        num_heads=4,
        mlp_width=128,
        head="classification",
        pool="mean",
        labels=tuple("0123456789"),
        norm_epsilon=1e-6,
        dropout=0.1,
    ),
    "vit-small-patch16-224": dataclasses.replace(_BASE, **_SIZES["small"], **_SCORES),
    "vit-base-patch16-224": dataclasses.replace(_BASE, **_SCORES),
    "vit-base-patch16-224-in21k": _BASE,
    "vit-base-patch16-384": dataclasses.replace(_BASE, image_size=(384, 384), **_SCORES),
    "vit-large-patch16-224": dataclasses.replace(_BASE, **_SIZES["large"], **_SCORES),
    "vit-huge-patch14-224-in21k": ViTConfig(
        patch_size=(14, 14), num_layers=32, width=1280, num_heads=16, mlp_width=5120
    ),
    **{f"dinov2-{name}": dataclasses.replace(_DINOV2, **sizes) for name, sizes in _SIZES.items()},
    **{
        f"dinov2-with-registers-{name}": dataclasses.replace(_DINOV2, registers=4, antialias=True, **sizes)
        for name, sizes in _SIZES.items()
    },
}
