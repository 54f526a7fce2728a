"""Stages that ran out of memory: told from other failures, counted, and tried again with less.

How often is noted beside a stage's resumable state, where every rank finds it, and the next gang where this one broke.
"""

from __future__ import annotations

import ctypes
import sys

from raysweep.worker import StateDir

# Of CUDA and cuBLAS, of torch's allocator on a CPU, and of the C++ library.
_WORDS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "std::bad_alloc")
_NOTE = "out-of-memory-"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it, or what it was raised from, is a device's or the machine's lack of memory."""
    # By name, as torch need not be imported.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"OutOfMemoryError", "MemoryError"} or any(word in str(error) for word in _WORDS):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and is_out_of_memory(cause)


def times_out_of_memory(states: StateDir) -> int:
    """How often stages of this state have run out of memory."""
    numbers = [name.removeprefix(_NOTE) for name in states.names() if name.startswith(_NOTE)]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def note_out_of_memory(states: StateDir, times: int) -> None:
    """Count one more than `times`, the number at the beginning of this try; every rank that ran out may say so."""
    name = f"{_NOTE}{times + 1}"
    (states.path / name).touch()
    states.send(name)


def release() -> None:
    """Give freed memory back: of a GPU, in whose pieces a smaller micro-batch may not fit, and of the heap."""
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
