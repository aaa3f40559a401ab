"""The loop: an experiment and a placement in, a trained model and its run folder out."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import jax
import numpy as np

from zoo import sharding
from zoo.train import ending, processes, run_folder
from zoo.train import session as sessions
from zoo.train.checkpoints import Checkpoints
from zoo.train.data.loader import batches
from zoo.train.evaluate import evaluator
from zoo.train.experiment import Batch, Dataset, Placement, UserError
from zoo.train.interruption import Interruption
from zoo.train.metrics import Interval, Jsonl, Meter, Reader, TensorBoard, Tracker
from zoo.train.progress import Display, display
from zoo.train.session import Session
from zoo.train.step import (
    AnyExperiment,
    Metrics,
    State,
    abstract_batch,
    abstract_state,
    compiled,
    init_state,
    train_step,
)

CompiledStep = Callable[[State, Batch], tuple[State, Metrics]]


def run(experiment: AnyExperiment, placement: Placement) -> State:
    """Trains `experiment` to its last step, in a new run folder or on from the newest checkpoint of an old one.

    Devices must be ready (zoo.train.launch.start); every process of a run calls this alike. Raises UserError, or a
    ValueError of ours, for what a person can mend, and KeyboardInterrupt after a signal, with the run saved.
    """
    given = placement.run
    if given is not None:
        processes.on_first(lambda: run_folder.check(given, experiment))
    session = sessions.start(experiment, placement)
    data, held_out = session.dataset("train"), session.dataset("validation")
    # Traced before anything is written: what does not fit together leaves no folder behind.
    lowered = lower(session, data)

    def create() -> str:
        folder = given or run_folder.default_folder(experiment)
        tokenizer = sessions.tokenizer_file(experiment.data)
        run_folder.create(folder, experiment, session.experiment.model, data.info, tokenizer)
        held.enter_context(run_folder.claimed(folder))
        return str(folder)

    with ExitStack() as held:
        folder = Path(processes.on_first(create))
        show = display(experiment.steps, experiment.data.unit, quiet=not processes.is_first())
        held.enter_context(closing(show))
        trainer = held.enter_context(closing(Trainer(session, data, held_out, folder, show)))
        announce(session, data, folder, show)
        step, state, start = trainer.prepare(lowered)
        trainer.track(start, tensorboard=placement.tensorboard)
        state = trainer.train(step, state, start)
        figures = trainer.latest or trainer.evaluate(state)
        ending.conclude(session, experiment, folder, state.best, figures, trainer.meter, show)
        return state


def lower(session: Session, data: Dataset) -> jax.stages.Lowered:
    """The training step, traced for the session's mesh. Raises UserError, or a ValueError of ours, as `run` does."""
    experiment, mesh = session.experiment, session.mesh
    with sharding.use(mesh):
        state = abstract_state(experiment, mesh)
        batch = abstract_batch(data.batch(0, [0]), experiment.batch_size, mesh)
        return train_step(experiment, mesh).lower(state, batch)


def announce(session: Session, data: Dataset, folder: Path, show: Display) -> None:
    """Says on what, which model, which data, and where."""
    for name, text in session.facts(data.info).items():
        show.line(f"{name:<10}{text}")
    show.line(f"run       {folder}")


class Trainer:
    """The steps of a session, and what happens between them."""

    def __init__(self, session: Session, data: Dataset, held_out: Dataset, folder: Path, show: Display):
        self.session, self.experiment, self.mesh = session, session.experiment, session.mesh
        self.data, self.folder, self.show = data, folder, show
        self.meter = meter(session)
        self.reader = Reader()
        self.trackers: list[Tracker] = []
        self.checkpoints = Checkpoints(
            folder / run_folder.CHECKPOINTS,
            keep_last=self.experiment.keep_last,
            keep_every=self.experiment.keep_every,
            say=show.line,
        )
        self.validate = evaluator(session, held_out)
        self.latest: dict[str, float] | None = None

    def prepare(self, lowered: jax.stages.Lowered) -> tuple[CompiledStep, State, int]:
        """The compiled step, the state to begin with, how many steps it has behind it. One is made beside the other."""
        with ThreadPoolExecutor(1) as beside:
            compiling = beside.submit(self.compile, lowered)
            state, start = self.restore()
            return compiling.result(), state, start

    def restore(self) -> tuple[State, int]:
        with self.meter.losing("startup"):
            found = self.checkpoints.restore(abstract_state(self.experiment, self.mesh))
            if found is None:
                return init_state(self.experiment, self.mesh), 0
        self.show.line(f"resumed   from step {found.step}")
        return found.state, found.step

    def track(self, start: int, *, tensorboard: bool) -> None:
        if processes.is_first():
            self.trackers = [Jsonl(self.folder / run_folder.METRICS, start)]
            self.trackers += [TensorBoard(self.folder / "tensorboard", start)] if tensorboard else []

    def train(self, step: CompiledStep, state: State, start: int) -> State:
        """From step `start` to the last. Devices are waited for where figures are due, and one interval late."""
        experiment = self.experiment
        source = batches(self.data, self.mesh, experiment.batch_size, start, experiment.steps)
        with sharding.use(self.mesh), closing(source), Interruption() as interruption:
            self.meter.begin()
            for done in range(start + 1, experiment.steps + 1):
                with self.meter.losing("input"):
                    batch = next(source)
                state, metrics = step(state, batch)
                self.reader.add(metrics)
                last, stop = done == experiment.steps, interruption.requested(done)
                evaluating = done % experiment.eval_every == 0 or last
                saving = done % experiment.checkpoint_every == 0 or last or stop
                if done % experiment.log_every == 0 or evaluating or saving:
                    self.log(self.reader.cut(done, keep=0 if evaluating or saving else 1))
                if evaluating:
                    self.evaluate(state, done)
                if saving:
                    self.save(state, done)
                if stop and not last:
                    self.stop(done)
        self.checkpoints.wait()
        return state

    def compile(self, lowered: jax.stages.Lowered) -> CompiledStep:
        with self.meter.losing("compile"):
            return compiled(lowered)

    def log(self, intervals: list[Interval]) -> None:
        """Records intervals of steps. Raises UserError where too many steps in a row were skipped."""
        for interval in intervals:
            steps: list[Metrics] = interval.figures
            sums = jax.tree.map(lambda *values: float(np.sum(values, dtype=np.float64)), *[m.loss for m in steps])
            figures = self.experiment.objective.summary(*sums) if sums.weight else {"loss": math.nan}
            figures |= {name: float(getattr(steps[-1], name)) for name in ("grad_norm", "learning_rate", "skipped")}
            figures |= self.meter.interval(len(steps), interval.end)
            self.record("train", interval.last, figures)
            self.show.update(interval.last, figures)
            for number, metrics in enumerate(steps, interval.last - len(steps) + 1):
                self.check(number, int(metrics.bad_steps), float(metrics.grad_norm))

    def check(self, step: int, bad_steps: int, grad_norm: float) -> None:
        if bad_steps:
            self.show.line(f"step {step} skipped: its loss or gradient is not finite (gradient norm {grad_norm})")
        if bad_steps >= self.experiment.max_bad_steps:
            raise UserError(
                f"{bad_steps} steps in a row, to step {step}, had a loss or gradient that is not finite: lower "
                f"--optimizer.learning-rate {self.experiment.optimizer.learning_rate:g}, or look at the data"
            )

    def evaluate(self, state: State, step: int | None = None) -> dict[str, float]:
        """Held-out figures of the state's best model, recorded where `step` is given."""
        with self.meter.losing("evaluation"):
            self.latest = self.validate(state.best)
        if step is not None:
            self.record("validation", step, self.latest)
            self.show.line(f"step {step}  validation {ending.sentence(self.latest)}")
        return self.latest

    def save(self, state: State, step: int) -> None:
        with self.meter.losing("checkpoint"):
            meta = {"experiment": run_folder.encode(self.experiment), "data": run_folder.encode(self.data.info)}
            self.checkpoints.save(step, state, meta=meta)

    def stop(self, step: int) -> None:
        self.checkpoints.wait()
        self.show.line(
            f"stopped   after step {step}, which is saved; the same command with --run {self.folder} goes on"
        )
        raise KeyboardInterrupt

    def record(self, kind: str, step: int, figures: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log({"step": step, "kind": kind, **figures, "seconds": self.meter.seconds()})

    def close(self) -> None:
        """Leaves nothing half done: a save that began is finished, whatever ended the run."""
        self.reader.close()
        for tracker in self.trackers:
            tracker.close()
        self.checkpoints.wait()


def meter(session: Session) -> Meter:
    experiment, shape = session.experiment, session.experiment.data.example_shape
    unit = experiment.data.unit
    return Meter(
        unit=unit,
        units=experiment.batch_size * (sum(shape) if unit == "tokens" else 1),
        forward_flops=experiment.model.forward_flops(shape),
        batch_size=experiment.batch_size,
        device_kinds=[device.device_kind for device in session.mesh.devices.flat],
    )
