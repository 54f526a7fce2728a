"""Stores at URLs, as several machines see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiny import TINY, results_of

from raysweep.runners import run_sweep
from raysweep.space import load
from raysweep.store import Store
from raysweep.variants import SearchSpace

if TYPE_CHECKING:
    from s3_server import Server


@pytest.fixture(scope="session")
def s3() -> Iterator[Server]:
    for library in ("s3fs", "moto.server"):
        pytest.importorskip(library)
    from s3_server import Server

    server = Server()
    yield server
    server.stop()


@pytest.fixture(params=["local", "s3"])
def url(request, tmp_path, monkeypatch) -> str:
    """An empty store's URL."""
    if request.param == "local":
        return f"local://{tmp_path}/url"  # To a store a URL like any other.
    server = request.getfixturevalue("s3")
    import s3fs

    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = tmp_path.name.replace("_", "-").lower()[:40]
    return server.store(bucket)


@pytest.fixture
def machine(url, tmp_path, monkeypatch) -> Callable[[str], Store]:
    """The store as a machine of some name opens it, with a cache of its own."""

    def opened(name: str) -> Store:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        return Store(url)

    return opened


LONE = TINY.replace("name: tiny", "name: lone").replace("{grid: [1e-2, 3e-3]}", "{grid: [1e-2]}")
"""The tiny sweep of one variant, for what happens to any of its stages."""


@pytest.fixture
def lone_file(sweep_file) -> Path:
    return sweep_file(LONE)


@pytest.fixture
def lone_space(lone_file) -> SearchSpace:
    return load(lone_file)


@pytest.fixture(scope="session")
def untouched(tmp_path_factory) -> Callable[[SearchSpace], dict[str, object]]:
    """What the sweep gives where nothing is lost; run once."""
    known: dict[str, dict[str, object]] = {}

    def results(space: SearchSpace) -> dict[str, object]:
        if space.name not in known:
            store = Store(tmp_path_factory.mktemp("untouched"))
            known[space.name] = results_of(run_sweep(space, store, runner="inline"))
        return known[space.name]

    return results
