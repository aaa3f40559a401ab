import os
import subprocess
import sys

import pytest

from zoo.train.data import cache
from zoo.train.experiment import UserError


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("FLAXZOO_CACHE", str(tmp_path / "named"))
    assert cache.cache_dir() == tmp_path / "named"
    monkeypatch.delenv("FLAXZOO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_dir() == tmp_path / "xdg" / "flaxzoo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_dir() == tmp_path / "home" / ".cache" / "flaxzoo"


def test_a_home_that_cannot_be_written(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")  # no folder can be made below it, whoever asks
    monkeypatch.delenv("FLAXZOO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    folder = cache.cache_dir()
    assert folder == tmp_path / f"flaxzoo-{os.getuid()}" and folder.stat().st_mode & 0o077 == 0
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(blocked))
    with pytest.raises(UserError, match="set FLAXZOO_CACHE"):
        cache.cache_dir()
    monkeypatch.setenv("FLAXZOO_CACHE", str(blocked / "x"))
    with pytest.raises(UserError, match="cannot be written"):
        cache.cache_dir()


def test_somebody_elses_folder_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.delenv("FLAXZOO_CACHE")
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / f"flaxzoo-{os.getuid()}").symlink_to(elsewhere)
    with pytest.raises(UserError):
        cache.cache_dir()


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def broken(folder):
        (folder / "a").write_text("half")
        raise ValueError("stop")

    target = tmp_path / "made"
    with pytest.raises(ValueError, match="stop"):
        cache.prepared(target, lambda folder: (folder / "a").exists(), broken)
    assert not target.exists() and not list(tmp_path.glob("*.partial"))
    cache.prepared(target, lambda folder: (folder / "a").exists(), lambda folder: (folder / "a").write_text("whole"))
    assert (target / "a").read_text() == "whole"


HOLD = "import sys, time; from pathlib import Path; from zoo.train.data.cache import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    with cache.locked(path):
        pass
