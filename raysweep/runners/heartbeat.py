"""Signs of life of a process of a gang, sent from a thread of its own; see `watch.py`."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from raysweep.errors import ClusterError
from raysweep.patience import waits_for_store
from raysweep.runners.attempts import under_way
from raysweep.runners.channel import AGAIN_SECONDS, FIRST_SECONDS, Address, connect, lose_after, send
from raysweep.runners.watch import Beat, Process

logger = logging.getLogger(__name__)

# A connection is made anew after so many beats that did not arrive: 30 s of the 120 after which a process is ended.
LOST_BEATS = 6


def this_process(gang: str, rank: int) -> Process:
    """The process of a Ray actor."""
    import ray

    return Process(gang=gang, rank=rank, node_id=ray.get_runtime_context().get_node_id(), pid=os.getpid())


def start_beats(
    address: Address, process: Process, *, every_seconds: float, trial: Callable[[], str] = lambda: ""
) -> None:
    """Beat until this process ends; where the driver cannot be reached any more, as soon as it can again.

    Raises:
        ClusterError: if the driver cannot be reached.
    """
    # Not the connection of the events: the driver may take its time over one of these.
    connection = _connect(address, every_seconds, seconds=FIRST_SECONDS)
    arguments = (address, connection, process, every_seconds, trial)
    threading.Thread(target=_beat, args=arguments, name="raysweep-beats", daemon=True).start()


def _connect(address: Address, every_seconds: float, *, seconds: float) -> Connection:
    connection = connect(address, seconds=seconds)
    # Else beats that are dropped on the way pile up in a buffer until the driver takes this process for stopped.
    lose_after(connection, LOST_BEATS * every_seconds)
    return connection


def waits_for_disk(tasks: Path = Path("/proc/self/task")) -> bool:
    """Whether a thread of a process is in a call to a file system that has not returned, as to NFS mounted `hard`."""
    for task in tasks.iterdir():
        with contextlib.suppress(OSError):  # It has ended.
            if (task / "stat").read_text().rpartition(")")[2].split()[0] == "D":
                return True
    return False


def _beat(
    address: Address, connection: Connection, process: Process, every_seconds: float, trial: Callable[[], str]
) -> None:
    clock, spent = time.monotonic(), time.process_time()
    seconds, load = 0.0, 1.0
    while True:
        try:
            load = 1.0 if waits_for_store() or waits_for_disk() else load
            send(connection, Beat(process, trial=trial(), stage=under_way(), seconds=seconds, load=load))
        except OSError:
            connection.close()
            try:
                connection = _connect(address, every_seconds, seconds=AGAIN_SECONDS)
            except ClusterError as error:
                # The next beat tries again: a rank that tells of no events trains on, and is to be watched once the
                # driver is back, as after a stop.
                logger.warning("no signs of life reach the driver, which is tried again: %s", error)
        time.sleep(every_seconds)
        seconds, used = time.monotonic() - clock, time.process_time() - spent
        clock, spent, load = clock + seconds, spent + used, used / seconds
