"""Stores at URLs, as several machines see them."""

import logging
from collections.abc import Callable, Iterator

import pytest
from tiny import results_of

from raysweep.runners import run_sweep
from raysweep.space import SearchSpace
from raysweep.store import Store


class Server:
    """A server of S3's interface on this machine; what it holds outlives its being stopped."""

    def __init__(self) -> None:
        self._kind = pytest.importorskip("moto.server").ThreadedMotoServer
        logging.getLogger("werkzeug").setLevel(logging.WARNING)  # A line for each request.
        self._port = 0
        self.start()

    def start(self) -> None:
        self._server = self._kind(ip_address="127.0.0.1", port=self._port, verbose=False)
        self._server.start()
        self._port = self._server.get_host_and_port()[1]
        self.address = f"http://127.0.0.1:{self._port}"

    def stop(self) -> None:
        self._server.stop()


@pytest.fixture(scope="session")
def s3() -> Iterator[Server]:
    pytest.importorskip("s3fs")
    server = Server()
    yield server
    server.stop()


@pytest.fixture(params=["local", "s3"])
def url(request, tmp_path, monkeypatch) -> str:
    """An empty store's URL."""
    if request.param == "local":
        return f"local://{tmp_path}/url"  # To a store a URL like any other.
    address = request.getfixturevalue("s3").address
    import boto3
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # The library's own tries, which would hide an outage of seconds.
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = tmp_path.name.replace("_", "-").lower()[:40]
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/store"


@pytest.fixture
def machine(url, tmp_path, monkeypatch) -> Callable[[str], Store]:
    """The store as a machine of some name opens it, with a cache of its own."""

    def opened(name: str) -> Store:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        return Store(url)

    return opened


@pytest.fixture(scope="session")
def untouched(tmp_path_factory) -> Callable[[SearchSpace], dict[str, object]]:
    """What the sweep gives where nothing is lost; run once."""
    known: list[dict[str, object]] = []

    def results(space: SearchSpace) -> dict[str, object]:
        if not known:
            known.append(results_of(run_sweep(space, Store(tmp_path_factory.mktemp("untouched")), runner="inline")))
        return known[0]

    return results
