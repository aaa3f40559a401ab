"""SIGTERM and SIGINT as a request to stop after a step, agreed on by all processes."""

import os
import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Interruption:
    """Within it the first signal is remembered, so that the run can save; the second acts as it does elsewhere.

    With several processes, JAX's preemption service hears SIGTERM on any of them and names a step that all reach.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        listened = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
        self._before = {number: signal.signal(number, self._hear) for number in listened}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def requested(self, step: int) -> bool:
        """Whether to stop before step `step`; every process asks at every step, and gets the same answer."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signalled

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self._signalled = True
        self._restore()
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
