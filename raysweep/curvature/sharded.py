"""Traces of a model that is sharded by ZeRO-3: each worker moves its own part of the weights, none holds all of them.

DeepSpeed gathers a layer's weights from the shards when the layer is run and lets go of them afterwards, so moving the
shards moves the model. All workers run the same unit at once, each on its own sequences of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from raysweep.curvature.language import Batch
from raysweep.curvature.operators import Shifted
from raysweep.curvature.probes import Distribution, Tensors, key, probe_part
from raysweep.curvature.sharing import Item


class Shards(Shifted):
    """This worker's shards of the parameters that require a gradient, as `Shifted`.

    Args:
        model: partitioned by DeepSpeed's ZeRO-3, no parameter kept whole.
        rank: of this worker.
        gather: every worker's number, on every worker.
    """

    def __init__(self, model: Any, *, rank: int, gather: Callable[[float], Sequence[float]]) -> None:
        sharded = {name: part for name, part in model.named_parameters() if part.requires_grad}
        self._sizes = {name: int(part.ds_numel) for name, part in sharded.items()}
        shards = {name: part.ds_tensor.detach() for name, part in sharded.items()}
        self._starts = {name: rank * shard.numel() for name, shard in shards.items()}
        self._gather = gather
        super().__init__(shards, math.nan)

    @property
    def rms(self) -> float:
        """Of all shards; every worker has to ask for it."""
        # The end of the last shard is no part of any parameter.
        squares = math.fsum(
            float(shard[: max(0, self._sizes[name] - self._starts[name])].double().square().sum())
            for name, shard in self._home.items()
        )
        return math.sqrt(math.fsum(self._gather(squares)) / sum(self._sizes.values()))

    def probe(self, *, seed: int, probe: int, distribution: Distribution = "rademacher") -> Tensors:
        """This worker's part of the vector that a whole model would get."""
        return {
            name: probe_part(
                key(seed, probe, name),
                self._sizes[name],
                like=shard,
                distribution=distribution,
                start=self._starts[name],
            )
            for name, shard in self._parameters.items()
        }


def rows_of(batch: Batch, *, rank: int, world_size: int) -> tuple[Batch, bool]:
    """A worker's sequences of a batch, and whether there are any; if not, one that must not be counted.

    All have to run the model as often, as each layer is gathered from all.
    """
    num = len(batch["input_ids"])
    mine = torch.arange(num)[rank::world_size]
    chosen = mine if len(mine) else torch.zeros(1, dtype=torch.int64)
    return {name: rows[chosen.to(rows.device)] for name, rows in batch.items()} | {"row": chosen}, bool(len(mine))


class Together:
    """A `Share` whose pieces are run by all workers at once, and are sums over what each has."""

    def __init__(self, gather: Callable[[Any], Sequence[Any]], *, counts: Callable[[Any], bool]) -> None:
        self._gather, self._counts = gather, counts

    def __call__(self, items: Sequence[Item], run: Callable[[Item], Any]) -> list[Any]:
        """See `sharing.Share`."""
        found = []
        for item in items:
            mine: Mapping[str, float] = run(item)
            parts = self._gather(mine if self._counts(item) else dict.fromkeys(mine, 0.0))
            found.append({name: math.fsum(part[name] for part in parts) for name in mine})
        return found
