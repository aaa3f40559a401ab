"""Real processes: simulated devices and hosts, and how they end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from zoo.train import hosts, launch
from zoo.train.experiment import Placement, UserError

# A host that joins the others and adds up a number from each.
JOIN = """
import sys
from zoo.train import launch
from zoo.train.experiment import Placement
devices, coordinator, count, index = sys.argv[1:]
launch.start(Placement(simulate_devices=int(devices), coordinator=coordinator, num_processes=int(count),
                       process_id=int(index), compile_cache=False))
import jax
from jax.experimental import multihost_utils
total = multihost_utils.process_allgather(jax.numpy.asarray(float(index) + 1)).sum()
print(f"devices {jax.device_count()} local {jax.local_device_count()} sum {total:.0f}")
"""

# Starts hosts from a process of their own, which a test can interrupt and kill.
PARENT = """
import sys
from zoo.train import hosts
from zoo.train.experiment import Placement
def command(p):
    return [sys.executable, "-c", sys.argv[1], str(p.simulate_devices), p.coordinator, str(p.num_processes),
            str(p.process_id)]
sys.exit(hosts.run(command, Placement(simulate_hosts=2, simulate_devices=4)))
"""


def start(host: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, host], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until_gone(pids: list[int], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")


def test_devices_are_divided_and_hosts_add_up(processes: list[subprocess.Popen[str]]) -> None:
    process = start(JOIN)
    processes.append(process)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out == "devices 4 local 2 sum 3\n", "the first host's output, and nothing of the libraries'"
    assert "warning" not in err


SLEEP = "import time; print('ready', flush=True); time.sleep(100)"


@linux
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_host_is_named_and_the_others_end(victim: int, processes: list[subprocess.Popen[str]]) -> None:
    process = start(SLEEP)
    processes.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    running = children(process.pid)
    os.kill(running[victim], signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL
    assert err == f"zoo: host {victim} of 2 was killed by SIGKILL, so the others were ended\n"
    assert wait_until_gone(running)


def test_the_code_and_last_line_of_a_failed_host_are_passed_on(processes: list[subprocess.Popen[str]]) -> None:
    process = start("import sys, time; time.sleep(100) if sys.argv[4] == '0' else sys.exit('first\\nout of luck')")
    processes.append(process)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err == (
        "zoo: host 1 of 2 ended with exit code 1, so the others were ended; its last line was: out of luck\n"
    )


def test_a_mistake_that_ends_all_is_told_once(processes: list[subprocess.Popen[str]]) -> None:
    process = start("import sys; print('zoo: a mistake', file=sys.stderr); sys.exit(2)")
    processes.append(process)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err == "zoo: a mistake\n"


COUNT_SIGNALS = """
import signal, sys, time
seen = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda n, _: seen.append(n))
print("ready", flush=True)
while not seen:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(40 + sum(seen))
"""


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_every_host_once(number: signal.Signals, processes: list[subprocess.Popen[str]]) -> None:
    process = start(COUNT_SIGNALS)
    processes.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 40 + number and err == ""


@linux
def test_no_host_outlives_a_killed_parent(processes: list[subprocess.Popen[str]]) -> None:
    process = start(f"from zoo.train import hosts; hosts.become_host(); {SLEEP}")
    processes.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    running = children(process.pid)
    assert len(running) == 2
    process.kill()
    process.wait()
    assert wait_until_gone(running)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (Placement(simulate_hosts=2, simulate_devices=3), "3 does not divide over --simulate-hosts 2"),
        (Placement(simulate_hosts=0), "--simulate-hosts 0"),
        (Placement(simulate_hosts=2, coordinator="a:1"), "leave out --coordinator"),
    ],
)
def test_hosts_that_cannot_be(placement: Placement, message: str) -> None:
    with pytest.raises(UserError, match=message):
        hosts.split(placement)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (Placement(coordinator="here:1"), "--num-processes, --process-id missing"),
        (Placement(coordinator="here", num_processes=2, process_id=0), "write host:port"),
    ],
)
def test_processes_that_cannot_be(placement: Placement, message: str) -> None:
    with pytest.raises(UserError, match=message):
        launch.connect(placement)


def test_devices_that_come_too_late() -> None:
    import jax

    assert jax.devices()
    with pytest.raises(UserError, match="came too late"):
        launch.simulate_devices(jax.device_count() + 1)
    with pytest.raises(UserError, match="give a number from 1"):
        launch.simulate_devices(0)


def test_an_idle_accelerator_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "accelerators", lambda: {"cuda": "an NVIDIA GPU"})
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    [line] = launch.warnings_about_devices(simulated=False)
    assert "an NVIDIA GPU" in line and "flaxzoo[cuda]" in line
    assert launch.warnings_about_devices(simulated=True) == []
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert launch.warnings_about_devices(simulated=False) == []


def test_compiled_programs_are_kept(tmp_path: Path) -> None:
    script = (
        "from zoo.train import launch; from zoo.train.experiment import Placement; launch.start(Placement());"
        "import jax; jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0);"
        "jax.jit(lambda x: x @ x)(jax.numpy.ones((8, 8)))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment["FLAXZOO_CACHE"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    assert any((tmp_path / "compiled").iterdir())
