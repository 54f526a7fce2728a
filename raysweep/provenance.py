"""When, where and with what a stage ran. The only home of time, host and commit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import socket
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from raysweep.worker import Worker

# Those that compute; triton compiles for GPUs, and liger has kernels of its own.
_PACKAGES = ("raysweep", "torch", "transformers", "accelerate", "deepspeed", "ray", "triton", "liger-kernel")


def provenance(*, started: float, finished: float, worker: Worker) -> dict[str, Any]:
    """When, where and with what a stage ran: recorded, never part of an id. `started`, `finished`: seconds of epoch.

    Of the worker, that by which sums are rounded: in which order they are taken, and by whose kernels. Memory is this
    process's most, or this device's most of tensors, since `count_peak_memory_anew`.
    """
    return {
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="milliseconds"),
        "wall_seconds": round(finished - started, 6),
        "peak_memory_bytes": _peak_memory_bytes(worker.device),
        "world_size": worker.world_size,
        "device": worker.device,
        "gpus_per_worker": worker.gpus,
        "zero_stage": worker.zero_stage,
        "micro_batch_sequences": worker.micro_batch_sequences,
        "micro_batch_divisor": worker.micro_batch_divisor,
        "gradient_checkpointing": worker.gradient_checkpointing,
        "compile": worker.compile,
        **_host(),
    }


@cache
def _host() -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"host": socket.gethostname(), "git_commit": _git_commit(), "versions": versions}


def _git_commit() -> str | None:
    """The commit raysweep itself runs from, with `+` if the working tree differs; None outside a checkout."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "."], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def count_peak_memory_anew(device: str) -> None:
    """From now on; what is held counts. Where the system cannot, the peak stays that since the process began."""
    if device.startswith("cuda"):
        import torch

        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # Else there is none to forget.
            torch.cuda.reset_peak_memory_stats(device)
        return
    # Of Linux, proc(5): 5 brings this process's peak down to what it holds.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory_bytes(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    # Not getrusage's, which is no smaller than what its parent held when it started this process.
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
