from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from zoo.diffusion import schedules
from zoo.diffusion.samplers import METHODS
from zoo.models.noising import Noising
from zoo.train.experiment import UserError
from zoo.train.samplers import ImageSampler

DATA = SimpleNamespace(example_shape=(4, 6, 1))


@jax.tree_util.register_pytree_node_class
class Points:
    """The exact noise predictor of images that are all 0.25: a model whose samples are known."""

    config = SimpleNamespace(noising=Noising("cosine", 100))

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        signal, sigma = map(schedules.over_images, schedules.make(self.config.noising).at(t))
        return (x - signal * 0.25) / sigma

    def tree_flatten(self) -> tuple:
        return (), None

    @classmethod
    def tree_unflatten(cls, _, __) -> "Points":
        return cls()


@pytest.mark.parametrize("method", METHODS)
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


def test_classes_take_turns_and_guidance_leads_away_from_none() -> None:
    class Classes(Points):
        """Images of class c are all (c - 1) / 2, and those of no class 0."""

        config = SimpleNamespace(noising=Noising("cosine", 100), num_classes=3, null_class=True)

        def __call__(self, x: jax.Array, t: jax.Array, classes: jax.Array) -> jax.Array:
            signal, sigma = map(schedules.over_images, schedules.make(self.config.noising).at(t))
            values = schedules.over_images(jnp.array([-0.5, 0.0, 0.5, 0.0])[classes])
            return (x - signal * values) / sigma

    jax.tree_util.register_pytree_node_class(Classes)
    for guidance in (1.0, 1.5):
        drawn = ImageSampler(rows=2, columns=3, steps=20, guidance=guidance).draw(
            Classes(), (4, 4, 1), jax.random.key(0)
        )
        expected = guidance * np.array([-0.5, 0, 0.5] * 2)
        np.testing.assert_allclose(drawn, np.broadcast_to(expected[:, None, None, None], drawn.shape), atol=1e-3)


def test_steps_outside_the_schedule_and_empty_grids_are_refused() -> None:
    with pytest.raises(UserError, match="101 sampling steps are not in the model's 1 to 100"):
        ImageSampler(steps=101).check(Points().config, DATA)
    with pytest.raises(ValueError, match=r"eta -0.5 is not a share"):
        ImageSampler(eta=-0.5).check(Points().config, DATA)
    with pytest.raises(UserError, match=r"--sampler.guidance 3.0 needs a model of classes"):
        ImageSampler(guidance=3.0).check(Points().config, DATA)
    with pytest.raises(UserError, match="a grid of 0 x 8 images is empty"):
        ImageSampler(rows=0).check(Points().config, DATA)
    with pytest.raises(UserError, match="a scale of -1 pixels"):
        ImageSampler(scale=-1).check(Points().config, DATA)
