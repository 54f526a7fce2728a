"""Where gangs fit: by node, with what is warm, starting, or still to be placed counted in."""

import itertools

import pytest
from benchmarks.ramp import ramp

from raysweep.resources import Resources
from raysweep.runners.room import Gangs, Room, Shape, View

ONE, EIGHT = Shape(1, 1, 1), Shape(8, 1, 1)


@pytest.mark.parametrize(
    ("node", "share", "room"),
    [
        ({"CPU": 8}, 0, 8),
        ({"CPU": 8}, 1, 0),
        ({"CPU": 8, "GPU": 4}, 1, 4),
        ({"CPU": 8, "GPU": 2}, 0.1, 8),
        ({"CPU": 64, "GPU": 2}, 0.1, 20),
        ({"CPU": 8, "GPU": 3}, 2, 1),
        ({"CPU": 8, "GPU": 2}, 0.6, 2),  # The rest of a GPU holds no second one.
        ({"CPU": 8, "GPU": 1.5}, 0.5, 3),
        ({"CPU": -1.0}, 0, 0),
    ],
)
def test_room_of_a_node(node, share, room):
    assert Shape.of(Resources(gpus_per_worker=share)).workers_in(node) == room


def test_a_gang_goes_where_it_leaves_least():
    room = Room({"a": {"CPU": 8.0, "GPU": 8.0}, "b": {"CPU": 8.0, "GPU": 3.0}})
    assert room.find(ONE) == {"b": 1}
    assert room.find(EIGHT) == {"a": 8}
    room.take(ONE, {"a": 1})
    assert room.find(EIGHT) is None
    assert room.find(EIGHT._replace(spans_nodes=True)) == {"a": 7, "b": 1}
    assert room.find(Shape(11, 1, 1, spans_nodes=True)) is None
    room.give(ONE, {"a": 1})
    assert room.find(EIGHT) == {"a": 8}


def gangs_of(nodes, gangs, **how):
    return Gangs(lambda: View(nodes, gangs), **{"max_concurrent": None, "may_grow": False} | how)


def test_all_that_fit_may_start_before_the_cluster_has_noticed():
    gangs = gangs_of({"a": {"CPU": 3.0}, "b": {"CPU": 1.0}}, {})
    two = Shape(2, 1, 0)
    for key in "xy":
        assert gangs.has_room(ONE._replace(gpus=0))
        gangs.start(key, ONE._replace(gpus=0))
    # One filled b, one is on a.
    assert gangs.has_room(two)
    gangs.start("z", two)
    assert not gangs.has_room(ONE._replace(gpus=0))
    gangs.end("z")
    assert gangs.has_room(two)


def test_a_share_gets_no_room_that_a_trial_waits_for():
    small, large = Shape(1, 1, 0), Shape(4, 1, 0)
    gangs = gangs_of({"a": {"CPU": 4.0}, "b": {"CPU": 2.0}}, {}, may_grow=True)
    gangs.start("x", small)
    assert gangs.has_room_now(small)
    gangs.start("y", large)
    assert gangs.has_room_now(small)
    gangs.start("z", large)  # In a cluster that may grow.
    assert not gangs.has_room_now(small)
    gangs.end("y")
    assert gangs.has_room_now(small)
    assert not gangs_of({"a": {"CPU": 4.0}}, {}, max_concurrent=0).has_room_now(small)


def test_a_warm_gang_is_room_for_one_trial():
    one = Shape(1, 1, 0)
    gangs = gangs_of({"a": {"CPU": 0.0}}, {one: [{"a": 1}, {"a": 1}]})
    for key in "xy":
        assert gangs.has_room(one)
        gangs.start(key, one)
    assert not gangs.has_room(one)
    gangs.end("x")
    assert gangs.has_room(one)


def test_one_trial_may_wait_for_a_cluster_to_grow():
    one = Shape(1, 1, 0)
    gangs = gangs_of({"a": {"CPU": 1.0}}, {}, may_grow=True)
    gangs.start("x", one)
    assert gangs.has_room(one)
    gangs.start("waits", one)
    assert not gangs.has_room(one)
    gangs.started("waits")
    assert gangs.has_room(one)


@pytest.mark.parametrize(("shape", "after_each"), [(EIGHT, [1, 2, 4, 8, 16]), (ONE, [8, 16, 32, 64, 128])])
def test_a_cluster_that_grows_from_one_node_doubles_with_each_boot(shape, after_each):
    assert ramp(shape, num_gangs=after_each[-1], boot_seconds=180) == {
        num: index * 180 for index, num in enumerate(after_each)
    }


def test_trials_stop_waiting_for_a_cluster_that_grows_no_more():
    one, nodes = Shape(1, 1, 0), {"a": {"CPU": 4.0}}
    gangs = gangs_of(nodes, {}, may_grow=True)
    keys = map(str, itertools.count())

    def hand_out():
        there = []
        while gangs.has_room(one) and len(there) < 100:
            there.append(next(keys))
            gangs.start(there[-1], one)
        return there

    four = hand_out()
    assert len(four) == 4 + 1, "no node has come yet"
    nodes["b"] = {"CPU": 4.0}
    gangs.started(four[4])
    eleven = hand_out()
    assert len(eleven) == 3 + 8
    for waits in eleven[3:]:  # It has the gang of one that has ended.
        gangs.started(waits)
        gangs.end(waits)
        if waits != eleven[-1]:
            assert not hand_out()
    assert len(hand_out()) == 1, "as long as no more come"
    nodes["c"] = {"CPU": 4.0}
    assert len(hand_out()) == 3 + 10, "one waits already"
    assert gangs_of(nodes, {}, may_grow=True, max_concurrent=2).has_room(one)


def test_no_more_than_asked_for_at_once_and_never_none():
    one = Shape(1, 1, 0)
    gangs = gangs_of({"a": {"CPU": 8.0}}, {}, max_concurrent=1)
    gangs.start("x", one)
    assert not gangs.has_room(one)
    assert gangs_of({}, {}).has_room(one), "with nothing under way, nothing would come of waiting"
