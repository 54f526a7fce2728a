"""Shares of trials under way: which stages, of which trial, when, and that a run with them loses nothing."""

from dataclasses import replace
from typing import ClassVar

from ended import ended
from handed import under_way
from timed import Timed, timed_trials
from tiny import ONE_CPU, roomy, row

from raysweep.events import StageFailed, TrialStarted
from raysweep.plan import Stage
from raysweep.runners.queue import Beginnings, Durations, Queue
from raysweep.runners.room import Shape
from raysweep.runners.searchers import Points, ThenShares
from raysweep.runners.tail import Tail
from raysweep.runners.trainable import SHARE


class Training(Timed):
    kind: ClassVar[str] = "training"

    @property
    def state_key(self):
        return f"state-{self.index}"


class Split(Timed):
    kind: ClassVar[str] = "split"
    wide: ClassVar[bool] = False
    number: int = 0


class Wide(Timed):
    kind: ClassVar[str] = "wide"


def trial_of(index=0, *, splits=6, wide=0, seconds=20.0):
    """One whose training takes 100 s, and each of what hangs from it 20, or so many."""
    (trial,) = timed_trials([0.0])
    training = Stage(Training(index=index, predicted=100.0), {"tokens": trial.stages[0].id}, step=1)
    inputs = {"checkpoint": training.id}
    specs = [
        *(Wide(index=10 * index + number, predicted=seconds) for number in range(wide)),
        *(Split(index=index, number=number, predicted=seconds) for number in range(splits)),
    ]
    stages = [training, *(Stage(spec, inputs, step=1) for spec in specs)]
    of_it = [replace(stage, checkpoint=training.id) for stage in stages]
    return replace(trial, point={"index": index}, stages=(trial.stages[0], *of_it))


class Run:
    """A tail, told of what ends."""

    def __init__(self, *trials, shape=ONE_CPU, is_wide=lambda trial, stage: stage.spec.wide, may_end_early=False):
        self.trials = {f"key-{index}": trial for index, trial in enumerate(trials)}
        self.beginnings = Beginnings([trials[0].stages[0].id])
        self.durations = Durations(self.beginnings, lambda trial: shape)
        self.tail = Tail(self.beginnings, self.durations, lambda trial: shape, is_wide, may_end_early=may_end_early)
        for key, trial in self.trials.items():
            self.tail.start(key, trial)
            self.tail.take(TrialStarted(row=row(trial.id)))

    def end(self, stage, trial, **fields):
        event = ended(stage.id, trial=trial.id, wall_seconds=stage.spec.predicted, **fields)
        for each in (self.beginnings, self.durations, self.tail):
            each.take(event)

    def next(self, room=True):
        return self.tail.next(lambda shape: room)

    def drain(self):
        return list(iter(self.next, None))


def numbers(share):
    return [stage.spec.number for stage in share.trial.stages if stage.id in share.stages]


def test_the_last_stages_are_given_once_the_checkpoint_is_there():
    trial = trial_of()
    run = Run(trial)
    assert run.next() is None, "training is its own gang's"
    run.end(trial.stages[1], trial)
    # Its own gang begins with 0. What others are given is the last; the 20 s that 1 would take are not worth a start.
    shares = run.drain()
    assert [numbers(share) for share in shares] == [[5], [4], [3], [2]]
    assert {share.trial.id for share in shares} == {trial.id}
    for stage in trial.stages[2:4]:
        run.end(stage, trial)
    assert run.next() is None


def test_room_that_gets_free_is_seen():
    trial = trial_of()
    run = Run(trial)
    run.end(trial.stages[1], trial)
    assert run.next(room=False) is None
    run.tail.end("another")
    assert numbers(run.next()) == [5]


def test_as_many_split_stages_as_a_gang_has_workers_or_one_wide_one():
    trial = trial_of(splits=5, wide=6)
    run = Run(trial, shape=Shape(2, 1, 0))
    run.end(trial.stages[1], trial, num_workers=2)
    shares = run.drain()
    assert [numbers(share) for share in shares[:2]] == [[3, 4], [1, 2]]
    assert [stage.kind for share in shares[2:] for stage in trial.stages if stage.id in share.stages] == [
        "split",
        "wide",
        "wide",
        "wide",
        "wide",
    ]
    assert {len(share.stages) for share in shares[2:]} == {1}


def test_the_trial_that_has_most_before_it_is_helped_first():
    short, long = trial_of(0, splits=4), trial_of(1, splits=5)
    run = Run(short, long)
    for trial in (short, long):
        run.end(trial.stages[1], trial)
    assert [(share.trial.point["index"], *numbers(share)) for share in run.drain()] == [
        (1, 4),
        (0, 3),
        (1, 3),
        (0, 2),
        (1, 2),
    ]
    run = Run(short, long)
    for trial in (short, long):
        run.end(trial.stages[1], trial)
    run.tail.end("key-1")
    assert {share.trial.point["index"] for share in run.drain()} == {0}, "what has ended is not helped"


def test_as_long_as_nothing_is_measured_nothing_is_given():
    trial = trial_of()
    run = Run(trial)
    run.end(trial.stages[1], trial, event="found")
    assert run.next() is None
    run.end(trial.stages[2], trial)
    assert numbers(run.next()) == [5]


def test_what_no_gang_can_make_is_not_given():
    trial = trial_of(splits=8)
    run = Run(trial)
    run.end(trial.stages[1], trial)
    # Failed for good, as its own gang was at it: the next one is what that makes now.
    run.tail.take(StageFailed(trial=trial.id, stage=trial.stages[2].id, kind="split", cause="", log="", retry=False))
    run.tail.take(StageFailed(trial=trial.id, stage=trial.stages[3].id, kind="split", cause="", log="", retry=True))
    assert [numbers(share) for share in run.drain()] == [[7], [6], [5], [4], [3]]
    run = Run(trial)
    run.end(trial_of(1).stages[1], trial_of(1))
    run.end(trial.stages[1], trial, status="diverged")
    assert run.drain() == []


def test_a_trial_that_waits_for_its_gang_is_not_helped():
    trial = trial_of()
    run = Run(trial)
    run.tail = under_way(roomy(), run.beginnings, run.durations).tail
    run.tail.start("key", trial)
    run.end(trial.stages[1], trial)
    assert run.next() is None
    run.tail.take(TrialStarted(row=row(trial.id)))
    assert numbers(run.next()) == [5]


def test_of_a_trial_that_may_end_early_nothing_is_given_that_comes_after_its_checkpoint():
    (trial,) = timed_trials([0.0])
    stages, before = [trial.stages[0]], trial.stages[0].id
    for step in (1, 2):  # Both trainings are finished by an earlier run.
        training = Stage(Training(index=step, predicted=100.0), {"tokens": before}, step=step)
        split = [
            Stage(Split(index=step, number=number, predicted=20.0), {"checkpoint": training.id}, step=step)
            for number in range(4)
        ]
        stages += [training, *split]
        before = training.id
    stages[1:] = [replace(each, checkpoint=each.inputs.get("checkpoint", each.id)) for each in stages[1:]]
    trial = replace(trial, stages=tuple(stages))
    for may_end_early, first in ((False, 2), (True, 1)):
        run = Run(trial, may_end_early=may_end_early)
        for each in (stages[1], stages[6]):
            run.end(each, trial, event="found")
        run.end(stages[2], trial)
        share = run.next()
        assert [stage.step for stage in stages if stage.id in share.stages] == [first]


def test_stages_that_fine_tune_wide_are_given_one_by_one():
    trial = trial_of()
    run = Run(trial, shape=Shape(4, 1, 0), is_wide=lambda trial, stage: True)
    run.end(trial.stages[1], trial, num_workers=4)
    run.end(trial.stages[2], trial, num_workers=4)
    assert [numbers(share) for share in run.drain()] == [[5], [4], [3]]


def test_short_stages_are_given_together():
    trial = trial_of(splits=61, seconds=1.0)
    run = Run(trial)
    run.end(trial.stages[1], trial)
    run.end(trial.stages[2], trial)
    shares = run.drain()
    assert [len(share.stages) for share in shares] == [5] * 6
    given = [number for share in shares for number in numbers(share)[::-1]]
    assert given == sorted(given, reverse=True)
    assert given[0] == 60


def test_shares_are_handed_out_when_there_is_no_trial_any_more_and_the_search_ends_with_the_last():
    trial, other = trial_of(), trial_of(1, splits=1)
    beginnings, gangs = Beginnings([trial.stages[0].id]), roomy(max_concurrent=2)
    queue = Queue([trial, other], beginnings, lambda trial: ONE_CPU)
    handed = under_way(gangs, beginnings, queue.durations)
    points = ThenShares(Points(queue, handed), handed)

    def tell(event):
        for each in (beginnings, queue, handed.tail):
            each.take(event)

    assert [points.suggest(key)["index"] for key in ("long", "short")] == [0, 1]
    assert points.is_finished(), "for now: Tune may close a gang that gets free"
    for each in (trial, other):
        tell(TrialStarted(row=row(each.id)))
        tell(ended(each.stages[1].id, trial=each.id, wall_seconds=100.0))
    tell(ended(other.stages[2].id, trial=other.id, wall_seconds=20.0))
    assert points.suggest("too many") is None
    points.on_trial_complete("short")
    assert not points.is_finished(), "asked before a gang is closed: it stays warm for the share"
    assert points.suggest("share") == {"index": 0, "seed": 0, SHARE: (trial.stages[-1].id,)}
    assert points.suggest("another") is None, "as many gangs as may be"
    points.on_trial_complete("share")
    assert points.suggest("next")[SHARE] == (trial.stages[-2].id,)
    for key in ("next", "long"):
        points.on_trial_complete(key)
    assert points.is_finished()
