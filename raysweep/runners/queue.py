"""Which trial is handed out next: the longest that there is room for and that waits for nobody's beginning."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from raysweep.estimates import sized, work_of
from raysweep.events import Event, StageEnded, StageEvent
from raysweep.plan import Stage, Trial
from raysweep.runners.room import Shape


class Beginnings:
    """Who is training what, of all that trials may share; fed with the events of a run.

    A trial's trainings are the stages that hand resumable state on: minutes to weeks of a gang each, where other
    shared stages are few and short.

    Args:
        finished: ids of the stages that the store has.
    """

    def __init__(self, finished: Iterable[str]) -> None:
        self.finished = set(finished)
        """Ids of the stages that are finished by now."""
        self._trainings: dict[str, tuple[str, ...]] = {}
        self._makers: dict[str, set[str]] = {}
        """Trial that is under way, by a key of the caller's -> trainings that it had not found finished."""

    def first_ready(self, trials: Iterable[Trial]) -> Trial | None:
        """The first that would wait for nobody's training; None if there is none."""
        others = {stage for stages in self._makers.values() for stage in stages} - self.finished
        return next((trial for trial in trials if others.isdisjoint(self._to_train(trial))), None)

    def in_order(self, trials: Iterable[Trial], seconds: Callable[[Trial], float] = lambda trial: 0.0) -> list[Trial]:
        """Trials as they are best handed out: first those that train the most of what others share, then the longest.

        Args:
            trials: to be put in order; equals stay in theirs.
            seconds: how long a trial will take.
        """
        all_trials = list(trials)
        sharing = self.shared(all_trials)
        keys = {id(trial): (len(sharing.intersection(self._to_train(trial))), seconds(trial)) for trial in all_trials}
        return sorted(all_trials, key=lambda trial: keys[id(trial)], reverse=True)

    def shared(self, trials: Iterable[Trial]) -> set[str]:
        """Ids of the trainings to do that several trials need."""
        needed = Counter(stage for trial in trials for stage in self._to_train(trial))
        return {stage for stage, num_trials in needed.items() if num_trials > 1}

    def start(self, key: str, trial: Trial) -> None:
        """Note that a trial is handed out, under a `key` for `end`: until then, others wait for what it trains."""
        self._makers[key] = set(self._to_train(trial))

    def end(self, key: str) -> None:
        """Note that the trial of `key` has ended, however it did: what it left undone is for another."""
        self._makers.pop(key, None)

    def take(self, event: Event) -> None:
        """Take one event of the run."""
        if isinstance(event, StageEnded):
            self.finished.add(event.stage)

    def _to_train(self, trial: Trial) -> Sequence[str]:
        if trial.id not in self._trainings:
            self._trainings[trial.id] = tuple(stage.id for stage in trial.stages if stage.state_key)
        return [stage for stage in self._trainings[trial.id] if stage not in self.finished]


class _Work(NamedTuple):
    stage: str
    kind: str
    flops: float
    """Of each worker of the gang."""
    workers: int
    """Of the gang; the stage takes one of them, or all."""


class Durations:
    """How long trials will take: by FLOPs alone at first, then by what stages of this run took; fed with its events.

    A kind of stage takes the seconds of a FLOP that it has been measured to take, and as long as others are the only
    ones measured, those of all together. Before the first, a FLOP stands for a second: that is an order, too.

    Args:
        beginnings: knows what is finished.
        shape_of: the gang of a trial, whose workers share its stages.
    """

    def __init__(self, beginnings: Beginnings, shape_of: Callable[[Trial], Shape]) -> None:
        self._beginnings, self._shape_of = beginnings, shape_of
        self._work: dict[str, tuple[_Work, ...]] = {}
        self._of_stage: dict[str, _Work] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._flops: defaultdict[str, float] = defaultdict(float)
        self._num: Counter[str] = Counter()
        self._measured: set[str] = set()

    def expect(self, trial: Trial) -> None:
        """Learn from what its stages will take, whether it is asked for before or not."""
        self._works(trial)

    def seconds(self, trial: Trial) -> float:
        """Of what is still to be done; FLOPs as long as nothing is measured."""
        finished = self._beginnings.finished
        return sum(self._stage_seconds(work) for work in self._works(trial) if work.stage not in finished)

    def of(self, trial: Trial, stages: Iterable[Stage]) -> float:
        """Seconds that a trial's gang takes for some of its stages; 0 as long as nothing is measured."""
        if not self._num:
            return 0.0
        asked = {stage.id for stage in stages}
        return sum(self._stage_seconds(work) for work in self._works(trial) if work.stage in asked)

    def take(self, event: Event) -> bool:
        """Take one event of the run; True if predictions may change much: a kind has twice as many measurements."""
        if not isinstance(event, StageEnded) or event.event != "finished":
            return False
        work = self._of_stage.get(event.stage)
        if work is None or work.stage in self._measured:  # Whoever waits for a shared stage tells of it, too.
            return False
        self._measured.add(work.stage)
        self._seconds[work.kind] += event.wall_seconds * event.num_workers / work.workers
        self._flops[work.kind] += work.flops
        self._num[work.kind] += 1  # Last: a kind that has a number has the rest.
        return self._num[work.kind].bit_count() == 1  # A power of two.

    def _stage_seconds(self, work: _Work) -> float:
        if (num := self._num[work.kind]) and not self._flops[work.kind]:
            return self._seconds[work.kind] / num
        kinds = [work.kind] if num else [kind for kind in tuple(self._num) if self._flops[kind]]
        flops = sum(self._flops[kind] for kind in kinds)
        return work.flops * (sum(self._seconds[kind] for kind in kinds) / flops if flops else 1.0)

    def _works(self, trial: Trial) -> tuple[_Work, ...]:
        if trial.id not in self._work:
            workers = self._shape_of(trial).workers
            works = []
            for stage, size in sized(trial):
                flops = work_of(stage, self._beginnings.finished).flops(size, trial.corpus_of(stage))
                works.append(_Work(stage.id, stage.kind, flops / workers, workers))
            self._work[trial.id] = tuple(works)
            self._of_stage |= {work.stage: work for work in works}
        return self._work[trial.id]


class Queue:
    """Trials that are still to be handed out.

    The longest first, as what is long must not be begun last (Graham, 1969); where there is no room for its gang, the
    longest that there is room for. Large gangs do not go first: what is left at the end would be many small trials as
    long as they come.

    Args:
        trials: in the order of equals.
        beginnings: says who would wait for another's training.
        shape_of: the gang of a trial.
    """

    def __init__(self, trials: Iterable[Trial], beginnings: Beginnings, shape_of: Callable[[Trial], Shape]) -> None:
        self._left, self._beginnings, self.shape_of = list(trials), beginnings, shape_of
        self.durations = Durations(beginnings, shape_of)
        self._shapes = Counter(map(shape_of, self._left))
        self._shared: set[str] = set()
        self._is_in_order = False

    def __len__(self) -> int:
        return len(self._left)

    def next(self, has_room: Callable[[Shape], bool]) -> Trial | None:
        """Take out the trial to be handed out; None as long as there is no room, or all wait for what others train."""
        room = {shape: has_room(shape) for shape in +self._shapes}
        if not any(room.values()):
            return None
        if not self._is_in_order:
            self._is_in_order = True  # Before, as events come from another thread.
            self._shared = self._beginnings.shared(self._left)
            self._left = self._beginnings.in_order(self._left, self.durations.seconds)
        trial = self._beginnings.first_ready(trial for trial in self._left if room[self.shape_of(trial)])
        if trial is not None:
            self._left = [other for other in self._left if other is not trial]
            self._shapes[self.shape_of(trial)] -= 1
        return trial

    def take(self, event: Event) -> None:
        """Take one event of the run; what it measures is minded."""
        if self.durations.take(event) or (isinstance(event, StageEvent) and event.stage in self._shared):
            self._is_in_order = False
