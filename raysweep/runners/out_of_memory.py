"""Stages that ran out of memory: told from other failures, counted, and tried again with less.

How often is noted beside a stage's resumable state, where every rank finds it, and the next gang where this one broke.
The stage itself notes it if an allocation was refused; the driver, if Ray has killed a process of the gang; the next
try, if the kernel has.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections import defaultdict
from collections.abc import Container, Iterator
from pathlib import Path

from raysweep.events import Event, StageEnded, StageFailed, StageStarted
from raysweep.plan import Trial
from raysweep.store import Store
from raysweep.worker import StateDir

# Of CUDA and cuBLAS, of torch's allocator on a CPU, and of the C++ library.
_WORDS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "std::bad_alloc")
_NOTE = "out-of-memory-"

# Of Ray, of a process that its memory monitor has killed.
_KILLED = "killed due to the node running low on memory"

# Of a try that is under way on this host, with its kernel and how often that had killed by then: it stays where the
# process is killed.
_BEGUN = "begun-"

TRIED_WITH_LESS = "if tried again, it trains in smaller micro-batches, or recomputes activations"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it, or what it was raised from, is a device's or the machine's lack of memory."""
    # By name, as torch need not be imported.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"OutOfMemoryError", "MemoryError"} or any(word in str(error) for word in _WORDS):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and is_out_of_memory(cause)


def is_killed_for_memory(cause: str) -> bool:
    """Whether a gang was lost as Ray has killed a process of it before its node ran out of memory."""
    return _KILLED in cause


class AtWork:
    """The stages that each trial has in work, or in a batch of which some are, from the events of a run."""

    def __init__(self) -> None:
        self._stages: defaultdict[str, set[str]] = defaultdict(set)

    def take(self, event: Event) -> None:
        """Take one event of the run."""
        match event:
            case StageStarted():
                self._stages[event.trial].add(event.stage)
            case StageEnded() | StageFailed(retry=False):
                self._stages[event.trial].discard(event.stage)

    def note_out_of_memory(self, trial: Trial, store: Store, *, among: Container[str] | None = None) -> bool:
        """Have the next tries of those of a trial take less, or of some of them. False if there are none."""
        keys = {stage.id: stage.state_key for stage in trial.stages}
        at_work = tuple(stage for stage in self._stages[trial.id] if among is None or stage in among)
        for stage in at_work:
            states = store.state_dir(keys.get(stage) or stage)
            note_out_of_memory(states, times_out_of_memory(states))
        return bool(at_work)


def times_out_of_memory(states: StateDir) -> int:
    """How often stages of this state have run out of memory."""
    numbers = [name.removeprefix(_NOTE) for name in states.names() if name.startswith(_NOTE)]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def note_out_of_memory(states: StateDir, times: int) -> None:
    """Count one more than `times`, the number at the beginning of this try; every rank that ran out may say so."""
    name = f"{_NOTE}{times + 1}"
    (states.path / name).touch()
    states.send(name)


@contextlib.contextmanager
def under_way_in(states: StateDir, *, rank: int, times: int) -> Iterator[None]:
    """While in it, a file on this host says so; see `note_kills`. `times`: the number at the beginning of this try."""
    kernel, num_kills = _kills()
    begun = states.path / f"{_BEGUN}{rank}-{times}-{num_kills}-{kernel}"
    with contextlib.suppress(OSError):  # A full disk: whether the stage needs room is not for this to say.
        begun.touch()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            begun.unlink()


def note_kills(states: StateDir) -> bool:
    """Before any rank begins: note if the kernel has killed for lack of memory on this host in a try that never ended.

    It does not say whom it killed; at worst the next try takes less without need.
    """
    kernel, num_kills = _kills()
    is_killed = False
    for path in states.path.glob(f"{_BEGUN}*-{kernel}"):
        _, times, num_before, _ = path.name.removeprefix(_BEGUN).split("-", 3)
        if num_kills > int(num_before):
            note_out_of_memory(states, int(times))
            is_killed = True
        path.unlink(missing_ok=True)  # Another rank may be at it.
    return is_killed


def _kills() -> tuple[str, int]:
    """Which kernel this is, since it was started, and how many processes it has killed as memory ran out."""
    try:
        counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), int(counts["oom_kill"])
    except (OSError, KeyError):  # Linux alone counts them.
        return "none", 0


def release() -> None:
    """Give freed memory back: of a GPU, in whose pieces a smaller micro-batch may not fit, and of the heap."""
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
