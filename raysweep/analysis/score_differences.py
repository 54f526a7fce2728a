"""Differences between the scores of checkpoints: which pairs are clear, and which checkpoints tie with the best.

Many are looked at once, so both answers say what they hold for all of them together:

* *Clear pairs* by Benjamini & Hochberg (1995), as Williams, Jones & Tukey (1999) do for the pairs of states in a table
  of test scores: of the pairs called clear, one in twenty at most is expected to be none.
* *Differences from the best* by Tukey & Kramer: 95 % intervals that hold for all pairs at once, and so for the pair of
  the best, too, although it was picked for its score. Exact where all differences have one variance, else on the wide
  side (Hayter, 1984; for paired ones a conjecture, see Hsu, Multiple Comparisons, 1996).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from raysweep.analysis.pairwise import Flags, Floats, IntervalEstimate
from raysweep.analysis.uncertainty import CONFIDENCE, EstimateArrays, TaskNoise, independent, mean_estimates

# Degrees of freedom of printed tables. A value takes a third of a second, and those between differ by 1 % at most.
_TABLED = (*map(float, range(1, 31)), 40.0, 60.0, 120.0, 1000.0, math.inf)


@dataclass(frozen=True)
class Differences:
    """The difference of every two of n scores, the row's minus the column's; made by `between`."""

    value: Floats
    """[n, n]."""
    moments: EstimateArrays
    """[n, n], its variance NaN where the errors of scores are not known."""
    comparable: Flags
    """[n, n]: the pairs whose scores are of one quantity; what is said of all pairs is of these."""
    paired: bool
    """Whether all are over test examples that both checkpoints have."""
    knows_seeds: bool
    """Whether the errors hold those of the fine-tuning seeds."""

    @property
    def num_pairs(self) -> int:
        """Number of unordered pairs that compare; n (n - 1) / 2 where all do."""
        return len(self._pairs()[0])

    @property
    def known(self) -> bool:
        """Whether every difference has an error."""
        return bool(np.isfinite(self.moments.variance).all())

    def clear(self) -> Flags:
        """[n, n]: the pairs whose difference is clear; one without a known error is taken at its word."""
        from scipy.special import stdtr

        flags: Flags = (self.value != 0) & self.comparable
        rows, columns = self._pairs()
        errors = np.sqrt(self.moments.variance[rows, columns])
        known = np.isfinite(errors)
        rows, columns, errors = rows[known], columns[known], errors[known]
        ratios = np.abs(self.moments.value[rows, columns]) / errors
        chances = 2 * stdtr(self.moments.df[rows, columns], -ratios)
        flags[rows, columns] &= benjamini_hochberg(chances, rate=1 - CONFIDENCE)
        flags[columns, rows] = flags[rows, columns]
        return flags

    def ceiling(self, among: Flags | None = None, *, counted: Flags | None = None) -> float:
        """Share of pairs whose observed order is expected to be the true one; NaN without errors of all scores.

        For a true difference that is normal with variance t about 0, seen with an error of variance v as d, it has
        the sign of d with probability Phi(sqrt(t / (t + v)) |d| / sqrt(v)). t is what the observed differences vary
        beyond their errors; where it is less than these, few checkpoints do not show all of it, and the share is low.

        Args:
            among: [n, n], the pairs that are looked at; None: all that count.
            counted: [n, n], the pairs that count, which t is of; None: all.
        """
        from scipy.special import ndtr

        rows, columns = self._pairs()
        if counted is not None:
            rows, columns = rows[counted[rows, columns]], columns[counted[rows, columns]]
        variance, difference = self.moments.variance[rows, columns], self.value[rows, columns]
        if not len(rows) or not (variance > 0).all():
            return math.nan
        true = max(0.0, float((difference**2 - variance).mean()))
        right = ndtr(np.sqrt(true / (true + variance) / variance) * np.abs(difference))
        return float(right.mean() if among is None else right[among[rows, columns]].mean())

    def simultaneous(self) -> Floats:
        """[n, n]: half widths of the 95 % intervals that hold for all pairs at once, of scores that all compare."""
        num = len(self.value)
        if num < 2:
            return np.zeros_like(self.value)
        df = float(np.nanmin(self.moments.df[self._pairs()], initial=np.inf))
        widths: Floats = tukey(num, max(each for each in _TABLED if each <= max(df, 1.0))) * np.sqrt(
            self.moments.variance
        )
        return widths

    def from_first(self) -> list[IntervalEstimate]:
        """The first score minus each, with intervals that hold for all pairs at once."""
        middles, widths = self.moments.value, self.simultaneous()
        return [
            IntervalEstimate(float(value), float(middle - width), float(middle + width))
            for value, middle, width in zip(self.value[0], middles[0], widths[0], strict=True)
        ]

    def _pairs(self) -> tuple[np.ndarray, ...]:
        """Rows and columns of those that compare, each once."""
        return np.nonzero(np.triu(self.comparable, k=1))


def between(
    scores: Floats,
    *,
    errors: Floats | None,
    noise: Sequence[TaskNoise],
    checkpoints: Sequence[str],
    comparable: Flags | None = None,
) -> Differences:
    """The differences of the scores of `checkpoints`, each a mean over the tasks of `noise`.

    Args:
        scores: [n], as recorded.
        errors: [n], standard errors of the scores, taken where `noise` lacks a checkpoint; None: not known.
        noise: of each task that the scores are means over; empty where they are none of fine-tuning's.
        comparable: [n, n], the pairs whose scores are of one quantity; None: all of them.
    """
    value = scores[:, None] - scores
    comparable = np.ones(value.shape, dtype=bool) if comparable is None else comparable
    if noise and all(name in each.places for each in noise for name in checkpoints):
        noise = independent(noise)
        rows = [[each.places[name] for name in checkpoints] for each in noise]
        return Differences(
            value,
            mean_estimates([each.differences.at(row) for each, row in zip(noise, rows, strict=True)]),
            comparable,
            paired=all(each.paired[np.ix_(row, row)].all() for each, row in zip(noise, rows, strict=True)),
            knows_seeds=all(each.knows_seeds for each in noise),
        )
    variance = np.full(len(scores), np.nan) if errors is None else errors**2
    moments = EstimateArrays(value, variance[:, None] + variance, np.full(value.shape, np.inf))
    return Differences(value, moments, comparable, paired=False, knows_seeds=False)


@lru_cache
def tukey(num: int, df: float) -> float:
    """How many standard errors 95 % intervals of all pairs of `num` means at once reach to each side."""
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(CONFIDENCE, num, df)) / math.sqrt(2)


def benjamini_hochberg(chances: Floats, *, rate: float) -> Flags:
    """Which of p-values [m] to take, such that at most the share `rate` of those taken is expected to be wrong."""
    order = np.argsort(chances)
    below = np.flatnonzero(chances[order] <= rate * np.arange(1, len(chances) + 1) / max(1, len(chances)))
    taken = np.zeros(len(chances), dtype=bool)
    taken[order[: below[-1] + 1 if len(below) else 0]] = True
    return taken
