"""Several local processes that play the hosts of a pod: started, watched, interrupted and ended together."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import IO

from zoo.train.experiment import Placement, UserError

# In the environment of a host; its standard input is a pipe that closes when the parent is gone.
CHILD = "ZOO_SIMULATED_HOST"

# Seconds between looks at the hosts, and from asking one to end to making it.
_POLL = 0.05
_GRACE = 2.0

# Exit code for what a person can mend.
_USER_ERROR = 2


@dataclass(frozen=True)
class Host:
    """One process; `log` holds its stderr, or is None for the one whose output is passed on."""

    process: subprocess.Popen[bytes]
    log: IO[bytes] | None

    def last_line(self) -> str:
        if self.log is None:
            return ""
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""


def split(placement: Placement) -> list[Placement]:
    """One placement for each simulated host, the devices divided between them; raises UserError if they cannot be."""
    hosts = placement.simulate_hosts
    devices = placement.simulate_devices or hosts
    if hosts < 1:
        raise UserError(f"--simulate-hosts {hosts}: give a number from 1")
    if devices % hosts:
        raise UserError(f"--simulate-devices {devices} does not divide over --simulate-hosts {hosts}")
    if placement.coordinator is not None:
        raise UserError("--simulate-hosts starts processes of its own: leave out --coordinator")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    alike = replace(
        placement, simulate_hosts=1, simulate_devices=devices // hosts, coordinator=address, num_processes=hosts
    )
    return [replace(alike, process_id=index) for index in range(hosts)]


def flags(placement: Placement) -> list[str]:
    """What `split` filled in, as command-line flags that follow and overrule those a person gave."""
    return [
        f"--simulate-hosts={placement.simulate_hosts}",
        f"--simulate-devices={placement.simulate_devices}",
        f"--coordinator={placement.coordinator}",
        f"--num-processes={placement.num_processes}",
        f"--process-id={placement.process_id}",
    ]


def run(command: Callable[[Placement], Sequence[str]], placement: Placement) -> int:
    """Runs `command(its placement)` for each of `placement.simulate_hosts` processes; returns one exit code for all.

    The first one's output is passed on. When one ends badly, one line on stderr says which, and the others are ended.
    Interrupts are passed to all. No host outlives this process, however it ends.
    """
    placements = split(placement)
    with contextlib.ExitStack() as stack:
        hosts: list[Host] = []
        stack.callback(_end, hosts)
        for each in placements:
            log = None if each.process_id == 0 else stack.enter_context(tempfile.TemporaryFile())
            hosts.append(_start(command(each), log))
        with _forwarding_signals(hosts) as received:
            return _watch(hosts, received)


def _start(command: Sequence[str], log: IO[bytes] | None) -> Host:
    environment = os.environ | {CHILD: "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.PIPE,
        stdout=None if log is None else subprocess.DEVNULL,
        stderr=log,
        env=environment,
        # Ctrl-C goes to a whole group: the hosts are not in this one, so that each hears of it once, from here.
        process_group=0,
    )
    return Host(process, log)


def _watch(hosts: list[Host], received: list[int]) -> int:
    while True:
        codes = [host.process.poll() for host in hosts]
        failed = [index for index, code in enumerate(codes) if code]
        if None not in codes and (received or not failed):
            return _exit_code(codes[failed[0]] or 0) if failed else 0
        if failed and not received:
            return _report(hosts, failed[0])
        time.sleep(_POLL)


def _report(hosts: list[Host], index: int) -> int:
    """Ends the others of the failed host `index`, says what happened, and returns the exit code."""
    if hosts[index].process.returncode == _USER_ERROR and index != 0:
        # A person's mistake ends every host, and the first one prints the line that names it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            hosts[0].process.wait(_GRACE)
        index = 0 if hosts[0].process.returncode == _USER_ERROR else index
    _end(hosts)
    code = hosts[index].process.returncode
    if index == 0 and code == _USER_ERROR:
        return code
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    line = hosts[index].last_line()
    last = f"; its last line was: {line}" if line else ""
    print(f"zoo: host {index} of {len(hosts)} {how}, so the others were ended{last}", file=sys.stderr)
    return _exit_code(code)


def _exit_code(code: int) -> int:
    """As a shell counts: 128 plus the signal that killed a process."""
    return 128 - code if code < 0 else code


def _end(hosts: list[Host]) -> None:
    """Ends those that still run: asked first, then made."""
    for host in hosts:
        if host.process.poll() is None:
            host.process.terminate()
    deadline = time.monotonic() + _GRACE
    for host in hosts:
        try:
            host.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            host.process.kill()
            host.process.wait()
        assert host.process.stdin is not None
        host.process.stdin.close()


@contextlib.contextmanager
def _forwarding_signals(hosts: list[Host]) -> Iterator[list[int]]:
    """Passes SIGINT and SIGTERM on to every host, the second of them as SIGKILL; yields the list of those received."""
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for host in hosts:
            if host.process.poll() is None:
                host.process.send_signal(number if len(received) == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def become_host() -> None:
    """Called in a process that `run` started: it ends with its parent, and only Python writes to its output."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Gloo greets on the C++ standard output; Python's moves to a copy of it, and what is left there goes nowhere.
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def _end_with_parent() -> None:
    """Waits for standard input to close: then the parent is gone, and nobody would hear of this process's end."""
    while os.read(0, 1):
        pass
    os._exit(1)
