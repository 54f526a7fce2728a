"""Pairs of checkpoints by how far they differ in one column, such as perplexity, or in the target.

A perplexity's differences are of its logarithm, which is a loss in nats per token; so are those of any column whose
values are all positive. Others differ as they are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysweep.analysis.pairwise import SMALL, Flags, Floats, IntervalEstimate, of_one
from raysweep.scores import SAME_LOSS_NATS

NUM_PARTS = 4
"""Of the pairs that differ by more, with as many pairs in each."""
NUM_FIFTHS = 5
"""Of the pairs by the target."""
NUM_STEPS = 20
"""In which a range of small differences in the target grows to all of them; see `chance_within`."""


@dataclass(frozen=True)
class GapPairs:
    """Pairs [n, n] whose difference is above `low` and at most `high`; the first such are those that are equal."""

    low: float
    high: float
    pairs: Flags


@dataclass(frozen=True)
class GapAccuracy:
    """Pairs right by an indicator, among pairs of a range of differences."""

    low: float
    high: float
    num_pairs: int
    accuracy: IntervalEstimate


def gap_pairs(values: Floats, groups: NDArray[np.int64] | None = None) -> list[GapPairs]:
    """The pairs of checkpoints by their difference, smallest first; without those of a missing value.

    Args:
        values: [n], NaN where one is missing.
        groups: [n], of which only pairs of one group count, as losses of two objectives have no difference, and bases
            are not compared; None: all.

    >>> [(round(each.low, 2), round(each.high, 2)) for each in gap_pairs(np.array([10.0, 10.05, 11.0, 14.0]))]
    [(0.0, 0.01), (0.01, 0.1), (0.1, 0.24), (0.24, 0.33), (0.33, 0.34)]
    """
    known = np.isfinite(values)
    positive = bool((values[known] > 0).all())
    scaled = np.log(np.where(known, values, 1.0)) if positive else values
    differences = np.abs(scaled[:, None] - scaled)
    counted = known[:, None] & known & _counted(values, None if groups is None else of_one(groups))
    # A loss is a logarithm, too: what is positive counts as equal as near as losses do.
    same = SAME_LOSS_NATS if positive else SAME_LOSS_NATS * float(np.std(values[known]))
    apart = differences[counted & (differences > same)]
    inner = np.quantile(apart, np.arange(1, NUM_PARTS) / NUM_PARTS) if len(apart) else []
    edges = [same, *map(float, inner), float(apart.max(initial=same)) + SMALL]
    found = [GapPairs(0.0, same, counted & (differences <= same))]
    for low, high in itertools.pairwise(edges):
        found.append(GapPairs(low, high, counted & (differences > low) & (differences <= high)))
    return [each for each in found if each.pairs.any() and not math.isnan(each.high)]


def target_gaps(scores: Floats, comparable: Flags | None = None) -> list[GapPairs]:
    """Fifths of the pairs by how far their targets [n] differ, smallest first; of those that are equal the first.

    Args:
        scores: the targets.
        comparable: [n, n], the pairs whose targets are of one quantity, and base; None: all of them.

    >>> [(each.low, each.high) for each in target_gaps(np.array([0.0, 1.0, 2.0, 4.0, 8.0]))]
    [(0.0, 1.8), (1.8, 2.6), (2.6, 4.0), (4.0, 6.2), (6.2, 8.0)]
    """
    differences, counted = np.abs(scores[:, None] - scores), _counted(scores, comparable)
    edges = [-math.inf, *_quantiles(differences, counted, NUM_FIFTHS)]
    parts = [
        GapPairs(max(low, 0.0), high, counted & (differences > low) & (differences <= high))
        for low, high in itertools.pairwise(edges)
    ]
    return [each for each in parts if each.pairs.any()]


def target_ranges(scores: Floats, comparable: Flags | None = None) -> list[GapPairs]:
    """The pairs that differ least in the target: a twentieth of all, two of them, and so on; see `target_gaps`."""
    differences, counted = np.abs(scores[:, None] - scores), _counted(scores, comparable)
    ends = _quantiles(differences, counted, NUM_STEPS)
    return [GapPairs(0.0, high, counted & (differences <= high)) for high in ends]


OnPairs = Callable[[Flags], tuple[int, IntervalEstimate]]
"""Pairs [n, n] -> how many of these count, and the pairs right among them."""


def by_gap(gaps: Sequence[GapPairs], on: OnPairs) -> tuple[GapAccuracy, ...]:
    """Pairs right in each range that has pairs."""
    found = [(each, *on(each.pairs)) for each in gaps]
    return tuple(GapAccuracy(each.low, each.high, num, estimate) for each, num, estimate in found if num)


def chance_within(ranges: Sequence[GapPairs], on: OnPairs) -> GapAccuracy | None:
    """The widest range of small differences in which pairs right are not shown to be above 1/2.

    Ranges grow up to the first that is shown to be; None where that is the first one, or none has an interval.
    """
    widest = None
    for each in ranges:
        num, estimate = on(each.pairs)
        if estimate.low > 1 / 2:
            break
        if estimate.low <= 1 / 2:  # Else there is no interval.
            widest = GapAccuracy(each.low, each.high, num, estimate)
    return widest


def _counted(scores: Floats, comparable: Flags | None) -> Flags:
    apart: Flags = ~np.eye(len(scores), dtype=bool)
    return apart if comparable is None else apart & comparable


def _quantiles(differences: Floats, counted: Flags, num: int) -> list[float]:
    """Of the counted pairs' differences [n, n], the upper ends of so many parts; the last is their largest."""
    found = differences[np.triu(counted)]
    return [*map(float, np.quantile(found, np.arange(1, num + 1) / num))] if len(found) else []
