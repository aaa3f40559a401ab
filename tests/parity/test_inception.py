"""Inception-v3 against pytorch-fid's, from the golden file that make_inception.py wrote; and what is no such file."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_name import tensors
from comparing import assert_close
from safetensors.numpy import save_file

from zoo.layers.linear import LayerError
from zoo.models.inception import Inception, InceptionConfig
from zoo.pretrained import PretrainedError, read_weights, wanted_tensors

GOLDEN = Path(__file__).parent / "inception" / "golden.npz"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Inception:
    """Of a file with the names and shapes of the published one, among them tensors that are not read."""
    path = tmp_path_factory.mktemp("inception") / "pt_inception.safetensors"
    unread = {"fc.bias": np.zeros(1008, np.float32), "Conv2d_1a_3x3.bn.num_batches_tracked": np.array(0)}
    save_file(tensors(wanted_tensors(InceptionConfig())) | unread, path)
    return read_weights(path, InceptionConfig())


def test_features_agree_at_every_size(model: Inception) -> None:
    golden = dict(np.load(GOLDEN))
    assert len(golden) == 2
    run = jax.jit(lambda model, images: model(images))
    for name, expected in golden.items():
        y, x = map(int, name.removeprefix("features_").split("x"))
        pixels = np.random.default_rng(y).integers(0, 256, (2, y, x, 3), np.uint8)
        assert_close(run(model, pixels / np.float32(127.5) - 1), expected, name)


def test_another_file_is_refused_in_one_line(tmp_path: Path) -> None:
    pickled = tmp_path / "weights.pth"
    pickled.write_bytes(b"PK\x03\x04")
    with pytest.raises(
        PretrainedError, match=r"weights.pth is a pickle.*s.save_file\(torch.load\('weights.pth', weigh"
    ):
        read_weights(pickled, InceptionConfig())
    with pytest.raises(PretrainedError, match=r"is a pickle"):
        read_weights(pickled.rename(tmp_path / "weights.safetensors"), InceptionConfig())
    save_file({"fc.bias": np.zeros(3, np.float32), "other": np.zeros(2, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(PretrainedError, match=r"the model that it is read for; missing: Conv2d_1a.*left over: other"):
        read_weights(tmp_path / "other.safetensors", InceptionConfig())
    with pytest.raises(PretrainedError, match="none is not there: name a safetensors file"):
        read_weights(tmp_path / "none", InceptionConfig())


def test_grey_images_are_refused(model: Inception) -> None:
    with pytest.raises(LayerError, match=r"\(1, 8, 8, 1\) are given, and an Inception takes"):
        model(jnp.zeros((1, 8, 8, 1)))
