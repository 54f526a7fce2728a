"""The ranks of a gang as processes of a test, forked off one that has imported what takes seconds."""

import multiprocessing
from collections.abc import Callable, Sequence

import torch.multiprocessing

import raysweep

IMPORTED = [
    "accelerate",
    "deepspeed",
    "raysweep.runners.gang",
    "raysweep.train.loop",
    "torch.utils.cpp_extension",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
]

forked = multiprocessing.get_context("forkserver")
"""Where its processes come from. Their environment is that of the first one."""
forked.set_forkserver_preload(IMPORTED)


def run_ranks(main: Callable[..., None], given: Sequence[object], num_ranks: int = 2) -> None:
    """Run `main(rank, *given)` in a process for each rank; raises what `torch.multiprocessing.spawn` does."""
    torch.multiprocessing.start_processes(
        _rank, (raysweep.__file__, main, *given), nprocs=num_ranks, start_method="forkserver"
    )


def _rank(rank: int, tested: str, main: Callable[..., None], *given: object) -> None:
    # The one that was forked looks for it in its own folder first, then as any process does.
    assert raysweep.__file__ == tested, "run the tests from their root"
    main(rank, *given)
