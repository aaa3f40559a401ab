from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from zoo.diffusion import schedules
from zoo.diffusion.samplers import SAMPLERS
from zoo.models.noising import Noising
from zoo.sharding import make_mesh, use
from zoo.train.experiment import UserError
from zoo.train.image_sampler import ImageSampler, chosen_classes

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


@jax.tree_util.register_pytree_node_class
class Blind(Points):
    """Its samples are as different as its noise."""

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return 0.5 * x


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_grid_of_samples_is_written(tmp_path, sampler) -> None:
    sampler = ImageSampler(rows=2, columns=3, sampler=sampler, steps=20, scale=2)
    paths = sampler.sample(Points(), DATA, jax.random.key(0), tmp_path).splitlines()
    assert paths == [str(tmp_path / "samples.png"), str(tmp_path / "denoising.png")]
    picture, strip = (np.asarray(Image.open(path)) for path in paths)
    assert picture.shape == ((2 * 5 + 1) * 2, (3 * 7 + 1) * 2)
    # 0.25 is level 159; the gaps are 128.
    assert abs(picture[2:10, 2:14].astype(int) - 159).max() <= 1
    assert (picture[:2] == 128).all()
    # Five images, eight moments each: noise at the left, what the grid shows at the right.
    assert strip.shape == ((5 * 5 + 1) * 2, (8 * 7 + 1) * 2)
    assert strip[2:10, 2:14].std() > 50 and abs(strip[2:10, -14:-2].astype(int) - 159).max() <= 1


def test_a_strip_follows_its_images_and_can_be_left_out(tmp_path) -> None:
    sampler = ImageSampler(rows=1, columns=3, steps=20, eta=1.0, strip=2, scale=1)
    grid, strip = sampler.sample(Points(), DATA, jax.random.key(0), tmp_path).splitlines()
    pixels = np.asarray(Image.open(strip))
    assert pixels.shape == (2 * 5 + 1, 8 * 7 + 1)
    first, second = pixels[1:5, 1:7], pixels[6:10, 1:7]
    assert (first != second).any()
    (tmp_path / "denoising.png").unlink()
    plain = replace(sampler, strip=0).sample(Points(), DATA, jax.random.key(0), tmp_path)
    assert plain == grid and not (tmp_path / "denoising.png").exists()


@pytest.mark.parametrize("strip", [0, 1])
def test_a_person_who_waits_sees_every_step(tmp_path, shown, strip) -> None:
    sampler = ImageSampler(rows=1, columns=2, sampler="plms", steps=6, strip=strip)
    sampler.sample(Points(), DATA, jax.random.key(0), tmp_path, print)
    assert shown == [7, 2, 3, 4, 5, 6, 7, "closed"]
    del shown[:]
    sampler.sample(Points(), DATA, jax.random.key(0), tmp_path)
    assert not shown


def test_draws_follow_the_key() -> None:
    sampler = ImageSampler(rows=1, columns=2, steps=3, eta=1.0)
    one, again, other = (sampler.draw(Blind(), (4, 4, 1), jax.random.key(seed)) for seed in (0, 0, 1))
    assert (one == again).all() and (one != other).any()
    assert one.shape == (2, 4, 4, 1) and abs(one).max() <= 1


@jax.tree_util.register_pytree_node_class
class Classes(Points):
    """Images of class c are all (c - 1) / 2, and those of no class 0.1."""

    config = SimpleNamespace(noising=Noising("cosine", 100), num_classes=3, null_class=True)

    def __call__(self, x: jax.Array, t: jax.Array, classes: jax.Array) -> jax.Array:
        signal, sigma = map(schedules.over_images, schedules.make(self.config.noising).at(t))
        values = schedules.over_images(jnp.array([-0.5, 0.0, 0.5, 0.1])[classes])
        return (x - signal * values) / sigma


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({}, [-0.5, 0, 0.5] * 2),
        ({"columns": 2}, [-0.5, 0, 0.5, -0.5]),
        ({"guidance": 1.5}, [-0.8, -0.05, 0.7] * 2),
        ({"classes": "2,0"}, [0.5, -0.5] * 2),
        ({"classes": "1", "columns": 1}, [0, 0]),
        ({"classes": "none", "columns": 1, "guidance": 1.5}, [0.1, 0.1]),
    ],
)
def test_classes_take_turns_and_guidance_leads_away_from_none(options, values) -> None:
    drawn = ImageSampler(rows=2, steps=20, **options).draw(Classes(), (4, 4, 1), jax.random.key(0))
    np.testing.assert_allclose(drawn, np.broadcast_to(np.array(values)[:, None, None, None], drawn.shape), atol=1e-3)


def test_many_are_drawn_in_batches_and_classes_go_on_taking_turns() -> None:
    sampler = ImageSampler(steps=20, classes="0,2")
    drawn = list(sampler.draws(Classes(), DATA, jax.random.key(0), 7, 3))
    assert [len(batch) for batch in drawn] == [3, 3, 1] and drawn[0].shape[1:] == DATA.example_shape
    np.testing.assert_allclose(
        np.concatenate(drawn).mean((1, 2, 3)), [-0.5, 0.5, -0.5, 0.5, -0.5, 0.5, -0.5], atol=1e-3
    )
    one, other = ImageSampler(steps=3).draws(Blind(), DATA, jax.random.key(0), 4, 2)
    assert (one != other).any()


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("all", [*range(10)]),
        ("0-9", [*range(10)]),
        ("3", [3]),
        ("0,2,5", [0, 2, 5]),
        ("7-8, 1", [7, 8, 1]),
        ("none", [10]),
    ],
)
def test_classes_are_read(text, classes) -> None:
    assert chosen_classes(text, 10, none=True) == classes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("10", "class 10 of 10: choose from 0 to 9"),
        ("0-99999999999", "class 99999999999 of 10"),
        ("none", "without a class for none"),
        *((text, "are no numbers and rising ranges") for text in ("", "a", "5-2", "1,,2", "-1", "1-2-3", "٣", "all,1")),
    ],
)
def test_classes_that_there_are_not_are_refused(text, words) -> None:
    with pytest.raises(UserError, match=words):
        chosen_classes(text, 10, none=False)


def test_steps_outside_the_schedule_and_empty_grids_are_refused() -> None:
    with pytest.raises(UserError, match="101 sampling steps are not in the model's 1 to 100"):
        ImageSampler(steps=101).check(Points().config, DATA)
    with pytest.raises(UserError, match=r"where its share is 4.9e-05, and plms sets no bound to it here: predict"):
        ImageSampler(sampler="plms").check(SimpleNamespace(noising=Noising("cosine")), DATA)
    with pytest.raises(ValueError, match=r"eta -0.5 is not a share"):
        ImageSampler(eta=-0.5).check(Points().config, DATA)
    with pytest.raises(UserError, match=r"guidance 3.0 needs a model of classes"):
        ImageSampler(guidance=3.0).check(Points().config, DATA)
    with pytest.raises(UserError, match="guidance nan does not lead to what is asked for"):
        ImageSampler(guidance=float("nan")).check(Classes().config, DATA)
    with pytest.raises(UserError, match="a grid of 0 x 8 images is empty"):
        ImageSampler(rows=0).check(Points().config, DATA)
    with pytest.raises(UserError, match="a scale of -1 pixels"):
        ImageSampler(scale=-1).check(Points().config, DATA)
    with pytest.raises(UserError, match="classes 0-9 are asked of a model that is told none"):
        ImageSampler(classes="0-9").check(Points().config, DATA)
    with pytest.raises(UserError, match="class 3 of 3"):
        ImageSampler(classes="3").check(Classes().config, DATA)
    with pytest.raises(UserError, match="a strip of -1 images is none"):
        ImageSampler(strip=-1).check(Points().config, DATA)


def test_a_strip_of_images_over_a_mesh_is_whole(tmp_path) -> None:
    sampler = ImageSampler(rows=2, columns=4, steps=10, eta=1.0, strip=3)
    pictures = []
    for mesh in (make_mesh("data=1", jax.devices()[:1]), make_mesh("data=4,tensor=2")):
        with use(mesh):
            paths = sampler.sample(Points(), DATA, jax.random.key(0), tmp_path).splitlines()
        pictures.append([np.asarray(Image.open(path)).astype(int) for path in paths])
    for one, other in zip(*pictures, strict=True):
        assert abs(one - other).max() <= 1
