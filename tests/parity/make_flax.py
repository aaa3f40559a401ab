"""Writes tests/parity/flax: tiny random checkpoints of the Flax classes that transformers had until version 5.

    pip install transformers==4.48.3 flax==0.10.2 jax==0.4.38 jaxlib==0.4.38
    python tests/parity/make_flax.py

Each folder has what `save_pretrained` wrote, flax_model.msgpack in particular, and golden.npz: tokens, and logits or
final states.
"""

from pathlib import Path

import jax
import numpy as np
import transformers

FOLDER = Path(__file__).parent / "flax"
TOKENS = np.random.default_rng(5).integers(3, 97, (2, 11), dtype=np.int32)


def models() -> dict[str, transformers.FlaxPreTrainedModel]:
    bert = transformers.BertConfig(
        vocab_size=97,
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=5,
        intermediate_size=28,
        max_position_embeddings=24,
        num_labels=3,
    )
    gpt2 = transformers.GPT2Config(
        vocab_size=97, n_positions=24, n_embd=20, n_layer=2, n_head=5, bos_token_id=1, eos_token_id=2
    )
    sizes = {"vocab_size": 97, "d_model": 20, "d_kv": 6, "d_ff": 28, "num_layers": 2, "num_heads": 3}
    t5 = transformers.T5Config(**sizes)
    t5_v1_1 = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    return {
        "bert_none": transformers.FlaxBertModel(bert),
        "bert_pretraining": transformers.FlaxBertForPreTraining(bert),
        "bert_classification": transformers.FlaxBertForSequenceClassification(bert),
        "gpt2": transformers.FlaxGPT2LMHeadModel(gpt2),
        "gpt2_none": transformers.FlaxGPT2Model(gpt2),
        "t5": transformers.FlaxT5ForConditionalGeneration(t5),
        "t5_none": transformers.FlaxT5Model(t5),
        "t5_encoder": transformers.FlaxT5EncoderModel(t5),
        "t5_v1_1": transformers.FlaxT5ForConditionalGeneration(t5_v1_1),
    }


def randomised(params: dict) -> dict:
    """Scales and biases too, which are all alike at first."""
    leaves, tree = jax.tree.flatten(params)
    draw = np.random.default_rng(7)
    drawn = [np.asarray(leaf + 0.1 * draw.standard_normal(leaf.shape), np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, drawn)


def main() -> None:
    for name, model in models().items():
        model.params = randomised(model.params)
        decodes = model.config.is_encoder_decoder and name != "t5_encoder"
        decoder = {"decoder_input_ids": TOKENS[:, :5]} if decodes else {}
        out = model(TOKENS, **decoder)
        given = ("logits", "prediction_logits", "last_hidden_state")
        found = next(out[one] for one in given if one in out)
        model.save_pretrained(FOLDER / name)
        np.savez(FOLDER / name / "golden.npz", tokens=TOKENS, found=np.asarray(found))


if __name__ == "__main__":
    main()
