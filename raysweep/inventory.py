"""What lies in a store: its runs and how far they are, and what no run refers to any more."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from raysweep.errors import StoreError
from raysweep.run_files import UNKNOWN, TrialRow
from raysweep.runs import NAME, Run
from raysweep.store import Store, folder_bytes

State = Literal["under way", "done", "failed", "unfinished"]
"""`failed`: what failed is tried again when the sweep is run again, as what is unfinished."""


@dataclass(frozen=True)
class RunRow:
    """A run, as `raysweep ls` lists it."""

    name: str
    state: State
    num_trials_done: int
    num_trials: int
    last_active: str
    """When its driver last wrote, in UTC (ISO 8601)."""
    num_bytes: int
    """Of the stages that it refers to; runs share stages."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def list_runs(store: Store) -> list[RunRow]:
    """The runs of a store, oldest first. Stages are not checked against their checksums."""
    runs = Run.all(store)
    if not runs:
        return []
    finished, sizes = store.finished_ids(), store.stage_bytes()
    return [_run_row(run, finished, sizes) for run in runs]


def _run_row(run: Run, finished: Container[str], sizes: Mapping[str, int]) -> RunRow:
    trials, left_out = run.trials(), run.left_out()
    done = sum(not _to_do(run.store, trial, finished, left_out) for trial in trials)
    total = max(run.planned()["num_trials"], len(trials))
    state: State = "done" if done == total else "unfinished"
    if run.failures():
        state = "failed"
    if run.is_held:
        state = "under way"
    ids = {stage.id for trial in trials for stage in trial.stages}
    newest = max(path.stat().st_mtime for path in (run.folder, *run.folder.glob("*.json*"), run.folder / "sweep.yaml"))
    return RunRow(
        name=run.name,
        state=state,
        num_trials_done=done,
        num_trials=total,
        last_active=datetime.fromtimestamp(newest, UTC).isoformat(timespec="seconds"),
        num_bytes=sum(sizes.get(stage_id, 0) for stage_id in ids),
    )


def _to_do(store: Store, trial: TrialRow, finished: Container[str], left_out: Container[str]) -> list[str]:
    """Ids of the stages that a trial waits for: not finished, nor after its end by a scheduler or by divergence."""
    missing = [stage for stage in trial.stages if stage.id not in finished and stage.id not in left_out]
    if not missing:
        return []
    ended: set[str] = set()
    for stage in trial.stages:  # In order: what a stage takes comes before it.
        names = {stage.id} | ({stage.state_key} if stage.state_key not in (None, UNKNOWN) else set())
        if stage.id in finished:
            record = store.peek(stage.id)
            ended |= names if record is not None and record.status == "diverged" else set()
        elif ended & {*stage.inputs.values(), stage.state_key}:
            ended |= names
    return [stage.id for stage in missing if stage.id not in ended]


Kind = Literal["run", "stage", "state", "attempt", "locks", "altered", "cached"]


@dataclass(frozen=True)
class Garbage:
    """Something that may go, its bytes, and why nobody misses it."""

    kind: Kind
    name: str
    num_bytes: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@contextlib.contextmanager
def held_runs(store: Store) -> Iterator[list[Run]]:
    """Hold all runs of a store, and let none start on this file system.

    Raises:
        StoreError: if one is under way, or has lost its sweep file: what it refers to would count as garbage.
            At a URL a run is under way before its sweep file is there.
    """
    with contextlib.ExitStack() as held:
        held.enter_context(store.unused())
        runs = Run.all(store)
        _check_none_began(store, runs)
        for name in store.run_names():
            folder = store.root / "runs" / name
            if name not in {run.name for run in runs} and NAME.fullmatch(name) and _entries(folder):
                raise StoreError(
                    f"run {name!r} has lost its sweep.yaml, so what it refers to is kept: run its sweep again with "
                    f"--run {name}, which writes it, or delete the folder {store.url.rstrip('/')}/runs/{name}"
                )
        for run in runs:
            held.enter_context(run.held())
        _check_none_began(store, runs)
        yield runs


def _check_none_began(store: Store, runs: Sequence[Run]) -> None:
    """Raise StoreError if a lease at the store's URL is of no run that is known: it is there before the run's notes."""
    known = {f"run-{run.name}.held" for run in runs}
    for name in [] if store.is_local else sorted(store.partial_bytes().keys() - known):
        if name.startswith("run-") and name.endswith(".held"):
            run = name.removeprefix("run-").removesuffix(".held")
            raise StoreError(
                f"run {run!r} is noted as under way, perhaps on another machine; wait for it, or, if it was killed, "
                f"run its sweep again with --run {run}, or delete {store.url.rstrip('/')}/partial/{name}"
            )


def find_garbage(store: Store, runs: Sequence[Run], *, forget: Sequence[str] = ()) -> list[Garbage]:
    """What no run of the store refers to: stages, resumable state, attempts that were cut off, what was moved aside.

    Of a store at a URL also what this machine has cached of finished stages.

    Args:
        store: to look at.
        runs: all of its runs, each held: what is under way refers to more by the minute.
        forget: names of runs that are to go, too, with what they alone refer to.

    Raises:
        StoreError: if what a run refers to cannot be read: then nothing is known to be garbage.
    """
    gone = {Run.find(store, name).name for name in forget}
    kept = [run for run in runs if run.name not in gone]
    for run in kept:
        if not run.rows_are_whole():
            raise StoreError(
                f"run {run.name!r}: {run.folder / 'trials.jsonl'} is damaged, so what it refers to is not known; run "
                f"its sweep again, which mends it, or --forget {run.name}"
            )
    needed = {stage.id for run in kept for trial in run.trials() for stage in trial.stages}
    stages = store.stage_bytes()
    return [
        *(Garbage("run", run.name, folder_bytes(run.folder), "named") for run in runs if run.name in gone),
        *(
            Garbage("stage", stage_id, num_bytes, "no run refers to it")
            for stage_id, num_bytes in sorted(stages.items())
            if stage_id not in needed
        ),
        *_partial(store, kept),
        *(
            Garbage("altered", path.name, folder_bytes(path), "did not match its checksums")
            for path in _entries(store.root / "altered")
        ),
        *_cached(store, needed),
    ]


def free(store: Store, runs: Sequence[Run], garbage: Iterable[Garbage]) -> int:
    """Delete what was found with these runs held; returns the bytes freed. Raises StoreError if another has begun."""
    _check_none_began(store, runs)
    freed = 0
    for each in garbage:
        match each.kind:
            case "stage":
                store.discard(each.name)
            case "cached":
                shutil.rmtree(store.root / "stages" / each.name, ignore_errors=True)
            case "run":
                next(run for run in runs if run.name == each.name).remove()
            case "altered":
                store.remove(store.root / "altered" / each.name)
            case "locks":
                for path in (store.root / "partial").glob("*.lock"):
                    path.unlink(missing_ok=True)
            case "state" | "attempt":
                store.remove(store.root / "partial" / each.name)
        freed += each.num_bytes
    return freed


def _partial(store: Store, runs: Sequence[Run]) -> Iterator[Garbage]:
    """Of partial/: state that no unfinished trajectory goes on from; and attempts and locks, as nobody is at work."""
    finished = store.finished_ids()
    waiting: set[str | None] = set()
    for run in runs:
        left_out = run.left_out()
        for trial in run.trials():
            to_do = set(_to_do(store, trial, finished, left_out))
            waiting |= {name for stage in trial.stages if stage.id in to_do for name in (stage.id, stage.state_key)}
    sizes = store.partial_bytes()
    if locks := [name for name in sizes if name.endswith(".lock")]:
        yield Garbage("locks", f"{len(locks)} lock files", 0, "nobody is at work")
    for name, num_bytes in sorted(sizes.items()):
        key = name.rsplit(".", 1)[0]
        if name.endswith(".out"):
            yield Garbage("attempt", name, num_bytes, "cut off; made anew when tried again")
        elif (
            name.endswith(".state")
            and key not in waiting
            and not (UNKNOWN in waiting and key.startswith("trajectory-"))
        ):
            yield Garbage("state", name, num_bytes, "no unfinished trial goes on from it")


def _cached(store: Store, needed: Container[str]) -> Iterator[Garbage]:
    """Copies, on this machine, of finished stages at a URL; those of stages that go anyway are not told twice."""
    for path in [] if store.is_local else _entries(store.root / "stages"):
        if path.name in needed:
            yield Garbage("cached", path.name, folder_bytes(path), f"a copy of what is in {store.url}")


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder))
    except FileNotFoundError:
        return []
