"""A model that learns to compare: which of two checkpoints fine-tunes better, from pairs of others.

Gradient-boosted trees (LightGBM) over the features of a pair, made antisymmetric, and a linear comparer beside them:
with f the trees' logit and w the line's weights, that of "a is better than b" is
s (OF_TREES (f(a, b) - f(b, a)) / 2 + w (a - b)). The line is the better of the two where scores follow indicators in
proportion, and knows no bends and no interactions. How far both are from the best there is, on simulated tables:
benchmarks/indicator_truth.py.
The slope 0 <= s <= 1 calibrates the sum: it is fitted to pairs of checkpoints that trees and line of a fold did not
see, so that what does not carry over to new variants ends near probability 1/2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from raysweep.analysis.pair_features import KINDS, Scale, features, fit_scale, logistic, normalised, ordered_pairs
from raysweep.analysis.pairwise import SMALL, Flags, Floats
from raysweep.errors import RaysweepError

if TYPE_CHECKING:
    from lightgbm import Booster

NUM_TREES = 80
SETTINGS = {
    "objective": "binary",
    "num_leaves": 4,
    "learning_rate": 0.1,
    "min_data_in_leaf": 25,
    "max_bin": 31,
    "bin_construct_sample_cnt": 400,
    "num_threads": 1,
    "deterministic": True,
    "seed": 0,
    "verbose": -1,
}
"""Smaller trees than LightGBM's own settings: pairs of a few dozen checkpoints are far fewer than they look. So are the
values of an indicator: 31 bins, found from 400 pairs, tell as much as 255.
"""
OF_TREES = 0.5
"""Part of the trees' logit that counts beside the line: they are surer than they should be. On simulated tables of 60
variants all of it has 0.2 points more of pairs wrong, over settings, and half beside a line is within 0.1 of what inner
splits would choose for each table, at five times the cost."""
PENALTIES = np.logspace(-3, 3, 25)
"""Of the line's squared weights, a checkpoint."""
POWERS = (0, 1, 2, 4)
"""Of an indicator's correlation with the score, by which it is multiplied before weights are penalised: 0 penalises all
alike, 4 hardly leaves those that do not follow the score."""
NUM_FOLDS = 5
NUM_LINE_FOLDS = 10
MIN_VARIANTS = 20
"""Even 20 are now and then told apart by noise alone: the mean of the probability stated for the likelier order of new
pairs was up to 0.66 with 8 indicators and 0.67 with 40, and 0.53 and 0.54 over the tables (24 of each)."""
MAX_SLOPE = 10.0
NORMAL_LOGIT = 1.702
"""Times a normal deviate it is the logit of about the same probability."""


class CompareError(RaysweepError):
    """A comparer cannot be learnt, loaded, or asked about these checkpoints."""


@dataclass(frozen=True)
class Reason:
    """What an indicator says of a pair."""

    indicator: str
    logit: float
    """Added to the logit of "the first is better"; the reasons of a pair add up to it."""
    first: float
    second: float
    """The two values, as measured."""


@dataclass(frozen=True)
class Comparer:
    """Compares checkpoints by their indicators, for one target; made by `learn`."""

    target: str
    scales: tuple[Scale, ...]
    slope: float
    weights: Floats
    """[indicators]: of the line, for normalised values."""
    known: Floats
    """[checkpoints, indicators]: the normalised values that it was learnt from."""
    text: str
    """The trees, as LightGBM writes them."""
    _booster: list[Any] = field(default_factory=list, repr=False, compare=False)

    @property
    def indicators(self) -> tuple[str, ...]:
        """Their names, in the order in which values are given."""
        return tuple(scale.name for scale in self.scales)

    @property
    def booster(self) -> Booster:
        """The trees, read once."""
        if not self._booster:
            self._booster.append(lightgbm().Booster(model_str=self.text))
        return self._booster[0]

    def logits(self, first: Floats, second: Floats) -> Floats:
        """[pairs]: of "the first is better", from values [pairs, indicators] as measured."""
        left, right = normalised(self.scales, first), normalised(self.scales, second)
        return self.slope * pair_logits(self.booster, self.weights, left, right)

    def probability(self, first: Floats, second: Floats) -> float:
        """That the first of two checkpoints is better, from values [indicators]; 1 - p the other way round, exactly."""
        return logistic(float(self.logits(first[None], second[None])[0]))

    def reasons(self, first: Floats, second: Floats) -> list[Reason]:
        """What each adds to the logit of a pair, strongest first; in trees by TreeSHAP (Lundberg et al., 2020)."""
        left, right = (normalised(self.scales, values[None]) for values in (first, second))
        there, back = (
            np.asarray(self.booster.predict(features(*pair), pred_contrib=True))[0, :-1]
            for pair in ((left, right), (right, left))
        )
        of_trees = (OF_TREES * (there - back) / 2).reshape(len(KINDS), len(self.scales)).sum(axis=0)
        parts = self.slope * (of_trees + self.weights * (np.nan_to_num(left) - np.nan_to_num(right))[0])
        found = [
            Reason(scale.name, float(part), float(a), float(b))
            for scale, part, a, b in zip(self.scales, parts, first, second, strict=True)
        ]
        return sorted(found, key=lambda reason: -abs(reason.logit))

    def distance(self, values: Floats) -> float:
        """How far a checkpoint lies from the nearest that it was learnt from, over how far those lie from each other.

        About 1 for one more of the same; a pair with a distance of several is no interpolation. Root mean square over
        the indicators that both have; NaN where there is none.
        """
        gaps = _distances(normalised(self.scales, values[None])[0], self.known)
        to_others = [_distances(row, self.known) for row in self.known]
        # Not itself, and no twin of it either: two rows that are alike do not say how far rows lie apart.
        usual = [apart[apart > 0].min() for apart in to_others if (apart > 0).any()]
        return float(gaps.min() / np.median(usual)) if len(gaps) and usual else np.nan


def learn(
    values: Floats, scores: Floats, *, indicators: Sequence[str], variants: Sequence[str], target: str
) -> Comparer:
    """From checkpoints' indicators and scores.

    Args:
        values: [n, indicators], NaN where one is missing.
        scores: [n], finite; pairs of equal ones teach nothing.
        indicators: names of the columns of `values`.
        variants: of each checkpoint; the slope is fitted to pairs of variants that are new to trees and line, and the
            line's penalty is that which serves variants that are new to it.
        target: name of the scores.

    Raises:
        CompareError: if LightGBM is missing, there are too few variants, or all scores are equal.
    """
    check_enough(scores, variants, target)
    scales = tuple(fit_scale(name, column) for name, column in zip(indicators, values.T, strict=True))
    known = normalised(scales, values)
    booster = grow(known, scores, np.arange(len(scores)))
    return Comparer(
        target=target,
        scales=scales,
        slope=_slope(known, scores, variants),
        weights=line(known, scores, variants),
        known=known,
        text=booster.model_to_string(),
    )


def check_enough(scores: Floats, variants: Sequence[str], target: str) -> None:
    """Raises CompareError if there are too few variants to learn from, or all scores are equal."""
    if len(scores) > 1 and np.ptp(scores) == 0:
        raise CompareError(f"{target} is {scores[0]:.4g} in all {len(scores)} rows: there is nothing to compare")
    if (num := len(set(variants))) < MIN_VARIANTS:
        raise CompareError(f"{num} variants have a score in {target}; a comparer is learnt from {MIN_VARIANTS} or more")


def grow(known: Floats, scores: Floats, rows: np.ndarray) -> Booster:
    """Trees from all pairs of some rows, each once, from normalised values [n, indicators].

    Which of the two comes first goes by turns: trees are asked both ways round, and learn no more from both.
    """
    first, second = np.triu_indices(len(rows), 1)
    turned = (first + second) % 2 == 1
    first, second = rows[np.where(turned, second, first)], rows[np.where(turned, first, second)]
    apart = scores[first] != scores[second]
    first, second = first[apart], second[apart]
    better = (scores[first] > scores[second]).astype(np.float64)
    module = lightgbm()
    data = module.Dataset(features(known[first], known[second]), better)
    return module.train(SETTINGS, data, num_boost_round=NUM_TREES)


def line(known: Floats, scores: Floats, variants: Sequence[str]) -> Floats:
    """[indicators]: weights of a linear comparer, by ridge regression of scores [n] on normalised values.

    Each indicator is multiplied by a power of its correlation with the score before (as the adaptive lasso of Huang, Ma
    & Zhang, 2008, weighs penalties by marginal regressions), so that many that tell nothing do not drown a few that do.
    Of `POWERS` and `PENALTIES` it is the two by which variants are predicted best from the other ones, correlations and
    all. The difference of two rows' predictions, over the error e of such a difference, is a logit as of a normal
    distribution (1.7 d / e). A value that is missing is the mean.
    """
    values = np.nan_to_num(known)
    # Of a single variant nothing else can be learnt than what its own rows say.
    groups = variants if len(set(variants)) > 1 else list(map(str, range(len(scores))))
    predicted = np.zeros((len(scores), len(POWERS) * len(PENALTIES)))
    for out in _folds(groups, NUM_LINE_FOLDS):
        means, mean = values[~out].mean(axis=0), scores[~out].mean()
        predicted[out] = mean + (values[out] - means) @ _ridges(values[~out] - means, scores[~out] - mean).T
    errors = ((scores[:, None] - predicted) ** 2).mean(axis=0)
    best = int(errors.argmin())
    weights = _ridges(values - values.mean(axis=0), scores - scores.mean())[best]
    found: Floats = NORMAL_LOGIT * weights / max(math.sqrt(2 * errors[best]), SMALL)
    return found


def _ridges(values: Floats, scores: Floats) -> Floats:
    """[powers * penalties, indicators]: weights by each of `POWERS` and `PENALTIES`, of what has mean 0."""
    spreads = np.maximum(values.std(axis=0), SMALL) * max(float(scores.std()), SMALL)
    related = np.abs(scores @ values) / len(scores) / spreads
    related = related / max(float(related.max(initial=0.0)), SMALL)
    found = []
    for power in POWERS:
        scale = related**power
        left, singular, right = np.linalg.svd(values * scale, full_matrices=False)
        shrunk = singular / (singular**2 + len(scores) * PENALTIES[:, None])
        found.append((shrunk * (left.T @ scores)) @ right * scale)
    return np.concatenate(found)


def trained_on(
    known: Floats, scores: Floats, rows: np.ndarray, variants: Sequence[str]
) -> Callable[[np.ndarray, np.ndarray], Floats]:
    """Takes rows [pairs] and rows [pairs] to the logits of what is learnt from `rows`; 0 if those have one score."""
    if np.ptp(scores[rows]) == 0:
        return lambda first, second: np.zeros(len(first))
    booster = grow(known, scores, rows)
    weights = line(known[rows], scores[rows], [variants[row] for row in rows])
    return lambda first, second: pair_logits(booster, weights, known[first], known[second])


def importances(booster: Booster, num: int) -> Floats:
    """[num]: of each of so many regressors, its share of the gain of all splits of the trees; the line has no part."""
    gains = np.asarray(booster.feature_importance("gain"), dtype=np.float64).reshape(len(KINDS), num).sum(axis=0)
    shares: Floats = gains / max(float(gains.sum()), SMALL)
    return shares


def pair_logits(booster: Booster, weights: Floats, first: Floats, second: Floats) -> Floats:
    """[pairs]: half the difference of the trees' logits of a pair and of the pair turned round, times `OF_TREES`, and
    the line's.
    """
    if not len(first):  # Which LightGBM refuses.
        return np.zeros(0)
    there, back = (
        np.asarray(booster.predict(features(*pair), raw_score=True)) for pair in ((first, second), (second, first))
    )
    logits: Floats = OF_TREES * (there - back) / 2 + (np.nan_to_num(first) - np.nan_to_num(second)) @ weights
    return logits


def fitted_slope(logits: Floats) -> float:
    """Of logits for what was in fact the better one, [pairs]: the s >= 0 that makes s * logit likeliest."""
    from scipy.optimize import minimize_scalar

    # Trees that never split say 0 of each pair: any slope is as likely, and none of them is learnt.
    if not np.any(logits):
        return 0.0
    found = minimize_scalar(lambda slope: np.logaddexp(0, -slope * logits).mean(), bounds=(0, MAX_SLOPE))
    return float(found.x)


def lightgbm() -> Any:
    """The package. Raises CompareError if it is not installed."""
    try:
        import lightgbm as module
    except ImportError:
        raise CompareError("learning to compare needs LightGBM: pip install 'raysweep[compare]'") from None
    return module


def _slope(known: Floats, scores: Floats, variants: Sequence[str]) -> float:
    """Over pairs of variants of one fold, by what is learnt from the others."""
    logits = []
    for out in _folds(variants, NUM_FOLDS):
        first, second = ordered_pairs(np.flatnonzero(out))
        better = scores[first] > scores[second]
        logits.append(trained_on(known, scores, np.flatnonzero(~out), variants)(first[better], second[better]))
    # Trees and line are not less sure than they should be (0.66 to 0.84 on simulated tables): a slope above 1 is the
    # luck of few pairs.
    return min(fitted_slope(np.concatenate(logits)), 1.0)


def _folds(variants: Sequence[str], num: int) -> list[Flags]:
    """Rows [n] that each sets aside, of whole variants; no more folds than there are variants."""
    names, index = np.unique(np.asarray(variants, dtype=str), return_inverse=True)
    fold = np.random.default_rng(0).permutation(len(names)) % num
    return [fold[index] == number for number in range(min(num, len(names)))]


def _distances(row: Floats, others: Floats) -> Floats:
    """Of a row from each that has an indicator that it has."""
    both = np.isfinite(row) & np.isfinite(others)
    squares = np.where(both, np.square(np.where(both, others - row, 0.0)), 0.0).sum(axis=1)
    nums = both.sum(axis=1)
    found: Floats = np.sqrt(squares[nums > 0] / nums[nums > 0])
    return found
