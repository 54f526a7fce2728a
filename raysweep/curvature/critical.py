"""Curvature along one direction, from losses alone: the step at which the loss has risen."""

from __future__ import annotations

import math
from collections.abc import Callable

PRECISION = 0.01
"""Relative, of a step: its bracket is this wide in the end."""
MAX_DOUBLINGS = 60


def critical_step(
    rise: Callable[[float], float], *, start: float, target: float = 0.0, guess: float = math.nan
) -> float:
    """The smallest step at which a loss has risen by more than `target`, within half a percent.

    From `start` it doubles, or halves, until the target lies between two steps; then it halves their ratio. A rise and
    fall between two doublings is not seen. With target 0 along the negative of an update, 2 / step is the critical
    sharpness of Kalra et al. (2026, arXiv 2601.16979), which of a quadratic loss is u'Hu / u'g.

    Args:
        rise: of a step above 0: loss there less loss at 0; no number counts as a rise.
        start: a step above 0 to begin with; what is far from the answer costs a loss for each doubling.
        target: at least 0.
        guess: where the answer may lie; if it is a number above 0, the search begins at the doubling of `start` next to
            it. The answer is the same to the bit, unless the loss crosses the target more than once.

    Returns:
        NaN if the target is not met within 2^60 of the start.

    >>> round(critical_step(lambda step: 3 * step**2 - 6 * step, start=1e-3), 2)
    2.0
    >>> critical_step(lambda step: -step, start=1.0)
    nan
    """

    def is_above(step: float) -> bool:
        return not rise(step) <= target

    least, most = math.ldexp(start, -MAX_DOUBLINGS), math.ldexp(start, MAX_DOUBLINGS)
    high = start
    if 0 < guess < math.inf:
        doublings = round(math.log2(guess) - math.log2(start))
        high = math.ldexp(start, max(-MAX_DOUBLINGS, min(doublings, MAX_DOUBLINGS)))
    if is_above(high):
        while is_above(high / 2):
            high /= 2
            if high <= least:
                return math.nan
    else:
        while not is_above(high := 2 * high):
            if high >= most:
                return math.nan
    low = high / 2
    while high / low > 1 + PRECISION:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if is_above(middle) else (middle, high)
    return math.sqrt(low * high)


def quadratic_step(slope: float, curvature: float, target: float) -> float:
    """The smallest step at which slope * step + curvature * step^2 / 2 rises to `target`; NaN if none, 0 if at once.

    >>> quadratic_step(-6.0, 6.0, 0.0)
    2.0
    >>> quadratic_step(1.0, 0.0, 3.0)
    3.0
    >>> quadratic_step(-1.0, -1.0, 0.5)
    nan
    """
    square = slope * slope + 2 * curvature * target
    if square < 0 or (slope <= 0 and curvature <= 0):
        return math.nan
    # Of two forms of the root the one that subtracts no like numbers.
    root = math.sqrt(square)
    return 2 * target / (slope + root) if slope > 0 else (root - slope) / curvature
