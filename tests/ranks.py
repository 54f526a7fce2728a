"""The ranks of a gang as processes of a test, forked off one that has imported what takes seconds."""

import multiprocessing
from collections.abc import Callable, Sequence

import torch.multiprocessing

# raysweep's own modules are imported by each process, so that it is never another checkout's that is tested.
IMPORTED = [
    "accelerate",
    "deepspeed",
    "networkx",
    "ruamel.yaml",
    "torch.utils.cpp_extension",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
]

forked = multiprocessing.get_context("forkserver")
"""Where its processes come from. Their environment is that of the first one."""
forked.set_forkserver_preload(IMPORTED)


def run_ranks(main: Callable[..., None], given: Sequence[object], num_ranks: int = 2) -> None:
    """Run `main(rank, *given)` in a process for each rank; raises what `torch.multiprocessing.spawn` does."""
    torch.multiprocessing.start_processes(main, tuple(given), nprocs=num_ranks, start_method="forkserver")
