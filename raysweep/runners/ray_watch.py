"""A Ray that is gone ends the run in one line, not in the logs and the abort of Ray's own libraries."""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from raysweep.errors import ClusterError

# Seconds without a connection until a process counts as gone. A GCS elsewhere may be restarting, with the state that it
# keeps outside; Ray ends this process by itself when it has waited for a minute.
GONE_SECONDS = 3.0
GONE_SECONDS_OF_A_CLUSTER = 45.0


# Not SIGINT: a process started in a script's background ignores it. Tune has taken SIGUSR1.
WAKE = signal.SIGUSR2

# A GCS that is back has to be asked who it is before Ray's own libraries do, about once a second: they abort this
# process if it does not know them.
LOOK_SECONDS = 1.0
LOOK_SECONDS_WHEN_MISSED = 0.02

# A machine that is off refuses no connection, and a GCS that is stopped takes some and does not answer.
ANSWER_SECONDS = 2.0

GO_ON = "what is finished is kept, and the same command goes on from there"
FORGOT = (
    "Ray's GCS was started again without what it knew, which its nodes and gangs do not survive: give its head "
    f"RAY_gcs_storage=rocksdb and RAY_gcs_storage_path=FOLDER, or start all nodes anew; {GO_ON}"
)

# For the main thread to leave what it waits for; a call to the GCS itself hears no signal, and takes a minute.
WAKE_SECONDS = 5.0


@dataclass
class _Door:
    """Where a process of Ray takes connections."""

    name: str
    family: socket.AddressFamily
    address: str | tuple[str, int]
    patience: float
    missed_seconds: float = 0.0
    """Since it took one last."""

    def look(self, seconds: float) -> None:
        """`seconds` after the last time."""
        self.missed_seconds = 0.0 if _opens(self.family, self.address) else self.missed_seconds + seconds


class _Lifeline:
    """An idle connection to a process, which ends with it at once, however soon another one takes its place.

    It may also end by itself: gRPC has no patience with one that is silent for two minutes.
    """

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._socket: socket.socket | None = None

    def hold(self) -> bool:
        """Connect anew. False if that fails."""
        self.drop()
        try:
            self._socket = socket.create_connection(self._address, timeout=ANSWER_SECONDS)
        except OSError:
            return False
        return True

    def ends_within(self, seconds: float) -> bool:
        """Wait for so long, or until it ends."""
        if self._socket is None:
            time.sleep(seconds)
            return False
        # Unlike select, poll takes a descriptor of any number, which a driver of many gangs may have come to.
        ready = select.poll()
        ready.register(self._socket, select.POLLIN)
        if not ready.poll(1000 * seconds):
            return False
        try:
            said = self._socket.recv(4096)  # A greeting of gRPC's.
        except OSError:
            said = b""
        if not said:
            self.drop()
        return not said

    def drop(self) -> None:
        """Be without one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


@contextlib.contextmanager
def ray_watched() -> Iterator[Sequence[str]]:
    """While in it, see that the GCS and this node's raylet take connections; gives the list of what is gone.

    Only the main thread can be woken; elsewhere this does nothing.

    Where the main thread is inside a call that hears no signal, the process ends here with the same line and exit code,
    as Ray would end it a minute later.

    Raises:
        ClusterError: if one of them is gone.
    """
    gone: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield gone
        return
    import ray

    node = ray._private.worker._global_node
    host, port = node.gcs_address.rsplit(":", 1)
    patience = GONE_SECONDS if "RAY_ADDRESS" not in os.environ else GONE_SECONDS_OF_A_CLUSTER
    gcs = _Door("GCS", socket.AF_INET, (host, int(port)), patience)
    doors = [gcs, _Door("raylet", socket.AF_UNIX, node.raylet_socket_name, GONE_SECONDS)]
    left = threading.Event()

    def wake(number: int, frame: object) -> None:
        raise KeyboardInterrupt  # What Ray's own waiting lets through.

    def watch() -> None:
        lifeline, then = _Lifeline((host, int(port))), time.monotonic()
        # It may have been started again before this connection to it.
        is_doubtful, pause = True, 0.0
        while True:
            is_doubtful |= lifeline.ends_within(pause)
            if left.is_set():
                lifeline.drop()
                return
            now = time.monotonic()
            for door in doors:
                # Not more than a look takes: this process may have been stopped, and does not know what was.
                door.look(min(now - then, LOOK_SECONDS + ANSWER_SECONDS))
                if door.missed_seconds > door.patience:
                    gone.append(door.name)
                    signal.pthread_kill(threading.main_thread().ident or 0, WAKE)
                    if not left.wait(WAKE_SECONDS):
                        _leave(_message(door.name))
                    return
            if is_doubtful and not gcs.missed_seconds:
                is_held, cluster = lifeline.hold(), _cluster_at(node.gcs_address)
                if cluster not in (node.cluster_id, None):
                    _leave(FORGOT)
                is_doubtful = cluster is None or not is_held
            is_missed = is_doubtful or any(door.missed_seconds for door in doors)
            pause, then = LOOK_SECONDS_WHEN_MISSED if is_missed else LOOK_SECONDS, now

    before = signal.signal(WAKE, wake)
    threading.Thread(target=watch, name="raysweep-ray-watch", daemon=True).start()
    try:
        yield gone
    except BaseException:
        if gone:
            atexit.register(_leave)  # Runs before Ray's, which waits for the GCS for a minute and aborts.
            raise ClusterError(_message(gone[0])) from None
        raise
    finally:
        left.set()
        signal.signal(WAKE, before)


def _message(name: str) -> str:
    return f"Ray's {name} is gone: killed, out of memory, or its machine was taken away; {GO_ON}"


def _leave(message: str = "") -> None:
    """End this process now, with a line of what is wrong where nobody else will say it."""
    if message:
        print(f"ClusterError: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)


def _cluster_at(address: str) -> Any:
    """The id of the cluster whose GCS listens there; None if it has not said so after `ANSWER_SECONDS`.

    Asked in a thread of its own: Ray's client waits 40 s for a GCS that is killed while it connects.
    """
    import ray

    found: list[Any] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # Ray's own, of many kinds.
            found.append(ray._raylet.GcsClient(address=address).cluster_id)

    asking = threading.Thread(target=ask, name="raysweep-ray-watch-asks", daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS)
    return found[0] if found else None


def _opens(family: socket.AddressFamily, address: str | tuple[str, int]) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as door:
        door.settimeout(ANSWER_SECONDS)
        try:
            door.connect(address)
        except BlockingIOError:  # Its queue is full, so somebody listens.
            return True
        except OSError:
            return False
        return True
