"""For each published model_type: a preset of its size, what it is trained for, and random batches of that."""

import dataclasses
from typing import Any

import numpy as np

from zoo import models
from zoo.train.objectives import Classification, MaskedLM, NextToken, PermutationLM, SequenceToSequence

PRESETS = {
    "bart": "bart-base",
    "bert": "bert-base-uncased",
    "dinov2": "dinov2-small",
    "dinov2_with_registers": "dinov2-with-registers-small",
    "gpt2": "gpt2",
    "llama": "llama-3.2-1b",
    "marian": "opus-mt-en-de",
    "mistral": "mistral-7b-v0.3",
    "mt5": "mt5-small",
    "qwen2": "qwen2.5-0.5b",
    "qwen3": "qwen3-0.6b",
    "t5": "t5-small",
    "vit": "vit-base-patch16-224",
    "xlnet": "xlnet-base-cased",
}
"""A preset of published size for each model_type."""


IMAGES_A_ROW = 8
"""Images that a batch has for each row of text: of 224 x 224 in patches of 16 they are 1576 tokens."""

LAYERS_SIZE = 128e6
"""Parameters that all layers may have together on a CPU: half as many again as those of GPT-2 124M or BERT base.
Vocabularies come on top, and both sides of a comparison at once hold 16 bytes for each parameter."""


def undropped(config: Any) -> Any:
    """A config without dropout."""
    rates = [field.name for field in dataclasses.fields(config) if field.name.endswith("dropout")]
    return dataclasses.replace(config, **dict.fromkeys(rates, 0.0))


def cut(config: Any) -> Any:
    """A config with as many of its layers as LAYERS_SIZE holds, and at least one."""
    one, two = (models.parameter_count(dataclasses.replace(config, num_layers=count)) for count in (1, 2))
    return dataclasses.replace(config, num_layers=min(config.num_layers, max(1, int(LAYERS_SIZE // (two - one)))))


def task(kind: str, config: Any) -> tuple[Any, Any]:
    """The config with the head that a model_type is trained with, and the objective that trains it."""
    if kind == "bert":
        return dataclasses.replace(config, head="pretraining"), MaskedLM()
    if kind == "xlnet":
        return dataclasses.replace(config, head="lm"), PermutationLM()
    if kind in ("vit", "dinov2", "dinov2_with_registers"):
        # As published, a DINOv2's classes are scored from the class token's state and the mean of the patches'.
        pool = "class" if kind == "vit" else "class_and_mean"
        labels = tuple(map(str, range(1000)))
        return dataclasses.replace(config, head="classification", pool=pool, labels=labels), Classification()
    if kind in ("bart", "marian", "mt5", "t5"):
        return config, SequenceToSequence()
    return config, NextToken()


def batch(objective: Any, config: Any, rows: int, length: int) -> dict[str, np.ndarray]:
    """Random inputs of one step, by the names that the objective reads; nothing pads.

    Texts are rows of `length` tokens: BERT predicts 15 % of them, XLNet a sixth, and what is written of a source is a
    fourth as long. Of images there are IMAGES_A_ROW for each row.
    """
    draw = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return draw.integers(1000, min(30000, config.vocab_size), (rows, count), dtype=np.int32)

    def places(count: int) -> np.ndarray:
        every = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
        return np.sort(draw.permuted(every, axis=1)[:, :count], axis=1)

    if isinstance(objective, Classification):
        count = rows * IMAGES_A_ROW
        images = draw.uniform(-1, 1, (count, *config.image_size, config.image_channels)).astype(np.float32)
        labels = draw.integers(len(config.labels), size=count, dtype=np.int32)
        return {"images": images, "labels": labels, "weights": np.ones(count, np.float32)}
    made = {"tokens": tokens(length)}
    # The second half of a row is another text.
    halves = np.tile(np.arange(length, dtype=np.int32) * 2 // length, (rows, 1))
    if isinstance(objective, MaskedLM):
        made |= {"token_types": halves, "places": places(round(0.15 * length))}
        made |= {"targets": tokens(made["places"].shape[1]), "segments": np.ones_like(halves)}
        made["next_sentence"] = draw.integers(2, size=rows, dtype=np.int32)
    elif isinstance(objective, PermutationLM):
        predicted, order = places(max(1, length // 6)), np.zeros_like(halves)
        when = draw.permuted(np.tile(np.arange(1, predicted.shape[1] + 1), (rows, 1)), axis=1)
        np.put_along_axis(order, predicted, when, axis=1)
        made |= {"token_types": halves, "places": predicted, "order": order}
        made["targets"] = np.take_along_axis(made["tokens"], predicted, axis=1)
    elif isinstance(objective, SequenceToSequence):
        made = {"sources": made["tokens"], "tokens": tokens(length // 4), "targets": tokens(length // 4)}
    else:
        text = tokens(length + 1)
        ones = np.ones_like(halves)
        made = {"tokens": text[:, :-1], "targets": text[:, 1:], "segments": ones, "bytes": ones}
        made["positions"] = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return made | {"weights": np.ones(made["targets"].shape, np.float32)}
