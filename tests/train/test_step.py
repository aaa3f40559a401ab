"""The training step: what it computes, what it skips, where its arrays lie, and that none of it depends on the mesh."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from zoo import sharding
from zoo.kernels import cross_entropy
from zoo.models.gpt import GPTConfig
from zoo.train.experiment import Experiment, Optimizer, UserError
from zoo.train.objectives import NextToken
from zoo.train.step import (
    Metrics,
    State,
    abstract_batch,
    abstract_state,
    check_batch,
    check_numbers,
    init_state,
    train_step,
    with_compute,
)

ONE, EIGHT = "", "data=2,fsdp=2,tensor=2"


def make_mesh(axes: str) -> Mesh:
    return sharding.make_mesh(axes, jax.devices()[: 8 if axes else 1])


def batch_of(experiment: Any, mesh: Mesh, step: int) -> dict[str, jax.Array]:
    data = experiment.data.open("train", batch_size=experiment.batch_size, seed=experiment.seed)
    return jax.device_put(data.batch(step, range(experiment.batch_size)), sharding.batch_sharding(mesh))


@functools.cache
def compiled(experiment: Any, axes: str) -> Any:
    mesh = make_mesh(axes)
    with sharding.use(mesh):
        batch = abstract_batch(batch_of(experiment, mesh, 0), experiment.batch_size, mesh)
        return train_step(experiment, mesh).lower(abstract_state(experiment, mesh), batch).compile()


def run(experiment: Any, axes: str = ONE, steps: int = 3, spoil: tuple[int, ...] = ()) -> tuple[State, list[Metrics]]:
    """State and metrics after `steps`; in the steps of `spoil`, one weight of the last row is NaN."""
    mesh = make_mesh(axes)
    state, all_metrics = init_state(experiment, mesh), []
    with sharding.use(mesh):
        step = compiled(experiment, axes)
        for i in range(steps):
            batch = batch_of(experiment, mesh, i)
            if i in spoil:
                batch["weights"] = jax.device_put(batch["weights"].at[-1, -1].set(jnp.nan), batch["weights"].sharding)
            state, metrics = step(state, batch)
            all_metrics.append(jax.device_get(metrics))
    return state, all_metrics


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(a), jax.tree.leaves(b))


def assert_close(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    [np.testing.assert_allclose(x, y, rtol=rtol, atol=atol) for x, y in pairs]


@pytest.fixture
def fast(tiny):
    """Learning at once, so that differences between runs would show."""
    return dataclasses.replace(tiny, optimizer=Optimizer(learning_rate=3e-2, warmup_steps=0))


def test_it_learns(fast):
    _, metrics = run(fast, steps=12)
    losses = [m.loss.total / m.loss.weight for m in metrics]
    assert losses[-1] < 0.8 * losses[0]


def test_accumulation_equals_the_big_batch(fast):
    """Also where micro-batches have different weights."""
    whole, whole_metrics = run(fast)
    parts, parts_metrics = run(dataclasses.replace(fast, accumulate=4))
    assert_close(parts.model, whole.model)
    assert_close(parts_metrics, whole_metrics)


def test_accumulation_drops_other_values_in_each_micro_batch(fast):
    rates = dataclasses.replace(fast, model=dataclasses.replace(fast.model, dropout=0.5), batch_size=2, accumulate=2)
    # Two equal rows, one in each micro-batch: with equal keys, halving the batch would halve the sums exactly.
    mesh = make_mesh(ONE)
    row = batch_of(rates, mesh, 0)
    equal = {name: jnp.stack([x[0], x[0]]) for name, x in row.items()}
    with sharding.use(mesh):
        _, both = train_step(rates, mesh)(init_state(rates, mesh), equal)
        single = dataclasses.replace(rates, batch_size=1, accumulate=1)
        _, first = train_step(single, mesh)(init_state(single, mesh), {name: x[:1] for name, x in equal.items()})
    assert abs(float(both.loss.total) - 2 * float(first.loss.total)) > 1e-3


@pytest.mark.parametrize("axes", [ONE, EIGHT])
def test_a_step_that_is_not_finite_is_skipped(fast, axes: str):
    """One NaN in one row, on one device: parameters, moments and average stay, bit for bit, on all."""
    experiment = dataclasses.replace(fast, ema=0.9)
    before, _ = run(experiment, axes, steps=2)
    after, metrics = run(experiment, axes, steps=4, spoil=(2, 3))
    assert_same((after.model, after.opt_state, after.ema), (before.model, before.opt_state, before.ema))
    assert int(after.step) == 4
    assert [int(m.bad_steps) for m in metrics] == [0, 0, 1, 2]
    assert metrics[-1].loss.weight == 0 and not np.isfinite(metrics[-1].grad_norm)


def test_a_good_step_ends_the_row_of_bad_ones(fast):
    state, metrics = run(fast, steps=4, spoil=(0, 1))
    assert [int(m.bad_steps) for m in metrics] == [1, 2, 0, 0]
    assert int(state.skipped) == 2
    assert np.isfinite(metrics[-1].grad_norm) and metrics[-1].loss.weight > 0


def test_weights_of_zero_leave_the_model_finite(fast):
    mesh = make_mesh(ONE)
    batch = batch_of(fast, mesh, 0)
    with sharding.use(mesh):
        state, _ = train_step(fast, mesh)(init_state(fast, mesh), batch | {"weights": jnp.zeros_like(batch["weights"])})
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.model))


def test_the_average_follows_the_model(fast):
    """Against the recurrence in numpy: decay min(0.9, (1 + n) / (10 + n))."""
    experiment = dataclasses.replace(fast, ema=0.9)
    models = [np.asarray(run(experiment, steps=n)[0].model.up[...]) for n in range(4)]
    expected = models[0]
    for n, model in enumerate(models[1:]):
        kept = min(0.9, (1 + n) / (10 + n))
        expected = kept * expected + (1 - kept) * model
    np.testing.assert_allclose(run(experiment, steps=3)[0].ema.up[...], expected, rtol=1e-6, atol=1e-8)


def test_muon_sharded_equals_one_device(fast):
    experiment = dataclasses.replace(fast, optimizer=Optimizer("muon", learning_rate=3e-3, warmup_steps=0))
    assert_close(run(experiment, EIGHT)[0].model, run(experiment, ONE)[0].model, rtol=1e-4, atol=1e-5)


def test_sharded_equals_one_device(tiny, monkeypatch):
    """A GPT with dropout, accumulation and chunks over 20 steps: the losses of eight devices are those of one."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 2**11)
    model = GPTConfig(vocab_size=32, max_length=8, num_layers=2, width=16, num_heads=2, dropout=0.2)
    experiment = Experiment(
        "gpt",
        model,
        tiny.data,
        NextToken(z_loss=1e-4, label_smoothing=0.1),
        tiny.sampler,
        optimizer=Optimizer(learning_rate=3e-3, warmup_steps=5),
        steps=20,
        batch_size=16,
        accumulate=2,
    )
    losses = {axes: [m.loss.total / m.loss.weight for m in run(experiment, axes, steps=20)[1]] for axes in (ONE, EIGHT)}
    np.testing.assert_allclose(losses[EIGHT], losses[ONE], rtol=1e-4)
    assert losses[ONE][-1] < losses[ONE][0]


def test_state_is_laid_out_and_donated(fast):
    """Each device holds its part; nearly all that goes in comes out in the same memory; the old arrays are gone."""
    mesh = make_mesh(EIGHT)
    state = init_state(fast, mesh)
    up = state.model.up.get_value()
    assert up.addressable_shards[0].data.shape == (8, 32)
    step = compiled(fast, EIGHT)
    memory = step.memory_analysis()
    step(state, batch_of(fast, mesh, 0))
    parameters = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(init_state(fast, mesh).model))
    assert memory.alias_size_in_bytes >= 3 * parameters
    assert up.is_deleted()


def test_the_same_run_twice_is_the_same(fast):
    experiment = dataclasses.replace(fast, model=dataclasses.replace(fast.model, dropout=0.2))
    once, again = run(experiment)[0], run(experiment)[0]
    assert_same(once, again)
    other, _ = run(dataclasses.replace(experiment, seed=1))
    assert not np.array_equal(other.model.up[...], once.model.up[...])


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_parameters_may_be_bfloat16(name: str, fast):
    """State keeps its dtypes from step to step; what is skipped stays."""
    precision = dataclasses.replace(fast.model.precision, parameters="bfloat16")
    model = dataclasses.replace(fast.model, precision=precision)
    experiment = dataclasses.replace(fast, model=model, ema=0.9, accumulate=2, optimizer=Optimizer(name))
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(init_state(experiment, make_mesh(ONE)))]
    after, _ = run(experiment, steps=2, spoil=(1,))
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == dtypes
    assert after.model.up.dtype == jnp.bfloat16 and after.ema.up.dtype == jnp.float32


@pytest.mark.parametrize(
    ("platform", "compute", "expected"),
    [
        ("cpu", "auto", "float32"),
        ("tpu", "auto", "bfloat16"),
        ("gpu", "auto", "bfloat16"),
        ("cpu", "bfloat16", "bfloat16"),
    ],
)
def test_compute_dtype_follows_the_mesh(tiny, platform: str, compute: str, expected: str):
    """Also one of hardware that is not there: the step may be compiled for it."""
    mesh: Any = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    fitted = with_compute(dataclasses.replace(tiny, compute=compute), mesh)
    assert fitted.model.precision.compute == expected
    assert fitted.model.precision.parameters == "float32"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 10, "accumulate": 4}, "--batch-size 10 is not divisible by --accumulate 4"),
        ({"batch_size": 10}, r"--batch-size 10 is not divisible by the 4 ways of mesh axes data=2 x fsdp=2: .* of 4"),
        ({"batch_size": 24, "accumulate": 4}, "over --accumulate 4 is 6 rows, which is not divisible by the 4 ways"),
    ],
)
def test_batches_that_do_not_divide(tiny, fields: dict[str, int], message: str):
    with pytest.raises(UserError, match=message):
        check_batch(dataclasses.replace(tiny, **fields), make_mesh(EIGHT))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"accumulate": 0}, "--accumulate 0 is too small: choose a whole number from 1"),
        ({"log_every": 0}, "--log-every 0 is too small"),
        ({"steps": -5}, "--steps -5 is too small"),
        ({"ema": 1.0}, "--ema 1.0 is no decay"),
    ],
)
def test_counts_below_one(tiny, fields: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        check_numbers(dataclasses.replace(tiny, **fields))


def test_unknown_compute_dtype(tiny):
    with pytest.raises(UserError, match="--compute float8 is unknown: choose auto, bfloat16 or float32"):
        with_compute(dataclasses.replace(tiny, compute="float8"), make_mesh(ONE))
