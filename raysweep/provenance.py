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


def provenance(*, started: float, finished: float, world_size: int, device: str) -> dict[str, Any]:
    """When, where and with what a stage ran: recorded, never part of an id. `started`, `finished`: seconds of epoch."""
    return {
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="milliseconds"),
        "wall_seconds": round(finished - started, 6),
        "peak_memory_bytes": _peak_memory_bytes(device),
        "world_size": world_size,
        "device": device,
        **_host(),
    }


@cache
def _host() -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in ("raysweep", "torch", "transformers", "accelerate", "deepspeed", "ray"):
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


def _peak_memory_bytes(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
