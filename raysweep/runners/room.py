"""Room for gangs on the nodes of a cluster. Pure: no Ray, so that a simulation decides by the same code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from raysweep.resources import Resources

Placement = Mapping[str, int]
"""Node -> workers of a gang that are on it."""


class Shape(NamedTuple):
    """What a gang takes. Only a gang of the same shape takes a trial over warm."""

    workers: int
    cpus: float
    """Of each worker, as `gpus`; both may be fractions."""
    gpus: float
    spans_nodes: bool = False
    """Whether its workers may be on several nodes: where no node could hold them all."""

    @staticmethod
    def of(resources: Resources, *, spans_nodes: bool = False) -> Shape:
        """What a sweep file's `resources` ask for."""
        return Shape(resources.workers, resources.cpus_per_worker, resources.gpus_per_worker, spans_nodes)

    def workers_in(self, free: Mapping[str, float]) -> int:
        """How many workers a node can hold; none is split over nodes, and no share of a GPU over GPUs.

        Args:
            free: CPU and GPU that nobody holds.
        """
        room = _times(free.get("CPU", 0.0), self.cpus)
        gpus = free.get("GPU", 0.0)
        if not self.gpus:
            return room
        if self.gpus >= 1:
            return min(room, _times(gpus, self.gpus))
        return min(room, int(gpus + 1e-9) * _times(1.0, self.gpus) + _times(gpus % 1.0, self.gpus))


def _times(there: float, each: float) -> int:
    return max(0, int(there / each + 1e-9))  # 1 / 0.1 is 9.99...


class Room:
    """What is free of each node: `free`, node -> CPU and GPU."""

    def __init__(self, free: Mapping[str, Mapping[str, float]]) -> None:
        self.free = {node: dict(resources) for node, resources in free.items()}

    def find(self, shape: Shape) -> Placement | None:
        """Where a gang fits; None if nowhere. Inside the node it fills best, so that large gangs find whole nodes."""
        workers = {node: shape.workers_in(free) for node, free in self.free.items()}
        if whole := [(num, node) for node, num in workers.items() if num >= shape.workers]:
            return {min(whole)[1]: shape.workers}
        if not shape.spans_nodes or sum(workers.values()) < shape.workers:
            return None
        placement, left = {}, shape.workers
        for num, node in sorted(((num, node) for node, num in workers.items() if num), reverse=True):
            placement[node] = min(num, left)
            left -= placement[node]
            if not left:
                break
        return placement

    def take(self, shape: Shape, placement: Placement) -> None:
        """Let a gang have its room."""
        for node, workers in placement.items():
            if node in self.free:  # Else it was lost.
                free = self.free[node]
                for name, each in (("CPU", shape.cpus), ("GPU", shape.gpus)):
                    free[name] = free.get(name, 0.0) - each * workers

    def give(self, shape: Shape, placement: Placement) -> None:
        """Have a gang's room back."""
        self.take(shape, {node: -workers for node, workers in placement.items()})


@dataclass(frozen=True)
class View:
    """A cluster as it is now."""

    free: Mapping[str, Mapping[str, float]]
    """Node -> CPU and GPU that nobody holds."""
    gangs: Mapping[Shape, Sequence[Placement]]
    """Our gangs that have their room: at work, starting, or waiting warm for a trial."""


class Gangs:
    """Trials under way, and whether there is room for one more.

    The room of a warm gang without a trial is free: the next trial of its shape takes it over. A trial that has been
    handed out holds room from then on, whether its gang has been given it yet or not.

    Args:
        look: gives the cluster as it is now; may be a second old.
        max_concurrent: trials under way at once; None: as many as fit.
        may_grow: whether trials may wait for more room than there is: a cluster grows as it is asked. One does; once
            nodes have come, as many as are at work, until no more come: each that waits is chosen early, and what
            a cluster may grow to, Ray's autoscalers do not tell.
    """

    def __init__(self, look: Callable[[], View], *, max_concurrent: int | None, may_grow: bool) -> None:
        self._look, self._max_concurrent, self._may_grow = look, max_concurrent, may_grow
        self._under_way: dict[str, Shape] = {}
        self._waiting: set[str] = set()
        """Keys of those that were handed out beyond the room, and have not begun."""
        self._num_nodes: int | None = None
        """The most that there were."""
        self._num_asked = inf
        """Trials handed out beyond the room since nodes have come; inf: none has."""
        self._nodes: dict[str, str] = {}
        """Key of a trial under way -> the node where its gang was found room."""

    def has_room(self, shape: Shape) -> bool:
        """Whether a trial may be handed out to a gang of this shape."""
        if not self._may_start():
            return False
        if not self._under_way:  # Nothing would come of waiting.
            return True
        return self._room()[0].find(shape) is not None or (self._may_grow and self._may_wait())

    def has_room_now(self, shape: Shape) -> bool:
        """Whether one more gang of this shape fits beside all trials under way, on nodes that are there."""
        if not self._may_start():
            return False
        room, is_enough = self._room()
        return is_enough and room.find(shape) is not None

    def start(self, key: str, shape: Shape) -> None:
        """Note that a trial is handed out, under a `key` for `started` and `end`."""
        found = self._room()[0].find(shape)
        if found is None:
            self._waiting.add(key)
            self._num_asked += 1
        elif not shape.spans_nodes:
            (self._nodes[key],) = found
        self._under_way[key] = shape

    def node_of(self, key: str) -> str | None:
        """The node to ask for a trial's gang; None: whichever has room, or several.

        Ray by itself takes the one with most room, so that small gangs break up all nodes, and large ones wait.
        """
        return self._nodes.get(key)

    def started(self, key: str) -> None:
        """Note that a trial has its gang."""
        self._waiting.discard(key)

    def under_way(self) -> set[Shape]:
        """The gangs of trials that are under way, or wait for theirs."""
        return set(self._under_way.values())

    def end(self, key: str) -> None:
        """Note that a trial has ended, however it did."""
        self._waiting.discard(key)
        self._nodes.pop(key, None)
        self._under_way.pop(key, None)

    def _may_start(self) -> bool:
        return self._max_concurrent is None or len(self._under_way) < self._max_concurrent

    def _may_wait(self) -> bool:
        """Whether one more may be handed out beyond the room."""
        at_work = len(self._under_way) - len(self._waiting)
        return not self._waiting or max(len(self._waiting), self._num_asked) < at_work

    def _room(self) -> tuple[Room, bool]:
        """What trials under way leave, and whether there is room for them all."""
        view = self._look()
        if self._num_nodes is not None and len(view.free) > self._num_nodes:
            self._num_asked = 0
        self._num_nodes = max(self._num_nodes or 0, len(view.free))
        room, is_enough = Room(view.free), True
        shapes = list(self._under_way.values())
        for shape in dict.fromkeys([*view.gangs, *shapes]):
            gangs, num_trials = view.gangs.get(shape, ()), shapes.count(shape)
            for placement in gangs[num_trials:]:
                room.give(shape, placement)
            for _ in range(num_trials - len(gangs)):
                if found := room.find(shape):
                    room.take(shape, found)
                else:
                    is_enough = False
        return room, is_enough
