"""How long until all gangs are up on a cluster that an autoscaler brings: it has one node, and gets what is asked for.

    python tests/benchmarks/ramp.py [--gangs 64] [--boot 180]

The runner's own choice of how many trials wait (`raysweep.runners.room.Gangs`), in a discrete-event replay. Nodes have
8 GPUs; each that is asked for is there after the same time, however many are; no trial ends. Gangs that are asked for
are packed on as few nodes as can hold them, as Ray's autoscalers do.
"""

from __future__ import annotations

import argparse
import itertools

from raysweep.runners.room import Gangs, Placement, Room, Shape, View

NODE = {"CPU": 64.0, "GPU": 8.0}


class Ramp:
    """A cluster that grows, and the gangs on it."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.room = Room({"0": NODE})
        self.placed: dict[str, Placement] = {}
        self.unplaced: list[str] = []
        self.gangs = Gangs(self.look, max_concurrent=None, may_grow=True)
        self.keys = map(str, itertools.count())

    def look(self) -> View:
        return View(self.room.free, {self.shape: [*self.placed.values()]})

    def hand_out(self, num_gangs: int) -> None:
        """All trials that may be, up to so many."""
        while len(self.placed) + len(self.unplaced) < num_gangs and self.gangs.has_room(self.shape):
            key = next(self.keys)
            self.gangs.start(key, self.shape)
            self.unplaced.append(key)
            self.place()

    def place(self) -> None:
        """As Ray does, as soon as there is room."""
        while self.unplaced and (found := self.room.find(self.shape)):
            self.room.take(self.shape, found)
            key = self.unplaced.pop(0)
            self.placed[key] = found
            self.gangs.started(key)

    def boot(self) -> None:
        """As many nodes as hold what waits."""
        each = self.shape.workers_in(NODE) // self.shape.workers
        for _ in range(-(-len(self.unplaced) // each)):
            self.room.free[str(len(self.room.free))] = dict(NODE)
        self.place()


def ramp(shape: Shape, *, num_gangs: int, boot_seconds: float) -> dict[int, float]:
    """Gangs that are up -> seconds after the first node came, until all are."""
    cluster, up = Ramp(shape), {}
    for boots in itertools.count():
        cluster.hand_out(num_gangs)
        up[len(cluster.placed)] = boots * boot_seconds
        if len(cluster.placed) >= num_gangs:
            return up
        cluster.boot()
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gangs", type=int, default=64)
    parser.add_argument("--boot", type=float, default=180.0, help="seconds from asking for a node until it is there")
    given = parser.parse_args()
    for workers in (1, 8):
        up = ramp(Shape(workers, 1, 1), num_gangs=given.gangs, boot_seconds=given.boot)
        print(f"gangs of {workers}: " + ", ".join(f"{num} after {seconds:g} s" for num, seconds in up.items()))


if __name__ == "__main__":
    main()
