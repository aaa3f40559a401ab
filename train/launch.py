"""Getting this process ready: simulated devices, the compile cache, the other processes, idle accelerators.

All of it must happen before JAX looks for devices, so that nothing may touch a device before `start`.
"""

import os
import shutil
import sys
import warnings
from pathlib import Path

import jax

from zoo.train import hosts
from zoo.train.data.cache import cache_dir
from zoo.train.experiment import Placement, UserError

# PCI identity of TPU chips, as JAX itself looks for them; Google's network cards bear the same vendor.
_TPU_VENDOR = "0x1ae0"
_TPU_DEVICES = {"0x0027", "0x005e", "0x0056", "0x0062", "0x0063", "0x006f", "0x0076"}


def start(placement: Placement) -> None:
    """Makes this process ready to use devices as `placement` says. Call it once, before anything asks for a device.

    Raises UserError where the devices or the other processes cannot be had.
    """
    if os.environ.get(hosts.CHILD):
        hosts.become_host()
    if placement.simulate_devices is not None:
        simulate_devices(placement.simulate_devices)
    if placement.compile_cache:
        jax.config.update("jax_compilation_cache_dir", str(compile_cache()))
    connect(placement)
    for line in warnings_about_devices(simulated=placement.simulate_devices is not None):
        print(f"warning: {line}", file=sys.stderr)


def simulate_devices(count: int) -> None:
    """Makes JAX show `count` CPU devices, whatever hardware there is."""
    if count < 1:
        raise UserError(f"--simulate-devices {count}: give a number from 1")
    jax.config.update("jax_platforms", "cpu")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise UserError("--simulate-devices came too late: this process already uses its devices") from error


def compile_cache() -> Path:
    """Where compiled programs are kept: as configured (JAX_COMPILATION_CACHE_DIR), else in our cache."""
    configured = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    return Path(configured) if configured else cache_dir() / "compiled"


def connect(placement: Placement) -> None:
    """Joins the other processes of this run: those named in `placement`, or those a pod or cluster tells of."""
    named = {
        "--coordinator": placement.coordinator,
        "--num-processes": placement.num_processes,
        "--process-id": placement.process_id,
    }
    missing = [flag for flag, value in named.items() if value is None]
    if len(missing) == len(named):
        if placement.simulate_devices is None:
            _connect_automatically()
        return
    if missing:
        raise UserError(f"{', '.join(missing)} missing: processes are named by {', '.join(named)} together, or by none")
    assert placement.coordinator is not None
    host, _, port = placement.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator {placement.coordinator}: write host:port, the same in every process")
    bind = placement.coordinator if host == "127.0.0.1" else None
    try:
        jax.distributed.initialize(
            placement.coordinator,
            placement.num_processes,
            placement.process_id,
            cluster_detection_method="deactivate",
            coordinator_bind_address=bind,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"could not join the processes at {placement.coordinator}: {_first_line(error)}") from error


def _connect_automatically() -> None:
    try:
        with warnings.catch_warnings():
            # Any container on Kubernetes is told there of a package that only several processes need.
            warnings.filterwarnings("ignore", message="Kubernetes environment detected")
            jax.distributed.initialize()
    except ValueError as error:
        if "coordinator_address" not in str(error):
            raise UserError(f"a cluster is here and cannot be joined: {_first_line(error)}") from error
    except RuntimeError as error:
        # In a notebook, or any program that used its devices before: it goes on with those.
        if "must be called before" in str(error):
            return
        raise UserError(
            f"could not join this cluster's other processes: {_first_line(error)} "
            "(start the same command on every host, or name them by --coordinator, --num-processes and --process-id)"
        ) from error


def accelerators() -> dict[str, str]:
    """Hardware this machine has, by what the system shows, whether or not JAX uses it: extra's name to words."""
    found = {}
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        found["cuda"] = "an NVIDIA GPU"
    for card in Path("/sys/bus/pci/devices").glob("*"):
        if _word(card / "vendor") == _TPU_VENDOR and _word(card / "device") in _TPU_DEVICES:
            found["tpu"] = "a TPU"
    return found


def _word(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def warnings_about_devices(*, simulated: bool) -> list[str]:
    """Lines for a person whose accelerator stands idle, unless CPU was asked for. Asks JAX for its devices."""
    if simulated or os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu" or jax.default_backend() != "cpu":
        return []
    return [
        f"this machine has {name}, and JAX runs on its CPU: install the extra with pip install 'flaxzoo[{extra}]', "
        "or see zoo doctor"
        for extra, name in accelerators().items()
    ]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
