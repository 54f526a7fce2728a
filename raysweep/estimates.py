"""What a sweep will cost: stages, tokens, FLOPs, memory, disk, GPU-hours; and time, by what the store has measured."""

from __future__ import annotations

import glob
import os
from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any

from raysweep.costs import UNKNOWN, Size
from raysweep.data.corpora import Corpus
from raysweep.devices import host_memory_bytes
from raysweep.errors import DataError
from raysweep.fitting import Load, Memory, Options, cheapest_fit
from raysweep.plan import Stage, Trial
from raysweep.resources import Resources
from raysweep.scores import Column
from raysweep.stages.base import StageSpec
from raysweep.store import Store
from raysweep.variants import SearchSpace

# Finished stages of a kind that are looked at, to judge how long others take.
MAX_MEASURED = 500
# The state of a training is the same on disk whatever gang saves it.
ANY_GANG = Resources()


@dataclass(frozen=True)
class Plan:
    """A sweep's cost. `stages`, `stages_done`: distinct stages by kind; the other sums are of what is still to do."""

    name: str
    run: str
    num_variants: int
    num_trials: int
    stages: Mapping[str, int]
    stages_done: Mapping[str, int]
    num_parameters: tuple[int, int] | None
    """Smallest and largest; None if they are not known."""
    tokens: int
    """Of pretraining, that are still to compute."""
    tokens_seen: int
    """Of pretraining, over all trials, those of a common beginning counted for each."""
    flops: float
    memory_bytes_per_worker: int
    """Of the stage that takes most; the accelerator's own context not counted."""
    memory_bytes: Mapping[str, int]
    """Kind -> the same of its stage that takes most; only kinds that hold a model."""
    gpu_memory_bytes: int | None
    """Of one GPU; None if it is not known which."""
    host_bytes_per_worker: int | None
    """Of a worker with a GPU, beside it, of the stage that takes most. None where there are no GPUs."""
    gpu_hours: float
    mfu: float
    peak_flops: float
    flatness_rse: float | None
    """Relative standard error of Hessian traces that the flatness budget is expected to give."""
    disk_bytes: int
    """That the store will grow by: checkpoints and tokens."""
    state_bytes: int
    """Of resumable state, besides, while a gang trains the largest model."""
    seconds: Mapping[str, float]
    """Kind -> of all its stages to do, one after another; only kinds of which the store has measured stages."""
    wall_seconds: float | None
    """Of the kinds in `seconds`, by one gang; None if there is none."""
    num_measured: int
    """Stages that `seconds` are judged by."""
    columns: tuple[Column, ...]
    """What will be known of checkpoints: what a search may ask for."""
    choices: tuple[str, ...]
    """What `auto` in the sweep file's resources comes to, a line for each."""
    warnings: tuple[str, ...]
    note: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with the sums of stages, and columns as they are declared."""
        total, done = sum(self.stages.values()), sum(self.stages_done.values())
        columns = [
            {"name": column.name, "direction": column.metric.direction, "unit": column.metric.unit}
            for column in self.columns
        ]
        counts = {"num_stages": total, "num_stages_done": done, "num_stages_to_do": total - done}
        return asdict(self) | counts | {"columns": columns}


def size_of(trial: Trial) -> Size | None:
    """Of a trial's model, by its first checkpoint; None if that lies at the hub, or cannot be told."""
    by_id = {stage.id: stage for stage in trial.stages}
    stage = next(by_id[stage.checkpoint] for stage in trial.stages if stage.checkpoint is not None)
    while (size := stage.spec.model_size) is None and "start" in stage.inputs:
        stage = by_id[stage.inputs["start"]]
    return size


def sized(trial: Trial) -> Iterator[tuple[Stage, Size]]:
    """A trial's stages, each with the size of the model that it makes or measures; `UNKNOWN` if that cannot be told."""
    size = size_of(trial) or UNKNOWN
    enlarged = {stage.id: stage.spec.model_size for stage in trial.stages if stage.kind == "enlarge"}
    for stage in trial.stages:
        yield stage, enlarged.get(stage.inputs.get("checkpoint", "")) or size


def flops_of(trial: Trial) -> dict[str, float]:
    """Stage id -> floating-point operations by its own formula; none where the model's size is not known."""
    return {
        stage.id: float(stage.spec.flops(size, trial.corpus_of(stage)))
        for stage, size in sized(trial)
        if size is not UNKNOWN
    }


@dataclass(frozen=True)
class ToWrite:
    """Bytes that a run is still to write; fewer than it will, as measurements are not counted."""

    kept: int
    """Checkpoints and tokens, that stay in the store."""
    state: int
    """Of resumable state, besides, while one gang trains the largest model."""

    @staticmethod
    def of(space: SearchSpace, store: Store) -> ToWrite | None:
        """Of a sweep; None where trials may be stopped before their end, or are picked later, or data has gone since.

        Of the last, as of a hub that does not answer, the stage that reads it tells.
        """
        if space.declared.search.name == "optuna" or space.declared.search.scheduler:
            return None
        seen, kept, state = store.finished_ids(), 0, 0
        for stage, size in (each for trial in space.trials() for each in sized(trial)):
            if stage.id not in seen:
                seen.add(stage.id)
                try:
                    kept += stage.spec.disk_bytes(size)
                except (FileNotFoundError, DataError):
                    return None
                state = max(state, stage.spec.state_bytes(size, ANY_GANG))
        return ToWrite(kept, state)

    def lack(self, store: Store, folder: str, free: int) -> str | None:
        """What to say of a machine with too little room; None if it has enough.

        Args:
            store: behind a URL, a machine keeps no more than the state of its gangs.
            folder: where the machine keeps the store's files.
            free: bytes that are free there.
        """
        num_bytes = (self.kept if store.is_local else 0) + self.state
        if free >= num_bytes:
            return None
        gib = 2**30
        return (
            f"{free / gib:,.1f} GiB are free in {folder}, and about {num_bytes / gib:,.1f} are to be written: make "
            "room, or " + ("give another --store" if store.is_local else "set XDG_CACHE_HOME to a folder with more")
        )


def work_of(stage: Stage, finished: Container[str]) -> StageSpec:
    """What a stage does: what it repeats, where its checkpoint was finished before and the state of that is gone."""
    repeated = stage.spec.repeated
    is_again = stage.id not in finished and stage.inputs.get("checkpoint") in finished
    return repeated if repeated and is_again else stage.spec


@dataclass(frozen=True)
class Largest:
    """The stage of a kind that takes most memory."""

    num_bytes: int
    spec: StageSpec
    size: Size


@dataclass
class _Sum:
    """Adds up the stages of trial after trial; a shared one counts once."""

    finished: set[str]
    once: bool
    """False where the points are stand-ins for others, which share less."""
    stages: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    flops_to_do: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By kind; of stages that are not finished."""
    flops_of: dict[str, float] = field(default_factory=dict)
    """By stage id; of finished ones too, whose time tells the seconds of a FLOP."""
    wide: set[str] = field(default_factory=set)
    """Kinds that take a whole gang."""
    sizes: set[int] = field(default_factory=set)
    tokens: int = 0
    tokens_seen: int = 0
    tokens_again: int = 0
    """Of `tokens`: trained once more, for an optimizer's state."""
    disk_bytes: int = 0
    largest: defaultdict[Resources, dict[str, Largest]] = field(default_factory=lambda: defaultdict(dict))
    """By kind, the stage that takes most, finished or not; so are `host_bytes` and `state_bytes`."""
    host_bytes: defaultdict[Resources, int] = field(default_factory=lambda: defaultdict(int))
    """Of a worker with a GPU, beside it."""
    state_bytes: int = 0
    rse: float | None = None

    def add(self, trial: Trial, resources: Resources) -> None:
        if size := size_of(trial):
            self.sizes.add(size.num_parameters)
        for stage, own in sized(trial):
            # Seen by each trial that shares a beginning; computed once, below.
            self.tokens_seen += stage.spec.pretraining_tokens
            if not (self.once and stage.id in self.flops_of):
                self._count(stage, own, trial.corpus_of(stage), resources)

    def _count(self, stage: Stage, size: Size, corpus: Corpus, resources: Resources) -> None:
        spec, work = stage.spec, work_of(stage, self.finished)
        self.flops_of[stage.id] = work.flops(size, corpus)
        self.stages[stage.kind] += 1
        num_bytes, largest = spec.memory_bytes(size, resources), self.largest[resources]
        if num_bytes > (largest[stage.kind].num_bytes if stage.kind in largest else 0):
            largest[stage.kind] = Largest(num_bytes, spec, size)
        if resources.gpus_per_worker:
            self.host_bytes[resources] = max(self.host_bytes[resources], spec.host_bytes(size, resources))
        self.state_bytes = max(self.state_bytes, spec.state_bytes(size, resources))
        if spec.expected_rse is not None:  # The plan shows the least sure of all variants.
            self.rse = max(self.rse or 0.0, spec.expected_rse)
        if spec.is_wide(resources):
            self.wide.add(stage.kind)
        if stage.id in self.finished:
            self.done[stage.kind] += 1
            return
        self.flops_to_do[stage.kind] += self.flops_of[stage.id]
        self.tokens += work.pretraining_tokens
        self.tokens_again += work.pretraining_tokens if work is not spec else 0
        self.disk_bytes += spec.disk_bytes(size)


def estimate(
    space: SearchSpace,
    store: Store,
    *,
    mfu: float,
    peak_flops: float,
    gpu_memory: int | None = None,
    choices: tuple[str, ...] = (),
) -> Plan:
    """Expand a sweep and add its stages up.

    Args:
        space: the sweep.
        store: looked at for what is finished, and how long it took.
        mfu: model FLOPs utilization assumed, of `peak_flops` per GPU.
        peak_flops: FLOP/s of one GPU.
        gpu_memory: bytes of one GPU; None if it is not known which.
        choices: what was chosen of its resources, in words.
    """
    search, resources = space.declared.search, space.resources
    has_sizes = len({each.workers for each in resources.every}) > 1
    picked_later = search.name == "optuna"
    # Optuna's points are not known yet, so that the base stands for each.
    base = [space.trial({}, space.declared.seeds[0])] * (search.num_trials or 0) if picked_later else []
    trials = base or list(space.trials())
    finished = store.finished_ids()
    # Where points are picked later, the base's own stages being finished says nothing of them.
    total = _Sum(set() if picked_later else finished, once=not picked_later)
    for trial in trials:
        total.add(trial, resources.of(trial.point))
    # How long a stage of one gang takes in one of another size is not known.
    times = Times() if has_sizes else _seconds(total, store, finished, resources.default)
    flops = float(sum(total.flops_to_do.values()))
    warnings = [*space.warnings]
    memory_bytes: dict[str, int] = {}
    for each, largest in total.largest.items():
        device_bytes = max((stage.num_bytes for stage in largest.values()), default=0)
        # Without GPUs all workers share the machine's memory; see `gpu_warnings` for that of a GPU.
        warnings += machine_warnings(each, total.host_bytes[each] if each.gpus_per_worker else device_bytes)
        warnings += gpu_warnings(each, largest, gpu_memory)
        memory_bytes |= {kind: max(stage.num_bytes, memory_bytes.get(kind, 0)) for kind, stage in largest.items()}
    return Plan(
        name=space.name,
        run=space.run_name(),
        num_variants=len(trials) if picked_later else len({trial.variant_id for trial in trials}),
        num_trials=len(trials),
        stages=dict(total.stages),
        stages_done=dict(total.done),
        num_parameters=(min(total.sizes), max(total.sizes)) if total.sizes else None,
        tokens=total.tokens,
        tokens_seen=total.tokens_seen,
        flops=flops,
        memory_bytes_per_worker=max(memory_bytes.values(), default=0),
        memory_bytes=memory_bytes,
        gpu_memory_bytes=gpu_memory,
        host_bytes_per_worker=max(total.host_bytes.values(), default=0) if resources.default.gpus_per_worker else None,
        gpu_hours=flops / (mfu * peak_flops) / 3600,
        mfu=mfu,
        peak_flops=peak_flops,
        flatness_rse=total.rse,
        disk_bytes=total.disk_bytes,
        state_bytes=total.state_bytes if total.tokens else 0,
        seconds=times.seconds,
        wall_seconds=_wall_seconds(times.seconds, total.wide, resources.default) if times.seconds else None,
        num_measured=times.num_measured,
        columns=space.columns(),
        choices=choices,
        warnings=tuple(dict.fromkeys(warnings)),
        note=_note(
            space, has_sizes=has_sizes, known_sizes=bool(total.sizes), tokens_again=total.tokens_again, times=times
        ),
    )


def _note(space: SearchSpace, *, has_sizes: bool, known_sizes: bool, tokens_again: int, times: Times) -> str:
    notes = []
    if tokens_again:
        notes.append(
            f"{tokens_again:,} tokens are trained once more: of finished runs whose optimizer's state was not kept "
            "(pretrain.leave_optimizer_state); optimizer_state: fresh does without."
        )
    if space.declared.search.name == "optuna":
        notes.append("Optuna picks the points; counted as if each were the base recipe.")
    if (sft := space.declared.sft) and sft.auto_lrs:
        begins = (", ".join(f"{lr:g}" for lr in sft.first_lrs(method)) for method in sorted(sft.auto_lrs))
        rates = "; ".join(dict.fromkeys(begins))
        notes.append(f"sft.lrs auto: counted are the rates it begins with ({rates}), so there are at least so many.")
    if has_sizes:
        notes.append("Gangs have several sizes, so no time is told.")
    if times.of_others:
        notes.append(
            f"Times of {', '.join(times.of_others)} are means over stages of other sweeps in this store, whatever the "
            "size of their models and the length of their work."
        )
    if not known_sizes:
        notes.append("The checkpoints' sizes are not known here, and their FLOPs and bytes not counted.")
    return " ".join(notes)


@dataclass(frozen=True)
class Times:
    """What measured stages say of those to do."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    """Kind -> of all its stages to do."""
    num_measured: int = 0
    """Stages that say so."""
    of_others: tuple[str, ...] = ()
    """Kinds of which other sweeps alone have measured stages."""


def _seconds(total: _Sum, store: Store, finished: set[str], resources: Resources) -> Times:
    """Judged by the stages that the store has measured.

    Finished stages of this sweep tell the seconds of a FLOP, for each kind by itself; where there are none, those of
    other sweeps tell the mean of a stage. Stages of other devices, or wide ones of another number of workers, are no
    guide.
    """
    own: dict[str, list[tuple[float, float]]] = {}
    others: dict[str, list[float]] = {}
    num_read: Counter[str] = Counter()  # Alike or not: of another device there may be any number.
    # Those of this sweep first: a large store is not read to the end.
    for stage_id in sorted(finished, key=lambda stage_id: (stage_id not in total.flops_of, stage_id)):
        kind = stage_id.rsplit("-", 1)[0]
        if num_read[kind] == MAX_MEASURED or total.stages[kind] == total.done[kind]:
            continue
        num_read[kind] += 1
        ran = store.provenance(stage_id)
        if ran is None or not _is_alike(ran, resources, wide=kind in total.wide):
            continue
        if stage_id in total.flops_of:
            own.setdefault(kind, []).append((ran["wall_seconds"], total.flops_of[stage_id]))
        else:
            others.setdefault(kind, []).append(ran["wall_seconds"])
    seconds: dict[str, float] = {}
    for kind in total.stages:
        # By FLOPs where this sweep has measured, as variants differ in size; by the mean where only others have.
        to_do = total.stages[kind] - total.done[kind]
        if kind in own:
            spent, flops = (sum(column) for column in zip(*own[kind], strict=True))
            seconds[kind] = spent / flops * total.flops_to_do[kind] if flops else spent / len(own[kind]) * to_do
        elif kind in others:
            seconds[kind] = sum(others[kind]) / len(others[kind]) * to_do
    num_measured = sum(len(own.get(kind) or others[kind]) for kind in seconds)
    return Times(seconds, num_measured, of_others=tuple(kind for kind in seconds if kind not in own))


def _is_alike(ran: Mapping[str, Any], resources: Resources, *, wide: bool) -> bool:
    device = "cuda" if resources.gpus_per_worker else "cpu"
    return str(ran["device"]).startswith(device) and (not wide or ran["world_size"] == resources.workers)


def _wall_seconds(seconds: Mapping[str, float], wide: set[str], resources: Resources) -> float:
    """A gang works on a wide stage together, and on as many others at once as it has workers."""
    return sum(each if kind in wide else each / resources.workers for kind, each in seconds.items())


def machine_warnings(resources: Resources, memory_bytes: int) -> list[str]:
    """What a gang needs beyond this machine: no fault, where the plan is for a cluster.

    Args:
        resources: of the gang.
        memory_bytes: that each worker takes of the machine's memory.
    """
    if "RAY_ADDRESS" in os.environ:
        return []
    workers = resources.workers
    here = {"CPUs": float(os.cpu_count() or 1), "GPUs": float(num_gpus_here())}
    asked = {"CPUs": workers * resources.cpus_per_worker, "GPUs": workers * resources.gpus_per_worker}
    warnings = [
        f"resources: a gang of {workers} worker(s) takes {num:g} {name}, and this machine has {here[name]:g}: "
        "run it on a cluster (RAY_ADDRESS), or lower resources"
        for name, num in asked.items()
        if num > here[name]
    ]
    memory = host_memory_bytes()
    if asked["GPUs"] <= here["GPUs"] and workers * memory_bytes > memory:
        beside, lower = " beside their GPUs", "resources.workers, or the model's size"
        if not resources.gpus_per_worker:
            beside, lower = "", "sequence_length or batch_sequences, or set resources."
            lower += "micro_batch_sequences or gradient_checkpointing"
        warnings.append(
            f"memory: {workers} worker(s) take about {workers * memory_bytes / 2**30:.1f} GiB{beside} at once, and "
            f"this machine has {memory / 2**30:.1f}: lower {lower}"
        )
    return warnings


def gpu_warnings(resources: Resources, largest: Mapping[str, Largest], gpu_memory: int | None) -> list[str]:
    """What does not fit a GPU of so many bytes, of which a worker may have a part, and the cheapest setting that does.

    Args:
        resources: of a gang.
        largest: kind -> its stage that takes most.
        gpu_memory: bytes; None if they are not known.
    """
    if not resources.gpus_per_worker or gpu_memory is None:
        return []
    has = gpu_memory * min(1.0, resources.gpus_per_worker)
    return [
        f"memory: {kind} takes about {stage.num_bytes / 2**30:.1f} GiB on a GPU, and a worker has {has / 2**30:.1f}: "
        + _advice(stage, resources, has)
        for kind, stage in largest.items()
        if stage.num_bytes > has
    ]


def _advice(stage: Largest, resources: Resources, has: float) -> str:
    if stage.spec.training is None:
        return "take GPUs with more memory, or smaller batches"
    options = Options.beyond(resources, is_wide=stage.spec.is_wide(resources))
    fit = cheapest_fit([Load(stage.spec, stage.size)], options, resources, lambda gang: Memory(has, inf))
    if fit is None:
        return "no micro-batch, ZeRO stage, gradient checkpointing or gang of up to 8 times the workers makes it fit"
    return (
        f"of what fits, {fit.changes(resources)} costs least (resources): about {fit.memory.device / 2**30:.1f} GiB, "
        f"and {fit.cost:.2f}x the GPU time of a whole batch at once"
    )


def num_gpus_here() -> int:
    """GPUs that this process may use."""
    # Not by torch, which takes seconds to import.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len(glob.glob("/dev/nvidia[0-9]*"))
