"""Makespan of large sweeps over its lower bound: the runner's own searcher and queue in a discrete-event replay.

    python tests/benchmarks/makespan.py [--draws 5] [--tail]

64 nodes of 8 GPUs. Seconds of a trial are lognormal around half an hour. Each consists of training, and of fine-tuning
that takes 5 to 50 % of it and is ten times slower per FLOP, so that FLOPs mislead until both have been measured; the
FLOPs of each trial are 30 % off (lognormal). A gang starts in 15 s, and takes another trial of its shape over in 0.3 s,
as measured (RESULTS.md (a), (c2)). A warm gang is closed where one of another shape is to have its room. The bound is
the longer of the longest trial and all GPU-seconds over 512; it knows of no starts, and no nodes. With --tail, what
idle gangs could spare at most if they took fine-tuning stages of trials whose own gang is busy.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from ended import ended
from timed import Timed, timed_trials

from raysweep.plan import Stage, Trial
from raysweep.runners.queue import Beginnings, Queue
from raysweep.runners.room import Gangs, Placement, Room, Shape, View
from raysweep.runners.tune import Points

NUM_NODES, GPUS = 64, 8
START_SECONDS, WARM_SECONDS = 15.0, 0.3
ONE, EIGHT = Shape(1, 1, 1), Shape(8, 1, 1)


class Tuned(Timed):
    """Fine-tuning: another kind, with a speed of its own."""

    kind = "tuned"


class Job(NamedTuple):
    trial: Trial
    shape: Shape
    seconds: tuple[float, float]
    """Of its two stages, in its gang."""


def jobs_of(num: int, sigma: float, shapes: Sequence[Shape], draw: random.Random) -> list[Job]:
    jobs = []
    trials = timed_trials([0.0] * num)
    for index, trial in enumerate(trials):
        shape, total = draw.choice(shapes), draw.lognormvariate(7.5, sigma)
        tuned = total * draw.uniform(0.05, 0.5)
        seconds = (total - tuned, tuned)
        flops = [each * shape.workers * draw.lognormvariate(0, 0.3) for each in (seconds[0], tuned / 10)]
        tokens = trial.stages[0]
        first = Stage(Timed(index=index, predicted=flops[0]), {"tokens": tokens.id}, step=1)
        second = Stage(Tuned(index=index, predicted=flops[1]), {"checkpoint": first.id}, step=1, checkpoint=first.id)
        jobs.append(Job(replace(trial, stages=(tokens, replace(first, checkpoint=first.id), second)), shape, seconds))
    return jobs


class Peer(Queue):
    """Another order, and whether what fits may go before what does not."""

    key: Callable[[Job], float] = staticmethod(lambda job: 0.0)
    strict = False
    by_id: dict[str, Job] = {}  # noqa: RUF012 - set for each replay

    def next(self, has_room: Callable[[Shape], bool]) -> Trial | None:
        if not self._is_in_order:
            self._is_in_order = True
            self._left.sort(key=lambda trial: self.key(self.by_id[trial.id]))
        room = {shape: has_room(shape) for shape in +self._shapes}
        for trial in self._left[:1] if self.strict else self._left:
            if room[self.shape_of(trial)]:
                self._left.remove(trial)
                self._shapes[self.shape_of(trial)] -= 1
                return trial
        return None


class Strict(Peer):
    key = staticmethod(lambda job: -sum(job.seconds))
    strict = True


class InFileOrder(Peer):
    strict = True


class Backfilled(Peer):
    pass


class LargestFirst(Peer):
    key = staticmethod(lambda job: (-job.shape.workers, -sum(job.seconds)))  # type: ignore[assignment]


class Replay:
    """A cluster whose gangs take the seconds of their trials."""

    def __init__(self, jobs: Sequence[Job], queue: type[Queue], *, one_start_at_a_time: bool, spread: bool) -> None:
        self.by_id = {job.trial.id: job for job in jobs}
        self.one_start_at_a_time, self.spread = one_start_at_a_time, spread
        self.room = Room({f"{node:02}": {"CPU": 64.0, "GPU": float(GPUS)} for node in range(NUM_NODES)})
        """Free of trials: warm gangs do not count."""
        self.busy: dict[str, tuple[Job, Placement]] = {}
        self.warm: defaultdict[Shape, list[Placement]] = defaultdict(list)
        self.last_start, self.num_starts, self.ends = 0.0, 0, list[tuple[float, str]]()
        beginnings = Beginnings([jobs[0].trial.stages[0].id])
        gangs = Gangs(self.look, max_concurrent=None, may_grow=False)
        self.queue = queue([job.trial for job in jobs], beginnings, lambda trial: self.by_id[trial.id].shape)
        if isinstance(self.queue, Peer):
            self.queue.by_id = self.by_id
        self.searcher, self.beginnings = Points(self.queue, beginnings, gangs), beginnings
        self.by_index = {job.trial.point["index"]: job for job in jobs}

    def look(self) -> View:
        gangs: defaultdict[Shape, list[Placement]] = defaultdict(list)
        for job, placement in self.busy.values():
            gangs[job.shape].append(placement)
        return View(self.room.free, gangs)

    def run(self) -> float:
        """Seconds until the last trial has ended."""
        now, names = 0.0, (f"{number}" for number in itertools.count())
        while self.queue or self.ends:
            while self.queue and (config := self.searcher.suggest(name := next(names))) is not None:
                self.begin(name, self.by_index[config["index"]], now)
            now, name = heapq.heappop(self.ends)
            self.end(name)
        return now

    def begin(self, name: str, job: Job, now: float) -> None:
        starts = now + WARM_SECONDS
        if self.warm[job.shape]:
            placement = self.warm[job.shape].pop()
        else:
            placement, starts = self.place(job.shape), now + START_SECONDS
            self.num_starts += 1
            if self.one_start_at_a_time:
                starts = self.last_start = max(now, self.last_start) + START_SECONDS
        self.room.take(job.shape, placement)
        self.busy[name] = (job, placement)
        heapq.heappush(self.ends, (starts + sum(job.seconds), name))

    def place(self, shape: Shape) -> Placement:
        """Beside the warm gangs; where there is no room, these are closed, the oldest first."""
        while True:
            there = Room(self.room.free)
            for of, placements in self.warm.items():
                for placement in placements:
                    there.take(of, placement)
            found = self.emptiest(there, shape) if self.spread else there.find(shape)
            if found:
                return found
            next(placements for placements in self.warm.values() if placements).pop(0)

    @staticmethod
    def emptiest(room: Room, shape: Shape) -> Placement | None:
        """Where Ray itself puts it: its scorer prefers the node with the largest share of free resources."""
        node = max(room.free, key=lambda node: shape.workers_in(room.free[node]))
        return {node: shape.workers} if shape.workers_in(room.free[node]) >= shape.workers else None

    def end(self, name: str) -> None:
        job, placement = self.busy.pop(name)
        self.room.give(job.shape, placement)
        self.warm[job.shape].append(placement)
        for stage, seconds in zip(job.trial.stages[1:], job.seconds, strict=True):
            num_workers = job.shape.workers if stage.spec.wide else 1
            event = ended(stage.id, wall_seconds=seconds, num_workers=num_workers)
            self.beginnings.take(event)
            self.queue.take(event)
        self.searcher.on_trial_complete(name)


def area(jobs: Sequence[Job]) -> float:
    """All GPU-seconds over the GPUs."""
    return sum(sum(job.seconds) * job.shape.workers for job in jobs) / (NUM_NODES * GPUS)


def bound(jobs: Sequence[Job]) -> float:
    return max(area(jobs), *(sum(job.seconds) for job in jobs))


POLICIES: dict[str, tuple[type[Queue], bool, bool]] = {
    "ours": (Queue, False, False),
    "ours, nodes by Ray": (Queue, False, True),
    "strict": (Strict, False, False),
    "largest first": (LargestFirst, False, False),
    "FIFO, backfilled": (Backfilled, False, False),
    "FIFO": (InFileOrder, False, False),
    "FIFO, one start at a time": (InFileOrder, True, False),
}
SHAPES = {"1": [ONE], "8": [EIGHT], "1 and 8": [ONE, EIGHT]}


def rows(num_draws: int, nums: Sequence[int], sigmas: Sequence[float]) -> Iterator[str]:
    for num, (name, shapes), sigma in itertools.product(nums, SHAPES.items(), sigmas):
        cells = []
        for queue, one_at_a_time, spread in POLICIES.values():
            ratios = []
            for seed in range(num_draws):
                jobs = jobs_of(num, sigma, shapes, random.Random(seed))
                replay = Replay(jobs, queue, one_start_at_a_time=one_at_a_time, spread=spread)
                ratios.append(replay.run() / bound(jobs))
            cells.append(f"{statistics.mean(ratios):.3f} ({max(ratios):.3f})")
        yield f"| {num:,} | {name} | {sigma:g} | {' | '.join(cells)} |"


PIECES = 24
"""Fine-tuning stages of a trial, as of 4 tasks, 3 learning rates and 2 seeds."""


def shared_bound(jobs: Sequence[Job]) -> float:
    """The bound, if any idle worker could take any piece of a trial's fine-tuning."""
    return max(area(jobs), *(job.seconds[0] + job.seconds[1] * job.shape.workers / PIECES for job in jobs))


def tail_rows(num_draws: int, nums: Sequence[int], sigmas: Sequence[float]) -> Iterator[str]:
    for num, (name, shapes), sigma in itertools.product(nums, SHAPES.items(), sigmas):
        spared, loads = [], []
        for seed in range(num_draws):
            jobs = jobs_of(num, sigma, shapes, random.Random(seed))
            replay = Replay(jobs, Queue, one_start_at_a_time=False, spread=False)
            spared.append(1 - shared_bound(jobs) / replay.run())
            loads.append(max(sum(job.seconds) for job in jobs) / area(jobs))
        cells = f"{statistics.mean(spared):.1%} ({max(spared):.1%}) | {statistics.mean(loads):.2f}"
        yield f"| {num:,} | {name} | {sigma:g} | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--trials", type=int, nargs="+", default=[1000, 5000])
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--tail", action="store_true", help="what sharing stages could spare")
    given = parser.parse_args()
    began = time.process_time()
    columns = ["spared at most", "longest trial / all GPU-seconds over 512"] if given.tail else [*POLICIES]
    print("| trials | gangs of | sigma | " + " | ".join(columns) + " |")
    print("| --- " * (3 + len(columns)) + "|")
    for row in (tail_rows if given.tail else rows)(given.draws, given.trials, given.sigmas):
        print(row, flush=True)
    print(f"{time.process_time() - began:.0f} s of processor time")


if __name__ == "__main__":
    main()
