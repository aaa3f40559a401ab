"""Optimizers: schedules, what decays, Muon's matrices, layouts of moments, and names that are not there."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from zoo import sharding
from zoo.train.experiment import Optimizer, UserError
from zoo.train.optimizer import decay_mask, make, muon_dimensions, optimizer_names, schedule

AXES = {
    "table": ((12, 6), ("vocab", "embed")),
    "query": ((2, 6, 2, 4), ("layers", "embed", "heads", "head_dim")),
    "out": ((2, 2, 4, 6), ("layers", "heads", "head_dim", "embed")),
    "head_bias": ((2, 2, 4), ("layers", "heads", "head_dim")),
    "mlp": ((2, 6, 8), ("layers", "embed", "mlp")),
    "mlp_bias": ((2, 8), ("layers", "mlp")),
    "scale": ((6,), ("norm",)),
    "conv": ((3, 3, 4, 6), ("kernel_y", "kernel_x", "conv_in", "conv_out")),
}
DECAYING = {"table", "query", "out", "mlp", "conv"}


class Parameters(nnx.Module):
    def __init__(self) -> None:
        random = np.random.default_rng(0)
        for name, (shape, axes) in AXES.items():
            setattr(self, name, nnx.Param(jnp.asarray(1 + random.random(shape, np.float32)), axes=axes))


def like(params: Parameters, seed: int) -> Parameters:
    """A gradient drawn at random."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape, np.float32)), params)


def prepared(options: Optimizer, params: Parameters) -> tuple[Any, Any]:
    """The compiled update, and the first state."""
    optimizer = make(options, 10)
    return jax.jit(optimizer.update), jax.jit(optimizer.init)(params)


GOOD = jnp.array(True)


def value(tree, name: str) -> np.ndarray:
    return np.asarray(getattr(tree, name)[...])


def rates(optimizer: Optimizer, steps: int) -> np.ndarray:
    return np.array([float(schedule(optimizer, steps)(jnp.int32(step))) for step in range(steps)])


@pytest.mark.parametrize(("name", "middle"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_schedules(name: str, middle: float):
    """Warm-up ends at the peak, half the way down is the mean of both ends, the last step has the final fraction."""
    got = rates(Optimizer(learning_rate=2.0, warmup_steps=4, schedule=name, final_fraction=0.1), 24)
    np.testing.assert_allclose(got[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    assert got[13] == pytest.approx(2 * middle, rel=1e-6)
    assert got[-1] == pytest.approx(2.0 if name == "constant" else 0.2, rel=1e-6)
    assert (np.diff(got[3:]) <= 0).all()


def test_the_transformers_schedule():
    """Equation 3 of Vaswani et al. 2017: D^-0.5 min(n^-0.5, n w^-1.5), n from 1."""
    width, warmup, steps = 512, 40, 400
    peak = (width * warmup) ** -0.5
    got = rates(Optimizer(learning_rate=peak, warmup_steps=warmup, schedule="inverse_sqrt"), steps)
    n = np.arange(1, steps + 1)
    np.testing.assert_allclose(got, width**-0.5 * np.minimum(n**-0.5, n * warmup**-1.5), rtol=1e-5)


def test_a_run_shorter_than_its_warmup():
    np.testing.assert_allclose(rates(Optimizer(learning_rate=1.0, warmup_steps=100), 4), [0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "sgd", "muon"])
def test_decay_spares_biases_and_norms(name: str):
    """With gradients of zero, what decays loses rate * weight_decay of itself, and all else stays."""
    params = Parameters()
    options = Optimizer(name, learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.2)
    update, state = prepared(options, params)
    updates, _ = update(jax.tree.map(lambda x: 0 * x, params), state, params, good=GOOD)
    for parameter in AXES:
        factor = -0.02 if parameter in DECAYING else 0.0
        expected = factor * value(params, parameter)
        np.testing.assert_allclose(value(updates, parameter), expected, atol=1e-6, err_msg=parameter)


@pytest.mark.parametrize("clip_norm", [None, 3.0])
def test_adamw_is_that_of_optax(clip_norm: float | None):
    options = Optimizer(learning_rate=0.1, warmup_steps=2, weight_decay=0.2, clip_norm=clip_norm)
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    rate = schedule(options, 10)
    theirs = optax.chain(clip, optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.2, mask=decay_mask))
    params = Parameters()
    update, state = prepared(options, params)
    their_update, their_state = jax.jit(theirs.update), theirs.init(params)
    for step in range(4):
        gradient = like(params, step)
        updates, state = update(gradient, state, params, good=GOOD)
        expected, their_state = their_update(gradient, their_state, params)
        for name in AXES:
            np.testing.assert_allclose(value(updates, name), value(expected, name), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "muon", "lion"])
def test_a_bad_step_changes_nothing(name: str):
    params = Parameters()
    update, state = prepared(Optimizer(name), params)
    _, state = update(params, state, params, good=GOOD)
    updates, after = update(jax.tree.map(lambda x: x * jnp.nan, params), state, params, good=~GOOD)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(after), jax.tree.leaves(state))


def test_every_name_gives_moments_that_can_be_laid_out():
    params = jax.eval_shape(Parameters)
    mesh = sharding.make_mesh("fsdp=2,tensor=2", jax.devices()[:4])
    assert {"adamw", "adam", "lion", "sgd", "adafactor", "lamb", "muon"} <= set(optimizer_names())
    for name in optimizer_names():
        optimizer = make(Optimizer(name, clip_norm=None), 10)
        state = jax.eval_shape(optimizer.init, params)
        sharding.shardings(state, mesh)
        after = jax.eval_shape(lambda s, p, optimizer=optimizer: optimizer.update(p, s, p, good=GOOD)[1], state, params)
        assert jax.tree.structure(after) == jax.tree.structure(state), name


def test_moments_are_laid_out_as_their_parameters():
    params = jax.eval_shape(Parameters)
    mesh = sharding.make_mesh("fsdp=2,tensor=2", jax.devices()[:4])
    state = sharding.shardings(jax.eval_shape(make(Optimizer(), 10).init, params), mesh)
    specs = [s.spec for s in jax.tree.leaves(state)]
    of_params = [s.spec for s in jax.tree.leaves(sharding.shardings(params, mesh))]
    assert all(specs.count(spec) >= 2 * of_params.count(spec) for spec in of_params if any(spec))


def test_muon_takes_maps_between_spaces():
    dimensions = {name: getattr(muon_dimensions(Parameters()), name) for name in AXES}
    assert dimensions == {
        "table": None,
        "query": MuonDimensionNumbers((1,), (2, 3)),
        "out": MuonDimensionNumbers((1, 2), (3,)),
        "head_bias": None,
        "mlp": MuonDimensionNumbers((1,), (2,)),
        "mlp_bias": None,
        "scale": None,
        "conv": MuonDimensionNumbers((0, 1, 2), (3,)),
    }


def test_muon_orthogonalises_each_layer_apart():
    """A layer's update has singular values near 0.2 sqrt(max(fan_in, fan_out)) times the rate, whatever its scale."""
    params = Parameters()
    gradient = like(params, 7)
    gradient.query = gradient.query.replace(gradient.query[...].at[1].multiply(1000.0))
    options = Optimizer(
        "muon", learning_rate=1.0, warmup_steps=0, schedule="constant", weight_decay=0.0, clip_norm=None
    )
    update, state = prepared(options, params)
    updates, _ = update(gradient, state, params, good=GOOD)
    for layer in value(updates, "query").reshape(2, 6, 8):
        singular = np.linalg.svd(layer, compute_uv=False) / (0.2 * np.sqrt(8))
        assert (singular > 0.5).all() and (singular < 1.5).all()


def test_moment_dtype():
    state = make(Optimizer(moment_dtype="bfloat16"), 10).init(Parameters())
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert dtypes.count(jnp.bfloat16) == dtypes.count(jnp.float32) == len(AXES)


def test_clipping_is_by_the_global_norm():
    params = Parameters()
    options = Optimizer("sgd", learning_rate=1.0, warmup_steps=0, schedule="constant", weight_decay=0.0, clip_norm=0.5)
    update, state = prepared(options, params)
    updates, _ = update(jax.tree.map(lambda x: 100 * x, params), state, params, good=GOOD)
    norm = np.sqrt(sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(updates)))
    assert norm == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Optimizer("adamm"), "optimizer 'adamm' is unknown: did you mean 'adam'"),
        (Optimizer("scale_by_adam"), "optimizer 'scale_by_adam' is unknown"),
        (Optimizer(schedule="cosin"), "schedule 'cosin' is unknown: the schedules are cosine, linear, constant"),
        (Optimizer("sgd", moment_dtype="bfloat16"), "'sgd' keeps no moments of another dtype: drop moment_dtype"),
        (Optimizer(moment_dtype="int8"), "moment_dtype 'int8' is unknown: choose float32"),
    ],
)
def test_names_that_are_not_there(options: Optimizer, message: str):
    with pytest.raises(UserError, match=message):
        make(options, 10)
