"""What is gained by fine-tuning only the checkpoints that an indicator puts first: recall, regret and NDCG at k.

Which checkpoints come first in one table is a single draw, and no resample of it tells how another would end: the
percentile bootstrap holds a regret near 0 in 54 to 69 % of tables in place of 95. So these are means over random halves
of the variants, as if each half had been the sweep: smooth in every variant, so that leaving one out says how surely
(a jackknife over the halves that lack it, as Efron, 1992, does after a bootstrap).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from raysweep.analysis.pairwise import SMALL, Floats, IntervalEstimate, interval

PLACES = (1, 3, 5)
NUM_HALVES = 2000
SEED = 0
"""Of the halves, which are the same for all indicators, and from one call to the next."""


@dataclass(frozen=True)
class Selection:
    """What the `k` checkpoints that an indicator puts first are worth, in a sweep of `num_variants`."""

    k: int
    num_variants: int
    """Half of those that there are."""
    recall: IntervalEstimate
    """Share of the truly best k among them."""
    regret: IntervalEstimate
    """Score of the best checkpoint minus that of the best among them, in the target's unit; 0 is best."""
    ndcg: IntervalEstimate
    """Discounted gain (Järvelin & Kekäläinen, 2002) over that of the true order; gain: score above the table's worst,
    over the range of scores."""


@dataclass(frozen=True)
class Halves:
    """Random halves of the variants."""

    variants: Floats
    """[halves, variants]: 1 for those that are in it."""
    rows: Floats
    """[halves, n]: the same of checkpoints."""


def halves(variants: Sequence[str], num: int = NUM_HALVES) -> Halves:
    """Of the variants of checkpoints [n], each half with as many of them."""
    names, index = np.unique(np.asarray(variants, dtype=str), return_inverse=True)
    places = np.random.default_rng(SEED).random((num, len(names))).argsort(axis=1).argsort(axis=1)
    chosen = (places < len(names) // 2).astype(np.float64)
    return Halves(chosen, chosen[:, index])


def select(indicator: Floats, scores: Floats, drawn: Halves, *, places: Iterable[int] = PLACES) -> list[Selection]:
    """For each k that is less than the number of checkpoints in every half.

    Equal values of the indicator are put in the order of the scores and in the opposite one, half each.

    Args:
        indicator: [n], finite, higher being better.
        scores: [n], finite.
        drawn: halves of the variants of the same checkpoints.
    """
    least = int(drawn.rows.sum(axis=1).min(initial=len(scores)))
    kind, best = np.lexsort((-scores, -indicator)), np.argsort(-scores, kind="stable")
    unkind = np.lexsort((scores, -indicator))
    orders = [kind] if (kind == unkind).all() else [kind, unkind]
    spread = max(float(np.ptp(scores)), SMALL) if len(scores) else 1.0
    places = [k for k in places if k < least]
    first = max(places, default=0)
    truth, ours = _first(best, drawn, first), [_first(order, drawn, first) for order in orders]
    gains = (scores - scores.min(initial=np.inf)) / spread
    selections = []
    for k in places:
        discounts = 1 / np.log2(np.arange(2, k + 2))
        ideal = np.maximum(gains[truth[:, :k]] @ discounts, SMALL)
        parts = [
            (
                (each[:, :k, None] == truth[:, None, :k]).sum(axis=(1, 2)) / k,
                scores[truth[:, 0]] - scores[each[:, :k]].max(axis=1),
                gains[each[:, :k]] @ discounts / ideal,
            )
            for each in ours
        ]
        recall, regret, ndcg = (np.mean(values, axis=0) for values in zip(*parts, strict=True))
        selections.append(
            Selection(
                k=k,
                num_variants=drawn.variants.shape[1] // 2,
                recall=_estimate(recall, drawn),
                regret=_estimate(regret, drawn, high=spread),
                ndcg=_estimate(ndcg, drawn),
            )
        )
    return selections


def _first(order: np.ndarray, drawn: Halves, num: int) -> np.ndarray:
    """[halves, num]: the first checkpoints of each half in an order, by their rows in the table."""
    half, place = np.nonzero(drawn.rows[:, order])
    starts = np.searchsorted(half, np.arange(len(drawn.rows)))
    first: np.ndarray = order[place[starts[:, None] + np.arange(num)]]
    return first


def _estimate(values: Floats, drawn: Halves, *, high: float = 1.0) -> IntervalEstimate:
    """The mean over halves, with its interval by those that lack each variant."""
    lack = 1 - drawn.variants
    return interval(float(values.mean()), values @ lack / np.maximum(lack.sum(axis=0), 1.0), high=high)
