"""A process of a gang: its device and threads, and the process group that it enters."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from raysweep.errors import ClusterError
from raysweep.resources import Resources
from raysweep.runners.node_tasks import interface_of
from raysweep.worker import Worker, never

logger = logging.getLogger(__name__)


def make_worker(
    resources: Resources,
    *,
    rank: int,
    world_size: int,
    save_asked: Callable[[], bool] = never,
) -> Worker:
    """The worker this process is, with its share of the machine's threads."""
    import torch
    import transformers.models.llama.modeling_llama

    # What is imported now stays: a collection between stages need not walk over it, which takes a quarter second.
    gc.freeze()
    device = "cuda" if resources.gpus_per_worker else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ClusterError(
            f"resources.gpus_per_worker is {resources.gpus_per_worker:g}, but torch finds no GPU here: set it to 0, or "
            "run where there is one"
        )
    transformers.utils.logging.disable_progress_bar()
    if device == "cpu":
        torch.set_num_threads(max(1, int(resources.cpus_per_worker)))
    else:
        device = "cuda:0"  # Ray shows each worker its own GPU alone.
        torch.cuda.set_device(0)
        gpu = torch.cuda.get_device_properties(0)
        stay_near(f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0")  # type: ignore[attr-defined]
    return Worker(
        rank=rank,
        world_size=world_size,
        device=device,
        gpus=resources.gpus_per_worker,
        zero_stage=resources.zero_stage,
        gradient_checkpointing=resources.gradient_checkpointing,
        micro_batch_sequences=resources.micro_batch_sequences,
        compile=resources.compiles,
        save_asked=save_asked,
    )


def stay_near(device: str, *, devices: Path = Path("/sys/bus/pci/devices")) -> None:
    """Run all threads on the processors of a device's NUMA node, as far as this process may; memory is taken there.

    Args:
        device: its address on the PCI bus, such as 0000:dc:00.0.
        devices: where the system describes what is on it.
    """
    try:
        near = _numbers((devices / device / "local_cpulist").read_text()) & os.sched_getaffinity(0)
    except (OSError, ValueError):  # The system does not say, as in some containers.
        return
    if near:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), near)


def _numbers(ranges: str) -> set[int]:
    """Those of "0-2,5"."""
    ends = [each.partition("-") for each in ranges.strip().split(",")]
    return {number for first, _, last in ends for number in range(int(first), int(last or first) + 1)}


LOOPBACK = "127.0.0.1"

# Variables that `join_process_group` has set, as they were: a process that leaves its group may start a gang elsewhere.
_replaced: dict[str, str | None] = {}


def join_process_group(
    worker: Worker,
    resources: Resources,
    address: str,
    port: int,
    *,
    hosts: Sequence[str] = (),
    listener: socket.socket | None = None,
    tell: Callable[[str], None] = logger.info,
) -> None:
    """Make the process group of a gang, once for all its stages. A plain gang of one needs none.

    Ranks are let in without a key, so they listen on one network alone: on loopback if they meet there, else on that
    of their nodes' addresses. By themselves gloo and NCCL would take the interface of the host's name, or any.

    Args:
        worker: this process.
        resources: of the gang.
        address: where rank 0 listens.
        port: the same on every rank.
        hosts: the address of each rank's node; none: all ranks are on one.
        listener: of rank 0, bound there already, so that nobody else takes the port meanwhile.
        tell: takes a line about what is waited for.
    """
    if worker.world_size == 1 and worker.zero_stage == 0:
        return
    import torch.distributed as dist

    if worker.device == "cpu":
        from raysweep.train.deepspeed_ops import load_cpu_operator

        # Here, and not in the first step that needs it: whoever compiles it elsewhere may take minutes.
        load_cpu_operator(tell)
    _restore()  # Of a group that was never left.
    hosts = list(hosts) or [address] * worker.world_size
    variables = environment_of(worker, hosts) | {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    variables |= {k: v for k, v in interfaces_of(address, own=hosts[worker.rank]).items() if k not in os.environ}
    _replaced.update((name, os.environ.get(name)) for name in variables)
    os.environ |= variables
    is_first = worker.rank == 0
    if is_first:
        listener = listener or socket.create_server((address, port))
    meeting = dist.TCPStore(  # type: ignore[attr-defined]
        address,
        port,
        worker.world_size,
        is_master=is_first,
        timeout=dist.default_pg_timeout,
        master_listen_fd=listener.detach() if listener else None,
    )
    backend = "nccl" if worker.device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=meeting, rank=worker.rank, world_size=worker.world_size)


def environment_of(worker: Worker, hosts: Sequence[str]) -> dict[str, str]:
    """A rank's place, as torch's launcher would say it; local ranks count along the ranks of a host.

    >>> environment_of(Worker(rank=2, world_size=3), ["10.0.0.1", "10.0.0.2", "10.0.0.2"])["LOCAL_RANK"]
    '1'
    """
    host = hosts[worker.rank]
    return {
        "RANK": str(worker.rank),
        "WORLD_SIZE": str(worker.world_size),
        # Libraries take it for the number of a GPU, of which Ray shows each process its own alone.
        "LOCAL_RANK": "0" if worker.device.startswith("cuda") else str(hosts[: worker.rank].count(host)),
        "LOCAL_WORLD_SIZE": str(hosts.count(host)),
    }


def interfaces_of(address: str, *, own: str) -> dict[str, str]:
    """What gloo and NCCL are to use, where the user has not said it; nothing where no interface has this address."""
    if address == LOOPBACK:
        return {"GLOO_SOCKET_IFNAME": "lo"}
    name = interface_of(own)
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"} if name else {}


def leave_process_group() -> None:
    """Leave the group that `join_process_group` made, and drop what DeepSpeed keeps of it; nothing if there is none."""
    import torch.distributed as dist

    # A thread of gloo's may still be waiting for the interpreter to let its last tensors go. If the process ends
    # before it has them, it aborts (SIGABRT), its work all done.
    time.sleep(0.1)
    try:
        if "deepspeed" in sys.modules:
            import deepspeed.comm

            if deepspeed.comm.is_initialized():
                deepspeed.comm.destroy_process_group()  # With it goes what DeepSpeed keeps of the group.
        if dist.is_initialized():
            dist.destroy_process_group()
    finally:
        _restore()


def _restore() -> None:
    """The environment as it was before `join_process_group`."""
    for name, value in _replaced.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    _replaced.clear()
