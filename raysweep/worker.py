"""What a stage knows of the process it runs in: its place in the gang, its device, and how to reach the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


def ignore(event: Mapping[str, Any]) -> None:
    """Drop a progress event: the `report` of a worker whose progress nobody follows."""


def never() -> bool:
    """False: the `save_asked` of a worker that is never asked to save early."""
    return False


@dataclass(frozen=True)
class Worker:
    """One process of a gang. The process group (nccl or gloo) is made before any stage runs.

    None of this may change a result, but for how its sums are rounded: it says where and how fast, never what.
    """

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    zero_stage: int = 0
    gradient_checkpointing: bool = False
    micro_batch_sequences: int | None = None
    """Sequences per forward pass; None: as many as the rank's share of the global batch."""
    compile: bool = False
    """Whether a model's blocks are compiled for training, where all batches have one shape."""
    state_dir: Path | None = None
    """Folder for resumable state, seen by all ranks, that outlives a killed gang. None: nothing is saved midway."""
    report: Callable[[Mapping[str, Any]], None] = field(default=ignore, compare=False)
    """Sink for progress events; a plain dict such as {"step": 40, "loss": 3.1, "num_tokens": 65536}."""
    save_asked: Callable[[], bool] = field(default=never, compare=False)
    """Whether the run is about to end, so that training should save its state now; rank 0's answer counts."""

    def alone(self) -> Worker:
        """The same process as a gang of one, for a split stage."""
        return replace(self, rank=0, world_size=1, zero_stage=0)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (any picklable object), in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: Any) -> Any:
        """The sum of every rank's `tensor`, on every rank; in place."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait until every rank has come here; at once in a gang of one."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.barrier()
