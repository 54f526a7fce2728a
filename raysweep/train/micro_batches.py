"""The global batch of a step, cut into micro-batches of each rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from raysweep.devices import OVERHEAD_TOKENS_CPU, OVERHEAD_TOKENS_GPU
from raysweep.objectives.base import IGNORED
from raysweep.train.engines import Batch
from raysweep.worker import Worker


def num_read(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch, without padding."""
    return int(batch["lengths"].sum()) if "lengths" in batch else int(batch["input_ids"].size)


def draws_seed(seed: int, *, step: int, rank: int | None) -> int:
    """Of what a model draws in a step of all trainings before and this one.

    Like a state saved every step, but nothing has to be saved, and earlier stages of the process leave no trace.

    Args:
        seed: of the training.
        step: counted from 0.
        rank: that draws for itself; None: what all of them draw alike.
    """
    key = (1,) if rank is None else ()  # Rank 0 draws otherwise than all together.
    entropy = [seed, step] if rank is None else [seed, step, rank]
    return int(np.random.SeedSequence(entropy, spawn_key=key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def reseed(seed: int, device: str) -> None:
    """`torch.manual_seed` of what is drawn from: the host, and this rank's GPU.

    torch's own keeps a call, with the text of its stack, for each kind of device that was never used: memory that grows
    by the step, and half a step's time of a model of some thousand weights.
    """
    torch.default_generator.manual_seed(seed)
    if device.startswith("cuda"):
        torch.cuda.manual_seed(seed)


class Cutter:
    """Cuts a global batch into this rank's micro-batches, as many on every rank of several."""

    def __init__(self, worker: Worker, *, num_sequences: int) -> None:
        self._worker = worker
        share = -(-num_sequences // worker.world_size)  # Rounded up, as below.
        asked = min(worker.micro_batch_sequences or share, share)
        self.micro_sequences = -(-asked // worker.micro_batch_divisor)
        self.num_micro = -(-share // self.micro_sequences)

    def cut(self, batch: Mapping[str, Any]) -> list[Batch]:
        """This rank's part of a global batch of `Arrays`, or of some of its rows; as many on every rank of several."""
        worker = self._worker
        lengths = batch.get("lengths")
        if lengths is None and worker.world_size * self.num_micro == 1:
            return [self._tensors(batch, slice(None))]  # As it is: nothing is picked, and nothing copied.
        rows = np.arange(len(batch["input_ids"]))
        # Ranks keep rows of all lengths, so that they have as much to do.
        order = rows if lengths is None or worker.world_size > 1 else np.argsort(lengths, kind="stable")
        parts = np.array_split(order, worker.world_size * self.num_micro)
        mine = parts[worker.rank * self.num_micro : (worker.rank + 1) * self.num_micro]
        if lengths is not None and worker.world_size == 1:
            overhead = OVERHEAD_TOKENS_CPU if worker.device == "cpu" else OVERHEAD_TOKENS_GPU
            mine = [group for part in mine for group in _groups(part, lengths, overhead=overhead)]
        return [self._tensors(batch, part) for part in mine]

    def _tensors(self, batch: Mapping[str, Any], rows: Any) -> Batch:
        # A rank without a sequence still takes part: in one that counts for nothing.
        idle = not isinstance(rows, slice) and len(rows) == 0
        rows = np.zeros(1, np.int64) if idle else rows
        lengths = batch.get("lengths")
        width = None if lengths is None else lengths[rows].max()
        tensors = {}
        for name, values in batch.items():
            if name in ("lengths", "domains"):  # Neither is read by a model.
                continue
            # Without `lengths` nothing is cut: an array may have more columns than there are tokens.
            tensor = torch.from_numpy(values[rows, :width] if values.ndim > 1 and lengths is not None else values[rows])
            if idle and name == "labels":
                tensor = torch.full_like(tensor, IGNORED)
            tensors[name] = self._move(tensor)
        return tensors

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        # From pinned memory a GPU fetches it in its own time; from any other, the host waits for all work before it.
        pinned = tensor.pin_memory() if self._worker.device.startswith("cuda") else tensor
        return pinned.to(self._worker.device, non_blocking=True)


def _groups(rows: Any, lengths: Any, *, overhead: int) -> list[Any]:
    """`rows`, by rising length, cut where that is cheapest: a group costs its tokens with padding, and `overhead`."""
    # A group never ends between rows of one length, so only ends of lengths are looked at: as many as lengths differ.
    longest = np.asarray(lengths)[rows].astype(np.int64)
    ends = np.concatenate([[0], np.flatnonzero(np.diff(longest, append=-1)) + 1])
    costs, before = np.zeros(len(ends), np.int64), np.zeros(len(ends), np.int64)
    for at in range(1, len(ends)):
        options = costs[:at] + (ends[at] - ends[:at]) * longest[ends[at] - 1] + overhead
        before[at] = options.argmin()
        costs[at] = options[before[at]]
    groups, at = [], len(ends) - 1
    while at:
        groups.append(rows[ends[before[at]] : ends[at]])
        at = int(before[at])
    return groups[::-1]
