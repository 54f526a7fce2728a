"""The cheapest setting of a gang that a stage fits a GPU with: micro-batch, ZeRO, gradient checkpointing, gang size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from raysweep.costs import Size
from raysweep.devices import OVERHEAD_TOKENS_GPU
from raysweep.resources import Resources
from raysweep.stages.base import StageSpec

# Time of a step beside one without ZeRO: a Llama of 1B on an H200, one worker (RESULTS.md); ZeRO-3 is not compiled.
ZERO_COST = {0: 1.0, 1: 1.1, 2: 1.1, 3: 2.5}
# A forward pass more: a third of a gradient.
RECOMPUTING_COST = 4 / 3
# Gangs that are thought of, beside the declared one.
GROWTH = (1, 2, 4, 8)

ZeroStage = Literal[0, 1, 2, 3]


@dataclass(frozen=True)
class Fit:
    """A setting that fits. `cost`: time of all GPUs together, beside that of the whole share at once without ZeRO."""

    resources: Resources
    num_bytes: int
    cost: float

    def changes(self, declared: Resources) -> str:
        """What of it differs from what is declared, as a sweep file has it."""
        names = ("workers", "zero_stage", "gradient_checkpointing", "micro_batch_sequences")
        values = {name: getattr(self.resources, name) for name in names}
        return ", ".join(
            f"{name}: {str(value).lower()}" for name, value in values.items() if value != getattr(declared, name)
        )


def cheapest_fit(spec: StageSpec, size: Size, resources: Resources, limit: float) -> Fit | None:
    """The setting that takes the fewest workers, and of these the least time; None if none of those tried fits.

    Args:
        spec: of a stage that trains; of any other None is the answer.
        size: of its model.
        resources: what is declared.
        limit: bytes that a worker has.
    """
    if spec.training_batch is None:
        return None
    fits = [
        Fit(each, num_bytes, cost)
        for each, cost in _settings(spec, resources)
        if (num_bytes := spec.memory_bytes(size, each)) <= limit
    ]
    return min(fits, key=lambda fit: (fit.resources.workers, fit.cost), default=None)


def _settings(spec: StageSpec, resources: Resources) -> Iterator[tuple[Resources, float]]:
    """Each with its cost; a stage that one worker does has no others, and no ZeRO."""
    assert spec.training_batch
    (sequences, length), is_wide = spec.training_batch, spec.is_wide(resources)
    stages: tuple[ZeroStage, ...] = (0, 1, 2, 3) if is_wide else (resources.zero_stage,)
    recomputes = (True,) if resources.gradient_checkpointing else (False, True)
    for growth, stage, recompute in product(GROWTH if is_wide else (1,), stages, recomputes):
        workers = resources.workers * growth
        # One worker has nobody to shard with.
        if (stage == 3 and resources.compile) or (workers == 1 and stage != resources.zero_stage):
            continue
        share = -(-sequences // workers) if is_wide else sequences
        micro = min(resources.micro_batch_sequences or share, share)
        while True:
            changed: dict[str, Any] = {"workers": workers, "zero_stage": stage, "gradient_checkpointing": recompute}
            whole = micro == share and resources.micro_batch_sequences is None
            changed["micro_batch_sequences"] = None if whole else micro
            cost = (1 + OVERHEAD_TOKENS_GPU / (micro * length)) * (RECOMPUTING_COST if recompute else 1)
            yield resources.with_(**changed), cost * ZERO_COST[stage if is_wide else 0]
            if micro == 1:
                break
            micro = -(-micro // 2)
