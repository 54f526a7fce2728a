"""Who goes on from a checkpoint, by loss and trace at once."""

import math

from raysweep.runners.pareto_asha import Rungs
from raysweep.search import Goal, ParetoAsha

LOSS, TRACE = "heldout/loss_nats_per_token", "flatness/hessian_trace"


def rungs(**given) -> Rungs:
    goals = (Goal(metric=LOSS, mode="min"), Goal(metric=TRACE, mode="min"))
    return Rungs(ParetoAsha(name="pareto_asha", goals=goals, **given))


def test_what_others_beat_in_both_is_stopped():
    judged = rungs()
    arrivals = [("a", 3.0, 50.0), ("b", 2.9, 60.0), ("c", 3.1, 40.0), ("worse", 3.2, 70.0), ("equal", 2.9, 60.0)]
    found = {name: judged.goes_on(name, 1, {LOSS: loss, TRACE: trace}) for name, loss, trace in arrivals}
    assert found == {"a": True, "b": True, "c": True, "worse": False, "equal": True}


def test_one_in_so_many_goes_on_though_it_is_beaten():
    judged = rungs(reduction_factor=3)
    for number in range(5):  # Each beats those before it.
        assert judged.goes_on(f"t{number}", 1, {LOSS: 3.0 - number, TRACE: 9.0 - number})
    # The sixth is beaten by one, and 6 / 3 go on.
    assert judged.goes_on("second", 1, {LOSS: -0.9, TRACE: 5.1})
    assert not judged.goes_on("fourth", 1, {LOSS: 1.5, TRACE: 7.5})


def test_checkpoints_are_compared_with_their_like_and_the_first_may_be_spared():
    judged = rungs(grace_checkpoints=2)
    assert judged.goes_on("a", 1, {LOSS: 1.0, TRACE: 1.0})
    assert judged.goes_on("b", 1, {LOSS: 2.0, TRACE: 2.0})
    assert judged.goes_on("b", 2, {LOSS: 2.0, TRACE: 2.0})
    assert judged.goes_on("a", 2, {LOSS: 1.0, TRACE: 1.0})
    assert not judged.goes_on("c", 2, {LOSS: 3.0, TRACE: 3.0})


def test_without_a_metric_nobody_is_judged():
    judged = rungs()
    assert judged.goes_on("a", 1, {LOSS: 1.0, TRACE: 1.0})
    assert judged.goes_on("b", 1, {LOSS: 2.0})
    assert judged.goes_on("c", 1, {LOSS: 2.0, TRACE: math.nan})
