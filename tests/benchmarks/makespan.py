"""Makespan of large sweeps over its lower bound: the runner's own searcher, queue and tail in a discrete-event replay.

    python tests/benchmarks/makespan.py [--draws 6] [--drawn]
    python tests/benchmarks/makespan.py --measure STORE SWEEP.yaml [...]

64 nodes of 8 GPUs. Each trial's stages are those of a trial that was measured, drawn from one sweep: the share of its
seconds that each kind of stage took, how many there are of it, and the FLOPs that were planned for it, by which the
queue goes until it has measured. So predictions are off as they were. A trial takes half an hour on average; how trials
differ is as it was measured, too, or (sigma) lognormal, as where models differ in size. Of 1 and 8 GPUs, the larger
gang has as much more to do. What was measured is in tests/data/stage_seconds.json, which --measure writes, of whole
trials of finished sweeps, but for stages that several share.

With --drawn nothing is measured: a trial consists of training, and of 24 stages of fine-tuning that take 5 to 50 % of
it and are ten times slower per FLOP, so that FLOPs mislead until both have been measured; each trial's are 30 % off
(lognormal).

A gang starts in 15 s, and takes another trial of its shape over in 0.3 s, as measured (RESULTS.md (a), (c2)). A warm
gang is closed where one of another shape is to have its room. The bound is the longer of two: all GPU-seconds, of each
trial in its own gang, over 512, and the trial that takes longest if all that is not training had a gang of its own
each. It knows of no starts, and no nodes.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).parents[1]))

from ended import ended
from timed import Timed, timed_trials

from raysweep.costs import UNKNOWN
from raysweep.estimates import size_of
from raysweep.events import TrialStarted
from raysweep.plan import Stage, Trial
from raysweep.run_files import TrialRow
from raysweep.runners.queue import Beginnings, Queue
from raysweep.runners.room import Gangs, Placement, Room, Shape, View
from raysweep.runners.searchers import Points, ThenShares, UnderWay
from raysweep.runners.tail import Tail
from raysweep.runners.trainable import SHARE
from raysweep.space import load
from raysweep.store import Store

NUM_NODES, GPUS = 64, 8
START_SECONDS, WARM_SECONDS = 15.0, 0.3
ONE, EIGHT = Shape(1, 1, 1), Shape(8, 1, 1)


MEASURED = Path(__file__).parents[1] / "data" / "stage_seconds.json"
MEAN_SECONDS = 1800.0

Work = Mapping[str, tuple[float, float, int]]
"""Of a trial: kind -> seconds of all its stages, one after another, FLOPs that were planned for them, their number."""


@dataclass(frozen=True)
class Job:
    trial: Trial
    shape: Shape
    seconds: Mapping[str, float]
    """By the id of a stage; of its gang where it is wide, else of one worker."""

    @cached_property
    def alone(self) -> float:
        """Seconds in its own gang, if no other takes any of it."""
        ranks = [0.0] * self.shape.workers
        for batch in batches(self.trial, self.trial.stages[1:]):
            ranks = [max(ranks)] * len(ranks)
            for stage in batch:  # The next one goes to the rank that is free first.
                heapq.heapreplace(ranks, ranks[0] + self.seconds[stage.id])
        return max(ranks)

    @property
    def work(self) -> float:
        """GPU-seconds in which a rank is at work."""
        stages = self.trial.stages[1:]
        return sum(self.seconds[each.id] * (self.shape.workers if each.spec.wide else 1) for each in stages)

    @property
    def shared(self) -> float:
        """Seconds, if whatever is not training were made at once."""
        training, *others = self.trial.stages[1:]
        return self.seconds[training.id] + max(self.seconds[stage.id] for stage in others)


def is_wide(trial: Trial, stage: Stage) -> bool:
    return stage.spec.wide


def batches(trial: Trial, stages: Iterable[Stage]) -> Iterator[list[Stage]]:
    """As a gang makes them."""
    for _, leg in replace(trial, stages=tuple(stages)).legs():
        yield from leg


@cache
def kind_of(name: str) -> type[Timed]:
    """A kind of stage, with a speed of its own."""
    wide = name in ("pretrain", "heldout", "indicators", "flatness", "noise")
    fields = {"kind": name, "wide": wide, "__annotations__": {"kind": ClassVar[str], "number": int}, "number": 0}
    if name == "pretrain":
        fields["state_key"] = property(lambda spec: f"state-{spec.index}")
    return type(name.title(), (Timed,), {"__module__": __name__, **fields})


def drawn_work(draw: random.Random) -> Work:
    """Of a trial of a second: see the module."""
    tuned = draw.uniform(0.05, 0.5)
    seconds = {"pretrain": (1 - tuned, 1 - tuned, 1), "sft": (tuned, tuned / 10, 24)}
    return {kind: (each, flops * draw.lognormvariate(0, 0.3), num) for kind, (each, flops, num) in seconds.items()}


def jobs_of(
    num: int,
    sigma: float | None,
    shapes: Sequence[Shape],
    draw: random.Random,
    work_of: Callable[[random.Random], Work] = drawn_work,
) -> list[Job]:
    """Trials of half an hour on average, each with a gang of one of `shapes`; sigma None: as long as their work is."""
    works = [work_of(draw) for _ in range(num)]
    lengths = [sum(seconds for seconds, *_ in work.values()) for work in works]
    wanted = [length if sigma is None else draw.lognormvariate(0, sigma) for length in lengths]
    scale = MEAN_SECONDS * num / sum(wanted)
    jobs = []
    for index, (trial, work) in enumerate(zip(timed_trials([0.0] * num), works, strict=True)):
        shape, factor = draw.choice(shapes), scale * wanted[index] / lengths[index]
        stages, seconds = [trial.stages[0]], {}
        for kind, (all_seconds, flops, of) in work.items():
            for number in range(of):
                each, spec_of = all_seconds * factor / of, kind_of(kind)
                spec = spec_of(index=index, number=number, predicted=flops * factor * shape.workers / of)
                inputs = {"tokens": stages[0].id} if len(stages) == 1 else {"checkpoint": stages[1].id}
                made = Stage(spec, inputs, step=1)
                stages.append(replace(made, checkpoint=stages[1].id if len(stages) > 1 else made.id))
                # A larger gang has as much more to do of each.
                seconds[made.id] = each if spec_of.wide else each * shape.workers
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
        work: dict[str, tuple[float, float, int]] = {}
        for stage in own:
            ran = store.provenance(stage.id)
            assert ran
            assert ran["world_size"] == 1
            seconds, flops, num = work.get(stage.kind, (0.0, 0.0, 0))
            planned = stage.spec.flops(size_of(trial) or UNKNOWN, trial.corpus_of(stage))
            work[stage.kind] = (round(seconds + ran["wall_seconds"], 3), float(f"{flops + planned:.4g}"), num + 1)
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
    key = staticmethod(lambda job: -job.alone)
    strict = True


class InFileOrder(Peer):
    strict = True


class Backfilled(Peer):
    pass


class LargestFirst(Peer):
    key = staticmethod(lambda job: (-job.shape.workers, -job.alone))  # type: ignore[assignment]


@dataclass
class Party:
    """A gang at work: on its own trial, or on a share of another's."""

    job: Job
    placement: Placement
    batches: Iterator[list[Stage]]
    """That are to come."""
    is_share: bool
    batch: list[Stage] = field(default_factory=list)
    """What of the present one no rank has begun, the next one last."""
    at_work: int = 0
    """Ranks."""


class Replay:
    """A cluster whose gangs take the seconds of their stages."""

    def __init__(
        self, jobs: Sequence[Job], queue: type[Queue], *, one_start_at_a_time: bool, asks: bool, shares: bool
    ) -> None:
        self.by_id = {job.trial.id: job for job in jobs}
        self.one_start_at_a_time, self.asks = one_start_at_a_time, asks
        self.room = Room({f"{node:02}": {"CPU": 64.0, "GPU": float(GPUS)} for node in range(NUM_NODES)})
        """Free of trials: warm gangs do not count."""
        self.busy: dict[str, Party] = {}
        self.warm: defaultdict[Shape, list[Placement]] = defaultdict(list)
        self.last_start, self.num_trials = 0.0, 0
        self.ends: list[tuple[float, str, str]] = []
        """When a gang has made a stage, or has started (no stage): the first one first."""
        self.made_at: dict[str, float] = {}
        """When each stage that was begun is made, by its id."""
        beginnings = self.beginnings = Beginnings([jobs[0].trial.stages[0].id])
        gangs = self.gangs = Gangs(self.look, max_concurrent=None, may_grow=False)
        self.queue = queue([job.trial for job in jobs], beginnings, self.shape_of)
        if isinstance(self.queue, Peer):
            self.queue.by_id = self.by_id
        self.tail = Tail(beginnings, self.queue.durations, self.shape_of, is_wide, may_end_early=False)
        under_way = UnderWay(beginnings, gangs, self.tail)
        points = Points(self.queue, under_way)
        self.searcher = ThenShares(points, under_way) if shares else points
        self.by_index = {job.trial.point["index"]: job for job in jobs}

    def shape_of(self, trial: Trial) -> Shape:
        return self.by_id[trial.id].shape

    def look(self) -> View:
        gangs: defaultdict[Shape, list[Placement]] = defaultdict(list)
        for party in self.busy.values():
            gangs[party.job.shape].append(party.placement)
        return View(self.room.free, gangs)

    def run(self) -> float:
        """Seconds until the last trial has ended."""
        now, names = 0.0, (f"{number}" for number in itertools.count())
        while True:
            while (config := self.searcher.suggest(name := next(names))) is not None:
                self.begin(name, self.by_index[config["index"]], config.get(SHARE), now)
            if not self.num_trials and not any(party.at_work for party in self.busy.values()):
                return now  # Shares that wait for a gang end.
            now, name, stage = heapq.heappop(self.ends)
            self.go_on(name, stage, now)

    def begin(self, name: str, job: Job, share: tuple[str, ...] | None, now: float) -> None:
        starts = now + WARM_SECONDS
        if self.warm[job.shape]:
            placement = self.warm[job.shape].pop()
        else:
            node = self.gangs.node_of(name) if self.asks else None
            placement, starts = self.place(job.shape, node), now + START_SECONDS
            if self.one_start_at_a_time:
                starts = self.last_start = max(now, self.last_start) + START_SECONDS
        self.num_trials += share is None
        self.room.take(job.shape, placement)
        stages = [stage for stage in job.trial.stages[1:] if share is None or stage.id in share]
        self.busy[name] = Party(job, placement, batches(job.trial, stages), share is not None)
        heapq.heappush(self.ends, (starts, name, ""))

    def go_on(self, name: str, stage: str, now: float) -> None:
        """A rank is free, or all are: the next stages, or the end."""
        party = self.busy[name]
        if stage:
            party.at_work -= 1
            self.tell(stage, party.job)
        if not stage and not party.is_share:
            self.tail.take(TrialStarted(row=TrialRow(party.job.trial.id, variant="", point={}, seed=0, stages=())))
        if not party.at_work and not party.batch:
            if (batch := next(party.batches, None)) is None:
                self.end(name)
                return
            party.batch = batch[::-1]
        # What another one has made costs nothing; whoever comes to what another one makes waits for it.
        while party.batch and party.at_work < (1 if party.batch[-1].spec.wide else party.job.shape.workers):
            made = party.batch.pop().id
            party.at_work += 1
            ends = self.made_at.setdefault(made, now + party.job.seconds[made])
            heapq.heappush(self.ends, (max(now, ends), name, made))

    def tell(self, stage: str, job: Job) -> None:
        if stage not in self.beginnings.finished:
            wide = next(each for each in job.trial.stages if each.id == stage).spec.wide
            num = job.shape.workers if wide else 1
            event = ended(stage, trial=job.trial.id, wall_seconds=job.seconds[stage], num_workers=num)
            self.beginnings.take(event)
            self.queue.take(event)
            self.tail.take(event)

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
        party = self.busy.pop(name)
        self.num_trials -= not party.is_share
        self.room.give(party.job.shape, party.placement)
        self.warm[party.job.shape].append(party.placement)
        self.searcher.on_trial_complete(name)


def area(jobs: Sequence[Job]) -> float:
    """All GPU-seconds, of each trial in its own gang, over the GPUs."""
    return sum(job.alone * job.shape.workers for job in jobs) / (NUM_NODES * GPUS)


def idle_part(jobs: Sequence[Job]) -> float:
    """Of that, ranks that have nothing to do as others of their gang are at work: it is not the queue's to mend."""
    return 1 - sum(job.work for job in jobs) / (area(jobs) * NUM_NODES * GPUS)


def bound(jobs: Sequence[Job]) -> float:
    return max(area(jobs), *(job.shared for job in jobs))


POLICIES: dict[str, tuple[type[Queue], bool, bool, bool]] = {
    "ours": (Queue, False, True, True),
    "ours, no shares": (Queue, False, True, False),
    "ours, no node asked for": (Queue, False, False, True),
    "strict": (Strict, False, True, False),
    "largest first": (LargestFirst, False, True, False),
    "FIFO, backfilled": (Backfilled, False, True, False),
    "FIFO": (InFileOrder, False, True, False),
    "FIFO, one start at a time": (InFileOrder, True, True, False),
}
SHAPES = {"1": [ONE], "8": [EIGHT], "1 and 8": [ONE, EIGHT]}


JobsOf = Callable[[int, float | None, Sequence[Shape], int], list[Job]]
"""By their number, sigma, shapes and the number of the draw."""


def rows(
    policies: Sequence[str], jobs_of: JobsOf, num_draws: int, nums: Sequence[int], sigmas: Sequence[float | None]
) -> Iterator[str]:
    for num, (name, shapes), sigma in itertools.product(nums, SHAPES.items(), sigmas):
        cells = []
        for queue, one_at_a_time, asks, shares in map(POLICIES.__getitem__, policies):
            ratios = []
            for number in range(num_draws):
                jobs = jobs_of(num, sigma, shapes, number)
                replay = Replay(jobs, queue, one_start_at_a_time=one_at_a_time, asks=asks, shares=shares)
                ratios.append(replay.run() / bound(jobs))
            cells.append(f"{statistics.mean(ratios):.3f} ({max(ratios):.3f})")
        idle = statistics.mean(map(idle_part, (jobs_of(num, sigma, shapes, number) for number in range(num_draws))))
        yield f"| {num:,} | {name} | {said(sigma)} | {' | '.join(cells)} | {idle:.0%} |"


def said(sigma: float | None) -> str:
    return "measured" if sigma is None else f"{sigma:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--trials", type=int, nargs="+", default=[1000, 5000])
    parser.add_argument(
        "--sigmas",
        type=lambda word: None if word == "measured" else float(word),
        nargs="+",
        help="of lengths: numbers, or measured; default: measured, 0.5 and 1",
    )
    parser.add_argument("--drawn", action="store_true", help="stages as drawn, not as measured")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=[*POLICIES])
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
    print("| trials | gangs of | sigma | " + " | ".join(given.policies) + " | idle ranks in gangs |")
    print("| --- " * (4 + len(given.policies)) + "|")
    for row in rows(given.policies, of_draw, given.draws, given.trials, sigmas):
        print(row, flush=True)
    print(f"{time.process_time() - began:.0f} s of processor time")


if __name__ == "__main__":
    main()
