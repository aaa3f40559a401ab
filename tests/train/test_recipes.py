"""Recipes: each fits together, and on the mesh that its own command names."""

import inspect
import re

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from zoo import sharding
from zoo.train.recipes import RECIPES
from zoo.train.step import check_batch, check_numbers

MESHES = {name: re.search(r"--mesh (\S+)", inspect.getdoc(recipe) or "") for name, recipe in RECIPES.items()}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_says_how_it_is_run(name: str):
    text = inspect.getdoc(RECIPES[name]) or ""
    assert f"zoo train {name}" in text and "Data:" in text
    assert RECIPES[name]().name == name
    assert RECIPES[name]() == RECIPES[name]()


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_its_numbers_divide(name: str):
    experiment = RECIPES[name]()
    check_numbers(experiment)
    assert experiment.batch_size % experiment.accumulate == 0


@pytest.mark.parametrize("name", sorted(name for name, mesh in MESHES.items() if mesh))
def test_it_divides_over_the_mesh_of_its_command(name: str):
    experiment, named = RECIPES[name](), MESHES[name]
    assert named is not None
    sizes = dict.fromkeys(sharding.MESH_AXES, 1) | sharding.parse_mesh(named[1])
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    check_batch(experiment, mesh)
    model = jax.eval_shape(lambda: experiment.model.build(nnx.Rngs(0)))
    for variable in jax.tree.leaves(model, is_leaf=sharding.is_variable):
        sharding.partition_spec(sharding.logical_axes(variable), variable.shape, mesh, name=name)
