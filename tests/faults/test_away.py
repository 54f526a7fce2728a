"""A shared folder whose server is gone for a while, or whose quota is used up: the same run waits and goes on."""

import errno
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tiny import results_of

from raysweep.runners import attempts
from raysweep.runners.attempts import Failure, wait_for_room
from raysweep.runners.heartbeat import waits_for_disk
from raysweep.runs import Run
from raysweep.store import Store


class Server:
    """Of the folder `below`, to processes that are started with `environment`."""

    def __init__(self, folder: Path) -> None:
        library = folder / "away.so"
        source = Path(__file__).with_name("away.c")
        try:
            subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, capture_output=True)
        except FileNotFoundError:
            pytest.skip("there is no C compiler here")
        self._is_gone, self.below = folder / "is_gone", folder / "shared"
        self.environment = os.environ | {
            "LD_PRELOAD": str(library),
            "AWAY_BELOW": str(self.below),
            "AWAY_WHILE": str(self._is_gone),
            "OMP_NUM_THREADS": "1",
        }

    def goes(self, number: int) -> None:
        """Calls fail with this errno."""
        self._is_gone.write_text(str(number))

    def comes_back(self) -> None:
        self._is_gone.unlink()


@pytest.fixture
def server(tmp_path) -> Server:
    return Server(tmp_path)


def until(condition, process) -> None:
    while not condition():
        assert process.poll() is None
        time.sleep(0.05)


def test_a_run_waits_for_a_folder_whose_server_is_gone(server, lone_file, lone_space, untouched, tmp_path):
    """At whatever it is as the server goes, and once more at another stage, by another of the errors there are."""
    store, said = server.below / "store", tmp_path / "said"
    command = [sys.executable, "-m", "raysweep", "run", str(lone_file), "--runner", "inline", "--store", str(store)]
    with said.open("wb") as stderr:
        process = subprocess.Popen([*command, "--run", "r"], env=server.environment, stdout=stderr, stderr=stderr)
    for times, (kind, number) in enumerate([("pretrain", errno.EIO), ("flatness", errno.ESTALE)], 1):
        until(lambda kind=kind: list(store.glob(f"stages/{kind}-*/record.json")), process)
        server.goes(number)
        until(lambda times=times: said.read_text().count("; trying again for up to 10:00") == times, process)
        assert f"cannot be written: {os.strerror(number)}; trying" in said.read_text() or (
            f"cannot be read: {os.strerror(number)}; trying" in said.read_text()
        )
        server.comes_back()
        until(lambda times=times: said.read_text().count("answers again, after ") == times, process)
    assert process.wait(timeout=300) == 0, said.read_text()
    assert "Traceback" not in said.read_text()
    run = Run.find(Store(store), "r")
    assert run.failures() == []
    assert results_of(run) == untouched(lone_space)


def test_a_command_that_meets_it_says_so_in_a_line(server, sweep_file):
    for number, command in ((errno.EIO, ["ls"]), (errno.ENOTCONN, ["run", str(sweep_file()), "--runner", "inline"])):
        server.goes(number)
        ran = subprocess.run(
            [sys.executable, "-m", "raysweep", *command, "--store", str(server.below / "store")],
            env=server.environment,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 2, ran.stderr
        assert "Traceback" not in ran.stderr
        assert os.strerror(number) in ran.stderr.splitlines()[-1]


def test_a_quota_is_room_that_can_be_made(store, monkeypatch):
    """Of a disk with much room: that a quota is used up, only a try tells."""
    store.check_writable()
    store.be_patient(60)
    told: list[str] = []
    assert not wait_for_room(store, told.append), "the disk has room, and no quota is used up"
    full = [True, True]

    def allocate(*arguments) -> None:
        if full:
            full.pop()
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(attempts, "QUOTA_SECONDS", 0.01)
    monkeypatch.setattr(os, "posix_fallocate", allocate)
    assert wait_for_room(store, told.append)
    assert [text.split("'")[2][:18] for text in told] == [" has no room: make", " has room again"]
    assert Failure.of(None, OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))).no_room
    assert Failure.of(None, RuntimeError("Error while serializing: Disk quota exceeded (os error 122)")).no_room
    assert Failure.of(None, RuntimeError("I/O error: Input/output error (os error 5)")).away


def test_a_process_in_a_call_that_does_not_return_waits_for_its_disk(tmp_path):
    """As of NFS mounted `hard`; here who starts a process waits as deep for it to open what nobody writes."""
    assert not waits_for_disk()
    os.mkfifo(tmp_path / "fifo")
    opens = "(os.POSIX_SPAWN_OPEN, 3, sys.argv[1], os.O_RDONLY, 0)"
    code = f"import os, sys; os.posix_spawn('/bin/true', ['true'], {{}}, file_actions=[{opens}])"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "fifo")])
    until(lambda: waits_for_disk(Path(f"/proc/{process.pid}/task")), process)
    with suppress(OSError):
        (tmp_path / "fifo").open("wb").close()
    assert process.wait(timeout=30) == 0
