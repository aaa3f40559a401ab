"""How outputs, gradients and files are compared with those of the golden folders."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.pretrained import gathered, groups


def assert_close(found: Any, expected: Any, name: str) -> None:
    """To 2e-5 of the largest value, or of 1."""
    assert np.shape(found) == np.shape(expected), name
    atol = 2e-5 * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=atol, err_msg=name)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Bit for bit, tensor by tensor."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].tobytes() == value.tobytes(), name


def gradient_norms(gradient: Any, layout: Any = None) -> dict[str, float]:
    """L2 norms by the names of the published tensors."""
    return {
        tensor.name: float(np.linalg.norm(gathered(group, tensor)))
        for group in groups(gradient, (layout or gradient.config.published_layout()).weights)
        for tensor in group.tensors
    }


def assert_gradients_close(gradient: Any, folder: Path) -> None:
    """Norms of a model's gradient and those of the folder's gradients.json."""
    found, expected = gradient_norms(gradient), json.loads((folder / "gradients.json").read_text())
    assert found.keys() == expected.keys()
    for name, norm in expected.items():
        assert_close(found[name], norm, name)


def cross_entropy(logits: jax.Array, labels: np.ndarray, ignored: int = -100) -> jax.Array:
    """The mean over labels that are not `ignored`, as torch has it."""
    counted = labels != ignored
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.where(counted, labels, 0)[..., None], -1)[..., 0]
    return -jnp.sum(jnp.where(counted, picked, 0)) / counted.sum()
