"""Whether this machine can run a sweep (versions, devices, compiler, store), and whether a cluster can."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
import sys
from collections.abc import Iterator

from raysweep.errors import ClusterError, first_line
from raysweep.estimates import ToWrite
from raysweep.runners.node_facts import GIB, MIN_SHARED_MEMORY_BYTES, Check
from raysweep.runners.node_tasks import store_disk
from raysweep.store import Store

logger = logging.getLogger(__name__)


def checks(store: Store, to_write: ToWrite | None = None) -> Iterator[Check]:
    """All findings, in an order of what needs what, as they are made: where all is new, one may take a minute.

    Args:
        store: that is to be written.
        to_write: what this machine is to have room for; None: it is not known.
    """
    for name, look in (
        ("python", _python),
        ("packages", _packages),
        ("torch", _torch),
        ("compiler", _compiler),
        ("deepspeed", _deepspeed),
        ("shared memory", _shared_memory),
        ("store", lambda: _store(store, to_write)),
    ):
        try:
            yield Check(name, *look())
        except Exception as error:  # A broken installation is what is looked for.
            yield Check(name, False, f"{type(error).__name__}: {error}")


def cluster_checks(store: Store, to_write: ToWrite | None = None) -> list[Check]:
    """All findings on the cluster of RAY_ADDRESS; takes a GPU of each node for some seconds, where there are any.

    Args: as of `checks`, for each of its nodes.
    """
    from raysweep.runners.cluster_checks import bandwidth, quick_checks
    from raysweep.runners.ray_cluster import connect

    try:
        connect()
        return [*quick_checks(store, to_write), bandwidth()]
    except ClusterError as error:
        return [Check("cluster", False, str(error))]


Verdict = tuple[bool, str]


def _python() -> Verdict:
    version = ".".join(map(str, sys.version_info[:3]))
    return (3, 11) <= sys.version_info[:2] <= (3, 13), f"{version}; 3.11 to 3.13 are supported"


def _packages() -> Verdict:
    names = ("ray", "transformers", "accelerate", "deepspeed", "optuna", "pandas")
    return True, ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def _torch() -> Verdict:
    import torch

    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return True, f"{torch.__version__}; {len(gpus)} GPU(s): {', '.join(gpus)}"
    return True, f"{torch.__version__}; no GPU, {os.cpu_count()} CPUs: gloo and fp32"


def _compiler() -> Verdict:
    missing = [name for name in ("ninja", "gcc", "g++") if shutil.which(name) is None]
    if missing:
        return False, f"{', '.join(missing)} not found: DeepSpeed compiles an operator at first use; install them"
    import torch

    if not torch.cuda.is_available():
        return True, "ninja, gcc, g++"
    try:
        # As a first training step does: kernels are built with a C compiler, and their callers with Python's headers.
        torch.compile(torch.square)(torch.ones(2, device="cuda"))
    except Exception as error:
        return (
            False,
            f"torch cannot compile for GPUs ({first_line(error)}): mend that, or set resources.compile to false",
        )
    return True, "ninja, gcc, g++; torch compiles for GPUs"


def _deepspeed() -> Verdict:
    import torch

    if torch.cuda.is_available():
        return True, "on GPUs nothing is compiled for ZeRO"
    from raysweep.train.deepspeed_ops import load_cpu_operator

    # Compiled here once, and kept, rather than in front of the first training step.
    load_cpu_operator(logger.warning)
    return True, "its CPU communication operator compiles and loads"


def _shared_memory() -> Verdict:
    free = shutil.disk_usage("/dev/shm").free
    is_enough = free >= MIN_SHARED_MEMORY_BYTES
    return is_enough, f"{free / GIB:.1f} GiB free in /dev/shm" + ("" if is_enough else ": Ray wants 1 GiB or more")


def _store(store: Store, to_write: ToWrite | None) -> Verdict:
    store.check_writable()
    folder, free = store_disk(store.url)
    if to_write and (lack := to_write.lack(store, folder, free)):
        return False, lack
    can = "can be written" if store.is_local else f"can be written and read; what is at hand of it is in {folder}"
    return True, f"{store.url}: {can}; {free / GIB:.1f} GiB free"
