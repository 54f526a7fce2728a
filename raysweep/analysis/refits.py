"""How a statistic of a fit varies between sweeps: by fits made anew on halves of the variants.

What is left out of the pairs alone would leave the fit as it was, and its intervals too narrow: 79 to 93 % held in
place of 95. The jackknife, which leaves one variant out at a time, counts what k of them do together k times (Efron &
Stein, 1981), and of a fit that decides by signs there is much of this: its variance was 2.4 to 2.8 times that between
simulated tables of 48 variants, and intervals held 98 to 100 %. Two halves that have no variant in common differ by
chance without bias: by that of half as many variants. With all of them it is at most half of this, if it falls with
their number n no slower than 1 / n, and is taken to be that: 0.9 to 2 times that between tables, 3.4 times where an
indicator adds nothing. Where the settings tell nothing of the scores it is 0.9 to 1, so no less may be taken. Where a
half has no more variants than the fit has parameters, it is 0.5 to 0.7 times, as what fits all scores hardly changes
with one more column: there, variants are left out one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raysweep.analysis.pairwise import MIN_CLUSTERS, Flags, Floats, IntervalEstimate, clusters_of, interval, wilson
from raysweep.analysis.selection import halves

NUM_PAIRS = 30
"""Of halves."""
FREEDOM = 20
"""Degrees of freedom of the variance, beside those of the variants, 1 / df = 1 / (n - 1) + 1 / FREEDOM: on simulated
tables of 24 variants it had 13, on those of 48 from 11 to 22."""
LEAST_HALVED = 16
"""Variants: of fewer, a half is too small, and they are left out one at a time instead."""
SPARE = 2
"""Variants that a half has more than the fit has parameters, at least."""
MAX_LEFT_OUT = 48
"""Groups of variants that are left out one at a time: as many fits as variants, each of [n, n], would take memory by
the cube of n, 1.1 GB for 100 variants of 3 checkpoints, each with a rate of its own."""


@dataclass(frozen=True)
class Parts:
    """Checkpoints that a fit is made anew on."""

    variants: tuple[str, ...]
    """[n]: of each checkpoint."""
    rows: Flags
    """[parts, n]: those of each part; halves i and parts / 2 + i have no variant in common."""
    are_halves: bool
    """Else each part is what is left without one of the variants, or a group of them."""

    def interval(self, value: float, by_part: Floats, among: Flags, *, low: float = 0.0) -> IntervalEstimate:
        """The value of a statistic between `low` and 1, with its 95 % interval, see `wilson`.

        None where the statistic is not defined on most pairs of halves, or on what is left without some.

        Args:
            by_part: [parts], the statistic of each part.
            among: [n, n], the pairs that it is of. Variants that have none, however many, change it through the fit
                alone, and tell nothing of how those vary that have.
        """
        have: Flags = among.sum(axis=1) > np.diagonal(among)
        if not self.are_halves:
            num = int((~self.rows[:, have]).any(axis=1).sum())
            return interval(value, by_part, low=low, num_clusters=num)
        num = len({name for name, has in zip(self.variants, have, strict=True) if has})
        apart = np.subtract(*np.split(by_part, 2))
        apart = apart[np.isfinite(apart)]
        if len(apart) <= NUM_PAIRS / 2 or num < MIN_CLUSTERS:
            return IntervalEstimate(value)
        freedom = 1 / (1 / (num - 1) + 1 / FREEDOM)
        return wilson(value, float((apart**2).mean()) / 4, num_clusters=num, freedom=freedom, low=low)


def parts_of(variants: Sequence[str], *, num_parameters: int) -> Parts:
    """Of the variants of checkpoints [n], for a fit of so many parameters."""
    names = sorted(set(variants))
    num = len(names)
    if num < max(LEAST_HALVED, 2 * (num_parameters + SPARE)):
        # Variants' names are hashes, so that neighbours by name are as good as drawn.
        size = -(-num // MAX_LEFT_OUT)
        group = {name: names[index - index % size] for index, name in enumerate(names)}
        groups = clusters_of([group[name] for name in variants])
        return Parts(tuple(variants), np.arange(groups.num)[:, None] != groups.index, are_halves=False)
    return Parts(tuple(variants), halves(variants, NUM_PAIRS).rows.astype(bool), are_halves=True)
