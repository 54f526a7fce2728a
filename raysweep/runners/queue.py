"""Which trial is handed out next: no gang waits for a beginning that another one is making."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from raysweep.plan import Trial


class Beginnings:
    """Who is training what, of all that trials may share; fed with the events of a run.

    A trial's trainings are the stages that hand resumable state on: minutes to weeks of a gang each, where other
    shared stages are few and short.

    Args:
        finished: ids of the stages that the store has.
    """

    def __init__(self, finished: Iterable[str]) -> None:
        self._finished = set(finished)
        self._trainings: dict[str, tuple[str, ...]] = {}
        self._makers: dict[str, set[str]] = {}
        """Trial that is under way, by a key of the caller's -> trainings that it had not found finished."""

    def first_ready(self, trials: Iterable[Trial]) -> Trial | None:
        """The first that would wait for nobody's training; None if there is none."""
        others = {stage for stages in self._makers.values() for stage in stages} - self._finished
        return next((trial for trial in trials if others.isdisjoint(self._to_train(trial))), None)

    def in_order(self, trials: Iterable[Trial]) -> list[Trial]:
        """Trials as they are best handed out: first those that train the most of what others share."""
        to_train = [(trial, self._to_train(trial)) for trial in trials]
        sharing = Counter(stage for _, stages in to_train for stage in stages)
        shared = [(sum(sharing[stage] > 1 for stage in stages), trial) for trial, stages in to_train]
        return [trial for _, trial in sorted(shared, key=lambda each: -each[0])]

    def start(self, key: str, trial: Trial) -> None:
        """Note that a trial is handed out, under a `key` for `end`: until then, others wait for what it trains."""
        self._makers[key] = set(self._to_train(trial))

    def end(self, key: str) -> None:
        """Note that the trial of `key` has ended, however it did: what it left undone is for another."""
        self._makers.pop(key, None)

    def take(self, event: Mapping[str, object]) -> None:
        """Take one event of the run."""
        if event["event"] in ("finished", "found"):
            self._finished.add(str(event["stage"]))

    def _to_train(self, trial: Trial) -> Sequence[str]:
        if trial.id not in self._trainings:
            self._trainings[trial.id] = tuple(stage.id for stage in trial.stages if stage.state_key)
        return [stage for stage in self._trainings[trial.id] if stage not in self._finished]
