"""Makes tests/parity/{llama,mistral,qwen2,qwen3,...}/: tiny models of random weights, and what Hugging Face's answer.

    pip install torch==2.13.0 transformers==5.23.0 && python tests/parity/make_llama.py

Sizes are awkward on purpose, biases and norms are random too, and logits spread as a trained model's do. Between them
they have all that the published classes differ by: biases with and without one on the output projection, windows in all
and in every other layer, norms of queries and keys, heads tied and untied, and rotary frequencies as they are, divided,
and scaled by wavelength; smaller ones have them scaled as in YaRN and dynamically.
"""

from pathlib import Path

import numpy as np
import torch
from randomise import randomise
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

FOLDER = Path(__file__).parent
COMMON = {
    "vocab_size": 211,
    "hidden_size": 36,
    "intermediate_size": 50,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "beta_fast": 6.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 16,
}
SMALL = COMMON | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
CASES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        **COMMON,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=20,
        attention_bias=True,
        rms_norm_eps=1e-5,
        rope_parameters=LLAMA3,
    ),
    "mistral": MistralConfig(
        **COMMON, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3, sliding_window=7
    ),
    "qwen2": Qwen2Config(
        **COMMON,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention"] * 2,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e6, "factor": 2.5},
    ),
    "qwen3": Qwen3Config(
        **COMMON,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=14,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "llama_dynamic": LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.5}),
    "qwen3_yarn": Qwen3Config(**SMALL, head_dim=22, rope_parameters=YARN),
    "qwen2_yarn": Qwen2Config(
        **SMALL,
        rope_parameters=YARN | {"rope_theta": 300.0, "attention_factor": 1.3, "truncate": False},
    ),
}


def build(config: PreTrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    return randomise(model)


def make(name: str, config: PreTrainedConfig) -> None:
    model = build(config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (3, 28))
    mask = np.arange(28)[None] < np.array([28, 17, 2])[:, None]
    prompts = rng.integers(0, config.vocab_size, (2, 9))
    inputs = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
    result = model(**inputs, labels=torch.tensor(np.where(mask, tokens, -100)))
    result.loss.backward()
    gradients = {name: float(p.grad.double().norm()) for name, p in model.named_parameters()}
    with torch.no_grad():
        greedy = model.generate(
            torch.tensor(prompts), attention_mask=torch.ones(2, 9), max_new_tokens=20, do_sample=False, pad_token_id=0
        )
    model.save_pretrained(FOLDER / name)
    (FOLDER / name / "generation_config.json").unlink()
    np.savez_compressed(
        FOLDER / name / "golden.npz",
        tokens=tokens.astype(np.int32),
        mask=mask,
        logits=result.logits.detach().numpy(),
        loss=result.loss.detach().numpy(),
        gradient_names=np.array(list(gradients)),
        gradient_norms=np.array(list(gradients.values())),
        frequencies=model.model.rotary_emb.inv_freq.numpy(),
        prompts=prompts.astype(np.int32),
        greedy=greedy[:, 9:].numpy().astype(np.int32),
    )


if __name__ == "__main__":
    for case, config in CASES.items():
        make(case, config)
