"""What the processes of a run say to each other outside of compiled steps. With one process it costs nothing."""

from collections.abc import Callable

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


def _broadcast(text: str) -> str:
    """The first process's text, on all."""
    data = np.zeros(_LIMIT, np.uint8)
    encoded = np.frombuffer(text.encode()[:_LIMIT], np.uint8)
    data[: len(encoded)] = encoded
    return bytes(multihost_utils.broadcast_one_to_all(data)).rstrip(b"\0").decode(errors="ignore")
