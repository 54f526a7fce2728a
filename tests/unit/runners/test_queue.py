"""The queue: the longest trial that fits, predicted by FLOPs, then by what was measured."""

import random
from collections import Counter

import pytest
from ended import ended
from hypothesis import given, settings
from hypothesis import strategies as st
from timed import Timed, timed_trials
from tiny import ONE_CPU, TINY, roomy

from raysweep.runners.queue import Beginnings, Durations, Queue
from raysweep.runners.room import Gangs, Room, Shape, View
from raysweep.space import load


def ids(trials):
    return [trial.stages[1].spec.index for trial in trials]


def queue_of(trials, shape_of=lambda trial: ONE_CPU):
    return Queue(trials, Beginnings([]), shape_of)


def drain(queue):
    return [queue.next(lambda shape: True) for _ in range(len(queue))]


def test_the_longest_goes_first():
    assert ids(drain(queue_of(timed_trials([1.0, 5.0, 3.0, 5.0])))) == [1, 3, 2, 0]


def test_nothing_is_handed_out_without_room():
    queue = queue_of(timed_trials([1.0]))
    assert queue.next(lambda shape: False) is None
    assert len(queue) == 1


def test_what_fits_goes_before_what_does_not():
    large = Shape(8, 1, 0)
    trials = timed_trials([90.0, 2.0, 3.0])
    queue = queue_of(trials, lambda trial: large if trial is trials[0] else ONE_CPU)
    assert ids([queue.next(lambda shape: shape == ONE_CPU)]) == [2]
    assert ids([queue.next(lambda shape: True)]) == [0]


def test_measurements_take_the_place_of_flops():
    # A kind that the machine is slow at: few FLOPs, many seconds.
    class Slow(Timed):
        kind = "slow"

    quick, slow = timed_trials([10.0, 20.0]), timed_trials([1.0, 2.0], Slow)
    queue = queue_of([*quick, *slow])
    assert ids([queue.next(lambda shape: True)]) == [1]
    queue.take(ended(quick[1].stages[1].id, wall_seconds=20.0))
    assert queue.next(lambda shape: True) is quick[0]
    queue = queue_of([*quick, *slow])
    queue.next(lambda shape: True)
    for trial, seconds in ((quick[1], 20.0), (slow[0], 100.0)):
        event = ended(trial.stages[1].id, wall_seconds=seconds)
        queue.take(event)
        queue.take(event)  # Told by all that waited for it.
    assert queue.next(lambda shape: True) is slow[1], "200 s against 10"


def test_seconds_of_a_trial(sweep_file):
    trial = load(sweep_file(TINY)).trial({}, 0)
    beginnings = Beginnings([])
    durations = Durations(beginnings, lambda trial: Shape(2, 1, 0))
    assert durations.seconds(trial) > 0
    pretrain = next(stage for stage in trial.stages if stage.kind == "pretrain")
    sft = [stage for stage in trial.stages if stage.kind == "sft"]
    assert durations.take(finished(pretrain, seconds=7.0, num_workers=2))
    assert durations.take(finished(sft[0], seconds=3.0, num_workers=1))
    beginnings.finished |= {stage.id for stage in trial.stages} - {pretrain.id}
    assert durations.seconds(trial) == pytest.approx(7.0)
    beginnings.finished.add(pretrain.id)
    beginnings.finished -= {stage.id for stage in sft}
    assert durations.seconds(trial) == pytest.approx(3.0 * len(sft) / 2), "the two workers share them"
    durations = Durations(beginnings, lambda trial: Shape(2, 1, 0))
    durations.seconds(trial)
    assert durations.take(finished(sft[0], seconds=3.0, num_workers=2))
    assert durations.seconds(trial) == pytest.approx(3.0 * len(sft)), "both work on each"


def finished(stage, *, seconds, num_workers):
    return ended(stage.id, wall_seconds=seconds, num_workers=num_workers)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30)
def test_it_never_hands_out_what_does_not_fit_nor_leaves_any_out(seed):
    assert replayed(seed) == replayed(seed)


def replayed(seed):
    """Trials of two shapes on nodes of 8, ended at random; the order of keys they were handed out in."""
    draw = random.Random(seed)
    small, large = Shape(1, 1, 1), Shape(8, 1, 1)
    trials = timed_trials([draw.expovariate(1.0) for _ in range(40)])
    shapes = {trial.id: draw.choice([small, large]) for trial in trials}
    queue = Queue(trials, Beginnings([]), lambda trial: shapes[trial.id])
    room = Room({node: {"CPU": 8.0, "GPU": 8.0} for node in "abc"})
    placed = {}

    def look():
        gangs = {shape: [where for of, where in placed.values() if of == shape] for shape in (small, large)}
        return View(room.free, gangs)

    gangs, order = Gangs(look, max_concurrent=None, may_grow=False), []
    while queue or placed:
        while (trial := queue.next(gangs.has_room)) is not None:
            shape = shapes[trial.id]
            where = room.find(shape)
            assert where is not None
            gangs.start(trial.id, shape)
            room.take(shape, where)
            placed[trial.id] = (shape, where)
            order.append(trial.id)
        ended = draw.choice(sorted(placed))
        gangs.end(ended)
        room.give(*placed.pop(ended))
    assert Counter(order) == Counter(trial.id for trial in trials)
    return order


def test_a_cluster_with_room_is_filled_at_once():
    queue, gangs = queue_of(timed_trials([1.0] * 100)), roomy()
    num = 0
    while (trial := queue.next(gangs.has_room)) is not None:
        gangs.start(trial.id, ONE_CPU)
        num += 1
    assert num == 64
