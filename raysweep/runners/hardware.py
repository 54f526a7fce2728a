"""What memory workers have: of the nodes of a cluster, or of this machine; and what `auto` comes to by it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from raysweep.choice import Device, choose
from raysweep.devices import memory_bytes
from raysweep.errors import ClusterError
from raysweep.estimates import num_gpus_here
from raysweep.events import GangsChosen, Note, Report
from raysweep.fitting import GROWTH
from raysweep.resources import AskedResources, ByVariant, Resources
from raysweep.runners.node_tasks import memory_here
from raysweep.runners.room import Shape
from raysweep.runs import Run
from raysweep.variants import SearchSpace

# Of what a driver reports, about what its own context leaves (see `devices`).
USABLE_OF_GPU = 0.93


@dataclass(frozen=True)
class NodeMemory:
    """A node: what of it Ray hands out, and its memory in bytes."""

    free: Mapping[str, float]
    """CPU and GPU, if nobody held any."""
    host: int
    gpus: Sequence[tuple[str, int]]
    """Of each, its name, and memory as its driver has it."""


def this_machine() -> NodeMemory:
    """The machine that this process is on."""
    host, gpus = memory_here()
    return NodeMemory({"CPU": float(os.cpu_count() or 1), "GPU": float(num_gpus_here())}, host, gpus)


def smallest_device(nodes: Sequence[NodeMemory], resources: Resources) -> Device:
    """Of all that a worker may come to, what has least memory for it; beside a GPU, also the node that has least.

    Raises:
        ClusterError: if no node has room for a worker, or tells of the GPUs that it is to have.
    """
    shape = Shape.of(resources)
    rooms = {index: room for index, node in enumerate(nodes) if (room := shape.workers_in(node.free))}
    room = sum(rooms.values())
    if not rooms:
        raise ClusterError(
            f"auto: no node has room for a worker of {resources.cpus_per_worker:g} CPU and "
            f"{resources.gpus_per_worker:g} GPU: lower cpus_per_worker or gpus_per_worker",
            at=("resources",),
        )
    # Of them all, that of which a worker's share is smallest.
    _, host, sharing = min((nodes[index].host / each, nodes[index].host, each) for index, each in rooms.items())
    if resources.gpus_per_worker:
        gpus = [(_usable_bytes(name, total), name) for index in rooms for name, total in nodes[index].gpus]
        if not gpus:
            raise ClusterError(
                "auto: no node with room for a worker tells the memory of its GPUs: is nvidia-smi there? Or say the "
                "settings in numbers, as raysweep plan --gpu NAME chooses them",
                at=("resources",),
            )
        num_bytes, name = min(gpus)
        return Device(name, num_bytes, room, sharing, host)
    return Device("CPU", host, room, sharing)


def _usable_bytes(name: str, total: int) -> int:
    known = memory_bytes(name)
    return min(known, total) if known else int(USABLE_OF_GPU * total)


def gangs_chosen(space: SearchSpace, *, gpu: str | None) -> tuple[SearchSpace, tuple[str, ...]]:
    """A sweep with all of its resources said, for a plan: by a GPU of this name, or else by this machine.

    Returns:
        The sweep, and what was chosen, a line for each choice.

    Raises:
        ClusterError: see `choose`; or if nothing tells which GPU there will be.
    """
    asked = space.declared.resources.by_variant
    if not any(each.autos for each in asked.every):
        return space, ()
    machine = this_machine()

    def look(resources: Resources) -> Device:
        if resources.gpus_per_worker and gpu:
            return Device(gpu, memory_bytes(gpu) or 0, room=max(GROWTH))
        if resources.gpus_per_worker and not machine.gpus:
            raise ClusterError(
                "auto is chosen by the memory of a GPU, and there is none here: name it, as raysweep plan --gpu H100",
                at=("resources",),
            )
        return smallest_device([machine], resources)

    choice = choose(space, asked, look)
    return replace(space, chosen=choice.resources), choice.lines


def with_gangs_chosen(
    space: SearchSpace,
    run: Run,
    nodes: Callable[[], Sequence[NodeMemory]],
    report: Report,
    *,
    asked: ByVariant[AskedResources] | None = None,
) -> SearchSpace:
    """A sweep with all of its resources said; what was left to choose is told, and kept in the run.

    Args:
        space: of the run.
        run: a run that goes on on such devices keeps what it chose.
        nodes: looks at them.
        report: takes events.
        asked: in place of the sweep file's resources.

    Raises:
        ClusterError: see `choose`.
    """
    asked = asked or space.declared.resources.by_variant
    if any(each.autos for each in asked.every):
        choice = choose(space, asked, partial(smallest_device, nodes()), kept=run.gangs())
        run.note_gangs(choice.to_dict())
        for line in choice.lines:
            report(Note(message=line))
        chosen = choice.resources
    else:
        chosen = asked.map(AskedResources.without_autos)
    report(GangsChosen(num_workers=max(each.workers for each in chosen.every)))
    return replace(space, chosen=chosen)
