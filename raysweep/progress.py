"""How far a sweep is: what it will run, what of it is done, how long the rest takes, and which checkpoint leads."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raysweep.events import (
    Event,
    GangsChosen,
    StageEnded,
    StageFailed,
    StageProgress,
    StageStarted,
    TrialStarted,
)
from raysweep.run_files import TrialRow
from raysweep.scores import MEAN_SCORE, Result, checkpoint_metrics, of_methods
from raysweep.variants import SearchSpace
from raysweep.worker import Reached


@dataclass(frozen=True)
class Leader:
    """A checkpoint and its mean score over tasks, of one."""

    score: float
    point: Mapping[str, Any]
    seed: int
    step: int | None


class Progress:
    """Counts of a sweep's stages by kind, fed with the events of its run."""

    def __init__(self, space: SearchSpace) -> None:
        search = space.declared.search
        self.num_workers = 1
        """Of the largest gang, once that is known."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Of the finished stages, by kind."""
        self.speeds: dict[str, float] = {}
        """Trial -> tokens per second in its present training."""
        self._planned: dict[str, set[str]] = {}
        self._rows: dict[str, TrialRow] = {}
        self._results: dict[str, Result] = {}
        self._failed: dict[str, str] = {}
        self._done: Counter[str] = Counter()
        self._running: dict[str, dict[str, str]] = {}
        self._leaders: dict[str, Leader] = {}
        self._made_seconds = self._made_at = 0.0
        if search.name == "optuna":
            base = space.trial({}, space.declared.seeds[0])
            self.num_trials = search.num_trials or 0
            # Its points are not known yet. What needs no other stage, such as the tokens, trials most likely share.
            self._per_open_trial = Counter(stage.kind for stage in base.stages if stage.inputs)
            self._shared = {stage.kind for stage in base.stages if not stage.inputs}
            self._planned = {stage.kind: set() for stage in base.stages}
            return
        self._per_open_trial, self._shared, self.num_trials = Counter(), set(), 0
        for trial in space.trials():
            self.num_trials += 1
            for stage in trial.stages:
                self._planned.setdefault(stage.kind, set()).add(stage.id)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of stages, in the order of a chain."""
        return tuple(self._planned)

    def total(self, kind: str) -> int:
        """Distinct stages of a kind, as far as is known: further learning rates and Optuna's points come as they do."""
        num_open = max(0, self.num_trials - len(self._rows)) if self._per_open_trial else 0
        known = len(self._planned[kind]) + self._per_open_trial[kind] * num_open
        return max(known, 1) if kind in self._shared else known

    def done(self, kind: str) -> int:
        """Finished stages of a kind, those that diverged among them."""
        return self._done[kind]

    def failed(self, kind: str) -> int:
        """Stages of a kind that failed for good, for this try of the sweep."""
        return sum(other == kind for other in self._failed.values())

    @property
    def num_failed(self) -> int:
        """Of every kind, lost gangs among them."""
        return len(self._failed)

    def running(self, kind: str) -> int:
        """Stages of a kind that are being worked on."""
        # A gang is told of a batch at once, and has as many of it in work as it has workers.
        return sum(
            other == kind for stages in self._running.values() for other in list(stages.values())[: self.num_workers]
        )

    def take(self, event: Event, *, at_seconds: float = 0.0) -> None:
        """Take one event of the run, that many seconds after it began."""
        match event:
            case GangsChosen(num_workers=num_workers):
                self.num_workers = num_workers
            case TrialStarted(row=row):
                self._rows[row.trial] = row
                for each in row.stages:
                    self._planned.setdefault(each.kind, set()).add(each.id)
            case StageStarted():
                self._failed.pop(event.stage, None)
                self._running.setdefault(event.trial, {})[event.stage] = event.kind
            case StageProgress(at=Reached(tokens_per_second=float(speed))):
                self.speeds[event.trial] = speed
            case StageEnded():
                self._take_end(event, at_seconds)
            case StageFailed():
                self._end(event.trial, event.stage)
                if not event.retry:
                    self._failed[event.stage] = event.kind

    def _take_end(self, event: StageEnded, at_seconds: float) -> None:
        self._end(event.trial, event.stage)
        self._failed.pop(event.stage, None)
        if event.stage not in self._results:
            self.seconds[event.kind] += event.wall_seconds
            self._done[event.kind] += 1
            if event.event == "finished":
                self._made_seconds += event.wall_seconds
                self._made_at = at_seconds
        self._results[event.stage] = Result(
            event.stage, event.kind, event.status, event.metrics, event.task, event.lr, event.seed
        )
        self._score(event.trial, event.stage)

    def counts(self) -> dict[str, Any]:
        """Trials and stages by kind, as far as they are known: see `Run.note_planned`."""
        return {"num_trials": self.num_trials, "stages": {kind: self.total(kind) for kind in self.kinds}}

    def rest_seconds(self, at_seconds: float) -> float | None:
        """For what is still to do, at the pace up to the last stage; None until each kind of it has been seen once."""
        rest = 0.0
        for kind in self.kinds:
            to_do = self.total(kind) - self.done(kind) - self.failed(kind)
            if to_do > 0 and not self.done(kind):
                return None
            rest += to_do * self.seconds[kind] / max(1, self.done(kind))
        if not rest or not self._made_seconds or not self._made_at:
            return None
        return max(0.0, rest * self._made_at / self._made_seconds - (at_seconds - self._made_at))

    def best(self, most: int) -> list[Leader]:
        """The leading checkpoints, of those whose fine-tuning is finished."""
        return sorted(self._leaders.values(), key=lambda leader: -leader.score)[:most]

    def _end(self, trial: str, stage: str) -> None:
        self._running.get(trial, {}).pop(stage, None)
        if not self._running.get(trial):
            self.speeds.pop(trial, None)

    def _score(self, trial: str, stage: str) -> None:
        """The score of the checkpoint that a finished stage measures, as a searcher and the report have it."""
        row = self._rows.get(trial)
        scored = next((each for each in row.stages if each.id == stage), None) if row else None
        if row is None or scored is None or scored.kind != "sft":
            return
        group = [each for each in row.stages if each.checkpoint == scored.checkpoint and each.kind == "sft"]
        ended = [each for each in group if each.id in self._results or each.id in self._failed]
        if len(ended) < len(group):
            return
        missing = {each.id: Result(each.id, each.kind, "missing", {}, each.task) for each in group}
        results = [self._results.get(each.id, missing[each.id]) for each in group]
        metrics = checkpoint_metrics(results)
        score = metrics[of_methods(MEAN_SCORE, (str(each.task) for each in results))[0]]
        if not math.isnan(score):
            self._leaders[str(scored.checkpoint)] = Leader(score, row.point, row.seed, scored.step)
