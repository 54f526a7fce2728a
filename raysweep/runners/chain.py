"""A trial's chain through a gang: what is finished is taken from the store, what failed is tried again and recorded."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from raysweep.events import Note, Report, StageEnded, StageFailed, StageStarted, TrialStarted
from raysweep.plan import Stage, Trial
from raysweep.record import Record
from raysweep.runners.attempts import Failure, Outcome, wait_for_room
from raysweep.runners.gang import Gang, GangBroken
from raysweep.runners.journal import trial_row
from raysweep.scores import Result, checkpoint_metrics
from raysweep.spec import canonical
from raysweep.store import Store


@dataclass(frozen=True)
class Leg:
    """A trial has come as far as the checkpoint at `step`. `metrics` are `kind/name` -> number, of that checkpoint."""

    step: int
    metrics: Mapping[str, float]
    last: bool


def run_chain(trial: Trial, gang: Gang, *, max_retries: int, report: Report) -> Iterator[Leg]:
    """Run what of a trial is not finished, yielding after each checkpoint.

    Where `sft.lrs: auto` adds stages, the trial is told again, with these.
    A stage that fails `1 + max_retries` times is reported, and what hangs from it is left out; a diverged one
    likewise, without further tries. All that happens is told to `report`.

    Raises:
        GangBroken: if a worker died; what was finished stays so.
    """
    records: dict[str, Record] = {}
    for step, batches in trial.legs():
        for batch in batches:
            left_out = _diverged(trial, records)
            ready = [
                stage
                for stage in batch
                if stage.id not in left_out and all(stage_id in records for stage_id in stage.inputs.values())
            ]
            outcomes = _run_batch(ready, trial, gang, max_retries=max_retries, report=report)
            records |= {outcome.id: outcome for outcome in outcomes}
        while (wider := trial.widened(_results(trial, records))) is not trial:
            new = [stage for stage in wider.stages if stage.id in wider.added - trial.added]
            trial = wider
            report(TrialStarted(row=trial_row(trial)))
            outcomes = _run_batch(new, trial, gang, max_retries=max_retries, report=report)
            records |= {outcome.id: outcome for outcome in outcomes}
        if step is not None:
            metrics = leg_metrics([stage for stage in trial.stages if stage.step == step], records)
            yield Leg(step=step, metrics=metrics, last=step == trial.last_step)
    # A trajectory with a checkpoint still to come keeps its state, for the next try.
    open_keys = {stage.state_key for stage in trial.stages if stage.id not in records}
    for key in {stage.state_key for stage in trial.stages} - open_keys - {None}:
        gang.drop_state(str(key))


def run_share(trial: Trial, ids: Container[str], gang: Gang, *, report: Report) -> None:
    """Make some stages of a trial whose own gang is busy with others; what fails is left to that gang.

    Raises:
        GangBroken: as `run_chain`.
    """
    store = gang.store
    unmade = [stage for stage in trial.stages if stage.id in ids and not store.get(stage.id)]
    # Each once: stages of a share mostly hang from one checkpoint, whose files are looked at.
    needed = {stage_id for stage in unmade for stage_id in stage.inputs.values()}
    done = {stage_id for stage_id in needed if (record := store.get(stage_id)) and record.status == "done"}
    stages = [stage for stage in unmade if done.issuperset(stage.inputs.values())]
    for stage in stages:
        report(StageStarted(trial=trial.id, stage=stage.id, kind=stage.kind))
    for outcome in _made(stages, gang):
        if isinstance(outcome, Record):
            report(told("finished", outcome, _of(outcome, stages), trial))
        else:
            report(_failed(outcome, trial, retry=True))


def recall(trial: Trial, store: Store, finished: Container[str]) -> tuple[Trial, list[Stage]]:
    """A trial as far as its finished stages have widened it, and the stages that are still to be run.

    Args:
        trial: as its space gives it.
        store: has the records.
        finished: ids that the store listed.
    """
    records: dict[str, Record] = {}
    asked: set[str] = set()
    while True:
        for stage in trial.stages:
            if stage.id not in asked and stage.id in finished and (record := store.get(stage.id)):
                records[stage.id] = record
            asked.add(stage.id)
        if (wider := trial.widened(_results(trial, records))) is trial:
            break
        trial = wider
    diverged = _diverged(trial, records)
    return trial, [stage for stage in trial.stages if stage.id not in records and stage.id not in diverged]


def last_metrics(trial: Trial, store: Store, finished: Container[str]) -> dict[str, float] | None:
    """Those of a finished trial's last checkpoint; None if a stage of it is still to be run, or diverged."""
    trial, to_do = recall(trial, store, finished)
    records = {stage.id: record for stage in trial.stages if (record := store.get(stage.id))}
    if to_do or any(record.status != "done" for record in records.values()) or len(records) < len(trial.stages):
        return None
    return leg_metrics([stage for stage in trial.stages if stage.step == trial.last_step], records)


def _diverged(trial: Trial, records: Mapping[str, Record]) -> set[str]:
    """Ids of the stages that diverged, would go on along a diverged trajectory, or hang from one of these."""
    ids: set[str] = set()
    trajectories: set[str] = set()
    for stage in trial.stages:
        record, key = records.get(stage.id), stage.state_key
        if record is not None and record.status == "done":
            continue
        if record is not None or key in trajectories or ids & set(stage.inputs.values()):
            ids.add(stage.id)
            trajectories |= {key} if key else set()
    return ids


def _run_batch(
    stages: Sequence[Stage], trial: Trial, gang: Gang, *, max_retries: int, report: Report
) -> Iterator[Record]:
    todo = []
    for stage in stages:
        if record := gang.store.get(stage.id, asked=canonical(stage.spec)):
            report(told("found", record, stage, trial))
            yield record
        else:
            todo.append(stage)
    attempt = 0
    while todo:
        for stage in todo:
            report(StageStarted(trial=trial.id, stage=stage.id, kind=stage.kind))
        outcomes, todo = _made(todo, gang), []
        # Finished stages that somebody deleted or damaged while the run went on: made again before what needs them.
        lost: set[str | None] = set()
        no_room = away = False
        try:
            for outcome in outcomes:
                if isinstance(outcome, Record):
                    report(told("finished", outcome, _of(outcome, stages), trial))
                    yield outcome
                    continue
                retry = attempt < max_retries and not outcome.final
                report(_failed(outcome, trial, retry=retry))
                if retry:
                    todo.append(outcome.stage)
                    lost |= {outcome.lost} - {None}
                    no_room |= outcome.no_room
                    away |= outcome.away
        except GangBroken as broken:
            if broken.failure:  # Its cause; the trial goes on in another gang.
                report(_failed(broken.failure, trial, retry=True))
            raise
        for stage in [stage for stage in trial.stages if stage.id in lost]:
            yield from _run_batch([stage], trial, gang, max_retries=max_retries, report=report)
        # Neither a full disk nor a lost server is a failing of the stage's.
        waited = (away and gang.store.wait_until_back()) or (
            no_room and wait_for_room(gang.store, partial(_note, report))
        )
        attempt += not waited


def _made(stages: Sequence[Stage], gang: Gang) -> Iterator[Outcome]:
    """One of each, as they come."""
    wide = [stage for stage in stages if stage.spec.is_wide(gang.resources)]
    yield from map(gang.wide, wide)
    yield from gang.split([stage for stage in stages if stage not in wide])


def _of(record: Record, stages: Iterable[Stage]) -> Stage:
    return next(stage for stage in stages if stage.id == record.id)


def _note(report: Report, message: str) -> None:
    report(Note(message=message))


def told(event: Literal["found", "finished"], record: Record, stage: Stage, trial: Trial) -> StageEnded:
    """The event of a stage that was finished before, or just now."""
    return StageEnded(
        event=event,
        trial=trial.id,
        stage=record.id,
        kind=record.kind,
        status=record.status,
        step=stage.step,
        task=stage.task,
        lr=record.spec.get("lr"),
        seed=record.spec.get("seed"),
        wall_seconds=record.provenance["wall_seconds"],
        num_workers=record.provenance["world_size"],
        metrics=dict(record.metrics),
    )


def _failed(failure: Failure, trial: Trial, *, retry: bool) -> StageFailed:
    return StageFailed(
        trial=trial.id,
        stage=failure.stage.id,
        kind=failure.stage.kind,
        cause=failure.cause,
        log=failure.log,
        retry=retry,
    )


def _results(trial: Trial, records: Mapping[str, Record]) -> dict[str, Result]:
    return {stage.id: _result(stage, records[stage.id]) for stage in trial.stages if stage.id in records}


def leg_metrics(stages: Sequence[Stage], records: Mapping[str, Record]) -> dict[str, float]:
    """`kind/name` -> number over the stages of one checkpoint: what a searcher or a pruner may ask for."""
    return checkpoint_metrics([_result(stage, records.get(stage.id)) for stage in stages])


def _result(stage: Stage, record: Record | None) -> Result:
    if record is None:
        return Result(id=stage.id, kind=stage.kind, task=stage.task, status="missing", metrics={})
    return Result(
        id=stage.id,
        kind=stage.kind,
        task=stage.task,
        status=record.status,
        metrics=record.metrics,
        lr=record.spec.get("lr"),
        seed=record.spec.get("seed"),
    )
