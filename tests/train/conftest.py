"""A model and data small enough for every test of the training code."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo import sharding
from zoo.layers.linear import Head, Precision
from zoo.train.experiment import DataInfo, Experiment
from zoo.train.objectives import NextToken

LENGTH, VOCAB = 8, 32


@dataclass(frozen=True)
class TinyConfig:
    width: int = 16
    dropout: float = 0.0
    windows: tuple[int | None, ...] = (None, 3)
    precision: Precision = Precision()

    def build(self, rngs: nnx.Rngs) -> "Tiny":
        return Tiny(self, rngs)

    def forward_flops(self, shape: tuple[int, ...]) -> float:
        return shape[0] * 2.0 * self.width * (8 * self.width + VOCAB)


class Tiny(nnx.Module):
    """A residual layer between an embedding and its transpose."""

    def __init__(self, config: TinyConfig, rngs: nnx.Rngs):
        self.config, width = config, config.width

        def param(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
            dtype = jnp.dtype(config.precision.parameters)
            return nnx.Param(0.1 * jax.random.normal(rngs.params(), shape, dtype), axes=axes)

        self.table = param((VOCAB, width), ("vocab", "embed"))
        self.up = param((width, 4 * width), ("embed", "mlp"))
        self.bias = param((4 * width,), ("mlp",))
        self.down = param((4 * width, width), ("mlp", "embed"))

    def hidden(self, tokens: Any, *, positions: Any, segments: Any, key: Any = None) -> jax.Array:
        x = self.table[...][tokens]
        h = jax.nn.gelu(x @ self.up + self.bias)
        if key is not None and self.config.dropout:
            keep = 1 - self.config.dropout
            h = jnp.where(jax.random.bernoulli(key, keep, h.shape), h / keep, 0)
        h = sharding.constrain(h, "act_batch", "act_length", "act_mlp")
        return sharding.constrain(x + h @ self.down, "act_batch", "act_length", "act_embed")

    def head(self) -> Head:
        return Head(self.table[...].T, VOCAB)


@dataclass(frozen=True)
class TinyDataset:
    batch_size: int
    seed: int
    batches: int = 3
    info: ClassVar[DataInfo] = DataInfo("tiny", "0" * 64, 1, 1)

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        streams = [np.random.default_rng([self.seed, step, row]) for row in rows]
        # Each token follows from the one before: there is something to learn.
        start = np.array([stream.integers(VOCAB) for stream in streams])[:, None]
        tokens = (start + 5 * np.arange(LENGTH + 1)) % VOCAB
        ones = np.ones((len(rows), LENGTH), np.int32)
        return {
            "tokens": tokens[:, :-1].astype(np.int32),
            "targets": tokens[:, 1:].astype(np.int32),
            "segments": ones,
            "positions": np.cumsum(ones, axis=1, dtype=np.int32) - 1,
            "weights": np.stack([stream.random(LENGTH) < 0.9 for stream in streams]).astype(np.float32),
            "bytes": ones,
        }


@dataclass(frozen=True)
class TinyData:
    seed: int = 0
    unit: ClassVar[str] = "tokens"

    def prepare(self) -> None: ...

    def open(self, split: str, *, batch_size: int, seed: int) -> TinyDataset:
        return TinyDataset(batch_size, self.seed + seed + (split == "validation"))

    @property
    def example_shape(self) -> tuple[int, ...]:
        return (LENGTH,)

    def fit(self, model: Any) -> Any:
        return model


@dataclass(frozen=True)
class TinySampler:
    text: str = "a sample"

    def check(self, model: Any, data: Any) -> None: ...

    def sample(self, model: Any, data: Any, key: jax.Array, folder: Path, emit: Any = None) -> str:
        return self.text


@pytest.fixture
def tiny() -> Experiment[TinyConfig, TinyData, NextToken, TinySampler]:
    """An experiment of 12 steps that compiles in about a second."""
    return Experiment(
        "tiny",
        TinyConfig(),
        TinyData(),
        NextToken(),
        TinySampler(),
        steps=12,
        batch_size=16,
        log_every=2,
        eval_every=6,
        checkpoint_every=4,
    )
