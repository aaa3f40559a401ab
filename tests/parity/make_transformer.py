"""Makes tests/parity/transformer/: tiny encoder-decoders of random weights, and what torch's answer with them.

    pip install torch==2.13.0 transformers==5.23.0 && python tests/parity/make_transformer.py

A MarianMTModel, a BartForConditionalGeneration, a bare BartModel, and a torch.nn.Transformer between embeddings. Sizes
are awkward on purpose, biases and norms are random too, and scores spread as a trained model's do. Words that end a
text are likely, so that beams end at different lengths; those that are banned are likelier still.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import transformers
from randomise import randomise
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "transformer"
VOCABULARY, SOURCE, TARGET, NEW = 131, 19, 13, 12
SIZES = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 37,
    "d_model": 28,
    "encoder_layers": 3,
    "encoder_attention_heads": 7,
    "encoder_ffn_dim": 38,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 46,
}
MARIAN = {
    "decoder_start_token_id": 130,
    "pad_token_id": 130,
    "eos_token_id": 0,
    "forced_eos_token_id": 0,
    "activation_function": "swish",
    "scale_embedding": True,
}
CASES = {
    "marian": ("MarianMTModel", MARIAN, {"bad_words_ids": [[130], [7]]}),
    "bart": ("BartForConditionalGeneration", {"activation_dropout": 0.1}, {"forced_bos_token_id": 5}),
    "bart_bare": ("BartModel", {"activation_function": "relu", "scale_embedding": True}, {}),
}
PENALTIES = ((1.0, False), (0.0, False), (2.0, True))
TORCH = {"src_vocab": 71, "tgt_vocab": 83, "d_model": 28, "nhead": 7, "enc_layers": 2, "dec_layers": 3}
TORCH |= {"dim_feedforward": 38, "activation": "relu", "layer_norm_eps": 1e-5, "pad_id": 0, "bos_id": 1}


def build(name: str, fields: dict, rules: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    kind = transformers.MarianConfig if name.startswith("Marian") else transformers.BartConfig
    model = getattr(transformers, name)(kind(**SIZES, **fields, attn_implementation="eager")).eval()
    constants = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    randomise(model)
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if n in constants):
            parameter.copy_(next(value for value in constants.values() if value.shape == parameter.shape))
        if hasattr(model, "final_logits_bias"):
            # Layers that weigh more than words do, lest one word follows itself for ever.
            for parameter in (p for n, p in model.named_parameters() if ".layers." in n and "norm" not in n):
                parameter.mul_(2.0)
            model.model.shared.weight.mul_(0.5)
            model.final_logits_bias.normal_(0.0, 0.3)
            model.final_logits_bias[:, model.config.eos_token_id] += 1.2
            model.final_logits_bias[:, [word for (word,) in rules.get("bad_words_ids", ())]] += 3.0
    return model


def batch(rng: np.random.Generator, source: int, target: int) -> dict[str, np.ndarray]:
    real = np.arange(SOURCE) < np.array([SOURCE, 11, 1])[:, None]
    counted = np.arange(TARGET) < np.array([TARGET, 6, 1])[:, None]
    tokens = rng.integers(1, target, real[:, :TARGET].shape)
    tokens[0, 4] = target - 1
    labels = np.where(counted, rng.integers(1, target, tokens.shape), -100)
    sources = np.where(real, rng.integers(1, source, real.shape), 0)
    return {"sources": sources, "real": real, "tokens": tokens, "counted": counted, "labels": labels}


def generation(model: torch.nn.Module, given: dict[str, np.ndarray], fields: dict) -> dict[str, np.ndarray]:
    """New tokens before the one that ends a text, padded with -1, of greedy and of beam search."""
    arguments = {
        "attention_mask": torch.tensor(given["real"]).long(),
        "max_new_tokens": NEW,
        "do_sample": False,
        **fields,
    }
    sources = torch.tensor(given["sources"])

    def new(found: torch.Tensor) -> np.ndarray:
        made = np.pad(found[:, 1:].numpy(), ((0, 0), (0, 1 + NEW - found.shape[1])), constant_values=-1)
        ended = np.cumsum(made == model.config.eos_token_id, 1) > 0
        return np.where(ended, -1, made)

    found = {"greedy": new(model.generate(sources, **arguments))}
    for penalty, early in PENALTIES:
        out = model.generate(
            sources,
            num_beams=4,
            num_return_sequences=4,
            length_penalty=penalty,
            early_stopping=early,
            return_dict_in_generate=True,
            output_scores=True,
            **arguments,
        )
        name = f"beams_{penalty:g}_{early}"
        found[f"{name}_tokens"] = new(out.sequences).reshape(3, 4, NEW)
        found[f"{name}_scores"] = out.sequences_scores.numpy().reshape(3, 4)
    return found


def published(case: str) -> None:
    name, fields, rules = CASES[case]
    rng = np.random.default_rng(0)
    model, given = build(name, fields, rules), batch(rng, VOCABULARY, VOCABULARY)
    out = model(
        input_ids=torch.tensor(given["sources"]),
        attention_mask=torch.tensor(given["real"]).long(),
        decoder_input_ids=torch.tensor(given["tokens"]),
        output_hidden_states=True,
        output_attentions=True,
        **({} if case == "bart_bare" else {"labels": torch.tensor(given["labels"])}),
    )
    found = {
        "encoder_hidden": torch.stack(out.encoder_hidden_states),
        "encoder_attention": torch.stack(out.encoder_attentions),
        "hidden": torch.stack(out.decoder_hidden_states),
        "attention": torch.stack(out.decoder_attentions),
        "cross_attention": torch.stack(out.cross_attentions),
    }
    if case == "bart_bare":
        given["along"] = rng.standard_normal(out.last_hidden_state.shape).astype(np.float32)
        loss = (out.last_hidden_state * torch.tensor(given["along"]) * torch.tensor(given["counted"])[..., None]).sum()
    else:
        loss, found["logits"] = out.loss, out.logits
    made = {} if case == "bart_bare" else generation(model, given, rules)
    folder = FOLDER / case
    if rules:
        model.generation_config.update(**rules)
    model.save_pretrained(folder)
    write(folder, model, given, found | {"loss": loss}, made)


class TorchTransformer(torch.nn.Module):
    """Embeddings times sqrt(D) and sinusoids, torch.nn.Transformer, and a head with a bias."""

    def __init__(self):
        super().__init__()
        width, length = TORCH["d_model"], SIZES["max_position_embeddings"]
        self.src_emb = torch.nn.Embedding(TORCH["src_vocab"], width, padding_idx=TORCH["pad_id"])
        self.tgt_emb = torch.nn.Embedding(TORCH["tgt_vocab"], width, padding_idx=TORCH["pad_id"])
        self.core = torch.nn.Transformer(
            width,
            TORCH["nhead"],
            TORCH["enc_layers"],
            TORCH["dec_layers"],
            TORCH["dim_feedforward"],
            activation=TORCH["activation"],
            layer_norm_eps=TORCH["layer_norm_eps"],
            batch_first=True,
        )
        self.out = torch.nn.Linear(width, TORCH["tgt_vocab"])
        angles = np.arange(length)[:, None] / 10000 ** (np.arange(0, width, 2) / width)
        self.sinusoids = torch.tensor(np.stack([np.sin(angles), np.cos(angles)], -1).reshape(length, width)).float()

    def enter(self, embed: torch.nn.Embedding, tokens: torch.Tensor) -> torch.Tensor:
        return embed(tokens) * math.sqrt(TORCH["d_model"]) + self.sinusoids[: tokens.shape[1]]

    def forward(self, sources: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits, and the states that leave the decoder and the encoder."""
        pads, future = sources == TORCH["pad_id"], torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()
        memory = self.core.encoder(self.enter(self.src_emb, sources), src_key_padding_mask=pads)
        hidden = self.core.decoder(
            self.enter(self.tgt_emb, tokens), memory, tgt_mask=future, memory_key_padding_mask=pads
        )
        return self.out(hidden), hidden, memory


def torch_transformer() -> None:
    torch.manual_seed(0)
    # Fused inference paths give padding other values, and no gradient.
    torch.backends.mha.set_fastpath_enabled(False)
    model = randomise(TorchTransformer().eval())
    given = batch(np.random.default_rng(0), TORCH["src_vocab"], TORCH["tgt_vocab"])
    sources, tokens, labels = (torch.tensor(given[name]) for name in ("sources", "tokens", "labels"))
    logits, hidden, memory = model(sources, tokens)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    made = torch.full((len(sources), 1), TORCH["bos_id"])
    with torch.no_grad():
        for _ in range(NEW):
            made = torch.cat([made, model(sources, made)[0][:, -1].argmax(-1, keepdim=True)], 1)
    folder = FOLDER / "torch"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TORCH, indent=1) + "\n")
    save_file(model.state_dict(), folder / "model.safetensors")
    found = {"logits": logits, "last": hidden, "memory": memory, "loss": loss}
    write(folder, model, given, found, {"greedy": made[:, 1:].numpy()})


def write(folder: Path, model: torch.nn.Module, given: dict, found: dict[str, torch.Tensor], made: dict) -> None:
    found["loss"].backward()
    norms = {path: float(p.grad.norm()) for path, p in model.named_parameters() if p.grad is not None}
    (folder / "gradients.json").write_text(json.dumps(norms, indent=1) + "\n")
    outputs = {f"out_{name}": x.detach().numpy() for name, x in found.items()}
    np.savez_compressed(folder / "golden.npz", **given, **made, **outputs)


if __name__ == "__main__":
    for one in CASES:
        published(one)
    torch_transformer()
