"""Signs of life of a process of a gang, sent from a thread of its own; see `watch.py`."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError

from raysweep.runners.attempts import under_way
from raysweep.runners.channel import Address, connect, send
from raysweep.runners.watch import Beat, Process

logger = logging.getLogger(__name__)


def this_process(gang: str, rank: int) -> Process:
    """The process of a Ray actor."""
    import ray

    return Process(gang=gang, rank=rank, node_id=ray.get_runtime_context().get_node_id(), pid=os.getpid())


def start_beats(
    address: Address, process: Process, *, every_seconds: float, trial: Callable[[], str] = lambda: ""
) -> None:
    """Beat until this process ends, or the driver does."""
    arguments = (address, process, every_seconds, trial)
    threading.Thread(target=_beat, args=arguments, name="raysweep-beats", daemon=True).start()


def _beat(address: Address, process: Process, every_seconds: float, trial: Callable[[], str]) -> None:
    clock, spent = time.monotonic(), time.process_time()
    seconds, load = 0.0, 1.0
    try:
        # Not the connection of the events: the driver may take its time over one of these.
        with connect(address) as connection:
            while True:
                send(connection, Beat(process, trial=trial(), stage=under_way(), seconds=seconds, load=load))
                time.sleep(every_seconds)
                seconds, used = time.monotonic() - clock, time.process_time() - spent
                clock, spent, load = clock + seconds, spent + used, used / seconds
    except (OSError, EOFError, AuthenticationError) as error:
        logger.warning("no more signs of life to the driver at %s:%d: %s", address.host, address.port, error)
