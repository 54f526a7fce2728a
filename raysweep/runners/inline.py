"""The same chains in this process, one after another: for debugging, and where there is no Ray."""

from __future__ import annotations

import logging
from dataclasses import replace

from raysweep.errors import SpaceError
from raysweep.events import Event, Report, StageProgress, TrialStarted
from raysweep.runners.chain import run_chain
from raysweep.runners.gang import Gang
from raysweep.runners.hardware import this_machine, with_gangs_chosen
from raysweep.runners.interrupts import SaveFirst
from raysweep.runners.journal import trial_row
from raysweep.runners.queue import Beginnings
from raysweep.runs import Run
from raysweep.store import Store
from raysweep.variants import SearchSpace

logger = logging.getLogger(__name__)


def run_inline(space: SearchSpace, store: Store, run: Run, report: Report) -> None:
    """Run every trial of a grid or random search.

    Raises:
        SpaceError: if the space wants Optuna or a scheduler, which Tune runs.
        ClusterError: if no choice of what is left to the planner fits this machine.
    """
    search, asked = space.declared.search, space.declared.resources.by_variant
    if search.name == "optuna" or search.scheduler:
        wanted = f"search.scheduler {search.scheduler.name}" if search.scheduler else f"search.name {search.name}"
        raise SpaceError(f"{wanted} needs Ray Tune: leave --runner inline out")
    for each in asked.every:
        if each.workers != "auto" and each.workers > 1:
            logger.warning("the inline runner is one process: resources.workers %d is not used", each.workers)
    alone = asked.map(lambda each: each.with_(workers=1, max_concurrent=1))
    trials = Beginnings(store.finished_ids()).in_order(space.trials())
    space = with_gangs_chosen(space, run, lambda: [this_machine()], report, asked=alone)
    current = ""
    saves = SaveFirst()

    def tell(event: Event) -> None:
        if isinstance(event, StageProgress):
            event = replace(event, trial=current)
        report(event)
        saves.take(event)

    gang: Gang | None = None
    try:
        with saves:
            for trial in trials:
                current = trial.id
                tell(TrialStarted(row=trial_row(trial)))
                resources = space.resources.of(trial.point)
                if gang is None or gang.resources != resources:
                    if gang:
                        gang.close()
                    gang = Gang(store, resources, report=tell, save_asked=saves.asked)
                for _leg in run_chain(trial, gang, max_retries=resources.max_retries, report=tell):
                    pass
    finally:
        if gang:
            gang.close()
