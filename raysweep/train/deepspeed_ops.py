"""The operator that DeepSpeed communicates with on a CPU: compiled once, whoever else compiles it or died at it.

torch compiles an operator under a file `lock` in its build folder, and waits for ever for that file to go. A process
that is killed as it compiles leaves the file behind, and every later one would wait in silence.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

from raysweep.durable import flock

logger = logging.getLogger(__name__)

# A lock whose owner is not seen may be of another machine or user that shares the folder: then files change in it.
QUIET_SECONDS = 60.0


def load_cpu_operator(tell: Callable[[str], None]) -> None:
    """Have DeepSpeed use the CPU, and load its operator, compiled before if need be; waits for others that compile it.

    To be called before anything imports DeepSpeed, which looks for a GPU then, and takes one that this process shall
    not use.

    Args:
        tell: takes a line for the user: what is waited for, or that a stale lock is removed.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed calls `ninja`, which lies beside the interpreter; it need not be on a user's path.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    folder = extensions_dir() / builder.name
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder.parent)
    with alone(folder, tell), contextlib.redirect_stdout(sys.stderr):
        builder.load(verbose=False)


def extensions_dir() -> Path:
    """Where operators are compiled: in the user's TORCH_EXTENSIONS_DIR, else in a folder of this environment.

    The commands name the environment's own folders, so that two that share one, as torch has it, compile in turns.
    Where several Pythons or torches have one prefix, as in containers that share a home, each has its own, too.
    """
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    prefix = sha256(sys.prefix.encode()).hexdigest()[:12]
    of_environment = f"{sys.implementation.cache_tag}-torch-{torch.__version__}-{prefix}"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path(get_default_build_root(), of_environment)))


@contextlib.contextmanager
def alone(folder: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold a build folder among raysweep's processes, once nobody else compiles in it; a stale `lock` is removed.

    Args:
        folder: where torch compiles an operator.
        tell: takes a line for the user: what is waited for, or that a stale lock is removed.

    Raises:
        StoreError: if its file system has no locks.
    """
    # A lock that the system frees when its holder dies.
    with folder.with_name(f"{folder.name}.raysweep").open("w") as held:
        try:
            flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process compiles in %s", folder)
            flock(held, fcntl.LOCK_EX)
        _wait_for_others(folder, tell)
        yield


def _wait_for_others(folder: Path, tell: Callable[[str], None]) -> None:
    lock, announced = folder / "lock", ""
    while lock.exists():
        users = _users(folder)
        quiet = time.time() - _last_change(folder)
        if users:
            message = f"waiting for process {users[0]}, which compiles an operator: it holds {lock}"
        elif quiet > QUIET_SECONDS:
            tell(f"{lock} was left by a process that died as it compiled: removed")
            lock.unlink(missing_ok=True)
            return
        else:
            message = f"{lock} is held by no process here: removed if nothing changes for {QUIET_SECONDS:.0f} s"
        if message != announced:
            tell(message)
            announced = message
        time.sleep(0.5)


def _last_change(folder: Path) -> float:
    """When a file of a folder was last written, in seconds of the epoch; 0 where there is none."""
    changes = [0.0]
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # The owner finished meanwhile, or its compiler a step.
            changes.append(path.stat().st_mtime)
    return max(changes)


def _users(folder: Path) -> list[int]:
    """Processes of this machine that hold the lock open, as torch does, or run in the folder, as its compiler does.

    The compiler outlives a process that is killed.
    """
    lock, users = str(folder / "lock"), []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # It ended, or is another user's.
            opened = (os.readlink(descriptor) for descriptor in (process / "fd").iterdir())
            if os.readlink(process / "cwd") == str(folder) or lock in opened:
                users.append(int(process.name))
    return users
