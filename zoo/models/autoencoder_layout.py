"""How the tensors of published KL autoencoders are named and laid out."""

from typing import Any

from zoo.models.published import Layout, Weight, linear, norm


def entering(channels: tuple[int, ...]) -> tuple[int, ...]:
    """Channels that enter each level, in the order in which the levels are gone through."""
    return (channels[0], *channels[:-1])


def layout(config: Any) -> Layout:
    """The names of the tensors of diffusers' AutoencoderKL; older files have other ones for attention's.

    config: an AutoencoderConfig.
    """
    channels, weights = config.channels, []
    sides = (
        ("encoder", "down", channels, config.blocks_per_level),
        ("decoder", "up", channels[::-1], config.blocks_per_level + 1),
    )
    for side, way, order, blocks in sides:
        weights += _conv(f"{side}.conv_in", f"{side}.conv_in")
        for i, (inputs, outputs) in enumerate(zip(entering(order), order, strict=True)):
            name, level = f"{side}.{way}_blocks.{i}", f"{side}.levels.{i}"
            for j in range(blocks):
                changes = j == 0 and inputs != outputs
                weights += _block(f"{name}.resnets.{j}", f"{level}.blocks.{j}", shortcut=changes)
            if i < len(order) - 1:
                weights += _conv(f"{name}.{way}samplers.0.conv", f"{level}.resample.conv")
        weights += _block(f"{side}.mid_block.resnets.0", f"{side}.middle.block_in")
        weights += _block(f"{side}.mid_block.resnets.1", f"{side}.middle.block_out")
        if config.middle_attention:
            weights += _attention(f"{side}.mid_block.attentions.0", f"{side}.middle.attention")
        weights += norm(f"{side}.conv_norm_out", f"{side}.norm_out")
        weights += _conv(f"{side}.conv_out", f"{side}.conv_out")
    if config.moment_map:
        weights += _pixelwise("quant_conv", "moment_map")
    if config.latent_map:
        weights += _pixelwise("post_quant_conv", "latent_map")
    older = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    renamed = {
        f"attentions.0.{old}.{kind}": f"attentions.0.{new}.{kind}"
        for old, new in older.items()
        for kind in ("weight", "bias")
    }
    return Layout(tuple(weights), renamed=renamed, stem="diffusion_pytorch_model")


def _conv(name: str, module: str) -> tuple[Weight, ...]:
    return linear(name, module, "o i y x -> y x i o", "o -> o")


def _pixelwise(name: str, module: str) -> tuple[Weight, ...]:
    return linear(name, module, "o i 1 1 -> i o", "o -> o")


def _block(name: str, block: str, *, shortcut: bool = False) -> list[Weight]:
    weights = [*norm(f"{name}.norm1", f"{block}.norm_in"), *_conv(f"{name}.conv1", f"{block}.conv_in")]
    weights += [*norm(f"{name}.norm2", f"{block}.norm_out"), *_conv(f"{name}.conv2", f"{block}.conv_out")]
    return [*weights, *_pixelwise(f"{name}.conv_shortcut", f"{block}.shortcut")] if shortcut else weights


def _attention(name: str, module: str) -> list[Weight]:
    weights = list(norm(f"{name}.group_norm", f"{module}.norm"))
    for part, ours in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
        weights += linear(f"{name}.{part}", f"{module}.attention.{ours}", "(n h) d -> d n h", "(n h) -> n h")
    return [*weights, *linear(f"{name}.to_out.0", f"{module}.attention.out", "d (n h) -> n h d", "d -> d")]
