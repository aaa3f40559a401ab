"""What a run is: one frozen dataclass, made by a recipe, and the protocols of its parts.

An Experiment is complete: with the seed it determines the run. Where a run is placed (mesh, hosts, folder) is not
part of it and may differ from start to start.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import jax
import numpy as np
from flax import nnx

Batch = dict[str, jax.Array]


class Loss(NamedTuple):
    """An objective's answer for one (micro-)batch: plain sums, divided once, after every micro-batch and host.

    total: sum of the losses [], float32.  weight: what `total` is divided by (tokens, images) [], float32.
    metrics: further sums [] by name, for `Objective.summary` to make ratios of.
    """

    total: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


class ModelConfig(Protocol):
    """A frozen dataclass in zoo/models/; knows its module, its size and its cost."""

    def build(self, rngs: nnx.Rngs) -> nnx.Module: ...

    def forward_flops(self, shape: tuple[int, ...]) -> float:
        """FLOPs of one example's forward pass, `shape` its input ((T,) or (Y, X, C)); a multiply-add is two.

        Matrix products and convolutions alone; causal attention counted as half.
        """
        ...


@dataclass(frozen=True)
class DataInfo:
    """What a person is told of a data set. `sha256` is over the bytes of its examples, in order."""

    name: str
    sha256: str
    examples: int
    bytes: int
    detail: str = ""


class Dataset(Protocol):
    """One split, as a pure function of its index: nothing to rewind, and no process count in the order.

    batches: number of batches of one pass (validation walks them once; training goes on past them, epoch by epoch).
    """

    @property
    def info(self) -> DataInfo: ...

    @property
    def batches(self) -> int: ...

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Rows `rows` of global batch `step`; leading axis len(rows). What pads a last batch has weight 0."""
        ...


class DataConfig(Protocol):
    """A frozen dataclass that names a data set and how it is cut into examples."""

    @property
    def unit(self) -> str:
        """What throughput counts: "tokens" or "images"."""
        ...

    def prepare(self) -> None:
        """Downloads, writes or indexes what is not there yet. Called on the first process alone; the others wait.

        Data with a `prepare_together()` too has that called on all of several processes instead.
        """
        ...

    def open(self, split: str, *, batch_size: int, seed: int) -> Dataset:
        """`split` is "train" (shuffled by seed) or "validation" (in order)."""
        ...

    @property
    def example_shape(self) -> tuple[int, ...]:
        """(T,) for text, (S, T) for pairs of texts, (Y, X, C) for images."""
        ...

    def fit(self, model: Any) -> Any:
        """`model` (its config) with what only the data knows, say a tokenizer's vocabulary; called after prepare."""
        ...


class Objective(Protocol):
    """A frozen dataclass: a loss over batches, and the figures a person reads off its sums."""

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        """`key` None means evaluation: no dropout, and any noise drawn from fixed keys."""
        ...

    def summary(self, total: float, weight: float, metrics: Mapping[str, float]) -> dict[str, float]:
        """Readable figures from sums over any number of batches; has at least "loss"."""
        ...


class Sampler(Protocol):
    """A frozen dataclass: what a trained model shows, and its command-line options for `zoo sample`."""

    def check(self, model: Any, data: Any) -> None:
        """Raises where a model of this config cannot be drawn from; called before training, so that no run ends so."""
        ...

    def sample(
        self, model: Any, data: Any, key: jax.Array, folder: Path, emit: Callable[[str], None] | None = None
    ) -> str:
        """Draws from `model`; returns text, or the paths of the pictures that it wrote below `folder`, each a line.

        `emit` receives text piece by piece while it is made, where the sampler can.
        """
        ...


@dataclass(frozen=True)
class Optimizer:
    """Named optimizer and schedule: linear warm-up, then down from the peak. Decay spares biases and norms."""

    name: str = "adamw"  # adamw, muon, or any optimizer of optax by its name
    learning_rate: float = 3e-4  # at the peak
    warmup_steps: int = 100
    schedule: str = "cosine"  # or linear, constant, inverse_sqrt
    final_fraction: float = 0.1  # of the peak, at the last step, with cosine and linear
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    clip_norm: float | None = 1.0  # of the gradient over all parameters
    moment_dtype: str | None = None  # of the first moment; None is float32 with adamw, else as optax has it


M = TypeVar("M", bound=Any)
D = TypeVar("D", bound=Any)
O = TypeVar("O", bound=Any)  # noqa: E741
S = TypeVar("S", bound=Any)


@dataclass(frozen=True)
class Experiment(Generic[M, D, O, S]):
    """A run. Every field defines it: a run folder whose experiment differs in one is another run."""

    name: str  # of the recipe
    model: M
    data: D
    objective: O
    sampler: S
    optimizer: Optimizer = field(default_factory=Optimizer)
    steps: int = 1000
    batch_size: int = 32  # examples of one step, over all devices
    accumulate: int = 1  # micro-batches that a step averages, batch_size / accumulate examples each
    seed: int = 0
    compute: str = "auto"  # dtype of products; auto is bfloat16 on accelerators, else float32
    ema: float | None = None  # decay of an average of the parameters, which is then what is evaluated and sampled
    max_bad_steps: int = 10  # steps in a row with a non-finite gradient that stop the run
    log_every: int = 10
    eval_every: int = 500
    checkpoint_every: int = 500
    keep_last: int = 2  # newest checkpoints that stay
    keep_every: int | None = None  # checkpoints at multiples of this step stay as well


@dataclass(frozen=True)
class Placement:
    """Where and how a run is started; may differ at each start."""

    run: Path | None = None  # folder of the run, created or resumed; a new one below ./runs unless given
    mesh: str | None = None  # such as data=2,fsdp=2,tensor=2; all devices on data unless given
    simulate_devices: int | None = None  # so many CPU devices, whatever hardware there is
    simulate_hosts: int = 1  # so many local processes that talk as hosts would, the devices divided between them
    coordinator: str | None = None  # host:port of the first process, where no pod or cluster tells of it
    num_processes: int | None = None
    process_id: int | None = None
    tensorboard: bool = False  # write figures for TensorBoard as well
    compile_cache: bool = True  # keep compiled programs between runs


class UserError(Exception):
    """What a person can mend: one line that names the thing, the value and the mend. The command exits with 2."""


def differing_fields(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Lines "field: a -> b" for each leaf in which two experiments differ."""
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        return [
            line
            for f in dataclasses.fields(a)
            for line in differing_fields(getattr(a, f.name), getattr(b, f.name), f"{prefix}{f.name}.")
        ]
    return [] if a == b else [f"{prefix[:-1]}: {a!r} -> {b!r}"]
