"""A process of a gang: its device and threads, and the process group that it enters."""

from __future__ import annotations

import gc
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from raysweep.errors import ClusterError
from raysweep.search import Resources
from raysweep.worker import Worker, ignore, never


def make_worker(
    resources: Resources,
    *,
    rank: int,
    world_size: int,
    report: Callable[[Mapping[str, Any]], None] = ignore,
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
    return Worker(
        rank=rank,
        world_size=world_size,
        device=device,
        zero_stage=resources.zero_stage,
        gradient_checkpointing=resources.gradient_checkpointing,
        micro_batch_sequences=resources.micro_batch_sequences,
        compile=resources.compiles,
        report=report,
        save_asked=save_asked,
    )


def join_process_group(worker: Worker, resources: Resources, address: str, port: int) -> None:
    """Make the process group of a gang, once for all its stages. A plain gang of one needs none."""
    if worker.world_size == 1 and worker.zero_stage == 0:
        return
    import torch.distributed as dist

    if worker.device == "cpu":
        from raysweep.train.deepspeed_ops import load_cpu_operator

        # Here, and not in the first step that needs it: whoever compiles it elsewhere may take minutes.
        load_cpu_operator(lambda message: worker.report({"event": "note", "message": message}))
    os.environ |= {
        "RANK": str(worker.rank),
        "WORLD_SIZE": str(worker.world_size),
        "LOCAL_RANK": "0" if worker.device.startswith("cuda") else str(worker.rank),
        "LOCAL_WORLD_SIZE": str(worker.world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    dist.init_process_group("nccl" if worker.device.startswith("cuda") else "gloo")


def leave_process_group() -> None:
    """Leave the group that `join_process_group` made, and drop what DeepSpeed keeps of it; nothing if there is none."""
    import torch.distributed as dist

    # A thread of gloo's may still be waiting for the interpreter to let its last tensors go. If the process ends
    # before it has them, it aborts (SIGABRT), its work all done.
    time.sleep(0.1)
    if "deepspeed" in sys.modules:
        import deepspeed.comm

        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()  # With it goes what DeepSpeed keeps of the group.
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
