"""Optimizers by name, with schedule, clipping and a weight decay that spares biases and norms.

Parameters are told apart by their logical axes, never by rank: they are stacked over layers and have several input or
output dimensions.
"""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from zoo import sharding
from zoo.train.experiment import Optimizer, UserError

Rate = Callable[[Any], jax.Array]

SCHEDULES = ("cosine", "linear", "constant", "inverse_sqrt")

# Added to the root of Adam's second moment.
EPSILON = 1e-8

# Kinds of parameter that are tables of vectors, not maps between spaces.
_TABLES = {"vocab", "positions", "classes"}

# Optimizers that need more than gradients and a schedule: a line search, a noise key, a constant rate.
_OTHER_ARGUMENTS = {"lbfgs", "noisy_sgd", "optimistic_adam", "rprop", "sm3"}


def schedule(optimizer: Optimizer, steps: int) -> Rate:
    """The learning rate of step 0, 1, ...: linear warm-up, then down to final_fraction of the peak at `steps`.

    "inverse_sqrt" falls as 1 / sqrt(step), whatever `steps` and final_fraction are (Vaswani et al. 2017, equation 3,
    whose peak for a model of width D is (D * warmup_steps) ** -0.5).
    """
    if optimizer.schedule not in SCHEDULES:
        raise UserError(f"schedule {optimizer.schedule!r} is unknown: the schedules are {', '.join(SCHEDULES)}")
    warmup = min(optimizer.warmup_steps, steps)

    def rate(step: Any) -> jax.Array:
        rise = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
        done = jnp.clip((step + 1 - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        floor = optimizer.final_fraction
        share = {
            "cosine": floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * done)),
            "linear": floor + (1 - floor) * (1 - done),
            "constant": jnp.ones_like(done),
            "inverse_sqrt": jnp.sqrt(jnp.minimum(1.0, max(warmup, 1) / (step + 1))),
        }
        return optimizer.learning_rate * rise * share[optimizer.schedule]

    return rate


def make(optimizer: Optimizer, steps: int) -> optax.GradientTransformationExtraArgs:
    """The transformation of gradients for a run of `steps` steps; its moments are laid out as their parameters.

    `update(gradient, state, params, good=good)` gives zero updates and the state as it was where `good`, [] bool, does
    not hold; norm= is the gradient's, where it is known. Decay is decoupled (Loshchilov & Hutter 2019), also where
    optax's optimizer of that name has none.
    Raises UserError on an unknown optimizer or schedule, or a moment_dtype that the optimizer has no use for.
    """
    rate = schedule(optimizer, steps)
    if optimizer.name == "adamw":
        core = adamw(optimizer, rate)
    else:
        core = guarded(muon(optimizer, rate) if optimizer.name == "muon" else named(optimizer, rate))
    clip = optax.identity() if optimizer.clip_norm is None else clipped(optimizer.clip_norm)
    return keep_layout(optax.chain(clip, core))


def clipped(limit: float) -> optax.GradientTransformation:
    """optax.clip_by_global_norm as one factor, which fuses into every reader; its quotients do not on CPUs.

    `norm`, of the updates, is taken here where it is not given.
    """

    def update(updates: Any, state: Any, params: Any, *, norm: jax.Array | None = None, **_: Any) -> tuple[Any, Any]:
        norm = global_norm(updates) if norm is None else norm
        factor = limit / jnp.maximum(norm, limit)
        return jax.tree.map(lambda g: factor * g, updates), state

    return transformation(lambda _: optax.EmptyState(), update)


def global_norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all arrays of a tree, [] float32.

    Products of arrays with themselves: XLA's CPU compiler would write out the squares before it sums them.
    """

    def square(x: jax.Array) -> jax.Array:
        axes = tuple(range(x.ndim))
        return jax.lax.dot_general(x, x, ((axes, axes), ((), ())), precision="highest")

    return jnp.sqrt(sum(square(x.astype(jnp.float32)) for x in jax.tree.leaves(tree)))


def guarded(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner`, which takes a step only where `good` holds."""

    def update(updates: Any, state: Any, params: Any, *, good: jax.Array, **_: Any) -> tuple[Any, Any]:
        updates, new = inner.update(updates, state, params)
        return jax.tree.map(lambda u: jnp.where(good, u, 0), updates), _chosen(good, new, state)

    return transformation(inner.init, update)


def adamw(optimizer: Optimizer, rate: Rate) -> optax.GradientTransformationExtraArgs:
    """optax.adamw, guarded, in an order that lets the compiler write every array in place in one pass.

    Moments are decided before updates are made from them, so that nothing that is overwritten is read later, and
    whatever is alike for all elements is one factor. optax's own order cost five times as long on a CPU, and a copy of
    the moments.
    """
    mu_dtype = dtype(optimizer.moment_dtype or "float32")
    b1, b2 = optimizer.b1, optimizer.b2

    def init(params: Any) -> optax.ScaleByAdamState:
        mu = jax.tree.map(lambda x: jnp.zeros_like(x, mu_dtype), params)
        nu = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(gradient: Any, state: Any, params: Any, *, good: jax.Array, **_: Any) -> tuple[Any, Any]:
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: (b1 * m + (1 - b1) * g).astype(m.dtype), state.mu, gradient)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, gradient)
        new = _chosen(good, optax.ScaleByAdamState(count, mu, nu), state)
        step = jnp.where(good, rate(state.count), 0.0)
        unbias_mu, unbias_nu = 1 / (1 - b1**count), 1 / (1 - b2**count)

        def one(decays: bool, mu: Any, nu: Any, param: Any) -> Any:
            decay = optimizer.weight_decay if decays else 0.0

            def change(m: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
                direction = unbias_mu * m / (jnp.sqrt(unbias_nu * v) + EPSILON) + decay * x
                return (-step * direction).astype(x.dtype)

            return jax.tree.map(change, mu, nu, param)

        return jax.tree.map(one, decay_mask(params), new.mu, new.nu, params), new

    return transformation(init, update)


def transformation(init: Callable[..., Any], update: Callable[..., Any]) -> optax.GradientTransformationExtraArgs:
    """optax's pair of functions; its own types know neither modules nor `good`."""
    return optax.GradientTransformationExtraArgs(init, update)


def _chosen(good: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `good` holds, in the dtypes of `old`: gradients are float32 whatever parameters and moments are."""
    return jax.tree.map(lambda new, old: jnp.where(good, new.astype(old.dtype), old), new, old)


def decay_mask(params: Any) -> Any:
    """One bool in the place of each parameter: whether it decays."""
    return jax.tree.map(lambda x: sharding.decays(sharding.logical_axes(x)), params, is_leaf=sharding.is_variable)


def with_decay(core: optax.GradientTransformation, optimizer: Optimizer, rate: Rate) -> optax.GradientTransformation:
    """`core`, whose finished updates also take rate * weight_decay off every parameter that decays."""

    def update(updates: Any, state: Any, params: Any, **_: Any) -> tuple[Any, Any]:
        factor = rate(state.count) * optimizer.weight_decay

        def one(decays: bool, update: Any, param: Any) -> Any:
            return jax.tree.map(lambda u, p: u - factor * p, update, param) if decays else update

        updates = jax.tree.map(one, decay_mask(params), updates, params)
        return updates, optax.ScaleByScheduleState(state.count + 1)

    def init(_: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    return optax.chain(core, transformation(init, update)) if optimizer.weight_decay else core


def named(optimizer: Optimizer, rate: Rate) -> optax.GradientTransformation:
    """An optimizer of optax; the fields of `optimizer` that it has parameters for are handed over."""
    known = optimizer_names()
    if optimizer.name not in known:
        near = difflib.get_close_matches(optimizer.name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"
        raise UserError(f"optimizer {optimizer.name!r} is unknown: {hint}")
    function = getattr(optax, optimizer.name)
    accepted = inspect.signature(function).parameters
    options: dict[str, Any] = {"learning_rate": rate}
    options |= {name: getattr(optimizer, name) for name in ("b1", "b2") if name in accepted}
    if optimizer.moment_dtype is not None:
        if "mu_dtype" not in accepted:
            raise UserError(f"optimizer {optimizer.name!r} keeps no moments of another dtype: drop moment_dtype")
        options["mu_dtype"] = dtype(optimizer.moment_dtype)
    mask = next((name for name in ("mask", "weight_decay_mask") if name in accepted), None)
    if mask is not None and "weight_decay" in accepted:
        return function(**options, weight_decay=optimizer.weight_decay, **{mask: decay_mask})
    return with_decay(function(**options), optimizer, rate)


def optimizer_names() -> list[str]:
    """What `Optimizer.name` may be: muon, and optax's functions that need a learning rate alone."""

    def usable(name: str) -> bool:
        function = getattr(optax, name)
        if name.startswith(("_", "scale_by")) or name in _OTHER_ARGUMENTS or not inspect.isfunction(function):
            return False
        parameters = inspect.signature(function).parameters
        required = [p.name for p in parameters.values() if p.default is p.empty and p.kind != p.VAR_KEYWORD]
        return "learning_rate" in parameters and set(required) <= {"learning_rate"}

    return sorted({"muon", *filter(usable, dir(optax))})


def dtype(name: str) -> jnp.dtype:
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"moment_dtype {name!r} is unknown: choose float32, bfloat16 or float16")
    return jnp.dtype(name)


def muon(optimizer: Optimizer, rate: Rate) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for maps between spaces, Adam for tables and vectors.

    Updates are scaled to the size of Adam's (0.2 sqrt(max(fan_in, fan_out)), Liu et al. 2025), so that one learning
    rate and one decay serve both.
    """
    core = optax.contrib.muon(
        rate,
        adam_b1=optimizer.b1,
        adam_b2=optimizer.b2,
        mu_dtype=None if optimizer.moment_dtype is None else dtype(optimizer.moment_dtype),
        muon_weight_dimension_numbers=muon_dimensions,
        consistent_rms=0.2,
    )
    return with_decay(core, optimizer, rate)


def muon_dimensions(params: Any) -> Any:
    """What Muon takes as the matrix of each parameter, in the parameter's place; None leaves it to Adam.

    The last axis is the output, with the heads before a head_dim; "layers" and nameless axes stack matrices; the rest
    is the input: (heads, head_dim, embed) maps heads x head_dim to embed.
    """

    def one(variable: Any) -> MuonDimensionNumbers | None:
        axes = sharding.logical_axes(variable)
        if not sharding.decays(axes) or _TABLES & set(axes):
            return None
        matrix = [i for i, axis in enumerate(axes) if axis not in (None, "layers")]
        outputs = 2 if axes[matrix[-1]] == "head_dim" else 1
        if len(matrix) <= outputs:
            return None
        return MuonDimensionNumbers(tuple(matrix[:-outputs]), tuple(matrix[-outputs:]))

    return jax.tree.map(one, params, is_leaf=sharding.is_variable)


def keep_layout(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """`inner`, its state a tree that zoo.sharding can lay out.

    Moments are Variables, with the logical axes of their parameter. Those of another rank (Adafactor's factors) are
    made to name no axis, which replicates them, and those that hold nothing (Muon's, for a parameter that Adam has)
    give way to the nothing that they hold.
    """

    def relabel(variable: Any) -> Any:
        if not sharding.is_variable(variable):
            return variable
        value = variable.get_value()
        if not hasattr(value, "ndim"):
            return value
        fits = len(sharding.logical_axes(variable)) == value.ndim
        return variable if fits else variable.replace(axes=(None,) * value.ndim)

    def outward(state: Any) -> Any:
        return jax.tree.map(relabel, state, is_leaf=sharding.is_variable)

    def init(params: Any) -> Any:
        return outward(inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        structure = jax.tree.structure(jax.eval_shape(inner.init, params))
        updates, state = inner.update(updates, jax.tree.unflatten(structure, jax.tree.leaves(state)), params, **extra)
        return updates, outward(state)

    return transformation(init, update)
