"""Pairs of checkpoints by how far they differ in one column, such as perplexity: those that it cannot tell apart too.

A perplexity's differences are of its logarithm, which is a loss in nats per token; so are those of any column whose
values are all positive. Others differ as they are.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysweep.analysis.pairwise import SMALL, Flags, Floats, IntervalEstimate

SAME = 0.01
"""Logarithms within this count as equal: as losses within `same_loss_nats` do."""
NUM_PARTS = 4
"""Of the pairs that differ by more, with as many pairs in each."""


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
        groups: [n], of which only pairs of one group count, as losses of two objectives have no difference; None: all.

    >>> [(round(each.low, 2), round(each.high, 2)) for each in gap_pairs(np.array([10.0, 10.05, 11.0, 14.0]))]
    [(0.0, 0.01), (0.01, 0.1), (0.1, 0.24), (0.24, 0.33), (0.33, 0.34)]
    """
    known = np.isfinite(values)
    positive = bool((values[known] > 0).all())
    scaled = np.log(np.where(known, values, 1.0)) if positive else values
    differences = np.abs(scaled[:, None] - scaled)
    counted = known[:, None] & known & ~np.eye(len(values), dtype=bool)
    if groups is not None:
        counted &= groups[:, None] == groups
    same = SAME if positive else SAME * float(np.std(values[known])) if known.any() else 0.0
    apart = differences[counted & (differences > same)]
    inner = np.quantile(apart, np.arange(1, NUM_PARTS) / NUM_PARTS) if len(apart) else []
    edges = [same, *map(float, inner), float(apart.max(initial=same)) + SMALL]
    found = [GapPairs(0.0, same, counted & (differences <= same))]
    for low, high in itertools.pairwise(edges):
        found.append(GapPairs(low, high, counted & (differences > low) & (differences <= high)))
    return [each for each in found if each.pairs.any() and not math.isnan(each.high)]
