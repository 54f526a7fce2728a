"""A run: one sweep in one store. Its folder holds the sweep file, the trials that were started, and what failed.

Which stages are finished is never written here: that is the store's to say.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raysweep.durable import parse_object, write_text
from raysweep.errors import StoreError
from raysweep.store import Store, difference


@dataclass(frozen=True)
class StageRow:
    """A stage of a started trial. `checkpoint` is the stage id of what it measures, `step` that checkpoint's step."""

    id: str
    kind: str
    step: int | None
    checkpoint: str | None
    task: str | None
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class TrialRow:
    """A started trial: variant x seed."""

    trial: str
    variant: str
    point: Mapping[str, Any]
    seed: int
    stages: tuple[StageRow, ...]


class Run:
    """One sweep in one store."""

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.name = name
        self.folder: Path = store.root / "runs" / name
        self._noted: dict[str, TrialRow] | None = None

    @staticmethod
    def create(store: Store, name: str, *, sweep_text: str, identity: str) -> Run:
        """Open the run `name`, or start it.

        Raises:
            StoreError: if a run of that name belongs to another sweep (`identity`: canonical text of the sweep).
        """
        run = Run(store, name)
        run.folder.mkdir(parents=True, exist_ok=True)
        store.pull(run.folder)
        path = run.folder / "identity.json"
        if not path.exists():
            write_text(path, identity)
        elif (other := path.read_text()) != identity:
            raise StoreError(
                f"run {name!r} in {store.url} belongs to another sweep; it differs in {difference(other, identity)}. "
                "Give this one another --run, or leave --run out: finished stages are shared either way"
            )
        write_text(run.folder / "sweep.yaml", sweep_text)
        return run

    @staticmethod
    def find(store: Store, name: str) -> Run:
        """An existing run, by its name or by the path of its folder.

        Raises:
            StoreError: if there is none; the message lists those there are.
        """
        run = Run(store, Path(name).name)
        store.pull(run.folder)
        if not (run.folder / "sweep.yaml").exists():
            there = ", ".join(run.name for run in Run.all(store)) or "none yet"
            raise StoreError(f"no run {name!r} in {store.url}; runs there: {there}")
        return run

    @staticmethod
    def all(store: Store) -> list[Run]:
        """Every run of a store, oldest first."""
        store.pull(store.root / "runs")
        found = sorted((store.root / "runs").glob("*/sweep.yaml"), key=lambda path: path.stat().st_mtime)
        return [Run(store, path.parent.name) for path in found]

    @property
    def sweep_text(self) -> str:
        """The sweep file as it was when last run."""
        return (self.folder / "sweep.yaml").read_text()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run alone; its holder's death frees it. Raises StoreError if another driver is at it."""
        with (self.folder / ".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(f"run {self.name!r} is under way in another process; wait for it, or end it") from None
            yield

    def note_planned(self, counts: Mapping[str, Any]) -> None:
        """Note how many trials and stages (by kind) the sweep asks for, so that what is not started can be counted."""
        write_text(self.folder / "planned.json", json.dumps(counts, indent=1))

    def planned(self) -> dict[str, Any]:
        """What `note_planned` noted: num_trials, and stages by kind; none if that is lost, until the next run."""
        noted: dict[str, Any] = {"num_trials": 0, "stages": {}}
        with contextlib.suppress(FileNotFoundError, ValueError):
            noted |= parse_object((self.folder / "planned.json").read_bytes())
        return noted

    def start_attempt(self) -> None:
        """Count tries afresh: running a sweep again tries again what failed."""
        for failure in self.failures():
            path = self.folder / "failures" / f"{failure['stage']}.json"
            if failure["kind"] == "gang":
                path.unlink()  # Its trial is about to start anew, in another gang.
            else:
                write_text(path, json.dumps(failure | {"attempts": 0}, indent=1))

    def add_trial(self, row: TrialRow) -> None:
        """Note that a trial was started, or got further stages; a row of stages that are all known changes nothing."""
        if self._noted is None:
            self._noted = {known.trial: known for known in self.trials()}
        known = self._noted.get(row.trial)
        if known is None or not {stage.id for stage in row.stages} <= {stage.id for stage in known.stages}:
            with (self.folder / "trials.jsonl").open("a") as file:
                # A leading newline too: a kill may have cut the line before off.
                file.write("\n" + json.dumps(asdict(row)) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._noted[row.trial] = row

    def trials(self) -> list[TrialRow]:
        """Trials in the order they were first started, each with the stages it was last told with."""
        try:
            lines = (self.folder / "trials.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        rows: dict[str, TrialRow] = {}
        for line in lines:
            try:
                data = json.loads(line)
            except json.JSONDecodeError:
                continue  # Cut off by a kill in mid-line: the trial is noted again when it is started again.
            stages = tuple(StageRow(**stage) for stage in data.pop("stages"))
            rows[data["trial"]] = TrialRow(**data, stages=stages)
        return list(rows.values())

    def add_failure(self, stage_id: str, *, kind: str, trial: str, cause: str, log: str) -> None:
        """Record why a stage failed, with the number of attempts so far in this run."""
        path = self.folder / "failures" / f"{stage_id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        attempts = 1 + (json.loads(path.read_text())["attempts"] if path.exists() else 0)
        failure = {"stage": stage_id, "kind": kind, "trial": trial, "cause": cause, "attempts": attempts, "log": log}
        write_text(path, json.dumps(failure, indent=1))

    def clear_failure(self, stage_id: str) -> None:
        """Forget a failure: the stage is finished now."""
        (self.folder / "failures" / f"{stage_id}.json").unlink(missing_ok=True)

    def publish(self) -> None:
        """Bring the run's folder to the store's URL, where it has one; Tune's own files stay behind."""
        shutil.rmtree(self.folder / "tune", ignore_errors=True)
        self.store.push(self.folder)

    def add_pruned(self, trial: str, step: int) -> None:
        """Note that a scheduler stopped a trial after its checkpoint at `step`: a resumed run stops it there too."""
        write_text(self.folder / "pruned.json", json.dumps(self.pruned() | {trial: step}, indent=1))

    def pruned(self) -> dict[str, int]:
        """Trial id -> step of its last checkpoint, for trials that a scheduler stopped."""
        path = self.folder / "pruned.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def failures(self) -> list[dict[str, Any]]:
        """What failed and is not finished yet, by stage id."""
        found = sorted((self.folder / "failures").glob("*.json"))
        return [json.loads(path.read_text()) for path in found]


def status(run: Run) -> dict[str, Any]:
    """Distinct stages by kind (done, diverged, failed, to_do) of all trials of the sweep, started or not; failures."""
    failures, planned, trials = run.failures(), run.planned(), run.trials()
    failed = {failure["stage"] for failure in failures}
    finished = run.store.finished_ids()
    kinds = {kind: dict.fromkeys(("done", "diverged", "failed", "to_do"), 0) for kind in planned["stages"]}
    for stage in {stage.id: stage for trial in trials for stage in trial.stages}.values():
        counts = kinds.setdefault(stage.kind, dict.fromkeys(("done", "diverged", "failed", "to_do"), 0))
        record = run.store.get(stage.id) if stage.id in finished else None
        counts[record.status if record else "failed" if stage.id in failed else "to_do"] += 1
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
