"""A run: one sweep in one store. Its folder holds the sweep file, the trials that were started, and what failed.

Which stages are finished is never written here: that is the store's to say.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from raysweep.durable import flock, parse_object, sync, write_text
from raysweep.errors import StoreError
from raysweep.lease import Holder
from raysweep.record import difference
from raysweep.run_files import (
    TrialRow,
    has_columns,
    is_choice,
    is_counts,
    is_driver,
    is_failure,
    is_plan,
    parse_trial_row,
)
from raysweep.scores import Column
from raysweep.spec import Metric
from raysweep.store import Store

logger = logging.getLogger(__name__)

# As a sweep's name, with room for the eight digits that follow it.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


class Run:
    """One sweep in one store: what its folder holds, read and written whole; see the module."""

    def __init__(self, store: Store, name: str) -> None:
        """Raises StoreError if a folder cannot have the name."""
        if not NAME.fullmatch(name):
            raise StoreError(
                f"--run {name!r}: a run is named with letters, digits, '_', '-' and '.', a letter or digit first, at "
                "most 100 of them"
            )
        self.store = store
        self.name = name
        self.folder: Path = store.root / "runs" / name
        self._noted: dict[str, TrialRow] | None = None
        self._told: set[str] = set()
        self._sending = threading.Lock()
        self._taken_by: str | None = None
        self._may_be_asked = False
        self.is_new = False
        """Whether it was not there before `create`."""

    @staticmethod
    def create(store: Store, name: str, *, sweep_text: str, identity: str) -> Run:
        """Open the run `name`, or start it.

        Raises:
            StoreError: if a run of that name belongs to another sweep (`identity`: canonical text of the sweep), or the
                store cannot be written.
        """
        run = Run(store, name)
        store.check_writable()
        run.folder.mkdir(parents=True, exist_ok=True)
        run._refresh()
        there = run._read("identity.json")
        if there is None:
            run._check_sweep_text(sweep_text)
            run.is_new = not (run.folder / "sweep.yaml").exists()
            write_text(run.folder / "identity.json", identity)
        elif there != json.loads(identity):
            other = json.dumps(there, indent=1, sort_keys=True)
            raise StoreError(
                f"run {name!r} in {store.url} belongs to another sweep; it differs in {difference(other, identity)}. "
                "Give this one another --run, or leave --run out: finished stages are shared either way"
            )
        write_text(run.folder / "sweep.yaml", sweep_text)
        return run

    @staticmethod
    def find(store: Store, given: str) -> Run:
        """An existing run, by its name, the beginning of its name, or the path of its folder.

        Raises:
            StoreError: if there is none, or several begin so; the message lists those there are.
        """
        name = Path(given).name
        if NAME.fullmatch(name):
            run = Run(store, name)
            run._refresh()
            if os.path.isfile(run.folder / "sweep.yaml"):
                return run
        runs = Run.all(store)
        begun = [run for run in runs if name and run.name.startswith(name)]
        if len(begun) == 1:
            return begun[0]
        if begun:
            raise StoreError(f"{given!r} begins the names of several runs in {store.url}, name one: {_names(begun)}")
        raise StoreError(f"no run {given!r} in {store.url}; runs there: {_names(runs) or 'none yet'}")

    @staticmethod
    def all(store: Store) -> list[Run]:
        """Every run of a store, oldest first."""
        runs = [Run(store, name) for name in store.run_names() if NAME.fullmatch(name)]
        for run in runs:
            run._refresh()
        started = [run for run in runs if os.path.isfile(run.folder / "sweep.yaml")]
        return sorted(started, key=lambda run: (run.folder / "sweep.yaml").stat().st_mtime)

    def _refresh(self) -> None:
        """Bring what other machines changed here; where a driver of this machine is at it, its notes are the newest."""
        self.store.pull(self.folder, unless=lambda: self.is_held)

    @property
    def sweep_text(self) -> str:
        """The sweep file as it was when last run."""
        return (self.folder / "sweep.yaml").read_text(encoding="utf-8", errors="replace")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run alone, on this machine and among all that use the store's URL; its holder's death frees it.

        While it is held, what is noted goes over to the URL with each renewal, so that another machine can go on.

        Raises:
            StoreError: if another driver is at it, or has taken it over from this one, which was cut off for long.
        """
        with (self.folder / ".lock").open("a") as lock:
            if not _lock(lock):
                raise StoreError(f"run {self.name!r} is under way in another process; wait for it, or end it")
            # Earlier versions left Tune's files here where they were killed: they quote errors with their secrets.
            shutil.rmtree(self.folder / "tune", ignore_errors=True)
            what = f"run {self.name!r}"
            try:
                with self.store.lease(self._key, _holder(lock), what=what, renewed=self._renewed, lost=self._lose):
                    with self._sending:  # What the holder before has sent since the run was opened here.
                        self.store.pull(self.folder)
                    self._noted = None
                    self._forget_to_end()  # Asked of the holder before.
                    self._may_be_asked = True
                    try:
                        yield
                    finally:
                        self._may_be_asked = False
                        self._forget_to_end()
            except KeyboardInterrupt:
                if not self._taken_by:
                    raise
            if self._taken_by:
                raise StoreError(
                    f"{what} was taken over by {self._taken_by}: this process gave no sign of life for long; what it "
                    "finished is kept, and the other goes on"
                )

    def note_planned(self, counts: Mapping[str, Any]) -> None:
        """Note how many trials and stages (by kind) the sweep asks for, so that what is not started can be counted."""
        write_text(self.folder / "planned.json", json.dumps(counts, indent=1))

    def planned(self) -> dict[str, Any]:
        """What `note_planned` noted: num_trials, and stages by kind; none if that is lost, until the next run."""
        return self._read("planned.json", is_plan) or {"num_trials": 0, "stages": {}}

    def note_gangs(self, choice: Mapping[str, Any]) -> None:
        """Note what was chosen of what the sweep file leaves to the planner, for a resumed run to go on so."""
        write_text(self.folder / "gangs.json", json.dumps(choice, indent=1))

    def gangs(self) -> dict[str, Any]:
        """What `note_gangs` noted; empty if nothing was, or that is lost."""
        return self._read("gangs.json", is_choice) or {}

    def note_columns(self, columns: Sequence[Column]) -> None:
        """Note what the stages of the sweep report, for tables to know which numbers are better large or small."""
        rows = [
            {"kind": column.kind, "task": column.task, "tasks": column.tasks, **asdict(column.metric)}
            for column in columns
        ]
        write_text(self.folder / "columns.json", json.dumps({"columns": rows}, indent=1))

    def columns(self) -> tuple[Column, ...]:
        """What `note_columns` noted; none if that is lost, until the next run."""
        rows = (self._read("columns.json", has_columns) or {"columns": []})["columns"]
        return tuple(
            Column(row.pop("kind"), task=row.pop("task"), tasks=tuple(row.pop("tasks", ())), metric=Metric(**row))
            for row in rows
        )

    @property
    def is_held(self) -> bool:
        """Whether a driver is at it, as far as this file system tells."""
        try:
            with (self.folder / ".lock").open("r") as lock:
                flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (FileNotFoundError, StoreError):
            return False
        except BlockingIOError:
            return True
        return False

    @property
    def is_under_way(self) -> bool:
        """Whether a driver is at it here, or noted to be at the store's URL: one that has died is for a while."""
        return self.is_held or self.store.is_leased(self._key)

    def ask_to_end(self, who: str) -> None:
        """Have the driver save and end, wherever it is: it looks each `Store.pace.beat_seconds`. Raises StoreError."""
        self.store.write(self._end, f"asked by {who}".encode())

    @property
    def _key(self) -> str:
        return f"run-{self.name}"

    @property
    def _end(self) -> str:
        """Name of the file that asks for the end."""
        return f"runs/{self.name}/end"

    def _renewed(self) -> None:
        self._send()
        if self._may_be_asked and (asked := self.store.read(self._end)) is not None:
            self._may_be_asked = False
            logger.warning("run %r: ending, as %s", self.name, asked.decode(errors="replace")[:200])
            interrupt_driver()

    def _forget_to_end(self) -> None:
        with contextlib.suppress(StoreError, OSError):
            self.store.remove(self.store.root / self._end)

    def note_driver(self, driver: Mapping[str, Any]) -> None:
        """Note which process holds the run, for others to end it."""
        write_text(self.folder / "driver.json", json.dumps(driver, indent=1))

    def driver(self) -> dict[str, Any]:
        """What `note_driver` noted: host, pid, and job where it is a Ray job; empty if none ever held the run."""
        return self._read("driver.json", is_driver) or {}

    def note_event(self, event: Mapping[str, Any]) -> None:
        """Add a line to the run's log."""
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps(event) + "\n")

    def events(self) -> Iterator[dict[str, Any]]:
        """Lines of the run's log, oldest first; one that a kill has cut off is left out."""
        try:
            with (self.folder / "events.jsonl").open("rb") as file:
                for line in file:
                    with contextlib.suppress(ValueError):
                        yield parse_object(line)
        except FileNotFoundError:
            return

    def rows_are_whole(self) -> bool:
        """Whether every line of its trials can be read: else it may need stages that are not known here."""
        return self._trials()[1]

    def start_attempt(self) -> None:
        """Count tries afresh: running a sweep again tries again what failed. Damaged notes of trials are left out."""
        for failure in self.failures():
            path = self.folder / "failures" / f"{failure['stage']}.json"
            if failure["kind"] == "gang":
                path.unlink()  # Its trial is about to start anew, in another gang.
            else:
                write_text(path, json.dumps(failure | {"attempts": 0}, indent=1))
        rows, is_whole = self._trials()
        if not is_whole:
            write_text(self.folder / "trials.jsonl", "".join(json.dumps(asdict(row)) + "\n" for row in rows))

    def add_trial(self, row: TrialRow) -> None:
        """Note that a trial was started, or got further stages; a row of stages that are all known changes nothing."""
        if self._noted is None:
            self._noted = {known.trial: known for known in self.trials()}
        known = self._noted.get(row.trial)
        if known is None or not {stage.id for stage in row.stages} <= {stage.id for stage in known.stages}:
            with (self.folder / "trials.jsonl").open("a") as file:
                # A leading newline too: a kill may have cut the line before off.
                file.write("\n" + json.dumps(asdict(row)) + "\n")
            sync(self.folder / "trials.jsonl")
            self._noted[row.trial] = row

    def trials(self) -> list[TrialRow]:
        """Trials in the order they were first started, each with the stages it was last told with.

        Of a variant under one seed the trial that was started last: another version of raysweep may give it other
        stages, and beside those of before a table would count its checkpoints twice, measured in two ways.
        """
        return self._trials()[0]

    def _trials(self) -> tuple[list[TrialRow], bool]:
        """See `trials`; and whether every line could be read. A kill may have cut one off."""
        path = self.folder / "trials.jsonl"
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            return [], True
        rows: dict[tuple[str, int], TrialRow] = {}
        damaged = []
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    row = parse_trial_row(line)
                    rows[row.variant, row.seed] = row
            except ValueError as error:
                damaged.append(f"{path}:{number}: {error}")
        for finding in damaged:
            if finding not in self._told:
                logger.warning("%s; left out until the sweep is run again", finding)
        self._told.update(damaged)
        return list(rows.values()), not damaged

    def add_failure(self, stage_id: str, *, kind: str, trial: str, cause: str, log: str) -> None:
        """Record why a stage failed, with the number of attempts so far in this run."""
        path = self.folder / "failures" / f"{stage_id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        attempts = 1 + (self._read(f"failures/{path.name}", is_failure) or {"attempts": 0})["attempts"]
        failure = {"stage": stage_id, "kind": kind, "trial": trial, "cause": cause, "attempts": attempts, "log": log}
        write_text(path, json.dumps(failure, indent=1))

    def clear_failure(self, stage_id: str) -> None:
        """Forget a failure: the stage is finished now."""
        (self.folder / "failures" / f"{stage_id}.json").unlink(missing_ok=True)

    def publish(self) -> None:
        """Bring what changed of the run to the store's URL, where it has one."""
        self._send()

    def remove(self) -> None:
        """Delete it, here and at the store's URL; its holder alone may."""
        with self._sending:  # What a renewal were sending meanwhile would be there again.
            self.store.remove(self.folder)

    def _send(self) -> None:
        with self._sending:
            if not self._taken_by:
                self.store.push(self.folder)

    def _lose(self, taker: str) -> None:
        """Another holds the run now: end what this process does, and take nothing back."""
        self._taken_by = taker
        logger.error("run %r was taken over by %s; ending this process's work on it", self.name, taker)
        interrupt_driver()

    def add_pruned(self, trial: str, step: int) -> None:
        """Note that a scheduler stopped a trial after its checkpoint at `step`: a resumed run stops it there too."""
        write_text(self.folder / "pruned.json", json.dumps(self.pruned() | {trial: step}, indent=1))

    def pruned(self) -> dict[str, int]:
        """Trial id -> step of its last checkpoint, for trials that a scheduler stopped."""
        return self._read("pruned.json", is_counts) or {}

    def left_out(self) -> set[str]:
        """Ids of the stages after the checkpoint at which a scheduler stopped their trial, if no other needs them."""
        pruned = self.pruned()
        left_out: set[str] = set()
        needed: set[str] = set()
        for trial in self.trials():
            for stage in trial.stages:
                is_after = (stage.step or 0) > pruned.get(trial.trial, math.inf)
                (left_out if is_after else needed).add(stage.id)
        return left_out - needed

    def failures(self) -> list[dict[str, Any]]:
        """What failed and is not finished yet, by stage id."""
        names = sorted(path.name for path in (self.folder / "failures").glob("*.json"))
        noted = [self._read(f"failures/{name}", is_failure) for name in names]
        return [failure for failure in noted if failure is not None]

    def _read(self, name: str, is_right: Callable[[Any], bool] = lambda value: True) -> dict[str, Any] | None:
        """A JSON object of the run; None if there is none, or it was damaged: named then, and moved aside.

        Raises:
            StoreError: if it cannot be read.
        """
        path = self.folder / name
        try:
            value = parse_object(path.read_bytes())
            if not is_right(value):
                raise ValueError("it does not hold what such a file does")
            return value
        except FileNotFoundError:
            return None
        except ValueError as error:
            self.store.set_aside(path, str(error))
            return None
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror}") from error

    def _check_sweep_text(self, sweep_text: str) -> None:
        """Where the identity is lost, the run belongs to the sweep whose file it holds; raises StoreError."""
        if (self.folder / "sweep.yaml").exists() and self.sweep_text != sweep_text:
            raise StoreError(
                f"run {self.name!r} in {self.store.url} has lost its identity.json, and its sweep.yaml is another than "
                "this sweep file: give this one another --run, or delete that sweep.yaml if they are the same sweep"
            )


def _lock(lock: IO[str]) -> bool:
    """Lock a run for its driver, or return False; who only looks whether it is held has the lock for a moment."""
    for _ in range(10):
        with contextlib.suppress(BlockingIOError):
            flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.02)
    return False


def interrupt_driver() -> None:
    """Do to this process what Ctrl-C does, though that may be ignored, as in the background of a shell."""
    number = signal.SIGINT if callable(signal.getsignal(signal.SIGINT)) else signal.SIGTERM
    signal.pthread_kill(threading.main_thread().ident or 0, number)


def _holder(lock: IO[str]) -> Holder:
    """This process; the lock that it holds is one of this machine since it was started."""
    stat = os.fstat(lock.fileno())
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Holder(socket.gethostname(), os.getpid(), f"{boot}:{stat.st_dev}:{stat.st_ino}")


def _names(runs: Sequence[Run]) -> str:
    return ", ".join(run.name for run in runs)


def status(run: Run) -> dict[str, Any]:
    """Distinct stages by kind (done, diverged, failed, pruned, to_do) of all trials of the sweep; and what failed."""
    failures, planned, trials = run.failures(), run.planned(), run.trials()
    known = dict.fromkeys(run.left_out(), "pruned") | {failure["stage"]: "failed" for failure in failures}
    names = ("done", "diverged", "failed", "pruned", "to_do")
    finished = run.store.finished_ids()
    kinds = {kind: dict.fromkeys(names, 0) for kind in planned["stages"]}
    for stage in {stage.id: stage for trial in trials for stage in trial.stages}.values():
        counts = kinds.setdefault(stage.kind, dict.fromkeys(names, 0))
        record = run.store.get(stage.id) if stage.id in finished else None
        counts[record.status if record else known.get(stage.id, "to_do")] += 1
    for kind, total in planned["stages"].items():
        kinds[kind]["to_do"] += max(0, total - sum(kinds[kind].values()))
    return {
        "run": run.name,
        "folder": str(run.folder),
        "num_trials": len(trials),
        "num_trials_planned": max(planned["num_trials"], len(trials)),
        "stages": kinds,
        "failures": failures,
        "pruned": run.pruned(),
    }
