"""What happens in a run, as it is told by gangs: kept in the run folder, tracked, and shown."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence

from raysweep.errors import StoreError
from raysweep.estimates import flops_of
from raysweep.events import (
    Event,
    Note,
    Report,
    StageEnded,
    StageFailed,
    StageProgress,
    StageStarted,
    TrialStarted,
)
from raysweep.plan import Trial
from raysweep.run_files import StageRow, TrialRow
from raysweep.runners.tracking import Tracker
from raysweep.runs import Run
from raysweep.scores import by_tuning, column_name
from raysweep.worker import Reached

logger = logging.getLogger(__name__)

# Bytes held back from the disk, so that the cause is kept when it fills up.
RESERVE = 2**16


LOGGED = ("started", "finished", "failed", "note")
LOGGED_FIELDS = (
    "time",
    "event",
    "stage",
    "kind",
    "trial",
    "status",
    "step",
    "wall_seconds",
    "cause",
    "retry",
    "message",
)
"""What of an event goes into the run's log."""


def trial_row(trial: Trial) -> TrialRow:
    """A trial as it is kept in the run."""
    flops = flops_of(trial)
    stages = tuple(
        StageRow(
            id=stage.id,
            kind=stage.kind,
            step=stage.step,
            # Without a step it is none that is measured.
            checkpoint=stage.id if stage.kind == "pretrain" and stage.step is not None else stage.checkpoint,
            task=stage.task,
            inputs=dict(stage.inputs),
            state_key=stage.state_key,
            flops=flops.get(stage.id),
        )
        for stage in trial.stages
    )
    return TrialRow(
        trial=trial.id,
        variant=trial.variant_id,
        point=trial.point,
        seed=trial.seed,
        stages=stages,
        settings=trial.settings,
    )


class Journal:
    """Takes the events of a run, in the driver."""

    def __init__(self, run: Run, show: Report, *, trackers: Sequence[Tracker] = ()) -> None:
        self._run = run
        self._show = show
        self._trackers = trackers
        self._rows: dict[str, TrialRow] = {}
        self._failed = {failure["stage"] for failure in run.failures()}
        self._finished: dict[str, tuple[str, float]] = {}
        """Id of a stage -> for which trial its end was told, and how long it took."""
        self._unkept: list[Event] = []
        self._reserve = run.folder / ".reserve"
        self._hold_back()

    def __call__(self, event: Event) -> None:
        """Keep and show one event.

        What finds no room on the disk is kept once there is some; the note of a failure has room held back. An end that
        comes a second time is left out: a gang's connection was lost meanwhile, or another gang has made the stage,
        which the trial's own had begun to wait for.
        """
        if isinstance(event, StageEnded) and self._finished.get(event.stage) == (event.trial, event.wall_seconds):
            return
        event = self._as_it_is(event)
        self._unkept.append(event)
        self._keep_all()
        if event.event in LOGGED:
            with contextlib.suppress(OSError):  # Said already.
                fields = {name: getattr(event, name, None) for name in LOGGED_FIELDS}
                self._run.note_event({name: value for name, value in fields.items() if value is not None})
        self._show(event)

    def close(self) -> None:
        """Give back what was held of the disk, and let the trackers write what they hold, if there is room."""
        self._give_back()
        self._keep_all()
        for tracker in self._trackers:
            tracker.close()

    def check(self) -> None:
        """Raise StoreError if a failure could not be kept: without it, the run would pass for one that is done."""
        if lost := [event for event in self._unkept if isinstance(event, StageFailed)]:
            raise StoreError(
                f"store {self._run.store.url!r} cannot be written, not even that {len(lost)} stage(s) of run "
                f"{self._run.name!r} failed: {lost[0].cause}; once it can, the same command goes on"
            )

    def _as_it_is(self, event: Event) -> Event:
        """The event, or a note in place of a failure of a stage that is finished.

        A worker's signs of life are a moment old: one that is stopped between two stages is missed as it was at the
        first.
        """
        match event:
            case StageEnded():
                self._finished[event.stage] = event.trial, event.wall_seconds
            case StageStarted():  # Made again, as its files were lost.
                self._finished.pop(event.stage, None)
            case StageFailed(stage=stage, cause=cause) if stage in self._finished:
                return Note(time=event.time, message=f"after {stage} was finished: {cause}")
        return event

    def _keep_all(self) -> None:
        waiting, self._unkept = self._unkept, []
        for event in waiting:
            try:
                self._keep_failure(event) if isinstance(event, StageFailed) else self._keep(event)
            except OSError as error:
                if not isinstance(event, StageProgress):  # Of which there are many, and the last says all.
                    self._unkept.append(event)
                    if event is waiting[-1]:  # The others were said to be.
                        logger.warning("event %r not kept yet: %s", event.event, error)

    def _hold_back(self) -> None:
        for size in (RESERVE, RESERVE // 4, RESERVE // 16):
            try:
                self._reserve.write_bytes(bytes(size))
                return
            except OSError:
                self._give_back()

    def _give_back(self) -> None:
        with contextlib.suppress(OSError):  # As of a store that can only be read any more.
            self._reserve.unlink(missing_ok=True)

    def _keep_failure(self, event: StageFailed) -> None:
        try:
            self._keep(event)
        except OSError:
            if not self._reserve.exists():
                raise
            self._give_back()
            self._keep(event)
            self._hold_back()

    def _keep(self, event: Event) -> None:
        match event:
            case TrialStarted(row=row):
                self._rows[row.trial] = row
                self._run.add_trial(row)
            case StageEnded():
                if event.stage in self._failed:
                    self._run.clear_failure(event.stage)
                    self._failed.discard(event.stage)
                if event.event == "finished":
                    placed = by_tuning(event.metrics, event.task)
                    scalars = {column_name(event.kind, name, task): value for task, name, value in placed}
                    self._track(event.trial, event.step or 0, scalars)
            case StageProgress(at=Reached(step=step, loss=float(loss))):
                self._track(event.trial, step, {f"{event.kind}/loss": loss})
            case StageFailed(stage=stage, kind=kind, trial=trial):
                self._run.add_failure(stage, kind=kind, trial=trial, cause=event.cause, log=event.log)
                self._failed.add(stage)

    def _track(self, trial: str, step: int, scalars: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.add(self._rows[trial], step, scalars)


def quiet_libraries() -> None:
    """Progress bars and advice of libraries would tear the board; warnings still come through logging."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # Each of five tries would be told twice; an error is raised.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
