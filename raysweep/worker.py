"""What a stage knows of the process it runs in: its place in the gang, its device, and how to reach the others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Reached:
    """How far a stage has come."""

    step: int
    """Optimizer steps of training, or pieces of a measurement."""
    loss: float | None = None
    """Of training, in nats per token of the objective's loss."""
    num_tokens: int | None = None
    """Trained on since this try began."""
    tokens_per_second: float | None = None
    saved_step: int | None = None
    """The step whose state has just been saved."""


def ignore(event: object) -> None:
    """Drop what is told: the `report` of a worker whose progress nobody follows."""


def never() -> bool:
    """False: the `save_asked` of a worker that is never asked to save early."""
    return False


class StateDir:
    """A folder for resumable state, that all ranks see and that outlives a killed gang.

    Where the ranks' hosts share no folder, `remote_state.RemoteStateDir` brings files to where the store is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        """Of the folder on this host, in which files are written."""

    def names(self) -> set[str]:
        """Of files and folders directly in it, whatever host has written them."""
        return set(os.listdir(self.path)) if self.path.is_dir() else set()

    def send(self, name: str) -> None:
        """Let all hosts have a file that was written here; a folder's last one says that it is whole."""

    def read(self, name: str) -> str:
        """The content of a file, in UTF-8, whatever host has written it. Raises OSError if there is none."""
        return (self.path / name).read_text()

    def fetch(self, name: str, digests: str) -> Path:
        """A folder, with all its files on this host.

        Args:
            name: of the folder.
            digests: the name of its last file: JSON, name -> SHA-256 of every other one.

        Raises:
            OSError, ValueError: if a file is missing, or another than was sent.
        """
        return self.path / name

    def remove(self, name: str) -> None:
        """Delete a file or folder for all hosts; done by one rank."""
        path = self.path / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def drop_copies(self, *, but: str) -> None:
        """Delete what lies on this host alone, but for the folder `but`; done by all ranks."""


@dataclass(frozen=True)
class Worker:
    """One process of a gang. The process group (nccl or gloo) is made before any stage runs.

    None of this may change a result, but for how its sums are rounded: it says where and how fast, never what.
    """

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    gpus: float = 0.0
    """That it takes; a part of one, where several workers share it."""
    zero_stage: int = 0
    gradient_checkpointing: bool = False
    micro_batch_sequences: int | None = None
    """Sequences per forward pass; None: as many as the rank's share of the global batch."""
    micro_batch_divisor: int = 1
    """What these are divided by, where a stage has run out of memory; at least one sequence remains."""
    compile: bool = False
    """Whether a model's blocks are compiled for training, where all batches have one shape."""
    state_dir: StateDir | None = None
    """None: nothing is saved midway."""
    report: Callable[[Reached], None] = field(default=ignore, compare=False)
    """Is told how far the stage is."""
    save_asked: Callable[[], bool] = field(default=never, compare=False)
    """Whether the run is about to end, so that training should save its state now; rank 0's answer counts."""

    def alone(self) -> Worker:
        """The same process as a gang of one, for a split stage."""
        return replace(self, rank=0, world_size=1, zero_stage=0)

    def saving_memory(self, times: int) -> Worker:
        """The same process for a stage that has run out of memory so often: each time with less.

        Micro-batches are halved, then activations are recomputed, then micro-batches are halved again and again.
        """
        has_halves = self.micro_batch_sequences != 1
        recomputes = times > (1 if has_halves else 0)
        return replace(
            self,
            micro_batch_divisor=2 ** (times - (1 if recomputes and not self.gradient_checkpointing else 0)),
            gradient_checkpointing=self.gradient_checkpointing or recomputes,
        )

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
