"""Resumable state of ranks whose hosts share nothing but a URL."""

import errno
import fcntl
import hashlib
import json
import os
import threading
from pathlib import Path

import pytest

from raysweep.errors import StoreError
from raysweep.remote import Remote
from raysweep.remote_state import RemoteStateDir
from raysweep.worker import StateDir

NAME = "partial/trajectory-a.state"


@pytest.fixture
def host(tmp_path):
    """The state's folder as a host of some name sees it."""

    def opened(name: str) -> RemoteStateDir:
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        return RemoteStateDir(Remote(f"local://{tmp_path}/url"), path, NAME)

    return opened


def write(states: StateDir, files: dict[str, str], *, folder: str = "step-1") -> None:
    (states.path / folder).mkdir(exist_ok=True)
    for name, text in files.items():
        (states.path / folder / name).write_text(text)
        states.send(f"{folder}/{name}")


def digests_of(files: dict[str, str]) -> dict[str, str]:
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_what_two_hosts_have_written_is_whole_on_each_and_on_a_third(host):
    files = {"rank0": "weights", "rank1": "more weights"}
    first, second, third = host("first"), host("second"), host("third")
    write(second, {"rank1": files["rank1"]})
    write(first, {"rank0": files["rank0"], "digests": json.dumps(digests_of(files))})
    for states in (first, second, third):
        assert states.names() == {"step-1"}
        assert content(states.fetch("step-1", "digests")) == {**files, "digests": json.dumps(digests_of(files))}
    first.remove("step-1")
    assert third.names() == set()
    third.drop_copies(but="step-2")
    assert not (third.path / "step-1").exists()


def test_a_copy_of_an_earlier_try_is_not_taken_for_the_state(host):
    here, there = host("here"), host("there")
    for text in ("of one gang", "of another"):
        files = {"rank0": text}
        write(there, {**files, "digests": json.dumps(digests_of(files))})
        assert content(here.fetch("step-1", "digests"))["rank0"] == text


def test_what_is_not_whole_is_refused(host):
    here, there = host("here"), host("there")
    write(there, {"rank0": "cut o"})
    with pytest.raises(FileNotFoundError):
        here.fetch("step-1", "digests")
    write(there, {"digests": json.dumps(digests_of({"rank0": "cut off"}))})
    with pytest.raises(ValueError, match="rank0 is not as it was written"):
        here.fetch("step-1", "digests")
    write(there, {"digests": json.dumps({"../../aside": "0"})})
    with pytest.raises(ValueError, match="leads out"):
        here.fetch("step-1", "digests")


def test_a_cache_without_locks_is_told_in_a_line(host, monkeypatch):
    def no_locks(file, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    states = host("here")
    write(states, {"rank0": "weights", "digests": json.dumps(digests_of({"rank0": "weights"}))})
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(StoreError, match=r"\.step-1\.lock cannot be locked: No locks available"):
        states.fetch("step-1", "digests")


def test_ranks_of_a_host_download_once(host, monkeypatch):
    files = {f"rank{rank}": "x" * 1000 for rank in range(4)}
    write(host("there"), {**files, "digests": json.dumps(digests_of(files))})
    downloaded: list[str] = []
    get = Remote.get
    monkeypatch.setattr(Remote, "get", lambda self, name, path: (downloaded.append(name), get(self, name, path)))
    here = host("here")
    ranks = [threading.Thread(target=here.fetch, args=("step-1", "digests")) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert sorted(downloaded) == [f"{NAME}/step-1/{name}" for name in sorted(files)]
