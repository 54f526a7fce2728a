"""Agreement of two orders: over pairs, and by rank correlation; with intervals that leave whole clusters out.

Pairs of n checkpoints are not independent, and checkpoints of one trajectory are hardly more so. So the jackknife
leaves clusters (variants) out, one at a time: the standard error of a statistic over pairs by Arvesen (1969). What is
left is a vector of weights, one per checkpoint, under which every statistic here is exactly that of the sample left;
pairs of a checkpoint with its own copy do not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

SMALL = 1e-9
"""What is zero but for rounding: a constant sample's scale may come out as 1e-15."""

MIN_CLUSTERS = 5
"""Fewer tell nothing of how a statistic varies between them, and there is no interval."""


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

    credit: Floats
    """[n, n]: 1 where the two orders of a pair agree, 0 where they do not, 1/2 where either is tied."""
    every: Floats
    """[n, n]: 1 for each pair that counts: both values are of one quantity; 0 on the diagonal."""
    clear: Floats
    """[n, n]: 1 for each pair whose target difference is clear."""
    counts: PairCounts

    def accuracy(self, weights: Floats, *, among: Flags | None = None) -> Floats:
        """Share of pairs ordered alike, ties half, for weights [rows, n] -> [rows].

        Args:
            among: [n, n], the pairs that are looked at; None: all that count.
        """
        every = self.every if among is None else self.every * among
        return share_of_pairs(weights, self.credit, every)

    def clear_accuracy(self, weights: Floats) -> Floats:
        """The same over clear pairs alone."""
        return share_of_pairs(weights, self.credit, self.clear)


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
    ours, theirs = _signs(indicator), _signs(target)
    return comparison((1 + ours * theirs) / 2, target, clear=clear, comparable=comparable, undecided=ours == 0)


def comparison(
    credit: Floats, target: Floats, *, clear: Flags | None, comparable: Flags | None = None, undecided: Flags
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
    return Comparison(credit=credit, every=counted * 1.0, clear=apart * 1.0, counts=counts)


def share_of_pairs(weights: Floats, credit: Floats, among: Floats) -> Floats:
    """Mean credit [n, n] of the pairs [n, n], NaN where there is none, for weights [rows, n] -> [rows]."""
    return _ratio(_pairs(weights, credit * among), _pairs(weights, among))


def kendall(indicator: Floats, target: Floats, weights: Floats, *, comparable: Flags | None = None) -> Floats:
    """Kendall's tau-b of each expanded sample, over the comparable pairs [n, n], weights [rows, n] -> [rows]."""
    among = 1.0 if comparable is None else comparable * 1.0
    ours, theirs = _signs(indicator) * among, _signs(target) * among
    scale = np.sqrt(_pairs(weights, np.abs(ours)) * _pairs(weights, np.abs(theirs)))
    return _ratio(_pairs(weights, ours * theirs), scale)


def spearman(indicator: Floats, target: Floats, weights: Floats) -> Floats:
    """Spearman's rho of each expanded sample: Pearson's r of mid-ranks, weights [rows, n] -> [rows]."""
    ours, theirs = (weights @ (1 + _signs(values).T) / 2 for values in (indicator, target))
    total = np.maximum(weights.sum(axis=1, keepdims=True), 1.0)  # An empty sample: NaN below, no warning.
    ours, theirs = (ranks - (weights * ranks).sum(axis=1, keepdims=True) / total for ranks in (ours, theirs))
    scale = np.sqrt((weights * ours**2).sum(axis=1) * (weights * theirs**2).sum(axis=1))
    return _ratio((weights * ours * theirs).sum(axis=1), scale)


def leave_one_out(clusters: Sequence[str]) -> Floats:
    """Weights [clusters, n]: in each row one cluster's items weigh 0, all others 1."""
    names, index = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    weights: Floats = (np.arange(len(names))[:, None] != index).astype(np.float64)
    return weights


def interval(value: float, left: Floats, *, low: float = 0.0, high: float = 1.0) -> IntervalEstimate:
    """The value of a statistic between `low` and `high`, with its 95 % interval by the jackknife; see `wilson`.

    None where the statistic is not defined without one of the clusters.

    Args:
        left: [clusters], the statistic without each cluster.
    """
    if not np.isfinite(left).all():
        return IntervalEstimate(value)
    return wilson(value, _jackknife(left), num_clusters=len(left), low=low, high=high)


def with_pairs(weights: Floats, among: Floats) -> Floats:
    """Of weights [clusters, n], as of `leave_one_out`, those of clusters that have one of the pairs [n, n]."""
    have: Flags = (weights[:, among.any(axis=1)] == 0).any(axis=1)
    return weights[have]


def interval_of_pairs(credit: Floats, among: Floats, weights: Floats) -> IntervalEstimate:
    """Mean credit of the pairs, with its 95 % interval by a variance that counts each pair of clusters once.

    The jackknife's variance has what is of two clusters together in the one's part and in the other's: 1.2 to 2.2 times
    that between simulated tables where a cluster has few pairs. So it is taken off once: with e_gh, the sum of credit -
    mean over the pairs of clusters g and h, over the number of pairs, by the sum of all e_gh^2 (Efron & Stein, 1981;
    the same as the variance robust to dyads of Aronow, Samii & Assenova, 2015). No more is taken off than half, as if
    nothing were of single clusters. The rest is as uncertain as the whole was, and has so many less degrees of freedom,
    by the square of the share that is left; so it was on simulated tables.

    Args:
        credit: [n, n], as of a `Comparison`.
        among: [n, n], 1 for the pairs that are looked at, of fixed pairs: not chosen by how far their values differ.
        weights: [clusters, n], as of `leave_one_out`; clusters that have none of the pairs are left out.
    """
    weights = with_pairs(weights, among)
    value = float(share_of_pairs(np.ones((1, len(among))), credit, among)[0])
    left = share_of_pairs(weights, credit, among)
    if not np.isfinite(left).all():
        return IntervalEstimate(value)
    num, variance = len(left), _jackknife(left)
    of_two = (1 - weights) @ (among * (credit - value)) @ (1 - weights).T
    twice = 4 * float((np.triu(of_two, k=1) ** 2).sum()) / max(float(among.sum()), 1.0) ** 2
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


def _signs(values: Floats) -> Floats:
    return np.sign(values[:, None] - values[None, :])


def _pairs(weights: Floats, matrix: Floats) -> Floats:
    products: Floats = np.einsum("di,di->d", weights @ matrix, weights)
    return products


def _ratio(top: Floats, bottom: Floats) -> Floats:
    fine = bottom > SMALL
    return np.where(fine, top / np.where(fine, bottom, 1.0), np.nan)


def _half(flags: Flags) -> int:
    """Of a symmetric matrix whose diagonal is not set, how many unordered pairs are."""
    return int(flags.sum()) // 2
