"""`benchmarks` is no installed package: its tests find it at the root. And what compiling for TPUs needs to be set."""

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))


@pytest.fixture
def libtpu_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import tpu

    for name, value in tpu.QUIET.items():
        monkeypatch.setenv(name, value)
    # libtpu reads it too, and ends the process at a flag that it does not know.
    known = [flag for flag in os.environ["XLA_FLAGS"].split() if "fusion_emitters" not in flag]
    monkeypatch.setenv("XLA_FLAGS", " ".join(known))
