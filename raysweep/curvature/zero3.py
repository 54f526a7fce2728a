"""Traces of a model that is sharded by ZeRO-3: each worker moves its own part of the weights, none holds all of them.

DeepSpeed gathers a layer's weights from the shards when the layer is run and lets go of them afterwards, so moving the
shards moves the model. All workers run the same unit at once, each on its own sequences of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from raysweep.curvature.dealing import Item
from raysweep.curvature.language import IGNORED, Batch
from raysweep.curvature.operators import MovableParameters, every_one, refuse_infinite
from raysweep.curvature.probes import Tensors, key, probe_part
from raysweep.curvature.settings import Distribution


class MovableShards(MovableParameters):
    """This worker's shards of the parameters that require a gradient, as `MovableParameters`.

    Args:
        model: partitioned by DeepSpeed's ZeRO-3, no parameter kept whole.
        rank: of this worker.
        gather: every worker's number, on every worker.
        reduce: the sum of all workers' tensors, on every worker.
        release: lets go of weights that are still gathered.
    """

    def __init__(
        self,
        model: Any,
        *,
        rank: int,
        gather: Callable[[float], Sequence[float]],
        reduce: Callable[[torch.Tensor], torch.Tensor],
        release: Callable[[], None],
    ) -> None:
        sharded = {name: part for name, part in model.named_parameters() if part.requires_grad}
        self._whole, self._reduce, self._release = sharded, reduce, release
        self._sizes = {name: int(part.ds_numel) for name, part in sharded.items()}
        # Not an alias of it: DeepSpeed reads the tensor itself, whose data are exchanged.
        shards = {name: part.ds_tensor for name, part in sharded.items()}
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

    def gradients(self, loss: torch.Tensor) -> Tensors:
        """This worker's shard of the gradient of the sum of all workers' losses; of one parameter after another.

        Raises:
            ValueError: if the loss is not finite, or a parameter takes no part in it.
        """
        refuse_infinite(loss)
        found: Tensors = {}

        def take(name: str, parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            shard, start = self._parameters[name], self._starts[name]
            part = self._reduce(parameter.grad.flatten())[start : start + shard.numel()]
            # The last shard is filled up to the size of the others.
            found[name] = F.pad(part, (0, shard.numel() - part.numel()))
            parameter.grad = None

        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(take, name)) for name, parameter in self._whole.items()
        ]
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        finally:
            for hook in hooks:
                hook.remove()
            self._release()  # What is left gathered (an embedding) would not move with its shards.
        return dict(zip(self._whole, every_one([found.get(name) for name in self._whole], self._whole), strict=True))

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


def rows_of(batch: Batch, *, rank: int, world_size: int) -> Batch:
    """A worker's sequences of a batch; where there are none left for it, one of which nothing is predicted.

    All have to run the model as often, as each layer is gathered from all.
    """
    mine = torch.arange(len(batch["input_ids"]))[rank::world_size]
    if len(mine):
        return {name: rows[mine.to(rows.device)] for name, rows in batch.items()} | {"row": mine}
    idle = {name: rows[:1] for name, rows in batch.items()}
    return idle | {"labels": torch.full_like(idle["input_ids"], IGNORED), "row": torch.zeros(1, dtype=torch.int64)}


class SummedDeal:
    """A `Deal` whose pieces are run by all workers at once; values are sums over what each has."""

    def __init__(self, gather: Callable[[Any], Sequence[Any]]) -> None:
        self._gather = gather

    def __call__(self, items: Sequence[Item], run: Callable[[Item], Any]) -> list[Any]:
        """See `dealing.Deal`; every worker has to call it with the same items."""
        found = []
        for item in items:
            mine: Mapping[str, float] = run(item)
            parts = self._gather(mine)
            found.append({name: math.fsum(part[name] for part in parts) for name in mine})
        return found
