"""What holds for every model: its parameters are named, laid out, unique, and counted without allocation."""

from typing import Any

import jax
import pytest
from flax import nnx

from zoo import models, sharding
from zoo.layers.transformer import Block, Stack

PRESETS = models.presets()


def variables(tree: Any) -> list[tuple[str, nnx.Variable]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=sharding.is_variable)[0]
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


@pytest.fixture(scope="module")
def abstract() -> dict[str, nnx.Module]:
    return {name: jax.eval_shape(lambda c=config: c.build(nnx.Rngs(0))) for name, config in PRESETS.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_only_parameters_are_arrays_and_each_names_its_axes(name, abstract) -> None:
    for path, leaf in variables(abstract[name]):
        assert isinstance(leaf, nnx.Param), f"{path} is no parameter"
        axes = sharding.logical_axes(leaf)
        assert len(axes) == leaf.ndim, f"{path}: {axes} for shape {leaf.shape}"
        assert set(axes) <= set(sharding.RULES) | {None}, f"{path}: {axes}"


@pytest.mark.parametrize("name", {type(config): name for name, config in PRESETS.items()}.values())
def test_two_models_of_one_config_have_one_structure(name, abstract) -> None:
    """What is made for one serves the other: shardings, moments, checkpoints."""
    again = jax.eval_shape(lambda: PRESETS[name].build(nnx.Rngs(1)))
    assert jax.tree.structure(again) == jax.tree.structure(abstract[name])


@pytest.mark.parametrize("name", PRESETS)
def test_decay_spares_vectors_alone(name, abstract) -> None:
    for path, leaf in variables(abstract[name]):
        vector = path.split(".")[-1] in ("bias", "scale")
        assert sharding.decays(sharding.logical_axes(leaf)) == (not vector), path


@pytest.mark.parametrize("name", PRESETS)
def test_no_variable_stands_in_a_model_twice(name, monkeypatch) -> None:
    blocks: list[Block] = []
    make = Stack.__init__

    # Under vmap an alias is already two leaves: blocks are watched where they are made.
    def watched(self: Stack, make_block: Any, *args: Any, **kwargs: Any) -> None:
        make(self, lambda rngs: blocks.append(make_block(rngs)) or blocks[-1], *args, **kwargs)

    monkeypatch.setattr(Stack, "__init__", watched)

    def build() -> None:
        model = PRESETS[name].build(nnx.Rngs(0))
        for module in (model, *blocks):
            held = [id(leaf) for _, leaf in variables(module)]
            assert len(held) == len(set(held))
            assert held

    jax.eval_shape(build)


def test_an_unknown_preset_is_answered_with_the_nearest_in_one_line() -> None:
    with pytest.raises(models.UnknownPreset, match=r"^preset 'gpt2-larg' is unknown: did you mean 'gpt2-large'\?.*$"):
        models.preset("gpt2-larg")


def test_a_list_of_presets_costs_no_array() -> None:
    before = len(jax.live_arrays())
    counts = {name: models.parameter_count(config) for name, config in PRESETS.items() if name.startswith("gpt3")}
    assert counts["gpt3-175b"] > 170e9
    assert len(jax.live_arrays()) <= before + 1
