"""Our measurement replayed on recorded v'H_s v: its error and the work it takes, in more runs than can be waited for.

Arithmetic only: which units come next, when to stop, and how many sequences share a probe are the library's own; what a
unit says is looked up in the rows of kind `table`, drawn at random. So plain Hutchinson's error, by the variances of
the same rows, is of the same text, with its rare sequences of a many times larger trace.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

import numpy as np

from raysweep.curvature.adaptive import next_units, stop_reason
from raysweep.curvature.averages import Moments, summarize
from raysweep.curvature.groups import cheapest_size
from raysweep.curvature.settings import TraceSettings
from raysweep.curvature.units import Unit, Values

# Sequences of a measurement's text; far more than any takes.
POOL = 4096


@dataclass(frozen=True)
class Replay:
    """One measurement: its estimate relative to the truth, what it stated, and its work."""

    ratio: float
    rse: float
    holds: bool
    """Whether its 95 % interval holds the truth."""
    units: int
    size: int


@dataclass(frozen=True)
class Recorded:
    """Sums over tokens of v'H_s v [row][sequence, probe], and tokens [row][sequence]."""

    sums: Sequence[Any]
    tokens: Sequence[Any]
    length: int

    @staticmethod
    def of(rows: Sequence[Mapping[str, Any]], length: int) -> Recorded:
        """From rows of kind `table`."""
        return Recorded(
            [np.array(row["values"]) for row in rows], [np.array(row["tokens"], dtype=float) for row in rows], length
        )

    @property
    def trace(self) -> float:
        """Of all that was recorded."""
        return float(np.concatenate(self.sums).sum(0).mean() / np.concatenate(self.tokens).sum())

    def replay(self, rse: float, *, seed: int) -> Replay:
        """As `measure.measure_traces` goes on, where batches of one sequence may share a probe."""
        sequences, probes = self.sums[0].shape

        @cache
        def drawn(group: int) -> tuple[int, Any, Any]:
            """A row, and in which order a group takes its sequences and probes: all of a row have these in common."""
            draw = np.random.default_rng([seed, group])
            return int(draw.integers(len(self.sums))), draw.permutation(sequences), draw.permutation(probes)

        def values(unit: Unit, first: int, stop: int) -> Values:
            row, order, vectors = drawn(unit.batch)
            chosen = order[first:stop]
            total = float(self.sums[row][chosen, vectors[unit.draw % probes]].sum())
            return {"num_tokens": float(self.tokens[row][chosen].sum()), "gauss_newton": total, "residual": 0.0}

        settings = TraceSettings(rse=rse, max_units=POOL)
        done: dict[Unit, Values] = {}
        size, may_grow = 1, True
        while units := next_units(done, POOL // size, settings):
            done |= {unit: values(unit, 0, size) for unit in units}
            if may_grow and stop_reason(done, POOL, settings) is None:
                size = cheapest_size(Moments.of(done), settings, num_batches=POOL, num_tokens=self.length, device="cpu")
                size = min(size, sequences)
                done = {unit: values(unit, 0, size) for unit in done}
            may_grow = False
        trace = summarize(done).hessian
        low, high = trace.relative_interval()
        return Replay(trace.mean / self.trace, trace.rse, low <= self.trace <= high, len(done), size)


@dataclass(frozen=True)
class Replayed:
    """Many of them: root mean square error, the stated one, how often intervals hold the truth, and the mean work."""

    error: float
    stated: float
    coverage: float
    runs: Sequence[Replay]

    @staticmethod
    def of(recorded: Recorded, rse: float, *, num: int) -> Replayed:
        """Of `num` seeds."""
        runs = [recorded.replay(rse, seed=seed) for seed in range(num)]
        error, stated = (
            math.sqrt(fmean(square(run) for run in runs))
            for square in (lambda run: (run.ratio - 1) ** 2, lambda run: run.rse**2)
        )
        return Replayed(error, stated, fmean(run.holds for run in runs), runs)
