"""Makespan of large sweeps over its lower bound: the runner's own searcher and queue in a discrete-event replay.

    python tests/benchmarks/makespan.py [--draws 6] [--drawn] [--tail]
    python tests/benchmarks/makespan.py --measure STORE SWEEP.yaml [...]

64 nodes of 8 GPUs. Each trial's stages are those of a trial that was measured, drawn from one sweep: the share of its
seconds that each kind of stage took, and the FLOPs that were planned for it, by which the queue goes until it has
measured. So predictions are off as they were. A trial takes half an hour on average; how trials differ is as it was
measured, too, or (sigma) lognormal, as where models differ in size. Of 1 and 8 GPUs, the larger gang has as much more
to do. What was measured is in tests/data/stage_seconds.json, which --measure writes, of whole trials of finished
sweeps, but for stages that several share.

With --drawn nothing is measured: a trial consists of training, and of fine-tuning that takes 5 to 50 % of it and is ten
times slower per FLOP, so that FLOPs mislead until both have been measured; each trial's are 30 % off (lognormal).

A gang starts in 15 s, and takes another trial of its shape over in 0.3 s, as measured (RESULTS.md (a), (c2)). A warm
gang is closed where one of another shape is to have its room. The bound is the longer of the longest trial and all
GPU-seconds over 512; it knows of no starts, and no nodes. With --tail, what idle gangs could spare at most if they took
fine-tuning stages of trials whose own gang is busy.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import ClassVar, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from ended import ended
from timed import Timed, timed_trials

from raysweep.costs import UNKNOWN
from raysweep.estimates import size_of
from raysweep.plan import Stage, Trial
from raysweep.runners.queue import Beginnings, Queue
from raysweep.runners.room import Gangs, Placement, Room, Shape, View
from raysweep.runners.tune import Points
from raysweep.space import load
from raysweep.store import Store

NUM_NODES, GPUS = 64, 8
START_SECONDS, WARM_SECONDS = 15.0, 0.3
ONE, EIGHT = Shape(1, 1, 1), Shape(8, 1, 1)


MEASURED = Path(__file__).parents[1] / "data" / "stage_seconds.json"
MEAN_SECONDS = 1800.0

Work = Mapping[str, tuple[float, float]]
"""Of a trial: kind -> seconds of all its stages, one after another, and FLOPs that were planned for them."""


class Job(NamedTuple):
    trial: Trial
    shape: Shape
    seconds: tuple[float, ...]
    """Of its stages of each kind, in its gang."""


@cache
def kind_of(name: str) -> type[Timed]:
    """A kind of stage, with a speed of its own."""
    fields = {"kind": name, "wide": name == "pretrain", "__annotations__": {"kind": ClassVar[str]}}
    return type(name.title(), (Timed,), {"__module__": __name__, **fields})


def drawn_work(draw: random.Random) -> Work:
    """Of a trial of a second: see the module."""
    tuned = draw.uniform(0.05, 0.5)
    seconds = {"pretrain": (1 - tuned, 1 - tuned), "sft": (tuned, tuned / 10)}
    return {kind: (each, flops * draw.lognormvariate(0, 0.3)) for kind, (each, flops) in seconds.items()}


def jobs_of(
    num: int,
    sigma: float | None,
    shapes: Sequence[Shape],
    draw: random.Random,
    work_of: Callable[[random.Random], Work] = drawn_work,
) -> list[Job]:
    """Trials of half an hour on average, each with a gang of one of `shapes`; sigma None: as long as their work is."""
    works = [work_of(draw) for _ in range(num)]
    lengths = [sum(seconds for seconds, _ in work.values()) for work in works]
    wanted = [length if sigma is None else draw.lognormvariate(0, sigma) for length in lengths]
    scale = MEAN_SECONDS * num / sum(wanted)
    jobs = []
    for index, (trial, work) in enumerate(zip(timed_trials([0.0] * num), works, strict=True)):
        shape, factor = draw.choice(shapes), scale * wanted[index] / lengths[index]
        stages = [trial.stages[0]]
        for kind, (_, flops) in work.items():
            spec = kind_of(kind)(index=index, predicted=flops * factor * shape.workers)
            made = Stage(spec, {"tokens": stages[0].id} if len(stages) == 1 else {"checkpoint": stages[1].id}, step=1)
            stages.append(replace(made, checkpoint=stages[1].id if len(stages) > 1 else made.id))
        seconds = tuple(each * factor for each, _ in work.values())
        jobs.append(Job(replace(trial, stages=tuple(stages)), shape, seconds))
    return jobs


def measure(store: Store, sweep: Path) -> list[Work]:
    """Of each trial of a sweep that is whole in a store."""
    space, finished = load(sweep), store.finished_ids()
    trials = list(space.trials())
    num_trials = Counter(stage.id for trial in trials for stage in trial.stages)
    works = []
    for trial in trials:
        own = [stage for stage in trial.stages if num_trials[stage.id] == 1]
        if not finished.issuperset(stage.id for stage in own):
            continue
        work: dict[str, tuple[float, float]] = {}
        for stage in own:
            ran = store.provenance(stage.id)
            assert ran
            assert ran["world_size"] == 1
            seconds, flops = work.get(stage.kind, (0.0, 0.0))
            planned = stage.spec.flops(size_of(trial) or UNKNOWN, trial.corpus_of(stage))
            work[stage.kind] = (round(seconds + ran["wall_seconds"], 3), float(f"{flops + planned:.4g}"))
        works.append(work)
    return works


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

    def __init__(self, jobs: Sequence[Job], queue: type[Queue], *, one_start_at_a_time: bool, asks: bool) -> None:
        self.by_id = {job.trial.id: job for job in jobs}
        self.one_start_at_a_time, self.asks = one_start_at_a_time, asks
        self.room = Room({f"{node:02}": {"CPU": 64.0, "GPU": float(GPUS)} for node in range(NUM_NODES)})
        """Free of trials: warm gangs do not count."""
        self.busy: dict[str, tuple[Job, Placement]] = {}
        self.warm: defaultdict[Shape, list[Placement]] = defaultdict(list)
        self.last_start, self.num_starts, self.ends = 0.0, 0, list[tuple[float, str]]()
        beginnings = Beginnings([jobs[0].trial.stages[0].id])
        gangs = self.gangs = Gangs(self.look, max_concurrent=None, may_grow=False)
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
            node = self.gangs.node_of(name) if self.asks else None
            placement, starts = self.place(job.shape, node), now + START_SECONDS
            self.num_starts += 1
            if self.one_start_at_a_time:
                starts = self.last_start = max(now, self.last_start) + START_SECONDS
        self.room.take(job.shape, placement)
        self.busy[name] = (job, placement)
        heapq.heappush(self.ends, (starts + sum(job.seconds), name))

    def place(self, shape: Shape, asked: str | None) -> Placement:
        """As Ray does: on the node that is asked for if it has room beside the warm gangs, else where most is free.

        Where there is no room, warm gangs are closed, the oldest first.
        """
        while True:
            there = Room(self.room.free)
            for of, placements in self.warm.items():
                for placement in placements:
                    there.take(of, placement)
            if asked and shape.workers_in(there.free[asked]) >= shape.workers:
                return {asked: shape.workers}
            # Its scorer prefers the node with the largest share of free resources.
            node = max(there.free, key=lambda node: shape.workers_in(there.free[node]))
            if shape.workers_in(there.free[node]) >= shape.workers:
                return {node: shape.workers}
            next(placements for placements in self.warm.values() if placements).pop(0)

    def end(self, name: str) -> None:
        job, placement = self.busy.pop(name)
        self.room.give(job.shape, placement)
        self.warm[job.shape].append(placement)
        for stage, seconds in zip(job.trial.stages[1:], job.seconds, strict=True):
            # A stage stands for all of its kind here: for those that the workers shared, of one worker each.
            workers = job.shape.workers
            wide = stage.spec.wide
            worked = seconds if wide else seconds * workers
            event = ended(stage.id, wall_seconds=worked, num_workers=workers if wide else 1)
            self.beginnings.take(event)
            self.queue.take(event)
        self.searcher.on_trial_complete(name)


def area(jobs: Sequence[Job]) -> float:
    """All GPU-seconds over the GPUs."""
    return sum(sum(job.seconds) * job.shape.workers for job in jobs) / (NUM_NODES * GPUS)


def bound(jobs: Sequence[Job]) -> float:
    return max(area(jobs), *(sum(job.seconds) for job in jobs))


POLICIES: dict[str, tuple[type[Queue], bool, bool]] = {
    "ours": (Queue, False, True),
    "ours, no node asked for": (Queue, False, False),
    "strict": (Strict, False, True),
    "largest first": (LargestFirst, False, True),
    "FIFO, backfilled": (Backfilled, False, True),
    "FIFO": (InFileOrder, False, True),
    "FIFO, one start at a time": (InFileOrder, True, True),
}
SHAPES = {"1": [ONE], "8": [EIGHT], "1 and 8": [ONE, EIGHT]}


JobsOf = Callable[[int, float | None, Sequence[Shape], int], list[Job]]
"""By their number, sigma, shapes and the number of the draw."""


def rows(
    policies: Sequence[str], jobs_of: JobsOf, num_draws: int, nums: Sequence[int], sigmas: Sequence[float | None]
) -> Iterator[str]:
    for num, (name, shapes), sigma in itertools.product(nums, SHAPES.items(), sigmas):
        cells = []
        for queue, one_at_a_time, asks in map(POLICIES.__getitem__, policies):
            ratios = []
            for number in range(num_draws):
                jobs = jobs_of(num, sigma, shapes, number)
                replay = Replay(jobs, queue, one_start_at_a_time=one_at_a_time, asks=asks)
                ratios.append(replay.run() / bound(jobs))
            cells.append(f"{statistics.mean(ratios):.3f} ({max(ratios):.3f})")
        yield f"| {num:,} | {name} | {said(sigma)} | {' | '.join(cells)} |"


def said(sigma: float | None) -> str:
    return "measured" if sigma is None else f"{sigma:g}"


PIECES = 24
"""Fine-tuning stages of a trial, as of 4 tasks, 3 learning rates and 2 seeds."""


def shared_bound(jobs: Sequence[Job]) -> float:
    """The bound, if any idle worker could take any piece of a trial's fine-tuning."""
    return max(area(jobs), *(sum(job.seconds) - tuned(job) * (1 - job.shape.workers / PIECES) for job in jobs))


def tuned(job: Job) -> float:
    """Seconds of its fine-tuning."""
    return sum(each for stage, each in zip(job.trial.stages[1:], job.seconds, strict=True) if stage.kind == "sft")


def tail_rows(jobs_of: JobsOf, num_draws: int, nums: Sequence[int], sigmas: Sequence[float | None]) -> Iterator[str]:
    for num, (name, shapes), sigma in itertools.product(nums, SHAPES.items(), sigmas):
        spared, loads = [], []
        for number in range(num_draws):
            jobs = jobs_of(num, sigma, shapes, number)
            replay = Replay(jobs, Queue, one_start_at_a_time=False, asks=True)
            spared.append(1 - shared_bound(jobs) / replay.run())
            loads.append(max(sum(job.seconds) for job in jobs) / area(jobs))
        cells = f"{statistics.mean(spared):.1%} ({max(spared):.1%}) | {statistics.mean(loads):.2f}"
        yield f"| {num:,} | {name} | {said(sigma)} | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--trials", type=int, nargs="+", default=[1000, 5000])
    parser.add_argument("--sigmas", type=float, nargs="+", help="of lengths; default: as measured, 0.5 and 1")
    parser.add_argument("--drawn", action="store_true", help="stages as drawn, not as measured")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=[*POLICIES])
    parser.add_argument("--tail", action="store_true", help="what sharing stages could spare")
    parser.add_argument("--measure", nargs="+", metavar="STORE SWEEP.yaml", help="write what --drawn does without")
    given = parser.parse_args()
    if given.measure:
        pairs = zip(given.measure[::2], map(Path, given.measure[1::2]), strict=True)
        lines = [f"{json.dumps(sweep.stem)}: {json.dumps(measure(Store(store), sweep))}" for store, sweep in pairs]
        MEASURED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return
    sweeps = [*json.loads(MEASURED.read_text()).values()]

    def as_measured(num: int, sigma: float | None, shapes: Sequence[Shape], number: int) -> list[Job]:
        sweep = sweeps[number % len(sweeps)]
        return jobs_of(num, sigma, shapes, random.Random(number), lambda draw: draw.choice(sweep))

    def as_drawn(num: int, sigma: float | None, shapes: Sequence[Shape], number: int) -> list[Job]:
        return jobs_of(num, sigma, shapes, random.Random(number))

    of_draw = as_drawn if given.drawn else as_measured
    sigmas = given.sigmas or ([] if given.drawn else [None]) + [0.5, 1.0]
    began = time.process_time()
    columns = ["spared at most", "longest trial / all GPU-seconds over 512"] if given.tail else given.policies
    print("| trials | gangs of | sigma | " + " | ".join(columns) + " |")
    print("| --- " * (3 + len(columns)) + "|")
    for row in (tail_rows if given.tail else partial(rows, given.policies))(of_draw, given.draws, given.trials, sigmas):
        print(row, flush=True)
    print(f"{time.process_time() - began:.0f} s of processor time")


if __name__ == "__main__":
    main()
