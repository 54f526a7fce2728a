"""The end of a run: gangs that find no trial in the queue take stages of trials whose own gang is still busy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from raysweep.events import Event, StageEnded, StageFailed, TrialStarted
from raysweep.plan import Stage, Trial
from raysweep.runners.queue import Beginnings, Durations
from raysweep.runners.room import Shape

# A trial is helped while more than this is left for others: two starts of a gang.
WORTH_SECONDS = 30.0
# A share takes at least about as long, where there is so much: each is a trial of Tune's.
SHARE_SECONDS = 5.0


class Share(NamedTuple):
    """What another gang takes of a trial."""

    trial: Trial
    stages: tuple[str, ...]
    """Ids of stages that a gang of the trial's shape makes side by side, or of a single one that it works on whole."""


class _Rest(NamedTuple):
    """What others may be given of a trial now."""

    seconds: float
    """Of the trial's own gang."""
    stages: list[Stage]


class Tail:
    """Trials under way, and which of their stages are for others.

    A trial's own gang goes through its stages in the order of `Trial.legs`, so others get the last ones of those whose
    inputs are finished; not training, of which only its own gang has the state. Each stage is given once, and stays the
    own gang's, too: whichever comes to it first makes it, and what others fail at is left to it. (Stores behind a URL
    have no locks: there both may be at the one where they meet, and the first record stands.)

    Args:
        beginnings: knows what is finished.
        durations: tells how long stages take.
        shape_of: the gang of a trial.
        is_wide: whether all workers of a trial's gang work on a stage at once.
        may_end_early: whether a trial may be stopped at a checkpoint, so that nothing is given that comes after the
            one that it is at.
    """

    def __init__(
        self,
        beginnings: Beginnings,
        durations: Durations,
        shape_of: Callable[[Trial], Shape],
        is_wide: Callable[[Trial, Stage], bool],
        *,
        may_end_early: bool,
    ) -> None:
        self._beginnings, self.durations = beginnings, durations
        self.shape_of, self._is_wide = shape_of, is_wide
        self._may_end_early = may_end_early
        self._trials: dict[str, Trial] = {}
        self._legs: dict[str, list[list[Stage]]] = {}
        """By the key of a trial, up to each of its checkpoints, in the order that its own gang makes them in."""
        self._begun: set[str] = set()
        """Ids of trials that have a gang."""
        self._kept: set[str] = set()
        """Ids of stages that are given already, or that nobody can make."""
        self._diverged: set[str] = set()
        self._rests: dict[str, _Rest] = {}
        """By the key of a trial; of those that have a gang."""
        self._changed: set[str] = set()
        """Ids of trials whose rest is to be reckoned anew."""
        self._may_have_room = False

    def start(self, key: str, trial: Trial) -> None:
        """Note that a trial is handed out to a gang of its own, under a `key` for `end`."""
        self._trials[key] = trial
        self._legs[key] = [[stage for batch in batches for stage in batch] for _, batches in trial.legs()]
        self.durations.expect(trial)

    def end(self, key: str) -> None:
        """Note that what was handed out under `key` has ended, a trial or a share, however it did."""
        for kept in (self._trials, self._legs, self._rests):
            kept.pop(key, None)
        self._may_have_room = True

    def take(self, event: Event) -> None:
        """Take one event of the run, after those that know what is finished, and how long it took."""
        match event:
            case TrialStarted(row=row):
                self._begun.add(row.trial)
                self._changed.add(row.trial)
            case StageEnded():
                if event.status != "done":
                    self._diverged.add(event.stage)
                self._changed.add(event.trial)
            case StageFailed(retry=False):
                self._kept.add(event.stage)
                self._changed.add(event.trial)

    def next(self, has_room: Callable[[Shape], bool]) -> Share | None:
        """Take out a share of the trial that has most before it; None if there is no room, or nothing that is worth it.

        Cheap to ask again as long as nothing has ended since.
        """
        if not self._changed and not self._may_have_room:
            return None
        self._reckon()
        self._may_have_room = False
        rests = {key: rest for key, rest in self._rests.items() if rest.seconds > WORTH_SECONDS}
        room = {shape: has_room(shape) for shape in {self.shape_of(self._trials[key]) for key in rests}}
        there = [key for key in rests if room[self.shape_of(self._trials[key])]]
        if not there:
            return None
        key = max(there, key=lambda key: rests[key].seconds)
        trial, stages = self._trials[key], self._share(self._trials[key], rests[key])
        self._kept.update(stages)
        self._changed.add(trial.id)
        return Share(trial, stages)

    def _reckon(self) -> None:
        changed = set()
        while self._changed:  # One by one, as events come from another thread.
            changed.add(self._changed.pop())
        for key, trial in self._trials.items():
            if trial.id in changed and trial.id in self._begun:
                stages = self._rest(trial, self._legs[key])
                self._rests[key] = _Rest(self.durations.of(trial, stages), stages)

    def _rest(self, trial: Trial, legs: Iterable[Sequence[Stage]]) -> list[Stage]:
        """What is ready, but for what its own gang makes next."""
        finished = self._beginnings.finished
        unmade = [stages for leg in legs if (stages := [stage for stage in leg if stage.id not in finished])]
        open_legs = unmade[:1] if self._may_end_early else unmade
        left = [stage for leg in open_legs for stage in leg if stage.id not in self._kept]
        own = self._side_by_side(trial, left[0]) if left else 0
        return [stage for stage in left[own:] if stage.state_key is None and self._is_ready(stage)]

    def _is_ready(self, stage: Stage) -> bool:
        inputs = stage.inputs.values()
        return self._beginnings.finished.issuperset(inputs) and self._diverged.isdisjoint(inputs)

    def _share(self, trial: Trial, rest: _Rest) -> tuple[str, ...]:
        """The last of its stages: as many as a gang makes side by side, and up to half of them where they are short."""
        stages = rest.stages
        at_once, each = self._side_by_side(trial, stages[-1]), rest.seconds / len(stages)
        num = at_once * math.ceil(SHARE_SECONDS / (at_once * each))
        num = max(at_once, min(num, len(stages) // 2))
        return tuple(stage.id for stage in stages[-num:] if self._side_by_side(trial, stage) == at_once)

    def _side_by_side(self, trial: Trial, stage: Stage) -> int:
        return 1 if self._is_wide(trial, stage) else self.shape_of(trial).workers
