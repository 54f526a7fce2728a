"""What is gained by fine-tuning only the checkpoints that an indicator puts first: recall, regret and NDCG at k.

Which checkpoints come first in one table is a single draw, and no resample of it tells how another would end: the
percentile bootstrap holds a regret near 0 in 54 to 69 % of tables in place of 95. So these are means over random halves
of the variants, as if each half had been the sweep. Halves come in pairs that have no variant in common, so that what
they differ by is chance without bias: that of one half. The variance of the mean over all halves is at most half of it
(Hoeffding, 1948, theorem 5.2), and is taken to be that: intervals of 95 % that err on the wide side. Of a recall it is
less, see `of_recall`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from raysweep.analysis.bases import Groups, whole_bases
from raysweep.analysis.pairwise import SMALL, Flags, Floats, IntervalEstimate, wilson
from raysweep.analysis.regrets import best_of_variants, regret_interval, upper_tail

PLACES = (1, 3, 5)
NUM_PAIRS = 1000
"""Of halves."""
OBSERVATIONS = 4.0
"""A place: as many shares as a recall near 0 is the mean of, at most. It is of events that few tables show at all, so
that their variance is near 0 where there is none; 3 to 5 on simulated tables whose indicator tells nothing."""
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
    """Random halves of the variants; of an odd number, each pair leaves one out."""

    num_variants: int
    """Of which half are in each."""
    variant_of_row: np.ndarray
    """[n]: the number of each checkpoint's variant."""
    rows: Floats
    """[2 * pairs, n]: 1 for checkpoints that are in it; half i and half pairs + i have none in common."""


def halves(variants: Sequence[str], num_pairs: int = NUM_PAIRS, *, among: Flags | None = None) -> Halves:
    """Of the variants of checkpoints [n], or of some, `among` [n] them; each half with as many of them."""
    names, index = np.unique(np.asarray(variants, dtype=str), return_inverse=True)
    dealt = np.unique(index if among is None else index[among])
    places = np.random.default_rng(SEED).random((num_pairs, len(dealt))).argsort(axis=1).argsort(axis=1)
    size = len(dealt) // 2
    chosen = np.zeros((2 * num_pairs, len(names)))
    chosen[:, dealt] = np.concatenate([places < size, (places >= size) & (places < 2 * size)])
    return Halves(len(dealt), index, chosen[:, index])


def select(
    indicator: Floats, scores: Floats, drawn: Halves, bases: Groups | None = None, *, places: Iterable[int] = PLACES
) -> list[Selection]:
    """For each k that is less than the number of checkpoints in every half; a mean over bases, chosen in each alone.

    Equal values of the indicator are put in the order of the scores and in the opposite one, half each.

    Args:
        indicator: [n], finite, higher being better.
        scores: [n], finite.
        drawn: halves of the variants of the same checkpoints that such bases have, see `bases`.
        bases: [n], of each checkpoint; None: one for all. Those with nearly all variants count, as a choice from fewer
            is another.
    """
    if not len(scores):
        return []
    rows = whole_bases(np.zeros(len(scores), dtype=np.int64) if bases is None else bases, drawn.variant_of_row)
    least = min(int(drawn.rows[:, own].sum(axis=1).min(initial=len(scores))) for own in rows)
    spreads = [max(float(np.ptp(scores[own])), SMALL) for own in rows]
    places = [k for k in places if k < least]
    by_base = [_of_halves(indicator[own], scores[own], drawn.rows[:, own], places) for own in rows]
    tails = [upper_tail(best_of_variants(scores[own], drawn.variant_of_row[own])[0]) for own in rows]
    selections = []
    for place, k in enumerate(places):
        recall, regret, ndcg = np.mean([each[place] for each in by_base], axis=0)
        selections.append(
            Selection(
                k=k,
                num_variants=drawn.num_variants // 2,
                recall=_recall(recall, drawn, k),
                regret=regret_interval(
                    float(regret.mean()),
                    _of_one_half(regret) / 2,
                    num_clusters=drawn.num_variants,
                    freedom=drawn.num_variants - 1,
                    high=max(spreads),
                    tail=float(np.mean(tails)),
                ),
                ndcg=wilson(float(ndcg.mean()), _of_one_half(ndcg) / 2, num_clusters=drawn.num_variants),
            )
        )
    return selections


def _of_halves(indicator: Floats, scores: Floats, chosen: Floats, places: Sequence[int]) -> list[Floats]:
    """Of each place, [3, halves]: recall, regret and NDCG of one base's checkpoints [n] in halves `chosen`."""
    kind, best = np.lexsort((-scores, -indicator)), np.argsort(-scores, kind="stable")
    unkind = np.lexsort((scores, -indicator))
    orders = [kind] if (kind == unkind).all() else [kind, unkind]
    first = max(places, default=0)
    truth, ours = _first(best, chosen, first), [_first(order, chosen, first) for order in orders]
    gains = (scores - scores.min()) / max(float(np.ptp(scores)), SMALL)
    found = []
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
        found.append(np.stack([np.mean(values, axis=0) for values in zip(*parts, strict=True)]))
    return found


def of_recall(k: int) -> float:
    """Variance of a mean recall at `k` over that of one half's.

    What depends on single checkpoints has 1/2, on pairs of them 1/4, on more at once less. Recall of a single place is
    hardly of single checkpoints, that of more is: 0.2 to 0.27 at 1 on simulated tables, 0.2 to 0.32 at 3, 0.21 to 0.36
    at 5.
    """
    return min(0.175 + 0.025 * k, 0.5)


def _first(order: np.ndarray, chosen: Floats, num: int) -> np.ndarray:
    """[halves, num]: the first checkpoints of each half [halves, n] in an order, by their rows."""
    half, place = np.nonzero(chosen[:, order])
    starts = np.searchsorted(half, np.arange(len(chosen)))
    first: np.ndarray = order[place[starts[:, None] + np.arange(num)]]
    return first


def _recall(values: Floats, drawn: Halves, k: int) -> IntervalEstimate:
    mean = float(values.mean())
    most = OBSERVATIONS * k / max(1 - mean, SMALL)
    return wilson(mean, of_recall(k) * _of_one_half(values), num_clusters=drawn.num_variants, most=most)


def _of_one_half(values: Floats) -> float:
    first, second = np.split(values, 2)
    return float(((first - second) ** 2).mean()) / 2
