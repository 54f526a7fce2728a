"""Stores at URLs, as several machines see them."""

from collections.abc import Callable, Iterator

import pytest

from raysweep.store import Store


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of a server of S3's interface, on this machine."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["local", "s3"])
def url(request, tmp_path, monkeypatch) -> str:
    """An empty store's URL."""
    if request.param == "local":
        return f"local://{tmp_path}/url"  # To a store a URL like any other.
    address = request.getfixturevalue("s3")
    import boto3
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
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
