from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from zoo.diffusion import schedules
from zoo.models.noising import Noising
from zoo.train.experiment import UserError
from zoo.train.samplers import ImageSampler

DATA = SimpleNamespace(example_shape=(4, 6, 1))


@jax.tree_util.register_pytree_node_class
class Points:
    """The exact noise predictor of images that are all 0.25: a model whose samples are known."""

    config = SimpleNamespace(noising=Noising("cosine", 100))

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        schedule = schedules.cosine(100)
        signal, sigma = (jnp.sqrt(f(t))[:, None, None, None] for f in (schedule.alpha_bar, schedule.variance))
        return (x - signal * 0.25) / sigma

    def tree_flatten(self) -> tuple:
        return (), None

    @classmethod
    def tree_unflatten(cls, _, __) -> "Points":
        return cls()


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_grid_of_samples_is_written(tmp_path, method) -> None:
    sampler = ImageSampler(rows=2, columns=3, method=method, steps=20, scale=2)
    path = sampler.sample(Points(), DATA, jax.random.key(0), tmp_path)
    assert path == str(tmp_path / "samples.png")
    picture = np.asarray(Image.open(path))
    assert picture.shape == ((2 * 5 + 1) * 2, (3 * 7 + 1) * 2)
    # 0.25 is level 159; the gaps are 128.
    assert abs(picture[2:10, 2:14].astype(int) - 159).max() <= 1
    assert (picture[:2] == 128).all()


def test_draws_follow_the_key() -> None:
    sampler = ImageSampler(rows=1, columns=2, steps=3, eta=1.0)

    class Blind(Points):
        def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
            return 0.5 * x

    jax.tree_util.register_pytree_node_class(Blind)
    one, again, other = (sampler.draw(Blind(), (4, 4, 1), jax.random.key(seed)) for seed in (0, 0, 1))
    assert (one == again).all() and (one != other).any()
    assert one.shape == (2, 4, 4, 1) and abs(one).max() <= 1


def test_steps_outside_the_schedule_and_empty_grids_are_refused() -> None:
    with pytest.raises(UserError, match="101 sampling steps are not in the model's 1 to 100"):
        ImageSampler(steps=101).check(Points().config, DATA)
    with pytest.raises(UserError, match="a grid of 0 x 8 images is empty"):
        ImageSampler(rows=0).check(Points().config, DATA)
    with pytest.raises(UserError, match="a scale of -1 pixels"):
        ImageSampler(scale=-1).check(Points().config, DATA)
