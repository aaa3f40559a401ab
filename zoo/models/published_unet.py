"""Published U-Nets, diffusers' UNet2DModel and UNet2DConditionModel: what their configs say, and their tensors' names.

Of the many variants that a config can ask for, those here are the ones of DDPM and of Stable Diffusion 1 and 2.
"""

from collections.abc import Mapping
from typing import Any

from zoo.models.published import Layout, PublishedError, Weight, flag, linear, norm, number, require, size

PLAIN, CONDITIONAL = "UNet2DModel", "UNet2DConditionModel"

MEANT = {
    "act_fn": "silu",
    "center_input_sample": False,
    "class_embed_type": None,
    "mid_block_scale_factor": 1,
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
}
"""Fields that say how a U-Net computes, and the one value that each has here."""

MEANT_BY = {
    PLAIN: MEANT
    | {
        "add_attention": True,
        "attn_norm_num_groups": None,
        "downsample_type": "conv",
        "mid_block_type": "UNetMidBlock2D",
        "upsample_type": "conv",
    },
    CONDITIONAL: MEANT
    | {
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "attention_type": "default",
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "mid_block_only_cross_attention": None,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "num_attention_heads": None,
        "only_cross_attention": False,
        "projection_class_embeddings_input_dim": None,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "reverse_transformer_layers_per_block": None,
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "transformer_layers_per_block": 1,
    },
}

UNREAD = {PLAIN: {"num_train_timesteps": None}, CONDITIONAL: {"addition_embed_type_num_heads": 64}}
"""Fields of variants that are not here, which say nothing without them."""

LEFT_OUT = {"attention_head_dim": 8, "downsample_padding": 1, "layers_per_block": 2, "norm_num_groups": 32}
"""What diffusers takes where a file leaves a field out."""

LEFT_OUT_BY = {
    PLAIN: LEFT_OUT
    | {
        "block_out_channels": [224, 448, 672, 896],
        "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
        "in_channels": 3,
        "out_channels": 3,
        "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    },
    CONDITIONAL: LEFT_OUT
    | {
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 1280,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "in_channels": 4,
        "out_channels": 4,
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    },
}

OLD_NAMES = {
    f".{old}.{kind}": f".{new}.{kind}"
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
    for kind in ("weight", "bias")
}
"""How names of attention's tensors ended in older files, and how they end now."""

NULL_CLASS = "_null_class"
"""A field of ours: which class stands for none. diffusers passes over fields that begin so, and keeps them."""

ATTENDING = {PLAIN: "Attn", CONDITIONAL: "CrossAttn"}
"""What the names of levels with attention begin with."""


def own_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a UNetConfig, from those of a published config.json."""
    name = fields.get("_class_name")
    if name not in MEANT_BY:
        raise PublishedError(f"config.json has _class_name {name!r}, and a U-Net here is one of {', '.join(MEANT_BY)}")
    require(fields, name, **MEANT_BY[name])
    fields = LEFT_OUT_BY[name] | dict(fields)
    channels = _numbers(fields, "block_out_channels")
    levels = _attention_levels(fields, name, len(channels))
    padding = fields["downsample_padding"]
    if padding not in (0, 1) or isinstance(padding, bool):
        raise PublishedError(f"config.json has downsample_padding {padding!r}, and a {name} here has 0 or 1")
    own = {
        "image_channels": size(fields, "in_channels"),
        "out_channels": size(fields, "out_channels"),
        "image_size": _image_size(fields),
        "channels": channels,
        "blocks_per_level": size(fields, "layers_per_block"),
        "attention_levels": levels,
        **_classes(fields),
        "groups": size(fields, "norm_num_groups"),
        "epsilon": number(fields, "norm_eps", 1e-5),
        "downsample_padding": (1, 1) if padding else (0, 1),
        "cosines_first": flag(fields, "flip_sin_to_cos", True),
        "frequency_shift": _shift(fields, channels[0]),
        "dropout": number(fields, "dropout", 0.0),
    }
    if own["out_channels"] == own["image_channels"]:
        own["out_channels"] = None
    if name == PLAIN:
        return own | {"num_heads": _heads_of_size(fields, channels, levels)}
    # The number of heads, whatever it is called.
    several = isinstance(fields["attention_head_dim"], list)
    return own | {
        "num_heads": (_numbers if several else size)(fields, "attention_head_dim"),
        "context_width": size(fields, "cross_attention_dim"),
        "linear_projections": flag(fields, "use_linear_projection", False),
        "upcast_attention": flag(fields, "upcast_attention", False),
    }


def published_fields(config: Any) -> dict[str, Any]:
    """The fields of config.json, from a UNetConfig."""
    name = PLAIN if config.context_width is None else CONDITIONAL
    levels, size = range(len(config.channels)), config.image_size
    attending = [ATTENDING[name] if level in config.attention_levels else "" for level in levels]
    fields = {
        "_class_name": name,
        **MEANT_BY[name],
        **UNREAD[name],
        "block_out_channels": list(config.channels),
        "down_block_types": [f"{which}DownBlock2D" for which in attending],
        "downsample_padding": config.downsample_padding[0],
        "dropout": config.dropout,
        "flip_sin_to_cos": config.cosines_first,
        "freq_shift": config.frequency_shift,
        "in_channels": config.image_channels,
        "layers_per_block": config.blocks_per_level,
        "norm_eps": config.epsilon,
        "norm_num_groups": config.groups,
        "num_class_embeds": config.class_vectors,
        "out_channels": config.predicted_channels,
        "sample_size": size if size is None else size[0] if size[0] == size[1] else list(size),
        "up_block_types": [f"{which}UpBlock2D" for which in reversed(attending)],
    }
    if config.null_class:
        fields[NULL_CLASS] = config.num_classes
    if name == PLAIN:
        return fields | {"attention_head_dim": _head_size(config)}
    return fields | {
        "attention_head_dim": config.num_heads if isinstance(config.num_heads, int) else list(config.num_heads),
        "cross_attention_dim": config.context_width,
        "upcast_attention": config.upcast_attention,
        "use_linear_projection": config.linear_projections,
    }


def _classes(fields: Mapping[str, Any]) -> dict[str, Any]:
    vectors, none = size(fields, "num_class_embeds", optional=True), fields.get(NULL_CLASS)
    if none is None:
        return {"num_classes": vectors}
    if vectors is None or vectors < 2 or isinstance(none, bool) or none != vectors - 1:
        raise PublishedError(
            f"config.json has {NULL_CLASS} {none!r} and num_class_embeds {vectors}: the class for none is the last"
        )
    return {"num_classes": vectors - 1, "null_class": True}


def _numbers(fields: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """A field that is a list of whole numbers from 1."""
    values = fields[name]
    if not isinstance(values, list) or not values:
        raise PublishedError(f"config.json has {name} {values!r}: the model needs a list of whole numbers there")
    return tuple(size({name: value}, name) for value in values)


def _attention_levels(fields: Mapping[str, Any], name: str, levels: int) -> tuple[int, ...]:
    """The levels with attention, which a U-Net here has on the way down and on the way up alike."""
    attends = {}
    for way in ("Down", "Up"):
        field, known = f"{way.lower()}_block_types", (f"{way}Block2D", f"{ATTENDING[name]}{way}Block2D")
        types = fields[field]
        if not isinstance(types, list) or len(types) != levels or any(kind not in known for kind in types):
            raise PublishedError(
                f"config.json has {field} {types!r}: the {levels} levels of a {name} here are each one of "
                f"{' and '.join(known)}"
            )
        attends[way] = [kind == known[1] for kind in types]
    if attends["Down"] != attends["Up"][::-1]:
        raise PublishedError(
            f"config.json has up_block_types {fields['up_block_types']!r}, and a {name} here has attention at the "
            f"levels of down_block_types {fields['down_block_types']!r}, in the other order"
        )
    return tuple(level for level, attend in enumerate(attends["Down"]) if attend)


def _image_size(fields: Mapping[str, Any]) -> tuple[int, int] | None:
    value = fields.get("sample_size")
    if value is None:
        return None
    sides = _numbers(fields, "sample_size") if isinstance(value, list) else (size(fields, "sample_size"),) * 2
    if len(sides) != 2:
        raise PublishedError(f"config.json has sample_size {value!r}: the model needs a number there, or two")
    return sides[0], sides[1]


def _shift(fields: Mapping[str, Any], channels: int) -> int:
    value = fields.get("freq_shift", 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < channels // 2:
        raise PublishedError(f"config.json has freq_shift {value!r}: the model needs 0, 1 or what leaves frequencies")
    return value


def _heads_of_size(
    fields: Mapping[str, Any], channels: tuple[int, ...], levels: tuple[int, ...]
) -> int | tuple[int, ...]:
    """Heads from their size, which in a UNet2DModel `attention_head_dim` is; without one there is one head."""
    if fields["attention_head_dim"] is None:
        return 1
    head = size(fields, "attention_head_dim")
    for level in (*levels, len(channels) - 1):
        if channels[level] % head:
            raise PublishedError(
                f"config.json has attention_head_dim {head}, which does not divide the {channels[level]} channels of "
                f"level {level}"
            )
    return tuple(max(1, c // head) for c in channels)


def _head_size(config: Any) -> int | None:
    if config.num_heads == 1:
        return None
    levels = sorted({*config.attention_levels, len(config.channels) - 1})
    sizes = {config.channels[level] // config.heads[level] for level in levels}
    if len(sizes) > 1:
        told = ", ".join(f"{config.heads[level]} of {config.channels[level]} channels" for level in levels)
        raise PublishedError(f"a U-Net with heads {told} has no published form: a {PLAIN}'s are all of one size")
    return sizes.pop()


def layout(config: Any) -> Layout:
    """The names of the tensors of a UNetConfig's network."""
    channels, last = config.channels, len(config.channels) - 1
    weights = [
        *linear("time_embedding.linear_1", "time.expand", "o i -> i o", "o -> o"),
        *linear("time_embedding.linear_2", "time.mix", "o i -> i o", "o -> o"),
        *_conv("conv_in", "conv_in"),
        *norm("conv_norm_out", "norm_out"),
        *_conv("conv_out", "conv_out"),
        *_residual("mid_block.resnets.0", "middle_in", shortcut=False),
        *_attention(config, "mid_block.attentions.0", "middle_attention"),
        *_residual("mid_block.resnets.1", "middle_out", shortcut=False),
    ]
    if config.class_vectors is not None:
        weights.append(Weight("class_embedding.weight", ("classes.embed.table",), "v d -> v d"))

    def level_weights(name: str, module: str, level: int, inputs: list[int]) -> None:
        for i, c in enumerate(inputs):
            weights.extend(_residual(f"{name}.resnets.{i}", f"{module}.blocks.{i}", shortcut=c != channels[level]))
            if level in config.attention_levels:
                weights.extend(_attention(config, f"{name}.attentions.{i}", f"{module}.attentions.{i}"))

    for level in range(last + 1):
        down, up = f"down_blocks.{level}", f"up_blocks.{last - level}"
        level_weights(down, f"down.{level}", level, config.down_inputs(level))
        level_weights(up, f"up.{level}", level, config.up_inputs(level))
        if level < last:
            weights += _conv(f"{down}.downsamplers.0.conv", f"downsamples.{level}.conv")
        if level:
            weights += _conv(f"{up}.upsamplers.0.conv", f"upsamples.{level - 1}.conv")
    return Layout(tuple(weights), renamed=OLD_NAMES, stem="diffusion_pytorch_model")


def _conv(name: str, module: str) -> tuple[Weight, ...]:
    return linear(name, module, "o i y x -> y x i o", "o -> o")


def _residual(name: str, module: str, *, shortcut: bool) -> tuple[Weight, ...]:
    weights = (
        *norm(f"{name}.norm1", f"{module}.norm_in"),
        *_conv(f"{name}.conv1", f"{module}.conv_in"),
        *linear(f"{name}.time_emb_proj", f"{module}.time", "o i -> i o", "o -> o"),
        *norm(f"{name}.norm2", f"{module}.norm_out"),
        *_conv(f"{name}.conv2", f"{module}.conv_out"),
    )
    if not shortcut:
        return weights
    return (*weights, *linear(f"{name}.conv_shortcut", f"{module}.shortcut", "o i 1 1 -> i o", "o -> o"))


def _attention(config: Any, name: str, module: str) -> tuple[Weight, ...]:
    """Those of attention among pixels, or of the transformer block in its place."""
    if config.context_width is None:
        return (*norm(f"{name}.group_norm", f"{module}.norm"), *_heads(name, f"{module}.attention", "(n h) -> n h"))
    projection = "o i -> i o" if config.linear_projections else "o i 1 1 -> i o"
    block, ours = f"{name}.transformer_blocks.0", f"{module}.block"
    feedforward = (f"{ours}.feedforward.up", f"{ours}.feedforward.gate")
    return (
        *norm(f"{name}.norm", f"{module}.norm"),
        *linear(f"{name}.proj_in", f"{module}.project_in", projection, "o -> o"),
        *norm(f"{block}.norm1", f"{ours}.attention_norm"),
        *_heads(f"{block}.attn1", f"{ours}.attention"),
        *norm(f"{block}.norm2", f"{ours}.cross_norm"),
        *_heads(f"{block}.attn2", f"{ours}.cross_attention"),
        *norm(f"{block}.norm3", f"{ours}.feedforward_norm"),
        *linear(f"{block}.ff.net.0.proj", feedforward, "(part f) d -> part d f", "(part f) -> part f"),
        *linear(f"{block}.ff.net.2", f"{ours}.feedforward.down", "d f -> f d", "d -> d"),
        *linear(f"{name}.proj_out", f"{module}.project_out", projection, "o -> o"),
    )


def _heads(name: str, module: str, bias: str | None = None) -> tuple[Weight, ...]:
    """bias: the layout of those of queries, keys and values; None: there are none."""
    weights = [
        *linear(f"{name}.to_q", f"{module}.query", "(n h) d -> d n h", bias),
        *linear(f"{name}.to_k", f"{module}.key", "(n h) d -> d n h", bias),
        *linear(f"{name}.to_v", f"{module}.value", "(n h) d -> d n h", bias),
        *linear(f"{name}.to_out.0", f"{module}.out", "d (n h) -> n h d", "d -> d"),
    ]
    return tuple(weights)
