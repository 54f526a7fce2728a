"""How many batches a unit of work has: those of one probe vector, whose fixed cost they share.

A unit of one short sequence leaves a device half idle: a third to two thirds of its time go into making the probe
vector, moving the weights, and what each pass costs beside its tokens. More sequences share that; but they share the
vector's own chance, too, and where a few already make the target, more are wasted. So the first round, of single
batches, tells by its variance which size makes the target at the lowest cost; its units are filled up with further
batches under the same vectors, and nothing of it is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raysweep.curvature.averages import Moments
from raysweep.curvature.cost import UNIT_OVERHEAD_TOKENS, most_batches
from raysweep.curvature.language import Batch
from raysweep.curvature.settings import TraceSettings

# Standard deviation of v'Hv over v on all the text, relative to the trace: what batches under one v have in common.
# 0.05 to 0.08 on a Llama of 1.9 M parameters (sequences of 64 to 256 tokens), 0.03 on one of 4.6 M. A guess is enough:
# near the best size the cost is flat.
COMMON = 0.06


# Of those of the first round: so many units shall be left to tell the error, where a target could be met with fewer,
# larger ones. Intervals of what is measured to a target with 20 units hold the truth in 93 % of runs in place of 95.
FEWEST_UNITS = 2


class Groups:
    """The text in groups of `size` batches.

    Group g begins with batch g, and goes on in steps of the number of groups, so that a group of one can become a
    larger one. What is left over at the end is left out.
    """

    def __init__(self, batches: Sequence[Batch], size: int) -> None:
        self._batches = batches
        self.size = size
        self.num = len(batches) // size

    def of(self, group: int) -> Batch:
        """All its batches, as one."""
        return _joined(self._batches[group : self.num * self.size : self.num])

    def rest(self, group: int) -> Batch:
        """All but its first batch."""
        return _joined(self._batches[group + self.num : self.num * self.size : self.num])


def can_be_joined(batches: Sequence[Batch]) -> bool:
    """Whether all batches have sequences of one length, and the same tensors."""
    shapes = {tuple(sorted((name, rows.shape[1:]) for name, rows in batch.items())) for batch in batches}
    return len(shapes) == 1


def _joined(batches: Sequence[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def cheapest_size(first: Moments, settings: TraceSettings, *, num_batches: int, num_tokens: int, device: str) -> int:
    """The power of two at which the target is expected to cost least; 1 where no size makes it within the budget.

    Args:
        first: of the first round, whose units have one batch each.
        settings: the target, and the budget.
        num_batches: of the text.
        num_tokens: that are read in a batch.
        device: of torch's names.
    """
    goal = (settings.rse * first.hessian) ** 2
    on_gpu = device != "cpu"
    overhead = UNIT_OVERHEAD_TOKENS["cuda" if on_gpu else "cpu"] / num_tokens
    least = FEWEST_UNITS * max(settings.min_units, first.num_probe)
    common = (COMMON * first.hessian) ** 2

    def cost(size: int) -> float:
        """In tokens' worth of batches."""
        variance = common + max(0.0, first.hh - common) / size
        units = max(variance / goal, least) if goal else float("inf")
        if units > settings.max_units or (size > 1 and units * size > num_batches):
            return float("inf")
        # Filling up takes another pass of each unit of the first round.
        return units * (overhead + size) + (first.num_probe * overhead if size > 1 else 0)

    most = most_batches(settings.max_unit_batches, num_tokens=num_tokens, on_gpu=on_gpu)
    return min((1 << power for power in range(most.bit_length())), key=cost)
