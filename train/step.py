"""The training step: one pure function (state, batch) -> (state, metrics), compiled for a mesh.

Call and lower what this file compiles within `zoo.sharding.use(mesh)`: the modules' constraints follow it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from zoo import sharding
from zoo.kernels.memory import give_back, loop_options, materialized
from zoo.train import optimizer as optimizers
from zoo.train.experiment import Batch, Experiment, Loss, UserError

AnyExperiment = Experiment[Any, Any, Any, Any]


class Metrics(NamedTuple):
    """Figures of one step, each [] and alike on every host.

    loss: sums over the batch, zero for a skipped step.  grad_norm: of the mean gradient, before clipping.
    skipped, bad_steps: the state's, after the step.
    """

    loss: Loss
    grad_norm: jax.Array
    learning_rate: jax.Array
    skipped: jax.Array
    bad_steps: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """All that changes from step to step, and all that a checkpoint holds.

    step: steps taken, [] int32, skipped ones included; the data and the randomness of the next step follow from it.
    ema: exponential moving average of the parameters, a module like `model`, or None.
    skipped: steps whose loss or gradient was not finite, [] int32; bad_steps: how many of the last in a row.
    """

    step: jax.Array
    model: Any
    opt_state: Any
    ema: Any
    skipped: jax.Array
    bad_steps: jax.Array

    @property
    def best(self) -> Any:
        """The model to evaluate, sample and publish: the average where there is one."""
        return self.model if self.ema is None else self.ema


def with_compute(experiment: AnyExperiment, mesh: Mesh) -> AnyExperiment:
    """`experiment` with its model's compute dtype decided: "auto" is by the platform of the mesh's devices."""
    compute = experiment.compute
    if compute == "auto":
        compute = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    if compute not in ("float32", "bfloat16"):
        raise UserError(f"--compute {compute} is unknown: choose auto, bfloat16 or float32")
    precision = dataclasses.replace(experiment.model.precision, compute=compute)
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, precision=precision))


COUNTS = (
    *("steps", "batch_size", "accumulate", "max_bad_steps", "log_every", "eval_every", "checkpoint_every"),
    *("keep_last", "keep_every"),
)


def check_numbers(experiment: AnyExperiment) -> None:
    """Raises UserError where a count, the seed, a decay or a bound is outside what it can be."""
    for name in COUNTS:
        count = getattr(experiment, name)
        if count is not None and count < 1:
            raise UserError(f"--{name.replace('_', '-')} {count} is too small: choose a whole number from 1")
    if not 0 <= experiment.seed < 2**32:
        raise UserError(f"--seed {experiment.seed} is not a seed: choose a whole number from 0 to {2**32 - 1}")
    optimizer = experiment.optimizer
    decays = {"ema": experiment.ema, "optimizer.b1": optimizer.b1, "optimizer.b2": optimizer.b2}
    for name, decay in decays.items():
        if decay is not None and not 0 <= decay < 1:
            raise UserError(f"--{name} {decay} is no decay: choose a number from 0 to below 1")
    clip = optimizer.clip_norm
    if clip is not None and not 0 < clip < math.inf:
        raise UserError(
            f"--optimizer.clip-norm {clip} bounds nothing: choose a number above 0, or None for no clipping"
        )
    for name in ("learning_rate", "weight_decay", "final_fraction"):
        value = getattr(optimizer, name)
        if not 0 <= value < math.inf:
            raise UserError(f"--optimizer.{name.replace('_', '-')} {value}: choose a finite number from 0")


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The program; what compiling it took is given back."""
    program = lowered.compile()
    give_back()
    return program


def check_batch(experiment: AnyExperiment, mesh: Mesh) -> None:
    """Raises UserError where the batch does not divide into micro-batches, or a micro-batch over the mesh."""
    size, micro, ways = experiment.batch_size, experiment.accumulate, sharding.batch_ways(mesh)
    if size % micro:
        raise UserError(f"--batch-size {size} is not divisible by --accumulate {micro}: choose a multiple of it")
    if size // micro % ways:
        axes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in ("data", "fsdp") if mesh.shape.get(axis, 1) > 1)
        each = f" over --accumulate {micro} is {size // micro} rows, which" if micro > 1 else ""
        raise UserError(
            f"--batch-size {size}{each} is not divisible by the {ways} ways of mesh axes {axes}: "
            f"choose a multiple of {micro * ways}"
        )


def build_state(experiment: AnyExperiment, seed: jax.Array | int) -> State:
    """The state before the first step."""
    # Steps draw from key(seed) folded with their number; a key of another stream keeps initialisation apart.
    rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(seed), np.uint32(2**32 - 1)))
    model = experiment.model.build(rngs)
    return State(
        step=jnp.zeros((), jnp.int32),
        model=model,
        opt_state=optimizers.make(experiment.optimizer, experiment.steps).init(model),
        ema=None if experiment.ema is None else jax.tree.map(lambda x: x.astype(jnp.float32), model),
        skipped=jnp.zeros((), jnp.int32),
        bad_steps=jnp.zeros((), jnp.int32),
    )


def init_state(experiment: AnyExperiment, mesh: Mesh) -> State:
    """The state before the first step, born sharded."""
    state = sharding.initialize(partial(build_state, experiment), np.uint32(experiment.seed), mesh=mesh)
    jax.block_until_ready(state)
    give_back()
    return state


def abstract_state(experiment: AnyExperiment, mesh: Mesh) -> State:
    """Shapes, dtypes and shardings of the state: to restore into, and to compile ahead of time with."""
    state = sharding.abstract(partial(build_state, experiment), np.uint32(experiment.seed))
    return sharding.with_shardings(state, mesh)


def abstract_batch(example: Mapping[str, Any], batch_size: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A global batch's shapes and shardings, from arrays [rows, ...] of any number of rows."""
    layout = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype, sharding=layout) for name, x in example.items()
    }


def train_step(experiment: AnyExperiment, mesh: Mesh) -> Any:
    """The compiled step (state, batch) -> (state, metrics). The state it is given is donated: its buffers are reused.

    A step is skipped, leaving parameters, moments and average as they were, when its loss or gradient is not finite.
    Both are sums over all devices, so that every host decides alike.
    """
    optimizer = optimizers.make(experiment.optimizer, experiment.steps)
    rate = optimizers.schedule(experiment.optimizer, experiment.steps)
    replicated = NamedSharding(mesh, PartitionSpec())
    layout = sharding.shardings(abstract_state(experiment, mesh), mesh)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(experiment.seed), state.step)
        sums, loss = accumulated(experiment, state.model, batch, key, layout.model)
        share = 1 / jnp.where(loss.weight > 0, loss.weight, 1)
        gradient = jax.tree.map(lambda g: g * share, sums)
        norm = share * optimizers.global_norm(sums)
        # One flag, and not a test in the update of every parameter.
        good = materialized(jnp.isfinite(norm) & jnp.isfinite(loss.total))

        updates, opt_state = optimizer.update(gradient, state.opt_state, state.model, good=good, norm=norm)
        model = optax.apply_updates(state.model, updates)
        ema = averaged(experiment.ema, state.ema, model, state.step - state.skipped)
        ema = jax.tree.map(lambda new, old: jnp.where(good, new, old), ema, state.ema)
        new = State(
            step=state.step + 1,
            model=model,
            opt_state=opt_state,
            ema=ema,
            skipped=state.skipped + ~good,
            bad_steps=jnp.where(good, 0, state.bad_steps + 1),
        )
        counted = jax.tree.map(lambda x: jnp.where(good, x, 0), loss)
        return new, Metrics(counted, norm, rate(state.step - state.skipped), new.skipped, new.bad_steps)

    return jax.jit(
        step,
        in_shardings=(layout, sharding.batch_sharding(mesh)),
        out_shardings=(layout, replicated),
        donate_argnums=0,
        compiler_options=loop_options(mesh.devices.flat[0].platform),
    )


def accumulated(experiment: AnyExperiment, model: Any, batch: Batch, key: jax.Array, layout: Any) -> tuple[Any, Loss]:
    """Sums over a batch's micro-batches: the losses' gradient, float32 and laid out as `layout`, and the losses."""

    def one(batch: Batch, key: jax.Array) -> tuple[Any, Loss]:
        def total(model: Any) -> tuple[jax.Array, Loss]:
            loss = experiment.objective.loss(model, batch, key)
            return loss.total, loss

        gradient, loss = jax.grad(total, has_aux=True)(model)
        gradient = jax.tree.map(lambda g: g.astype(jnp.float32), gradient)
        return jax.lax.with_sharding_constraint(gradient, layout), loss

    count = experiment.accumulate
    if count == 1:
        return one(batch, jax.random.fold_in(key, 0))

    def body(sums: tuple[Any, Loss], xs: tuple[jax.Array, Batch]) -> tuple[tuple[Any, Loss], None]:
        index, micro = xs
        return jax.tree.map(jnp.add, sums, one(micro, jax.random.fold_in(key, index))), None

    # Micro-batch i holds the rows congruent to i, so that rows stay on the devices that hold them.
    micros = {name: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0) for name, x in batch.items()}
    shapes = jax.eval_shape(one, {name: x[0] for name, x in micros.items()}, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(body, zeros, (jnp.arange(count), micros))[0]


def averaged(decay: float | None, ema: Any, model: Any, updates: jax.Array) -> Any:
    """The moving average after one more update; early on its memory is short, (1 + n) / (10 + n) of n updates."""
    if decay is None:
        return None
    kept = jnp.minimum(decay, (1 + updates) / (10 + updates))
    return jax.tree.map(lambda average, x: kept * average + (1 - kept) * x, ema, model)


def eval_step(experiment: AnyExperiment, mesh: Mesh) -> Callable[[Any, Batch], Loss]:
    """The compiled (model, batch) -> Loss of evaluation, its sums alike on every host."""

    def step(model: Any, batch: Batch) -> Loss:
        return experiment.objective.loss(model, batch, None)

    return jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()))
