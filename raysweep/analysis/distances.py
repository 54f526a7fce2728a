"""How far checkpoints lie from those that a comparer was learnt from, by their indicators.

In units of how far these lie from each other: about 1 is one more of the same, several is no interpolation. Root mean
squares over the indicators that both have.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from raysweep.analysis.gaps import GapAccuracy
from raysweep.analysis.pairwise import Floats, IntervalEstimate

ENDS = (0.0, 1.0, 2.0, 3.0, 5.0, np.inf)
"""Of the ranges of distances that accuracies are of."""


def distances(values: Floats, known: Floats) -> Floats:
    """[n]: of each from the nearest that was learnt from; NaN where no indicator is in both.

    Args:
        values: [n, indicators], normalised.
        known: [m, indicators], of those that were learnt from.

    >>> distances(np.array([[3.0], [0.5]]), np.array([[0.0], [1.0], [2.0]]))
    array([1. , 0.5])
    """
    to_others = [_gaps(row, known) for row in known]
    # Not itself, and no twin of it either: two rows that are alike do not say how far rows lie apart.
    usual = [apart[apart > 0].min() for apart in to_others if (apart > 0).any()]
    nearest = [_gaps(row, known).min(initial=np.inf) for row in values]
    found: Floats = np.where(np.isfinite(nearest), nearest, np.nan) / (np.median(usual) if usual else np.nan)
    return found


def by_distance(between: Callable[[float, float], tuple[int, IntervalEstimate]]) -> tuple[GapAccuracy, ...]:
    """Pairs right by how far the farther one of a pair lies, of the ranges of distances that have pairs.

    Args:
        between: takes the ends of a range to (number of its pairs, pairs right).
    """
    found = [GapAccuracy(low, high, *between(low, high)) for low, high in itertools.pairwise(ENDS)]
    return tuple(each for each in found if each.num_pairs)


def _gaps(row: Floats, others: Floats) -> Floats:
    """Of a row from each that has an indicator that it has."""
    both = np.isfinite(row) & np.isfinite(others)
    squares = np.where(both, np.square(np.where(both, others - row, 0.0)), 0.0).sum(axis=1)
    nums = both.sum(axis=1)
    found: Floats = np.sqrt(squares[nums > 0] / nums[nums > 0])
    return found
