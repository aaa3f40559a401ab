"""Weights that are functions of their names, so that no file holds the many that a large network has."""

import zlib
from collections.abc import Mapping

import numpy as np


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 tensor of a network of convolutions and batch normalisations, drawn by the CRC-32 of its name.

    Kernels keep the size of what passes a ReLU (He et al. 2015); normalisations are not those of a new network.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if name.endswith("bn.weight"):
        return rng.uniform(0.8, 1.2, shape).astype(np.float32)
    if len(shape) == 1:
        return 0.1 * rng.standard_normal(shape, np.float32)
    return rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / np.prod(shape[1:])))


def tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {name: tensor(name, shape) for name, shape in shapes.items()}
