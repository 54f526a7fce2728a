"""Sensitivity of a checkpoint to noise on its weights: how much the loss that it was trained by rises."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field, field_validator

from raysweep.costs import Size
from raysweep.data.corpora import Corpus
from raysweep.objectives.families import Objective
from raysweep.resources import Resources
from raysweep.spec import Metric
from raysweep.stages.base import StageSpec, Subject
from raysweep.stages.dealing import RankDeal
from raysweep.stages.held_text import HeldText
from raysweep.train.checkpoints import load_model
from raysweep.train.evaluate import BATCH
from raysweep.worker import Worker

if TYPE_CHECKING:
    from raysweep.curvature.probes import Tensors
    from raysweep.curvature.sensitivity import NoiseScale

PIECES = 16
"""Of the text, by whose differences its chance is told; of few sequences each is a piece."""


class Noise(StageSpec):
    """Mean rise of the loss on held-out text under normal noise on all weights (Springer et al., 2025, 2503.19206).

    Each draw is taken both ways, w + e and w - e, which cancels the slope and leaves the mean as it is. Sequences, what
    the objective draws on them, and the directions of the noise are the same for all models of one shape, so that of
    the difference of two models much less is chance than of either value. Errors hold the chance of noise and of text.

    Small noise rises by half its variance times the trace; larger noise sees beyond the second order. Relative to the
    weights' own size, it does not change where a matrix is scaled and the next one scales back.
    """

    kind: ClassVar[str] = "noise"
    reads_text: ClassVar[bool] = True
    of_weights: ClassVar[bool] = True
    filled: ClassVar[frozenset[str]] = frozenset({"text"})

    num_sequences: int = Field(default=256, ge=2)
    """Held-out sequences, each domain's share by its mix; fewer where a domain has not its share."""
    num_draws: int = Field(default=8, ge=2)
    """Of noise, at each of its sizes; two losses each."""
    absolute: tuple[float, ...] = (3e-3, 1e-2)
    """Standard deviations of the noise on every weight."""
    per_tensor: tuple[float, ...] = (0.03, 0.1)
    """The same as parts of the root mean square of each parameter's entries."""
    per_row: tuple[float, ...] = ()
    """The same as parts of that of each row of a matrix."""
    seed: int = Field(default=0, ge=0)
    """Of the noise."""
    text: HeldText | None = None
    """Filled from pretrain."""

    @field_validator("absolute", "per_tensor", "per_row")
    @classmethod
    def _distinct(cls, sizes: tuple[float, ...]) -> tuple[float, ...]:
        if len({f"{size:g}" for size in sizes}) != len(sizes) or min(sizes, default=1.0) <= 0:
            raise ValueError(f"{list(sizes)}: give different standard deviations, all above 0")
        return sizes

    def bind(self, subject: Subject) -> Noise:
        """With the text and the objective."""
        return self.with_(text=HeldText.of(subject))  # type: ignore[no-any-return]

    @property
    def loss_of(self) -> Objective | None:
        """What the model was trained by."""
        return self.text.loss if self.text else None

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """A rise and its error for each size of the noise, in nats per predicted token; NaN where a loss is no number.

        Draws are dealt over ranks, each whole on one; what is finished is not done again.
        """
        from raysweep.curvature.language import prepare
        from raysweep.curvature.operators import MovableParameters, named_parameters
        from raysweep.curvature.probes import probe_vector
        from raysweep.curvature.sensitivity import crossed_mean, noise_vector
        from raysweep.train.evaluate import heldout

        assert self.text
        loss = self.text.loss
        model = load_model(inputs["checkpoint"]).to(worker.device)
        prepare(model, twice_differentiable=False)
        rows = self.text.rows(inputs["tokens"], inputs["checkpoint"], num_sequences=self.num_sequences)
        piece = min(BATCH, max(1, len(rows["input_ids"]) // PIECES))
        before = heldout(model, rows, loss, batch_size=piece)
        parameters = named_parameters(model)
        movable = MovableParameters(parameters, 1.0)

        @lru_cache(maxsize=1)  # Of millions of numbers it takes longer than the losses: once for all sizes.
        def normal(draw: int) -> Tensors:
            return probe_vector(parameters, seed=self.seed, probe=draw, distribution="gaussian")

        def rise(item: tuple[NoiseScale, float, int]) -> list[float]:
            scale, size, draw = item
            vector = noise_vector(model, scale, normal(draw))
            both = []
            with movable.moves() as move:
                for way in (size, -size):
                    move(vector, way)
                    both.append(heldout(model, rows, loss, batch_size=piece).losses - before.losses)
            return list(map(float, np.mean(both, axis=0)))

        # So that ranks, to whom items are dealt in turns, keep to a draw for all sizes.
        ranks = worker.world_size
        items = [
            (*each, draw)
            for first in range(0, self.num_draws, ranks)
            for each in self._sizes()
            for draw in range(first, min(first + ranks, self.num_draws))
        ]
        rises = dict(zip(items, RankDeal(worker, "draws")(items, rise), strict=True))
        metrics = {}
        for scale, size in self._sizes():
            of_draws = np.array([rises[scale, size, draw] for draw in range(self.num_draws)])
            estimate = crossed_mean(np.where(np.isfinite(of_draws), of_draws, np.nan), before.num_predicted)
            metrics[_name(scale, size)] = estimate.mean
            metrics[f"{_name(scale, size)}_stderr"] = estimate.stderr
        return metrics

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """A rise and its error for each size of the noise."""
        return tuple(
            metric
            for each in self._sizes()
            for metric in (
                Metric(_name(*each), "min", "nats/token"),
                Metric(f"{_name(*each)}_stderr", unit="nats/token"),
            )
        )

    def flops(self, size: Size, corpus: Corpus) -> float:
        """Forward passes: two of each draw, and one without noise."""
        assert self.text
        num = 1 + 2 * self.num_draws * len(list(self._sizes()))
        return num * size.forward_flops(self.num_sequences * self.text.input_length, self.text.input_length)

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """Weights, their copy, a draw and its noise, whole on each worker; activations and logits of a batch."""
        assert self.text
        return 4 * size.weights_bytes + self.text.batch_bytes(size, self.num_sequences)

    def disk_bytes(self, size: Size) -> int:
        """None: its numbers stand in its record."""
        return 0

    def _sizes(self) -> Iterator[tuple[NoiseScale, float]]:
        yield from (("absolute", size) for size in self.absolute)
        yield from (("per_tensor", size) for size in self.per_tensor)
        yield from (("per_row", size) for size in self.per_row)


def _name(scale: NoiseScale, size: float) -> str:
    return f"rise_{scale}_{size:g}"
