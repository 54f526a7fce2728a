"""Sweeps as Ray jobs: sent to a cluster's job server, followed from anywhere, stopped.

A job goes on without whoever sent it. Its id is made of what was sent, so that sending the same again follows it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysweep.errors import ClusterError, StoreError
from raysweep.runners.drivers import END_SECONDS, JOB_ADDRESS, JOB_ID

URL_OF_HEAD = "such as http://HEAD:8265"

# How long the job server may be out of reach before following ends; the job does not.
LOST_SECONDS = 120.0
POLL_SECONDS = 1.0

# How long a head may take to come up; its server waits for its agent for a few seconds of them by itself.
AGENT_SECONDS = 60.0
NO_AGENT = "No available agent"

# What ends a job that was stopped, as a driver that gets SIGTERM would.
TERMINATED = 143


@dataclass(frozen=True)
class Submission:
    """A sweep to be run on a cluster by a process there.

    Attributes:
        address: of the job server, `http://HEAD:8265`.
        sweep: the sweep file; nothing but it is sent, unless it lies in `working_dir`.
        store: a URL, or an absolute folder that all nodes share.
        overrides: `key=value` that take the place of what the sweep file says.
        run: name of the run; None: as `raysweep run` names it.
        working_dir: what else is sent, at most 512 MiB.
    """

    address: str
    sweep: Path
    store: str
    overrides: tuple[str, ...] = ()
    run: str | None = None
    working_dir: Path | None = None

    @property
    def job_id(self) -> str:
        """The same for the same file, overrides, store and name of the run."""
        sent = [self.sweep.read_text(encoding="utf-8", errors="replace"), self.store, self.overrides, self.run]
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", self.sweep.stem)[:60]
        return f"raysweep-{name}-{hashlib.sha256(repr(sent).encode()).hexdigest()[:8]}"

    def command(self, sweep: str) -> str:
        """The job's own command, where its sweep file is `sweep`."""
        words = ["python", "-m", "raysweep", "run", sweep, *self.overrides, "--store", self.store]
        # exec: a signal is for raysweep, not for a shell around it.
        return "exec " + shlex.join([*words, *(["--run", self.run] if self.run else [])])


def submit(submission: Submission) -> tuple[str, bool]:
    """Send a sweep, unless it is there already and goes on; returns the job's id, and whether it is new.

    Raises:
        StoreError: if the store would be another on each machine.
        ClusterError: if the job server cannot be reached, or refuses it.
    """
    if "://" not in submission.store and not os.path.isabs(submission.store):
        raise StoreError(
            f"--store {submission.store!r}: of a job it must be a URL, or an absolute folder that all nodes share"
        )
    with _asked(submission.address) as client:
        known = {str(job.submission_id): job for job in client.list_jobs()}
        job_id, number = submission.job_id, 1
        while job_id in known:
            if not known[job_id].status.is_terminal():
                return job_id, False
            number += 1
            job_id = f"{submission.job_id}-{number}"
        with _sent_folder(submission) as (folder, sweep):
            environment = {
                JOB_ID: job_id,
                JOB_ADDRESS: submission.address,
                # Ray would kill it after 3 s: what is being trained is saved first.
                "RAY_JOB_STOP_WAIT_TIME_S": str(int(END_SECONDS)),
            }
            runtime_env = {"working_dir": str(folder), "env_vars": environment}
            _send(client, entrypoint=submission.command(sweep), submission_id=job_id, runtime_env=runtime_env)
        return job_id, True


def _send(client: Any, **job: Any) -> None:
    """Submit a job; the agent that takes it comes up a while after the server that is asked."""
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            client.submit_job(**job)
            return
        except RuntimeError as error:
            if NO_AGENT not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(POLL_SECONDS)


def follow(address: str, job_id: str, show: Callable[[str], None]) -> int:
    """Show what a job prints until it ends; returns its exit code, 143 if it was stopped.

    Raises:
        ClusterError: if the job server is out of reach for long, its cluster has lost the job, or that never began.
    """
    log = _Log(job_id, show)
    while True:
        try:
            with _asked(address) as client:
                asyncio.run(log.show_more(client))
                job = client.get_job_info(job_id)
        except ClusterError as error:
            log.lost_at = log.lost_at or time.monotonic()
            if time.monotonic() - log.lost_at > LOST_SECONDS:
                raise ClusterError(
                    f"{error}; job {job_id} goes on if its cluster does: the same command follows it again"
                ) from error
        else:
            log.lost_at = None
            if job.status.is_terminal():
                return _exit_code(job)
        time.sleep(POLL_SECONDS)


class _Log:
    """What a job prints, each part shown once, however often the connection is lost on the way."""

    def __init__(self, job_id: str, show: Callable[[str], None]) -> None:
        self._job_id, self._show = job_id, show
        self._num_shown = 0
        self.lost_at: float | None = None
        """When the job server was first out of reach since something was heard of it; None: it is not."""

    async def show_more(self, client: Any) -> None:
        """Until the job or the connection ends; each connection gives the log from its beginning."""
        seen = 0
        async for text in client.tail_job_logs(self._job_id):
            self.lost_at = None
            if seen + len(text) > self._num_shown:
                self._show(text[max(0, self._num_shown - seen) :])
            seen += len(text)
            self._num_shown = max(self._num_shown, seen)


def stop(job_id: str, address: str) -> str:
    """Stop a job and wait for its end; returns what was done, in a line.

    Raises:
        ClusterError: if there is none, or it does not end.
    """
    with _asked(address) as client:
        if not client.stop_job(job_id):
            return f"job {job_id} had ended: {client.get_job_status(job_id).value.lower()}"
        deadline = time.monotonic() + END_SECONDS + 30
        while not client.get_job_status(job_id).is_terminal():
            if time.monotonic() > deadline:
                raise ClusterError(f"job {job_id} has not stopped: ray job stop {job_id} --address {address}")
            time.sleep(POLL_SECONDS)
        return f"job {job_id} has stopped"


def _exit_code(job: Any) -> int:
    if str(job.status.value) == "STOPPED":
        return TERMINATED
    if job.driver_exit_code is None:  # It never began: no such folder, no room for its supervisor.
        raise ClusterError(f"job {job.submission_id} {job.status.value.lower()}: {job.message}")
    return int(job.driver_exit_code)


@contextlib.contextmanager
def _sent_folder(submission: Submission) -> Iterator[tuple[Path, str]]:
    """The folder to be sent, and the sweep file's path in it."""
    if submission.working_dir is not None:
        folder, sweep = submission.working_dir.resolve(), submission.sweep.resolve()
        if not sweep.is_relative_to(folder):
            raise ClusterError(f"--working-dir {folder}: {sweep} is not in it, and would not be sent")
        yield folder, str(sweep.relative_to(folder))
        return
    with tempfile.TemporaryDirectory() as name:
        shutil.copy(submission.sweep, name)
        yield Path(name), submission.sweep.name


@contextlib.contextmanager
def _asked(address: str) -> Iterator[Any]:
    """A client of the job server at `address`. Raises ClusterError for whatever goes wrong with it."""
    if not address.startswith(("http://", "https://")):  # Ray's client would look for a cluster at it, for minutes.
        raise ClusterError(f"job server at {address!r}: its address is a URL, {URL_OF_HEAD}")
    if importlib.util.find_spec("aiohttp") is None:
        raise ClusterError("jobs need Ray's own client of its job server: pip install 'raysweep[submit]'")
    from ray.job_submission import JobSubmissionClient

    from raysweep.runners.ray_cluster import use_token

    # It would take the place of `address`, and may be that of another cluster.
    os.environ.pop("RAY_ADDRESS", None)
    use_token()
    try:
        yield JobSubmissionClient(address)
    except (ClusterError, BrokenPipeError):  # The pipe is that of whoever reads what is shown.
        raise
    # What it raises is RuntimeError or ConnectionError, with the server's traceback in it, or aiohttp's own.
    except Exception as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
        mend = (
            f"; give its URL, {URL_OF_HEAD}, as it is reached from here" if isinstance(error, ConnectionError) else ""
        )
        raise ClusterError(f"job server at {address!r}: {lines[-1].rstrip('.')}{mend}") from error
