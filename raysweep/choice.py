"""What `auto` in a sweep file's resources comes to: the cheapest gang that holds every training of its variants."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import inf
from typing import Any

from pydantic import ValidationError

from raysweep.errors import ClusterError, SpaceError
from raysweep.estimates import size_of
from raysweep.fitting import GROWTH, Fit, Load, Memory, Options, cheapest_fit, nearest_fit
from raysweep.plan import Trial
from raysweep.resources import SETTINGS, AskedResources, ByVariant, Resources
from raysweep.search import settings, written
from raysweep.spec import canonical
from raysweep.validation import validate
from raysweep.variants import Point, SearchSpace

GIB = 2**30
# Of a node's memory, how much processes may use before Ray ends one (its memory_usage_threshold).
USABLE_OF_HOST = 0.95
# Resident memory of a worker before it holds a model: torch, transformers, DeepSpeed, Ray.
PROCESS_BYTES = 2**29
# The same with a GPU: also what CUDA and NCCL keep of the host's. Assumed, as it differs by driver and by GPU.
GPU_PROCESS_BYTES = 2**31
# By how much measured peaks were above what was planned, at most: on CPUs 12 %; on a GPU 4.1 % by tensors and, at 1B,
# 7 % by what torch's allocator reserved for them, gaps included (RESULTS.md).
MARGIN_OF_GPU, MARGIN_OF_CPU = 0.10, 0.12
# By which a training takes least of a worker.
_LEAST = Resources(
    workers=max(GROWTH),
    gpus_per_worker=1,
    zero_stage=3,
    gradient_checkpointing=True,
    micro_batch_sequences=1,
    fine_tuning="wide",
)


@dataclass(frozen=True)
class Device:
    """What holds the memory of workers: a GPU, or a node whose processors they are. Of several kinds, the smallest."""

    name: str
    num_bytes: int
    room: int
    """Workers that all nodes have room for."""
    num_sharing: int = 1
    """Workers that a node has room for, which share its memory."""
    host_bytes: int | None = None
    """Of a GPU, the memory of its node; None: it is not known."""

    def worker_memory(self, resources: Resources) -> Memory:
        """That a worker of such a gang has for its tensors."""
        sharing = min(self.num_sharing, (resources.max_concurrent or inf) * resources.workers)
        if not resources.gpus_per_worker:
            return Memory(USABLE_OF_HOST * self.num_bytes / sharing - PROCESS_BYTES, inf)
        host = inf if self.host_bytes is None else USABLE_OF_HOST * self.host_bytes / sharing - GPU_PROCESS_BYTES
        return Memory(self.num_bytes * min(1.0, resources.gpus_per_worker), host)


@dataclass(frozen=True)
class Decision:
    """What was chosen for a part of the variants, and why."""

    part: str | None
    """Their value of the axis that resources go by; None: all others."""
    asked: Mapping[str, Any]
    device: Mapping[str, Any]
    """Its name, and bytes."""
    chosen: Mapping[str, Any]
    reason: str


@dataclass(frozen=True)
class Choice:
    """What all variants are trained by."""

    resources: ByVariant[Resources]
    decisions: tuple[Decision, ...]
    """For each part that leaves something to choose."""

    @property
    def lines(self) -> tuple[str, ...]:
        """One for each choice."""
        return tuple(f"resources{_of(each.part)}: {each.reason}" for each in self.decisions)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, for `kept` of a later `choose`."""
        return {"decisions": [asdict(decision) for decision in self.decisions]}


def choose(
    space: SearchSpace,
    asked: ByVariant[AskedResources],
    look: Callable[[Resources], Device],
    *,
    kept: Mapping[str, Any] | None = None,
) -> Choice:
    """Choose what `asked` leaves to the planner.

    Args:
        space: its variants are what is trained.
        asked: for them; as the sweep file has it, or as a runner takes it.
        look: gives the device that workers will be on, by what of `Resources` is not chosen.
        kept: what an earlier run chose (`Choice.to_dict`); goes on where that was asked alike, for such a device.

    Raises:
        ClusterError: if nothing that may be chosen fits, naming the nearest; or if the size of a model that is trained
            cannot be known before it is fetched.
    """
    loads: dict[str | None, list[Load]] | None = None
    decisions = []
    for part, each in asked.parts.items():
        if not each.autos:
            continue
        device = look(each.without_autos())
        decision = _kept(kept or {}, part, each, device)
        if decision is None:
            loads = _loads(space, asked) if loads is None else loads
            decision = _decide(part, each, device, loads.get(part, []))
        decisions.append(decision)
    chosen = {decision.part: validate(Resources, decision.chosen) for decision in decisions}
    parts = {part: chosen.get(part) or each.without_autos() for part, each in asked.parts.items()}
    return Choice(ByVariant(parts, by=asked.by), tuple(decisions))


def _kept(kept: Mapping[str, Any], part: str | None, asked: AskedResources, device: Device) -> Decision | None:
    """What was chosen before; None if it was not, or for other hardware."""
    for given in kept.get("decisions", ()):
        with contextlib.suppress(TypeError, ValidationError):
            decision = Decision(**given)
            # Of a node with more memory it still fits, and machines of one kind differ by some megabytes.
            was, now = decision.device.get("host_bytes"), device.host_bytes
            is_less = now is not None and (was is None or now < was - GIB)
            there = _described(device) | {"host_bytes": was}
            is_alike = not is_less and (decision.part, decision.asked, decision.device) == (
                part,
                canonical(asked),
                there,
            )
            if is_alike and validate(Resources, decision.chosen).workers <= device.room:
                return decision
    return None


def _decide(part: str | None, asked: AskedResources, device: Device, loads: Sequence[Load]) -> Decision:
    base = asked.without_autos()
    decision = Decision(part, canonical(asked), _described(device), canonical(base), "nothing is trained")
    if not loads:
        return decision
    options = _options(asked, device)
    margin = MARGIN_OF_GPU if base.gpus_per_worker else MARGIN_OF_CPU
    limit = partial(_limit, device, margin)
    left = f"{100 * margin:.0f} % of it is left, as plans may be low by that"
    fit = cheapest_fit(loads, options, base, limit)
    if fit is None:  # What fits without the margin is better than nothing.
        limit, left = partial(_limit, device, 0.0), f"nothing leaves the {100 * margin:.0f} % by which plans may be low"
        fit = cheapest_fit(loads, options, base, limit)
    if fit is None:
        raise _nothing_fits(part, asked, device, loads)
    has = device.worker_memory(fit.resources)
    reason = f"{_said(asked.autos, fit.resources)}: {_gib(fit.memory.device)} of {_gib(has.device)} GiB ({device.name})"
    if has.host < inf:
        reason += f", {_gib(fit.memory.host)} of {_gib(has.host)} of its node"
    why = "nothing is cheaper"
    if fit.cheaper:
        cheaper = fit.cheaper.resources
        differ = [name for name in SETTINGS if getattr(cheaper, name) != getattr(fit.resources, name)]
        why = f"{_said(differ, cheaper)} would take {_too_much(fit.cheaper, limit(cheaper))}"
    return replace(decision, chosen=canonical(fit.resources), reason=f"{reason}; {why}; {left}")


def _limit(device: Device, margin: float, resources: Resources) -> Memory:
    """What a worker of such a gang is to take at most."""
    has = device.worker_memory(resources)
    return has._replace(device=(1 - margin) * has.device)


def _too_much(fit: Fit, has: Memory) -> str:
    """What it takes, of the memory that it lacks."""
    if fit.memory.device > has.device:
        return _gib(fit.memory.device)
    return f"{_gib(fit.memory.host)} of its node, which has {_gib(max(0.0, has.host))} for a worker"


def _options(asked: AskedResources, device: Device) -> Options:
    room = 1 if asked.shares_gpus else device.room
    return Options(
        workers=[each for each in GROWTH if each <= room] if asked.workers == "auto" else [asked.workers],
        zero_stages=(0, 1, 2, 3) if asked.zero_stage == "auto" else (asked.zero_stage,),
        recomputes=((False, True) if asked.gradient_checkpointing == "auto" else (asked.gradient_checkpointing,)),
        fine_tunings=("split", "wide") if asked.fine_tuning == "auto" else (asked.fine_tuning,),
        micro_batch_sequences=None if asked.micro_batch_sequences == "auto" else asked.micro_batch_sequences,
        may_halve=asked.micro_batch_sequences == "auto",
    )


def _nothing_fits(part: str | None, asked: AskedResources, device: Device, loads: Sequence[Load]) -> ClusterError:
    nearest = nearest_fit(loads, _options(asked, device), asked.without_autos(), device.worker_memory)
    has = device.worker_memory(nearest.resources)
    is_device = nearest.memory.device > has.device
    which = "device" if is_device else "host"
    largest = max(loads, key=lambda load: getattr(load.memory(nearest.resources), which)).spec.kind
    said = [name for name in SETTINGS if name not in ("workers", *asked.autos)]
    more = f"leave {', '.join(said)} to auto, too, " if said else ""
    more_room = "raise gpus_per_worker to 1" if asked.shares_gpus else "take more workers, give them more memory"
    remedy = f"{more_room}, or lower the model's size or sequence_length"
    if not is_device:
        fewer = "let fewer workers share a node (max_concurrent, or more cpus_per_worker)"
        remedy = f"{fewer}, give it more memory, or lower the model's size"
    return ClusterError(
        f"no choice of {', '.join(asked.autos)} fits: the nearest, {_said(asked.autos, nearest.resources)}, "
        f"takes {_gib(getattr(nearest.memory, which))} GiB{'' if is_device else ' of its node'} for {largest}, and a "
        f"worker has {_gib(max(0.0, getattr(has, which)))} ({device.name}): {more}{remedy}",
        at=("resources", part) if part is not None else ("resources",),
    )


def _loads(space: SearchSpace, asked: ByVariant[AskedResources]) -> dict[str | None, list[Load]]:
    """What is trained, by part; each once that takes the same memory, with the FLOPs of all like it."""
    by_key: dict[str | None, dict[Any, Load]] = {}
    for point in _corners(space, asked.by):
        try:
            trial = space.trial(point, space.declared.seeds[0])
        except SpaceError:  # Two values may not go together; points that are run are checked.
            continue
        part = asked.part_of(point)
        of_part = by_key.setdefault(part, {})
        for load in _trained(trial) if asked.parts[part].autos else ():
            key = _memory_key(load)
            of_part[key] = replace(load, flops=load.flops + (of_part[key].flops if key in of_part else 0.0))
    return {part: list(loads.values()) for part, loads in by_key.items()}


def _corners(space: SearchSpace, by: str | None) -> Iterator[Point]:
    """All values of the axes by which trainings take other memory, crossed; of ranges their two bounds.

    An axis that changes no memory where it alone is set is left as in the base.
    """
    base, axes = _memory_keys(space, {}), {}
    for name, axis in space.declared.sweep.items():
        labels = [setting.label for setting in settings(name, axis)]
        if name == by or any(_memory_keys(space, {name: label}) != base for label in labels):
            axes[name] = labels
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _memory_keys(space: SearchSpace, point: Point) -> set[Any]:
    return {_memory_key(load) for load in _trained(space.trial(point, space.declared.seeds[0]))}


def _memory_key(load: Load) -> Any:
    """Equal for what takes equal memory: in training, and in scoring, which shows where training takes least."""
    return load.spec.kind, load.size, load.spec.training, load.num_bytes(_LEAST)


def _trained(trial: Trial) -> list[Load]:
    size = size_of(trial)
    trained = [stage for stage in trial.stages if stage.spec.training]
    if trained and size is None:
        raise ClusterError(
            "auto: the size of a model at the hub is not known before it is fetched, and this sweep trains one: say "
            "workers, zero_stage, micro_batch_sequences, gradient_checkpointing and fine_tuning, or name a folder",
            at=("resources",),
        )
    return [Load(stage.spec, size, stage.spec.flops(size, trial.corpus_of(stage))) for stage in trained if size]


def _described(device: Device) -> dict[str, Any]:
    described = asdict(device)
    del described["room"]  # A run that goes on in a larger cluster keeps its gangs.
    return described


def _said(names: Sequence[str], resources: Resources) -> str:
    return ", ".join(f"{name} {written(getattr(resources, name))}" for name in names)


def _of(part: str | None) -> str:
    return "" if part is None else f".{part}"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f}" if num_bytes > 10 * GIB else f"{num_bytes / GIB:.2g}"
