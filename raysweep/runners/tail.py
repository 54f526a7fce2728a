"""The end of a run: gangs that find no trial in the queue take stages of trials whose own gang is still busy."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from raysweep.events import Event, StageEnded
from raysweep.plan import Stage, Trial
from raysweep.runners.queue import Beginnings, Durations
from raysweep.runners.room import Shape

# A share is handed out where what a gang has before it takes it longer: a gang takes some 15 s to start.
WORTH_SECONDS = 30.0


class Share(NamedTuple):
    """What another gang takes of a trial."""

    trial: Trial
    stages: tuple[str, ...]
    """Ids of stages that a gang of the trial's shape makes side by side, or of a single one that it works on whole."""


class _Rest(NamedTuple):
    """What others may be given of a trial now."""

    seconds: float
    stages: list[Stage]


class Tail:
    """Trials under way, and which of their stages are for others.

    A trial's own gang goes through its stages from the first on, so others get the last ones of those whose inputs are
    finished; not training, of which only its own gang has the state. Each stage is given once, and stays the own
    gang's, too: whichever comes to it first makes it, and what others fail at is left to it.

    Args:
        beginnings: knows what is finished.
        durations: tells how long stages take.
        shape_of: the gang of a trial.
    """

    def __init__(self, beginnings: Beginnings, durations: Durations, shape_of: Callable[[Trial], Shape]) -> None:
        self._beginnings, self._durations, self._shape_of = beginnings, durations, shape_of
        self._trials: dict[str, Trial] = {}
        self._given: set[str] = set()
        self._rests: dict[str, _Rest] = {}
        """By the key of a trial; of those that have any."""
        self._changed: set[str] = set()
        """Ids of trials whose rest is to be reckoned anew."""
        self._may_have_room = False

    def start(self, key: str, trial: Trial) -> None:
        """Note that a trial is handed out to a gang of its own, under a `key` for `end`."""
        self._trials[key] = trial
        self._changed.add(trial.id)

    def end(self, key: str) -> None:
        """Note that what was handed out under `key` has ended, a trial or a share, however it did."""
        self._trials.pop(key, None)
        self._rests.pop(key, None)
        self._may_have_room = True

    def take(self, event: Event) -> None:
        """Take one event of the run, after those that know what is finished, and how long it took."""
        if isinstance(event, StageEnded):
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
        room = {shape: has_room(shape) for shape in {self._shape_of(self._trials[key]) for key in rests}}
        there = [key for key in rests if room[self._shape_of(self._trials[key])]]
        if not there:
            return None
        key = max(there, key=lambda key: rests[key].seconds)
        trial, ready = self._trials[key], rests[key].stages
        num = 1 if ready[-1].spec.wide else self._shape_of(trial).workers
        stages = tuple(stage.id for stage in ready[-num:] if num == 1 or not stage.spec.wide)
        self._given.update(stages)
        self._changed.add(trial.id)
        return Share(trial, stages)

    def _reckon(self) -> None:
        changed, self._changed = self._changed, set()  # Events come from another thread.
        for key, trial in self._trials.items():
            if trial.id in changed:
                stages = self._rest(trial)
                self._rests[key] = _Rest(self._durations.of(trial, stages), stages)

    def _rest(self, trial: Trial) -> list[Stage]:
        """What is ready, but for what its own gang makes next."""
        finished = self._beginnings.finished
        left = [stage for stage in trial.stages if stage.id not in finished and stage.id not in self._given]
        return [
            stage
            for stage in left[self._shape_of(trial).workers :]
            if stage.state_key is None and finished.issuperset(stage.inputs.values())
        ]
