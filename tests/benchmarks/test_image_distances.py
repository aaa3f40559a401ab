"""Distances grow as digits get noisier and more blurred, even as a network of random weights sees them."""

import dataclasses
from pathlib import Path

import jax
import pytest
from flax import nnx

from benchmarks.image_distances import BLURS, NOISES, ladder
from zoo import models, sharding
from zoo.train.data.images import ImageData
from zoo.train.feature_network import FeatureNetwork


def test_distances_grow_with_noise_and_with_blur(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAXZOO_CACHE", str(tmp_path))
    config = dataclasses.replace(models.preset("vit-digits"), num_layers=1, width=16, num_heads=2, mlp_width=32)
    model = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    mesh = sharding.make_mesh(None, jax.devices()[:1])
    network = FeatureNetwork("random", model, (8, 8), 1, lambda model, x: model(x).pooled, mesh)
    (_, *start), *rest = ladder(network, ImageData().pixels("train")[:400])
    assert len(rest) == len(NOISES) + len(BLURS)
    for steps in (rest[: len(NOISES)], rest[len(NOISES) :]):
        for figures in ([distance for _, distance, _ in steps], [kernel.value for _, _, kernel in steps]):
            assert figures == sorted(figures)
        assert steps[-1][1] > 2 * start[0] and steps[-1][2].value > 5 * abs(start[1].value)
