"""The cheapest setting of a gang that trainings fit: micro-batch, ZeRO, gradient checkpointing, gang size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from raysweep.costs import Size
from raysweep.devices import OVERHEAD_TOKENS_CPU, OVERHEAD_TOKENS_GPU
from raysweep.memory import TrainingSteps
from raysweep.resources import SETTINGS, FineTuning, Resources, ZeroStage
from raysweep.search import written
from raysweep.stages.base import StageSpec

# Time of a step beside one without ZeRO: a Llama of 1B on an H200, one worker (RESULTS.md); ZeRO-3 is not compiled.
# Taken for CPUs, too, where it was not measured.
ZERO_COST = {0: 1.0, 1: 1.1, 2: 1.1, 3: 2.5}
# A forward pass more: a third of a gradient.
RECOMPUTING_COST = 4 / 3
# Gangs that are thought of, beside the smallest one.
GROWTH = (1, 2, 4, 8)


class Memory(NamedTuple):
    """Of a worker, in bytes: what it takes, or what there is for it."""

    device: float
    """Of its GPU; without one, of its node."""
    host: float
    """Of its node, beside a GPU."""

    def lacks(self, has: Memory) -> float:
        """By how much it is more than there is, of whichever is shorter; negative where both are enough."""
        return max(self.device - has.device, self.host - has.host)


@dataclass(frozen=True)
class Load:
    """A stage that trains: what a gang has to hold, and how much there is to do."""

    spec: StageSpec
    size: Size
    """Of its model."""
    flops: float = 1.0
    """Of all stages like it."""

    @property
    def training(self) -> TrainingSteps:
        """Of the stage."""
        assert self.spec.training
        return self.spec.training

    def num_bytes(self, resources: Resources) -> int:
        """That a worker holds on its device."""
        return self.spec.memory_bytes(self.size, resources)

    def memory(self, resources: Resources) -> Memory:
        """That a worker takes; without a GPU, all of it is counted as its device's."""
        host = self.spec.host_bytes(self.size, resources) if resources.gpus_per_worker else 0
        return Memory(self.num_bytes(resources), host)

    def micro_batch(self, resources: Resources) -> int:
        """Sequences that a worker takes at once."""
        return self.training.micro_batch(self.spec.gang(resources))

    def cost(self, resources: Resources) -> float:
        """Time of all workers together, beside that of their whole share at once without ZeRO."""
        gang = self.spec.gang(resources)
        overhead = OVERHEAD_TOKENS_GPU if gang.gpus_per_worker else OVERHEAD_TOKENS_CPU
        cost = 1 + overhead / (self.micro_batch(resources) * self.training.length)
        return cost * (RECOMPUTING_COST if gang.gradient_checkpointing else 1) * ZERO_COST[gang.zero_stage]


@dataclass(frozen=True)
class Options:
    """What each setting may be. One worker takes the first of those that only several have any use for."""

    workers: Sequence[int]
    zero_stages: Sequence[ZeroStage]
    recomputes: Sequence[bool]
    fine_tunings: Sequence[FineTuning]
    micro_batch_sequences: int | None
    may_halve: bool
    """Whether micro-batches may also be a half of it, a half of that, and so on."""

    @staticmethod
    def beyond(declared: Resources, *, is_wide: bool) -> Options:
        """What takes less memory than is declared; a stage that one worker does has no others, and no ZeRO."""
        growths = GROWTH if is_wide and not declared.shares_gpus else (1,)
        return Options(
            workers=[declared.workers * growth for growth in growths],
            zero_stages=tuple(dict.fromkeys((declared.zero_stage, *((0, 1, 2, 3) if is_wide else ())))),
            recomputes=(True,) if declared.gradient_checkpointing else (False, True),
            fine_tunings=(declared.fine_tuning,),
            micro_batch_sequences=declared.micro_batch_sequences,
            may_halve=True,
        )

    def settings(self, base: Resources, loads: Sequence[Load]) -> Iterator[Resources]:
        """Each that goes together; what is no option is as in `base`."""
        every = product(self.workers, self.zero_stages, self.recomputes, self.fine_tunings)
        for workers, stage, recomputes, fine_tuning in every:
            # One worker has nobody to shard with, nor to fine-tune with.
            is_idle = workers == 1 and (stage != self.zero_stages[0] or fine_tuning != self.fine_tunings[0])
            if is_idle or (stage == 3 and base.compile):
                continue
            whole = base.with_(
                workers=workers,
                zero_stage=stage,
                gradient_checkpointing=recomputes,
                fine_tuning=fine_tuning,
                micro_batch_sequences=self.micro_batch_sequences,
            )
            yield whole
            micro = max(load.micro_batch(whole) for load in loads)
            while self.may_halve and micro > 1:
                micro = -(-micro // 2)
                yield whole.with_(micro_batch_sequences=micro)


@dataclass(frozen=True)
class Fit:
    """A setting, what it takes, and what it costs."""

    resources: Resources
    memory: Memory
    """Of a worker, each for the load that takes most of it."""
    cost: float
    """See `Load.cost`; the mean over loads, by FLOPs."""
    cheaper: Fit | None = None
    """A cheaper one that takes too much: the first that takes so of its node alone, or else the next cheaper; None:
    there is none."""

    @staticmethod
    def of(resources: Resources, loads: Sequence[Load]) -> Fit:
        """What a setting comes to."""
        devices, hosts = zip(*(load.memory(resources) for load in loads), strict=True)
        return Fit(resources, Memory(max(devices), max(hosts)), _cost(resources, loads))

    def changes(self, declared: Resources) -> str:
        """What of it differs from `declared`, as a sweep file has it."""
        return ", ".join(
            f"{name}: {written(value)}"
            for name in SETTINGS
            if (value := getattr(self.resources, name)) != getattr(declared, name)
        )


def cheapest_fit(
    loads: Sequence[Load], options: Options, base: Resources, limit: Callable[[Resources], Memory]
) -> Fit | None:
    """The setting that takes the fewest workers, and of these the least time; None if none fits.

    Args:
        loads: at least one; each is to fit by itself.
        options: what may be chosen.
        base: has what may not.
        limit: what a worker of such a gang has.
    """
    cheaper: Fit | None = None
    of_node: Fit | None = None
    for resources in sorted(options.settings(base, loads), key=lambda each: (each.workers, _cost(each, loads))):
        fit = Fit.of(resources, loads)
        has = limit(resources)
        if fit.memory.lacks(has) <= 0:
            return replace(fit, cheaper=of_node or cheaper)
        if fit.memory.device <= has.device:
            of_node = of_node or fit
        cheaper = fit
    return None


def nearest_fit(loads: Sequence[Load], options: Options, base: Resources, limit: Callable[[Resources], Memory]) -> Fit:
    """Where none fits: the setting that lacks the fewest bytes of a worker. See `cheapest_fit`."""
    fits = [Fit.of(resources, loads) for resources in options.settings(base, loads)]
    return min(fits, key=lambda fit: fit.memory.lacks(limit(fit.resources)))


def _cost(resources: Resources, loads: Sequence[Load]) -> float:
    return sum(load.flops * load.cost(resources) for load in loads) / sum(load.flops for load in loads)
