"""Which process drives a run, noted in the run, and how it is asked to stop: it saves what is being trained first."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raysweep.errors import StoreError
from raysweep.runners.interrupts import SAVE_SECONDS
from raysweep.runs import Run

logger = logging.getLogger(__name__)

JOB_ID, JOB_ADDRESS = "RAYSWEEP_JOB_ID", "RAYSWEEP_JOB_ADDRESS"
"""Environment of a driver that was submitted as a Ray job: its id, and the job server that it was submitted to."""

# Beyond the saving: gangs end, the report is brought to the store.
END_SECONDS = SAVE_SECONDS + 60.0


def this_driver() -> dict[str, Any]:
    """What a run notes of the process that holds it."""
    noted: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    if JOB_ID in os.environ:
        noted["job"] = {"id": os.environ[JOB_ID], "address": os.environ.get(JOB_ADDRESS, "")}
    return noted


def cancel(run: Run, *, stop_job: Callable[[str, str], str], wait_seconds: float = END_SECONDS) -> str:
    """Ask the driver of a run to stop, and wait until it has; returns what was done, in a line.

    Args:
        run: to be stopped.
        stop_job: given an id and an address, stops a Ray job, waits for its end and says so.
        wait_seconds: how long a process may take, from when it knows.

    Raises:
        StoreError: if it does not stop.
    """
    driver = run.driver()
    if job := driver.get("job"):
        return f"run {run.name}: {stop_job(job['id'], job['address'])}"
    if not run.is_under_way:
        return f"run {run.name} is not under way"
    pid = driver.get("pid", 0)
    if driver.get("host") != socket.gethostname() or not _has_open(pid, run.folder / ".lock"):
        return _ask(run, f"process {pid} on {driver['host']}" if driver else "its driver", wait_seconds)
    os.kill(pid, signal.SIGTERM)
    if not _wait_until(lambda: not run.is_held, wait_seconds):
        raise StoreError(
            f"run {run.name!r}: process {pid} has not stopped in {wait_seconds:g} s; kill -KILL {pid} loses "
            "what was trained since its last save"
        )
    return f"run {run.name}: process {pid} has stopped"


def _ask(run: Run, driver: str, wait_seconds: float) -> str:
    """Through the store, where the driver is out of reach: on another machine, or in another container of this one."""
    run.ask_to_end(f"raysweep cancel on {socket.gethostname()}")
    every = run.store.pace.beat_seconds
    logger.warning("run %r: asked %s to end, which looks every %g s, and saves first", run.name, driver, every)
    if not _wait_until(lambda: not run.is_under_way, every + wait_seconds, every_seconds=min(1.0, every)):
        raise StoreError(
            f"run {run.name!r}: {driver} was asked to end, and has not in {every + wait_seconds:g} s: it is cut off "
            "from the store, or its machine is gone; kill -TERM it there if it lives"
        )
    return f"run {run.name}: {driver} has stopped"


def _has_open(pid: int, path: Path) -> bool:
    """Whether a process of this machine has a file open: pids are given anew, and mean nothing in another container."""
    try:
        return any(os.path.samefile(link, path) for link in Path(f"/proc/{pid}/fd").iterdir() if link.exists())
    except OSError:
        return False


def _wait_until(condition: Callable[[], bool], seconds: float, *, every_seconds: float = 0.1) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_seconds)
    return True
