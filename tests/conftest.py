"""Eight CPU devices for every test, and code that is compiled quickly; set before JAX starts.

Most of a test's time is LLVM's. Its optimizations are left out (XLA's own are not), which halves that, and so are the
fusion emitters where jaxlib can do without (from 0.11 it cannot), which takes another third. What is optimized runs in
the README's commands, and here too where the environment's XLA_FLAGS say so.
"""

import os
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    )
)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[int | str]:
    """What bars on a terminal show: how many steps there are, which have ended, and "closed"."""
    from zoo.train import progress

    told: list[int | str] = []

    class Bar(progress.Quiet):
        def __init__(self, steps: int, unit: str, console: object, counted: str) -> None:
            told.append(steps)

        def update(self, step: int, figures: object) -> None:
            told.append(step)

        def close(self) -> None:
            told.append("closed")

    monkeypatch.setattr(progress, "Bar", Bar)
    terminal = SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: True), stdout=sys.stdout)
    monkeypatch.setattr(progress, "sys", terminal)
    return told
