"""Where the weights of a model lie in the flat float32 partitions that the ranks step under DeepSpeed's ZeRO.

ZeRO 1 and 2 lay the weights of a group in a row and give each rank an equal part of it: most weights lie whole within
one part, and few are cut. ZeRO-3 cuts every weight over all ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Piece:
    """This rank's part of a weight; it may be nothing.

    `start` is its first element in the weight, in a row; `offset` is its first in the rank's partition `master`.
    """

    master: torch.Tensor
    shape: torch.Size
    start: int
    offset: int
    numel: int
    is_cut: bool
    """Whether more ranks than one hold parts of the weight; the same on all of them."""

    def place(self, *flats: torch.Tensor) -> torch.Tensor:
        """Of each of `flats`, laid out like `master`, this part in its place, among zeros: [len(flats), *shape].

        >>> partition = torch.tensor([5.0, 6.0, 7.0])  # Begins with the last two elements of a 2 x 2 weight.
        >>> Piece(partition, torch.Size([2, 2]), start=2, offset=0, numel=2, is_cut=True).place(partition)
        tensor([[[0., 0.],
                 [5., 6.]]])
        """
        rows = flats[0].new_zeros(len(flats), self.shape.numel())
        for row, flat in zip(rows, flats, strict=True):
            row[self.start : self.start + self.numel] = self.own(flat)
        return rows.view(-1, *self.shape)

    def join(self, *flats: torch.Tensor) -> torch.Tensor:
        """The parts of all ranks in one: [len(flats), *shape], to the bit. To be called by every rank."""
        rows = self.place(*flats)
        # Each element comes from one rank, the others add zeros: sums are exact.
        dist.all_reduce(rows)
        return rows

    def take(self, whole: torch.Tensor, flat: torch.Tensor) -> None:
        """Write this rank's part of `whole`, [*shape], to `flat`."""
        self.own(flat).copy_(whole.flatten()[self.start : self.start + self.numel])

    def own(self, flat: torch.Tensor) -> torch.Tensor:
        """A view of this part in `flat`, which is laid out like `master`: [numel]."""
        return flat.detach()[self.offset : self.offset + self.numel]


class PartitionedOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer that steps more than single elements of a weight, so that it has to know where weights lie."""

    @abstractmethod
    def partition(self, pieces: Mapping[torch.Tensor, Piece]) -> None:
        """From now on the groups hold partitions, not weights.

        Args:
            pieces: each weight that a group held -> where it lies in this rank's partition; see `pieces_of`.
        """


def masters_of(optimizer: Any) -> list[torch.Tensor]:
    """The float32 tensors that this rank steps: its partitions, or without ZeRO the weights, in the groups' order.

    Args:
        optimizer: DeepSpeed's own, which wraps the one that was given to it.
    """
    # ZeRO 3; 1 and 2; 1 in bfloat16.
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if masters := getattr(optimizer, name, None):
            return list(masters)
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def pieces_of(optimizer: Any, weights: Iterable[torch.nn.Parameter]) -> list[Piece]:
    """The pieces of `weights`, in their order. To be called by every rank.

    Args:
        optimizer: see `masters_of`; of a ZeRO stage above 0.
        weights: some of the model's.
    """
    masters = masters_of(optimizer)
    places = [_place(optimizer, weight) for weight in weights]
    # Whoever holds nothing of a weight does not know by itself where it lies, nor whether others hold it whole.
    known = torch.tensor([[index, numel] for index, _, _, _, numel in places], device=masters[0].device)
    dist.all_reduce(known, op=dist.ReduceOp.MAX)
    return [
        Piece(masters[index], shape, start, offset, numel, is_cut=most < shape.numel())
        for (_, shape, start, offset, numel), (index, most) in zip(places, known.tolist(), strict=True)
    ]


def _place(optimizer: Any, weight: Any) -> tuple[int, torch.Size, int, int, int]:
    """Index of the master; shape, start, offset and numel of the piece."""
    if hasattr(weight, "ds_id"):  # ZeRO-3
        index, offset, size = optimizer.grad_position[optimizer.get_param_id(weight)]
        start = min(dist.get_rank() * size, weight.ds_numel)  # The last partitions may be padding alone.
        return index, weight.ds_shape, start, offset, min(size, weight.ds_numel - start)
    mapping = weight._hp_mapping
    if mapping is None:
        return -1, weight.shape, 0, 0, 0
    ours, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return mapping.param_group_index, weight.shape, ours.start, there.start, ours.numel
