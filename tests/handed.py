"""What a searcher hands trials out to: gangs of one processor, whose stages are split."""

from tiny import ONE_CPU

from raysweep.runners.queue import Beginnings, Durations
from raysweep.runners.room import Gangs
from raysweep.runners.searchers import UnderWay
from raysweep.runners.tail import Tail


def under_way(
    gangs: Gangs, beginnings: Beginnings, durations: Durations | None = None, *, may_end_early: bool = False
) -> UnderWay:
    """Nothing yet; with `durations` of a queue, if there is one."""
    durations = durations or Durations(beginnings, lambda trial: ONE_CPU)
    tail = Tail(beginnings, durations, lambda trial: ONE_CPU, lambda trial, stage: False, may_end_early=may_end_early)
    return UnderWay(beginnings, gangs, tail)
