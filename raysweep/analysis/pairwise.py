"""Agreement of two orders: over pairs, and by rank correlation; with intervals that leave whole clusters out.

Pairs of n checkpoints are not independent, and checkpoints of one trajectory are hardly more so. So the jackknife
leaves clusters (variants) out, one at a time: the standard error of a statistic over pairs by Arvesen (1969). What is
left of a sum over pairs is the sum over all without those of one cluster: nothing is summed anew for each of them, and
time and memory grow as n^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Credit = NDArray[np.float32]
"""Of pairs: 0, 1/2 and 1 (or signs), whose sums over a row of so many pairs are exact."""
Flags = NDArray[np.bool_]

SMALL = 1e-9
"""What is zero but for rounding: a constant sample's scale may come out as 1e-15."""

MAX_VALUES = 2**21
"""Of a matrix that is needed in pieces only."""

MIN_CLUSTERS = 5
"""Fewer tell nothing of how a statistic varies between them, and there is no interval."""


MIN_CROSSED = 3
"""Fewer bases tell next to nothing of how a statistic varies between these: of two there is one difference."""

LEAST_SHARE = 0.5
"""Of a jackknife's variance over pairs: what is left of it where all is of pairs of clusters, and counted twice."""


@dataclass(frozen=True)
class IntervalEstimate:
    """A statistic with its 95 % interval; NaN where there is none."""

    value: float
    low: float = float("nan")
    high: float = float("nan")


@dataclass(frozen=True)
class PairCounts:
    """Unordered pairs: `num_pairs` is the sum of those within noise, with equal targets, and clear."""

    num_pairs: int
    num_within_noise: int | None
    """None where errors of the target are not known, as `num_clear` is."""
    num_target_ties: int
    num_indicator_ties: int
    num_clear: int | None


@dataclass(frozen=True)
class Comparison:
    """One indicator against one target, over the same n checkpoints; built by `compare`."""

    credit: Credit
    """[n, n]: 1 where the two orders of a pair agree, 0 where they do not, 1/2 where either is tied."""
    every: Flags
    """[n, n]: the pairs that count, as both values are of one quantity; none on the diagonal."""
    clear: Flags
    """[n, n]: the pairs whose target difference is clear."""
    counts: PairCounts


def compare(
    indicator: Floats, target: Floats, *, clear: Flags | None = None, comparable: Flags | None = None
) -> Comparison:
    """Compare the order of every pair, higher being better in both.

    Args:
        indicator: [n], finite; negated if lower is better.
        target: [n], finite.
        clear: [n, n], the pairs whose target difference is beyond noise; None: all of them.
        comparable: [n, n], the pairs whose two values of the indicator are of one quantity; None: all of them.

    Raises:
        ValueError: if a value is missing, or the lengths differ.
    """
    if indicator.shape != target.shape or not (np.isfinite(indicator).all() and np.isfinite(target).all()):
        raise ValueError("indicator and target must be finite and of one length; leave missing values out first")
    ours, theirs = signs(indicator), signs(target)
    return comparison(as_credit(ours * theirs), target, clear=clear, comparable=comparable, undecided=ours == 0)


def comparison(
    credit: Credit, target: Floats, *, clear: Flags | None, comparable: Flags | None = None, undecided: Flags
) -> Comparison:
    """From the credit of every pair, all arguments but the target being [n, n].

    Args:
        credit: 1 where a pair is ordered as by the target, 0 where not, 1/2 for no order.
        target: [n], finite.
        clear: see `compare`.
        comparable: see `compare`.
        undecided: the pairs that the indicator does not order.
    """
    counted = ~np.eye(len(target), dtype=bool)
    if comparable is not None:
        counted &= comparable
    tied = target[:, None] == target
    apart = counted & ~tied if clear is None else counted & ~tied & clear
    counts = PairCounts(
        num_pairs=_half(counted),
        num_within_noise=_half(counted & ~tied & ~apart),
        num_target_ties=_half(counted & tied),
        num_indicator_ties=_half(counted & undecided),
        num_clear=_half(apart),
    )
    return Comparison(credit=credit, every=counted, clear=apart, counts=counts)


@dataclass(frozen=True)
class Clusters:
    """Which of n items are left out together; made by `clusters_of`."""

    index: NDArray[np.int64]
    """[n]: the number of each item's cluster; `num` for those of none, which are never left out."""
    num: int
    inside: tuple[NDArray[np.int64], NDArray[np.int64]]
    """Rows and columns of the cells [n, n] that are of one cluster."""

    def sums(self, matrix: Credit | Flags) -> tuple[float, Floats]:
        """Of a symmetric matrix [n, n]: its sum, and [num] what is left of it without each cluster."""
        of_items = matrix.sum(axis=1, dtype=np.float32).astype(np.float64)
        of_clusters = np.bincount(self.index, of_items, self.num)[: self.num]
        twice = np.bincount(self.index[self.inside[0]], matrix[self.inside], self.num)
        total = float(of_items.sum())
        return total, np.asarray(total - 2 * of_clusters + twice, dtype=np.float64)


def clusters_of(names: Sequence[str], *, among: Flags | None = None) -> Clusters:
    """Of the cluster of each of n items; of those that are not `among` [n] these, none."""
    items, kept = np.asarray(names, dtype=str), np.ones(len(names), dtype=bool) if among is None else among
    known, own = np.unique(items[kept], return_inverse=True)
    index = np.full(len(items), len(known))
    index[kept] = own
    rows, columns = np.nonzero(of_one(index) & kept)
    return Clusters(index, len(known), (rows, columns))


def mean_credit(credit: Credit, among: Flags) -> float:
    """Mean credit [n, n] of the pairs [n, n]; NaN where there is none."""
    num = np.count_nonzero(among)
    return float(np.einsum("ij,ij->i", credit, among).sum(dtype=np.float64)) / num if num else math.nan


def credit_left(credit: Credit, among: Flags, clusters: Clusters) -> tuple[float, Floats]:
    """Mean credit [n, n] of the pairs [n, n], and the same without each of the clusters that have one of these.

    Of clusters that have none, however many, nothing is learnt about how clusters vary. Both matrices are symmetric.
    """
    (top, tops), (bottom, bottoms) = clusters.sums(credit * among), clusters.sums(among)
    have = bottoms < bottom
    return float(_ratio(top, bottom)), _ratio(tops[have], bottoms[have])


def credit_within(credit: Credit, among: Flags, parts: Flags) -> Floats:
    """[parts]: mean credit [n, n] of the pairs [n, n] within each of some parts [parts, n]; NaN where there is none."""
    rows = parts.astype(np.float32)
    top, bottom = (
        np.einsum("pi,pi->p", rows @ matrix, rows, dtype=np.float64)
        for matrix in (credit * among, among.astype(np.float32))
    )
    return _ratio(top, bottom)


def kendall(
    indicator: Floats, target: Floats, clusters: Clusters, *, among: Flags | None = None
) -> tuple[float, Floats]:
    """Kendall's tau-b over the pairs [n, n], or all, and without each of the clusters that have one of these."""
    among = ~np.eye(len(indicator), dtype=bool) if among is None else among
    ours, theirs = signs(indicator) * among, signs(target) * among
    (agree, agrees), (own, owns), (other, others) = map(clusters.sums, (ours * theirs, ours != 0, theirs != 0))
    total, left = clusters.sums(among)
    have = left < total
    return float(_ratio(agree, np.sqrt(own * other))), _ratio(agrees, np.sqrt(owns * others))[have]


def spearman(
    indicator: Floats, target: Floats, clusters: Clusters, *, among: Flags | None = None
) -> tuple[float, Floats]:
    """Spearman's rho, Pearson's r of mid-ranks; and the same without each of the clusters.

    Of ranks within groups, where `among` [n, n] has the pairs of these alone.
    """
    among = np.ones((len(indicator), len(indicator)), dtype=bool) if among is None else among
    order, sizes = np.argsort(clusters.index, kind="stable"), np.bincount(clusters.index, minlength=clusters.num)
    ends = np.cumsum(sizes)
    # [n, n]: what each adds to all ranks, beside the mean of these.
    above = [signs(values).T * among / 2 for values in (indicator, target)]
    ranks = [each.sum(axis=0, dtype=np.float64) for each in above]
    left = [np.zeros(0)]
    for names in np.array_split(np.arange(clusters.num), 1 + len(order) ** 2 // MAX_VALUES):
        if not len(names):
            continue
        first = ends[names[0]] - sizes[names[0]]
        own = order[first : ends[names[-1]]]
        starts = ends[names] - sizes[names] - first
        fewer = [whole - np.add.reduceat(each[own], starts, axis=0) for whole, each in zip(ranks, above, strict=True)]
        left.append(_pearson(*fewer, among=names[:, None] != clusters.index))
    [value] = _pearson(*(each[None] for each in ranks), among=np.ones((1, len(order)), dtype=bool))
    return float(value), np.concatenate(left)


def _pearson(ours: Floats, theirs: Floats, *, among: Flags) -> Floats:
    """[rows]: of two values [rows, n] each, over those that are marked."""
    total = np.maximum(among.sum(axis=1, keepdims=True), 1)  # An empty sample: NaN below, no warning.
    ours, theirs = (among * (each - (among * each).sum(axis=1, keepdims=True) / total) for each in (ours, theirs))
    scale = np.sqrt((ours**2).sum(axis=1) * (theirs**2).sum(axis=1))
    return _ratio((ours * theirs).sum(axis=1), scale)


def interval(
    value: float,
    left: Floats,
    *,
    crossed: Floats | None = None,
    low: float = 0.0,
    high: float = 1.0,
    num_clusters: int | None = None,
) -> IntervalEstimate:
    """The value of a statistic between `low` and `high`, with its 95 % interval by the jackknife; see `wilson`.

    None where the statistic is not defined without one of the clusters.

    Args:
        left: [clusters], the statistic without each cluster.
        crossed: the statistic without each of clusters of another kind, as bases are that all variants have; of
            `MIN_CROSSED` or more their variance is added. That of one variant in one base is in both, and counts twice:
            it is not taken off (Cameron, Gelbach & Miller, 2011), as of few bases too much would be. Degrees of freedom
            are Satterthwaite's.
        num_clusters: of these, those that its variance is known by; None: all.
    """
    if not np.isfinite(left).all():
        return IntervalEstimate(value)
    num = len(left) if num_clusters is None else num_clusters
    variance, freedom = _jackknife(left), None
    if crossed is not None and len(crossed) >= MIN_CROSSED and np.isfinite(crossed).all() and num > 1:
        alone, more = variance, _jackknife(crossed)
        variance = alone + more
        if variance > 0:
            freedom = variance**2 / (alone**2 / (num - 1) + more**2 / (len(crossed) - 1))
    return wilson(value, variance, num_clusters=num, freedom=freedom, low=low, high=high)


def interval_of_pairs(credit: Credit, among: Flags, clusters: Clusters) -> IntervalEstimate:
    """Mean credit of the pairs, with its 95 % interval by a variance that counts each pair of clusters once.

    The jackknife's variance has what is of two clusters together in the one's part and in the other's: 1.2 to 2.2 times
    that between simulated tables where a cluster has few pairs. So it is taken off once: with e_gh, the sum of credit -
    mean over the pairs of clusters g and h, over the number of pairs, by the sum of all e_gh^2 (Efron & Stein, 1981;
    the same as the variance robust to dyads of Aronow, Samii & Assenova, 2015). No more is taken off than half, as if
    nothing were of single clusters. The rest is as uncertain as the whole was, and has so many less degrees of freedom,
    by the square of the share that is left; so it was on simulated tables.

    Args:
        credit: [n, n], as of a `Comparison`.
        among: [n, n], the pairs that are looked at, of fixed pairs: not chosen by how far their values differ.
        clusters: of all items; those that have none of the pairs do not count.
    """
    assert (clusters.index < clusters.num).all()
    value, left = credit_left(credit, among, clusters)
    if not np.isfinite(left).all():
        return IntervalEstimate(value)
    num, variance = len(left), _jackknife(left)
    rows, columns = np.nonzero(among)
    cells = clusters.index[rows] * clusters.num + clusters.index[columns]
    of_two = np.bincount(cells, credit[rows, columns].astype(np.float64) - value, clusters.num**2).reshape(
        clusters.num, clusters.num
    )
    twice = 4 * float((np.triu(of_two, k=1) ** 2).sum()) / max(len(rows), 1) ** 2
    share = max(1 - twice / variance, LEAST_SHARE) if variance > SMALL else 1.0
    return wilson(value, share * variance, num_clusters=num, freedom=share**2 * (num - 1))


def wilson(
    value: float,
    variance: float,
    *,
    num_clusters: int,
    low: float = 0.0,
    high: float = 1.0,
    most: float = math.inf,
    freedom: float | None = None,
) -> IntervalEstimate:
    """The value of a statistic between `low` and `high`, with its 95 % interval by the statistic's variance.

    Wilson's interval (1927) of a share, by Student's t with one degree of freedom less than there are clusters, and
    with the number of observations that would give this variance to a share (Korn & Graubard, 1998); where that is
    zero, as when all pairs are right, with the number of clusters. No interval of fewer than `MIN_CLUSTERS`.

    Args:
        most: observations, if the variance may be too small.
        freedom: degrees of freedom of the variance, where it is not from the clusters.
    """
    from scipy.special import stdtrit

    if num_clusters < MIN_CLUSTERS or not math.isfinite(value):
        return IntervalEstimate(value)
    share = min(max((value - low) / (high - low), 0.0), 1.0)
    variance /= (high - low) ** 2
    is_inside = variance > SMALL and SMALL < share < 1 - SMALL
    size = min(share * (1 - share) / variance if is_inside else float(num_clusters), most)
    bend = float(stdtrit(num_clusters - 1 if freedom is None else freedom, 0.975)) ** 2 / size
    middle = (share + bend / 2) / (1 + bend)
    half = math.sqrt(bend * share * (1 - share) + bend**2 / 4) / (1 + bend)
    return IntervalEstimate(value, low + (high - low) * (middle - half), low + (high - low) * (middle + half))


def _jackknife(left: Floats) -> float:
    """Variance of a statistic by its values without each cluster."""
    num = len(left)
    return (num - 1) / num * float(((left - left.mean()) ** 2).sum()) if num else 0.0


def as_credit(agreement: Credit) -> Credit:
    """Of the product of two orders' signs."""
    return ((1 + agreement) / 2).astype(np.float32, copy=False)


def of_one(groups: NDArray[np.int64]) -> Flags:
    """[n, n]: the pairs that are of one group, by the groups' numbers [n]."""
    found: Flags = groups[:, None] == groups
    return found


def signs(values: Floats) -> Credit:
    """[n, n]: 1 where the row's value is above the column's, -1 where it is below, 0 where they are equal."""
    above = values[:, None] > values
    found: Credit = above.astype(np.float32) - above.T
    return found


def _ratio(top: Floats | float, bottom: Floats | float) -> Floats:
    """NaN where the bottom is 0."""
    fine = np.asarray(bottom) > SMALL
    return np.where(fine, top / np.where(fine, bottom, 1.0), np.nan)


def _half(flags: Flags) -> int:
    """Of a symmetric matrix whose diagonal is not set, how many unordered pairs are."""
    return int(np.count_nonzero(flags)) // 2
