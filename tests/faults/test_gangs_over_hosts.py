"""A gang whose two ranks are on two hosts, on an S3 store: what may happen to them and to it, in one run."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hosts import Host, can_have_hosts, own_operator
from processes import OTHER_RANK, RANK_0, gang_workers
from tiny import LONGER

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

from nodes import events_in, finish, nodes, results_in, wait_for


class Strangers:
    """Connect to all that processes listen at, as soon as they do, and stay: one says nothing, another half a word.

    Args:
        find: gives each process, and the address of its host.
    """

    def __init__(self, find: Callable[[], list[tuple[int, str]]]) -> None:
        self._find = find
        self._left = threading.Event()
        self.held: dict[tuple[int, int], list[socket.socket]] = {}
        """By process and port."""

    def __enter__(self) -> "Strangers":
        self._thread = threading.Thread(target=self._call)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        self._thread.join()
        for connection in [each for both in self.held.values() for each in both]:
            connection.close()

    def _call(self) -> None:
        while not self._left.wait(0.5):  # A look at all processes takes a core some 50 ms.
            for pid, ip in self._find():
                for port in ports_of(pid):
                    if (pid, port) not in self.held:
                        self.held[pid, port] = []
                        with contextlib.suppress(OSError):  # It is gone again, or listens on its loopback alone.
                            for word in (b"", b"\0\0"):
                                connection = socket.create_connection((ip, port), timeout=1)
                                self.held[pid, port].append(connection)
                                connection.sendall(word)


def ports_of(pid: int) -> set[int]:
    """Where a process takes TCP connections, in its own network."""
    found = set()
    try:
        own = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *_, inode = line.split()[:10]
                if state == "0A" and f"socket:[{inode}]" in own:
                    found.add(int(local.rsplit(":", 1)[1], 16))
    except OSError:  # It has ended.
        pass
    return found


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(not can_have_hosts(), reason="only root may make hosts")
def test_a_gang_over_two_hosts_loses_what_was_not_saved_at_most(sweep_file, tmp_path, undisturbed, monkeypatch):
    """A lock that a compiler of DeepSpeed's operator has left; SIGSTOP of the second rank, kill -9 of it, its host cut
    off for a while; a store that is slow, and away for seconds; and strangers at all doors."""
    text = LONGER.replace("[1e-2, 3e-3]", "[1e-2]").replace("max_retries: 2", "max_retries: 3, max_silence_seconds: 10")
    told = tmp_path / "events.jsonl"
    lock = own_operator(tmp_path / "extensions") / "lock"
    lock.touch()
    os.utime(lock, (0, 0))
    with nodes(tmp_path, extensions=tmp_path / "extensions") as cluster:
        cluster.server.delay_seconds = 0.02
        places = [cluster.add(num_cpus=1) for _ in range(2)]
        store = cluster.server.store("faults")
        driver = cluster.start(sweep_file(text), store, told)

        def ranks(name: str) -> list[tuple[int, Host]]:
            """The newest last: those of replaced gangs may take a moment to go."""
            return sorted((pid, host) for host, node in places for pid in gang_workers(node.pid, name))

        def doors() -> list[tuple[int, str]]:
            return [
                (driver.pid, cluster.network.ip),
                *((pid, host.ip) for pid, host in ranks(RANK_0) + ranks(OTHER_RANK)),
            ]

        def wait(event: str, after: int, **wanted: object) -> int:
            """Until it is told; gives how many events were told by then."""
            wait_for(told, driver, event, after=after, **wanted)
            return len(events_in(told))

        with Strangers(doors) as strangers:
            count = wait("progress", 0, kind="pretrain")
            assert not lock.exists()
            stopped, _ = ranks(OTHER_RANK)[-1]
            os.kill(stopped, signal.SIGSTOP)
            count = wait("progress", wait("failed", count), kind="pretrain")  # Of the next gang.
            cluster.server.stop()
            count = wait("note", count)  # As the checkpoint cannot be written: one rank waits for that, and one for it.
            time.sleep(15)
            cluster.server.start()
            count = wait("started", count, kind="flatness")
            os.kill(ranks(OTHER_RANK)[-1][0], signal.SIGKILL)
            wait("finished", count, kind="sft")
            count = wait("progress", count, kind="pretrain")
            cut_off, host = ranks(OTHER_RANK)[-1]
            host.vanish()
            wait("failed", count)
            host.come_back()
            finish(driver)
        for name, value in cluster.server.env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "reader"))
        found = results_in(store)
    assert found.items() <= undisturbed.items()
    failed = [event for event in events_in(told) if event["event"] == "failed"]
    assert len(failed) == 2
    for event in failed:
        assert event["retry"]
        assert "gave no sign of life for 10 s" in event["cause"]
    notes = [event["message"] for event in events_in(told) if event["event"] == "note"]
    assert sum("; trying again for up to 10:00" in note for note in notes) == 1
    assert sum("answers again, after 0:" in note for note in notes) == 1
    assert {driver.pid, stopped, cut_off} <= {pid for (pid, _), connections in strangers.held.items() if connections}
