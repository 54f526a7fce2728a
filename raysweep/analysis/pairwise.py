"""Agreement of two orders: over pairs, and by rank correlation; with intervals that resample whole clusters.

Pairs of n checkpoints are not independent, and checkpoints of one trajectory are hardly more so. So the bootstrap
draws clusters (variants) with replacement. A draw is a vector of whole-number weights, one per checkpoint, under
which every statistic here is exactly that of the expanded sample; pairs of a checkpoint with its own copy do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NOISE_Z = 1.96
"""Two scores closer than this many standard errors of their difference are within noise."""


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % interval; NaN where there is none."""

    value: float
    low: float = float("nan")
    high: float = float("nan")


@dataclass(frozen=True)
class PairCounts:
    """Unordered pairs: all of them, those within noise, and ties. `num_clear` = all without noise and target ties."""

    num_pairs: int
    num_within_noise: int
    num_target_ties: int
    num_indicator_ties: int
    num_clear: int


@dataclass(frozen=True)
class Comparison:
    """One indicator against one target, over the same n checkpoints; built by `compare`."""

    credit: Floats
    """[n, n]: 1 where the two orders of a pair agree, 0 where they do not, 1/2 where either is tied."""
    every: Floats
    """[n, n]: 1 for each pair that counts, 0 on the diagonal."""
    clear: Floats
    """[n, n]: 1 for each pair whose target difference is beyond noise."""
    counts: PairCounts

    def accuracy(self, weights: Floats) -> Floats:
        """Share of pairs ordered alike, ties half, for weights [draws, n] -> [draws]."""
        return _ratio(_pairs(weights, self.credit * self.every), _pairs(weights, self.every))

    def clear_accuracy(self, weights: Floats) -> Floats:
        """The same over clear pairs alone."""
        return _ratio(_pairs(weights, self.credit * self.clear), _pairs(weights, self.clear))


def compare(indicator: Floats, target: Floats, *, stderr: Floats | None = None) -> Comparison:
    """Compare the order of every pair, higher being better in both.

    Args:
        indicator: [n], finite; negated if lower is better.
        target: [n], finite.
        stderr: [n], standard error of each target score; NaN or None where noise is not known.

    Raises:
        ValueError: if a value is missing, or the lengths differ.
    """
    if indicator.shape != target.shape or not (np.isfinite(indicator).all() and np.isfinite(target).all()):
        raise ValueError("indicator and target must be finite and of one length; leave missing values out first")
    ours, theirs = _signs(indicator), _signs(target)
    every = 1.0 - np.eye(len(target))
    noisy = np.zeros_like(every)
    if stderr is not None:
        margin = NOISE_Z * np.hypot(stderr[:, None], stderr[None, :])
        # A NaN margin compares False: a pair of unknown noise is taken at its word.
        noisy = (np.abs(target[:, None] - target[None, :]) <= margin) * every
    tied = (theirs == 0) * every
    clear = every * (1 - noisy) * (1 - tied)
    counts = PairCounts(
        num_pairs=_half(every),
        num_within_noise=_half(noisy),
        num_target_ties=_half(tied),
        num_indicator_ties=_half((ours == 0) * every),
        num_clear=_half(clear),
    )
    return Comparison(credit=(1 + ours * theirs) / 2, every=every, clear=clear, counts=counts)


def kendall(indicator: Floats, target: Floats, weights: Floats) -> Floats:
    """Kendall's tau-b of each expanded sample, weights [draws, n] -> [draws]."""
    ours, theirs = _signs(indicator), _signs(target)
    scale = np.sqrt(_pairs(weights, np.abs(ours)) * _pairs(weights, np.abs(theirs)))
    return _ratio(_pairs(weights, ours * theirs), scale)


def spearman(indicator: Floats, target: Floats, weights: Floats) -> Floats:
    """Spearman's rho of each expanded sample: Pearson's r of mid-ranks, weights [draws, n] -> [draws]."""
    ours, theirs = (weights @ (1 + _signs(values).T) / 2 for values in (indicator, target))
    total = np.maximum(weights.sum(axis=1, keepdims=True), 1.0)  # An empty draw: NaN below, no warning.
    ours, theirs = (ranks - (weights * ranks).sum(axis=1, keepdims=True) / total for ranks in (ours, theirs))
    scale = np.sqrt((weights * ours**2).sum(axis=1) * (weights * theirs**2).sum(axis=1))
    return _ratio((weights * ours * theirs).sum(axis=1), scale)


def draw_weights(clusters: Sequence[str], *, num_bootstrap: int, seed: int) -> Floats:
    """Bootstrap draws of whole clusters: how often each item is in each draw, [num_bootstrap, n].

    The draws depend on the set of clusters and the seed, not on the order of the items.
    """
    names, index = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    generator = np.random.default_rng(seed)
    times = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=num_bootstrap)
    return times[:, index].astype(np.float64)


def interval(value: float, draws: Floats) -> Estimate:
    """The value with the 2.5 and 97.5 percentiles of those draws in which the statistic is defined."""
    draws = draws[np.isfinite(draws)]
    if len(draws) == 0 or not np.isfinite(value):
        return Estimate(value)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def _signs(values: Floats) -> Floats:
    return np.sign(values[:, None] - values[None, :])


def _pairs(weights: Floats, matrix: Floats) -> Floats:
    products: Floats = np.einsum("di,di->d", weights @ matrix, weights)
    return products


def _ratio(top: Floats, bottom: Floats) -> Floats:
    # Rounding may leave a constant sample with a scale of 1e-15 rather than 0.
    fine = bottom > 1e-9
    return np.where(fine, top / np.where(fine, bottom, 1.0), np.nan)


def _half(matrix: Floats) -> int:
    return int(matrix.sum()) // 2
