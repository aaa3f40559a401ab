"""What compiling for TPUs needs of the environment."""

import os

import pytest

from benchmarks import tpu


@pytest.fixture
def libtpu_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in tpu.QUIET.items():
        monkeypatch.setenv(name, value)
    # libtpu reads it too, and ends the process at a flag that it does not know.
    known = [flag for flag in os.environ["XLA_FLAGS"].split() if "fusion_emitters" not in flag]
    monkeypatch.setenv("XLA_FLAGS", " ".join(known))
