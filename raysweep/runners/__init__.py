"""Where stages run: in this process, or in Ray gangs."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal

from raysweep.errors import RaysweepError, StoreError
from raysweep.estimates import ToWrite
from raysweep.events import Event, Report, StageFailed, TrialStarted
from raysweep.plan import Trial
from raysweep.progress import Progress
from raysweep.runners.chain import recall, told
from raysweep.runners.drivers import this_driver
from raysweep.runners.journal import Journal, quiet_libraries, trial_row
from raysweep.runners.node_tasks import disk_usage, store_disk
from raysweep.runners.tracking import trackers
from raysweep.runs import Run, interrupt_driver
from raysweep.store import Store
from raysweep.variants import SearchSpace
from raysweep.worker import ignore

logger = logging.getLogger(__name__)

Runner = Literal["tune", "inline"]

BY_FAR = 1.5
"""Times the whole of a disk that a run is refused at that is to write more."""


def run_sweep(
    space: SearchSpace,
    store: Store,
    *,
    runner: Runner = "tune",
    name: str | None = None,
    show: Report = ignore,
    fail_fast: bool = False,
) -> Run:
    """Run what of a sweep is not finished yet; running it again is how one resumes it.

    `show` is called with each event as it comes, in the driver. What failed is in the run, and does not raise.
    With `fail_fast` the first stage that fails for good ends the run as Ctrl-C does: what is being trained is saved.

    Raises:
        StoreError: if the run `name` belongs to another sweep, or is under way in another process.
        ClusterError: if the cluster cannot hold one gang.
    """
    quiet_libraries()
    for warning in space.warnings:
        logger.warning(warning)
    shown = _UntilFailure(show) if fail_fast else show
    with store.in_use():
        run = Run.create(store, name or space.run_name(), sweep_text=space.text, identity=space.identity())
        try:
            with run.held():
                try:
                    _run(space, store, run, shown, runner=runner)
                except RaysweepError:
                    if run.is_new and not run.trials():
                        run.remove()  # Refused before anything was begun: by its cluster, or by what it asks for.
                    raise
        except KeyboardInterrupt:
            if not isinstance(shown, _UntilFailure) or not shown.has_failed:
                raise
            logger.warning("ended at the first failure, as asked; the same command goes on from there")
    return run


class _UntilFailure:
    """Shows events, and ends the run after one that says that a stage failed for good."""

    def __init__(self, show: Report) -> None:
        self._show = show
        self.has_failed = False

    def __call__(self, event: Event) -> None:
        self._show(event)
        if isinstance(event, StageFailed) and not event.retry and not self.has_failed:
            self.has_failed = True
            interrupt_driver()


def _run(space: SearchSpace, store: Store, run: Run, show: Report, *, runner: Runner) -> None:
    run.note_driver(this_driver())
    run.note_planned(Progress(space).counts())
    run.note_columns(space.columns())
    run.start_attempt()
    journal = Journal(run, show, trackers=trackers(run, space.name))
    store.be_patient(space.declared.resources.default.max_store_wait_seconds)
    try:
        _tell_lack_of_room(space, store)
        if runner == "inline":
            from raysweep.runners.inline import run_inline

            run_inline(space, store, run, journal)
        else:
            _run_on_ray(space, store, run, journal)
    finally:
        journal.close()
        run.publish()
    journal.check()


def _tell_lack_of_room(space: SearchSpace, store: Store) -> None:
    """Here it is waited for once a disk is full; a cluster without it is refused, as for all else that is found.

    Raises:
        StoreError: if no room that can be made would do, by far: what is to be written is an estimate.
    """
    if not store.is_local or "RAY_ADDRESS" in os.environ:
        return
    to_write, (folder, free) = ToWrite.of(space, store), store_disk(store.url)
    if not to_write or not (lack := to_write.lack(store, folder, free)):
        return
    in_all = disk_usage(Path(folder)).total
    if to_write.lack(store, folder, int(BY_FAR * in_all)):
        raise StoreError(f"{lack}; its disk has {in_all / 2**30:,.1f} in all")
    logger.warning(lack)


def _run_on_ray(space: SearchSpace, store: Store, run: Run, journal: Journal) -> None:
    trials: list[Trial] | None = None
    search = space.declared.search
    if search.name != "optuna":
        finished = store.finished_ids()
        trials = []
        for whole in space.trials():
            trial, to_do = recall(whole, store, finished)
            # A scheduler compares with all that came before, so it is shown the finished trials again.
            if search.scheduler is None and not to_do:
                _tell_finished(trial, store, journal)
            else:
                trials.append(whole)
        if not trials:
            return
    from raysweep.runners.tune import run_tune

    run_tune(space, store, run, journal, trials=trials)


def _tell_finished(trial: Trial, store: Store, journal: Journal) -> None:
    journal(TrialStarted(row=trial_row(trial)))
    for stage in trial.stages:
        if record := store.get(stage.id):  # Else it was left out, as what it needs diverged.
            journal(told("found", record, stage, trial))
