"""How the tensors of published Marians and BARTs are named and laid out."""

from typing import Any

from zoo.models.encoder_decoder_heads import classifier_weights
from zoo.models.published import Layout, Weight, linear, norm


def layout(config: Any) -> Layout:
    """The names of Marian's and BART's tensors; the bare BART's leave out that they are of a `model`.

    config: a TransformerConfig.
    """
    prefix = "model." if config.logits_bias or config.head != "lm" else ""

    def attention(name: str, module: str) -> tuple[Weight, ...]:
        into = [
            linear(f"{name}.{short}_proj", f"{module}.{part}", "(n h) d -> d n h", "(n h) -> n h")
            for short, part in (("k", "key"), ("v", "value"), ("q", "query"))
        ]
        out = linear(f"{name}.out_proj", f"{module}.out", "d (n h) -> n h d", "d -> d")
        return (*(weight for one in into for weight in one), *out)

    def stack(name: str, side: str) -> tuple[Weight, ...]:
        layer, block, weights = f"{prefix}{name}.layers.{{}}", f"{name}.blocks.*", ()
        if config.positions == "learned":
            table = f"{prefix}{name}.embed_positions.weight"
            weights += (Weight(table, (f"{side}.positions.table",), "t d -> t d"),)
        if config.embed_norm:
            weights += norm(f"{prefix}{name}.layernorm_embedding", f"{side}.embed_norm")
        if name == "decoder":
            weights += attention(f"{layer}.encoder_attn", f"{block}.cross_attention")
            weights += norm(f"{layer}.encoder_attn_layer_norm", f"{block}.cross_norm")
        return (
            *weights,
            *attention(f"{layer}.self_attn", f"{block}.attention"),
            *norm(f"{layer}.self_attn_layer_norm", f"{block}.attention_norm"),
            *linear(f"{layer}.fc1", f"{block}.feedforward.up", "f d -> d f", "f -> f"),
            *linear(f"{layer}.fc2", f"{block}.feedforward.down", "d f -> f d", "d -> d"),
            *norm(f"{layer}.final_layer_norm", f"{block}.feedforward_norm"),
        )

    shared = f"{prefix}shared.weight"
    weights = (Weight(shared, ("embed.table",), "v d -> v d"), *stack("encoder", "source"), *stack("decoder", "target"))
    if config.logits_bias:
        weights += (Weight("final_logits_bias", ("words.bias",), "1 v -> v"),)
    copies = (f"{prefix}encoder.embed_tokens.weight", f"{prefix}decoder.embed_tokens.weight", "lm_head.weight")
    constants = r"(encoder|decoder)\.version"
    if config.positions != "learned":
        constants += r"|(encoder|decoder)\.embed_positions\.weight"
    if config.head != "lm":
        constants += "|final_logits_bias"  # Of a file that was pretrained to score words.
    weights += classifier_weights(config.head)
    return Layout(weights, prefix, tied=dict.fromkeys(copies, shared), ignored=(rf"(model\.)?({constants})",))
