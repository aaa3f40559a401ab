from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from zoo.train.data.images import Images
from zoo.train.experiment import DataInfo, UserError
from zoo.train.samplers import ClassSampler


class Data:
    """Seven held-out images whose brightness is their class, 0 to 6."""

    def open(self, split: str, *, batch_size: int, seed: int) -> Images:
        assert split == "validation"
        pixels = np.broadcast_to(np.arange(7, dtype=np.uint8)[:, None, None, None] * 40, (7, 3, 4, 1))
        return Images(DataInfo("test", "", 7, 0), pixels, np.arange(7, dtype=np.int32), batch_size, None)


@jax.tree_util.register_pytree_node_class
class Brightness:
    """Finds the class by brightness, but takes 6 for 5."""

    config = SimpleNamespace(head="classification", labels=tuple("abcdefg"))

    def __call__(self, images: jax.Array) -> SimpleNamespace:
        found = jnp.minimum(jnp.round((images.mean((1, 2, 3)) + 1) * 127.5 / 40), 5)
        return SimpleNamespace(logits=jax.nn.one_hot(found.astype(jnp.int32), 7))

    def tree_flatten(self) -> tuple:
        return (), None

    @classmethod
    def tree_unflatten(cls, _, __) -> "Brightness":
        return cls()


def test_held_out_images_are_shown_with_what_is_found() -> None:
    images, said = ClassSampler().classify(Brightness(), Data(), jax.random.key(0))
    assert sorted(said) == ["a", "b", "c", "d", "e", "f", "f, not g"]
    levels = np.round((images[:, 0, 0, 0] + 1) * 127.5 / 40).astype(int)
    assert ["abcdefg"[level] for level in levels] == [caption[-1] for caption in said]


def test_other_keys_pick_other_images() -> None:
    sampler = ClassSampler(rows=1, columns=4)
    one, again, other = (sampler.classify(Brightness(), Data(), jax.random.key(seed))[1] for seed in (0, 0, 1))
    assert len(one) == 4 and one == again != other


def test_the_grid_is_written(tmp_path) -> None:
    path = ClassSampler(rows=1, columns=3, scale=5).sample(Brightness(), Data(), jax.random.key(0), tmp_path)
    assert path == str(tmp_path / "samples.png")
    assert Image.open(path).size == (3 * (4 * 5 + 4) + 4, 3 * 5 + 15 + 8)


def test_what_cannot_be_shown_is_refused() -> None:
    with pytest.raises(UserError, match=r"--model\.head pooler scores no classes: choose classification"):
        ClassSampler().check(SimpleNamespace(head="pooler"), Data())
    with pytest.raises(UserError, match="a grid of 4 x 0 images is empty"):
        ClassSampler(columns=0).check(Brightness.config, Data())
