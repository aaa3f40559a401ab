"""Image recipes compiled for a slice of TPUs that is not there."""

import importlib.util

import pytest

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("needs the extra `aot`", allow_module_level=True)

from benchmarks import pod
from zoo.train.recipes import RECIPES

pytestmark = pytest.mark.usefixtures("libtpu_environment")


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("latent-digits", "data=2,fsdp=4")]
    + [pytest.param(name, "fsdp=8", marks=pytest.mark.large) for name in (*pod.SMALL, *pod.LARGE)],
)
def test_the_training_step_compiles_and_fits(name: str, mesh: str) -> None:
    assert pod.compiled(name, mesh) < 16  # GiB of a v5e's chip


def test_a_row_of_each_kind_of_data() -> None:
    shapes = {
        name: {kind: x.shape for kind, x in pod.batch(RECIPES[name]()).items()} for name in (*pod.SMALL, *pod.LARGE)
    }
    assert shapes["text-to-emoji"] == {"images": (1, 32, 32, 3), "weights": (1,), "tokens": (1, 24)}
    assert shapes["dit-xl-2"] == {"images": (1, 32, 32, 4), "weights": (1,), "labels": (1,)}
    assert shapes["autoencoder-digits"]["images"] == (1, 16, 16, 1)
