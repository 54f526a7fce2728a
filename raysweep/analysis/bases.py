"""Which checkpoints are of one base, and so compare by more than the base's own luck.

A pretraining seed is a base: other initial weights, or another trunk that all variants go on from. It moves scores and
indicators of all its checkpoints together, and a sweep has one or a few. A pair of two bases is right or wrong as these
happen to lie, whatever the variants are, so no number of variants tells how such pairs would be in another sweep. With
all pairs counted, 95 % intervals over variants held the truth in 47 to 90 % of simulated tables of two to five bases
(tests/benchmarks/indicators_detail.md). So agreement is counted over pairs within a base, and what a base does to all
of its checkpoints changes nothing. How far bases order variants in different ways is told by three or more that have
these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raysweep.analysis.derived import SEED
from raysweep.analysis.pairwise import Flags

if TYPE_CHECKING:
    import pandas as pd

Groups = NDArray[np.int64]

WHOLE = 0.9
"""Part of the variants of the largest base that another has at least, to be as good as that."""


def bases_of(table: pd.DataFrame) -> Groups:
    """[rows]: equal numbers for checkpoints of one pretraining seed."""
    if SEED not in table:
        return np.zeros(len(table), dtype=np.int64)
    return np.asarray(table[SEED].factorize(use_na_sentinel=False)[0], dtype=np.int64)


def whole_bases(bases: Groups, variants: Sequence[str] | np.ndarray) -> list[Flags]:
    """[rows] of each base that has nearly all variants, see `WHOLE`: its rows. None of no rows."""
    rows: list[Flags] = [bases == base for base in np.unique(bases)]
    names = np.asarray(variants)
    nums = [len(set(names[own])) for own in rows]
    return [own for own, num in zip(rows, nums, strict=True) if num >= WHOLE * max(nums)]


def within_bases(groups: Groups, bases: Groups) -> Groups:
    """[rows]: equal numbers for rows of one group and one base.

    >>> within_bases(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])).tolist()
    [0, 1, 2, 3]
    """
    return groups * (int(bases.max(initial=0)) + 1) + bases
