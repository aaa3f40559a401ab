"""What the processes of a run say to each other outside of compiled steps. With one process it costs nothing."""

import uuid
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from zoo.train.experiment import UserError

_LIMIT = 4096


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def on_first(function: Callable[[], str | None]) -> str:
    """Calls `function` on the first process while the others wait; its answer, on all of them ("" for None).

    What a person can mend (UserError, OSError, ValueError) is raised as UserError on all, so that none is left waiting.
    """
    if jax.process_count() == 1:
        return function() or ""
    answer = ""
    if is_first():
        try:
            answer = "=" + (function() or "")
        except (UserError, OSError, ValueError) as error:
            answer = "!" + " ".join(str(error).split())
    answer = _broadcast(answer)
    if answer.startswith("!"):
        raise UserError(answer[1:])
    return answer[1:]


def on_each(function: Callable[[], object]) -> list[bool]:
    """Calls `function` on every process, where it may not speak to others; which of them answered with something true.

    Raises as on_first does what was raised on any.
    """
    message = ""
    answer: object = False
    try:
        answer = function()
    except (UserError, OSError, ValueError) as error:
        if jax.process_count() == 1:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
    if message := agreed(message):
        raise UserError(message)
    return [bool(each) for each in np.atleast_1d(multihost_utils.process_allgather(np.bool_(answer)))]


def beside(folder: Path) -> tuple[int, int]:
    """Which this process is among those that see the same files in `folder`, and how many these are.

    Each leaves a file there for a moment. Where one sees another's too late, both are taken for alone.
    """
    name = on_first(lambda: uuid.uuid4().hex)
    own = folder / f"{name}.{jax.process_index()}"
    on_each(own.touch)
    try:
        seen = [index for index in range(jax.process_count()) if (folder / f"{name}.{index}").exists()]
        on_each(lambda: None)
    finally:
        own.unlink(missing_ok=True)
    return seen.index(jax.process_index()), len(seen)


def agreed(message: str) -> str:
    """The first message that is not "" among those of all processes, which wait here for each other."""
    if jax.process_count() == 1:
        return message
    own = np.zeros(_LIMIT, np.uint8)
    text = np.frombuffer(message.encode(errors="replace")[:_LIMIT], np.uint8)
    own[: len(text)] = text
    for row in np.asarray(multihost_utils.process_allgather(own)):
        if row.any():
            return row.tobytes().rstrip(b"\0").decode(errors="replace")
    return ""


def _broadcast(text: str) -> str:
    """The first process's text, on all."""
    data = np.zeros(_LIMIT, np.uint8)
    encoded = np.frombuffer(text.encode()[:_LIMIT], np.uint8)
    data[: len(encoded)] = encoded
    return bytes(multihost_utils.broadcast_one_to_all(data)).rstrip(b"\0").decode(errors="ignore")
