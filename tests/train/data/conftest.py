"""Prepared data goes to a folder of the test session, never to the user's cache."""

import pytest


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(shared_cache, monkeypatch):
    monkeypatch.setenv("FLAXZOO_CACHE", str(shared_cache))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    return shared_cache


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    folder = tmp_path / "fresh-cache"
    monkeypatch.setenv("FLAXZOO_CACHE", str(folder))
    return folder
