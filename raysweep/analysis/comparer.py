"""A model that learns to compare: which of two checkpoints fine-tunes better, from pairs of others.

Gradient-boosted trees (LightGBM) over the features of a pair, made antisymmetric, and a line beside them: with f the
trees' logit and l the line's, which is antisymmetric by itself, that of "a is better than b" is
1.5 s (p (f(a, b) - f(b, a)) / 2 + (1 - p) l(a, b)). How far both are from the best there is, on simulated tables:
benchmarks/indicator_truth.py.
The part 0 <= p <= 1 of the trees is chosen by pairs of variants that trees and line of a fold did not see, where there
are variants enough to tell. The slope 0 <= s <= 1 calibrates the sum, fitted to such pairs, so that what does not carry
over to new variants ends near probability 1/2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from raysweep.analysis.distances import distances
from raysweep.analysis.line import Line, fit_line, folds
from raysweep.analysis.pair_features import KINDS, Scale, features, fit_scale, logistic, normalised, ordered_pairs
from raysweep.analysis.pairwise import SMALL, Floats
from raysweep.errors import RaysweepError

if TYPE_CHECKING:
    from lightgbm import Booster

NUM_TREES = 80
MANY = 80
"""Checkpoints beyond which trees are as many times more: 80 fit what bends 1 point worse than 240 at 240 variants, and
as well at 60."""
MAX_PAIRS = 5_000
"""That trees learn from, drawn where there are more, of more than 100 checkpoints: with all of them, and as many more
trees, time grows by the cube. On simulated tables of 240 all 28,680 pairs have 0.06 points less wrong on average, and
0.16 where what decides bends (six of these tables)."""
SETTINGS = {
    "objective": "binary",
    "num_leaves": 4,
    "learning_rate": 0.1,
    "min_data_in_leaf": 25,
    "max_bin": 31,
    "bin_construct_sample_cnt": 400,
    "enable_bundle": False,
    "force_row_wise": True,
    "num_threads": 1,
    "deterministic": True,
    "seed": 0,
    "verbose": -1,
}
"""Smaller trees than LightGBM's own settings: pairs of a few dozen checkpoints are far fewer than they look. So are the
values of an indicator: 31 bins, found from 400 pairs, tell as much as 255. Bundles of features, and timing on each
table which way to sum them is faster, cost more than they save; trees are the same to the bit.
"""
OF_TREES = 1 / 3
"""Part of the trees beside the line: they are surer than they should be."""
PARTS = np.linspace(0, 1, 7)
"""Of which one is chosen, for tables of `MIN_CHOOSING` variants or more. On simulated tables of 36 and 60 a choice by
folds has 0.2 and 0.0 points of pairs less wrong, at more than twice the time; at 120 and 240, 0.3 on average."""
MIN_CHOOSING = 100
DOUBT = 10.0
"""A part p has to be better by this times (p - OF_TREES)^2, in log-likelihood summed over variants."""
NUM_FOLDS = 5
NUM_CHOOSING_FOLDS = 3
MIN_VARIANTS = 20
"""Even 20 are now and then told apart by noise alone: the mean of the probability stated for the likelier order of new
pairs was up to 0.66 with 8 indicators and 0.67 with 40, and 0.53 and 0.54 over the tables (24 of each)."""
MAX_SLOPE = 10.0
FAR = 2.0
"""Distance (see `Comparer.distance`) beyond which a pair is no longer one more of the same."""
TOO_FAR = 5.0
"""Beyond which a probability is none to go by: on the indicator study it was then 1.00 in nearly all pairs, and 0.94
of those of another mix and 0.81 of another objective were right. Up to it about as many were right as was stated, but
for pairs of another mix 2 to 3 times as far, 0.89 for 0.96 (benchmarks/far_pairs.py)."""


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
    part: float
    """Of the trees."""
    line: Line
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
        return self.slope * together(self.part, tree_logits(self.booster, left, right), self.line.logits(left, right))

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
        of_trees = ((there - back) / 2).reshape(len(KINDS), len(self.scales)).sum(axis=0)
        parts = self.slope * together(self.part, of_trees, self.line.by_indicator(left[0], right[0]))
        found = [
            Reason(scale.name, float(part), float(a), float(b))
            for scale, part, a, b in zip(self.scales, parts, first, second, strict=True)
        ]
        return sorted(found, key=lambda reason: -abs(reason.logit))

    def distance(self, values: Floats) -> float:
        """How far a checkpoint lies from the nearest that it was learnt from; see `distances`."""
        return float(distances(normalised(self.scales, values[None]), self.known)[0])


def learn(
    values: Floats, scores: Floats, *, indicators: Sequence[str], variants: Sequence[str], target: str
) -> Comparer:
    """From checkpoints' indicators and scores.

    Args:
        values: [n, indicators], NaN where one is missing.
        scores: [n], finite; pairs of equal ones teach nothing.
        indicators: names of the columns of `values`.
        variants: of each checkpoint; slope and part are fitted to pairs of variants that are new to trees and line,
            and the line's form and penalty are those which serve variants that are new to it.
        target: name of the scores.

    Raises:
        CompareError: if LightGBM is missing, there are too few variants, or all scores are equal.
    """
    check_enough(scores, variants, target)
    scales = tuple(fit_scale(name, column) for name, column in zip(indicators, values.T, strict=True))
    known = normalised(scales, values)
    booster = grow(known, scores, np.arange(len(scores)))
    of_trees, of_line = _on_others(known, scores, variants, num_folds=NUM_FOLDS)
    part = _part(of_trees, of_line, variants)
    return Comparer(
        target=target,
        scales=scales,
        # Trees and line are not less sure than they should be: a slope above 1 is the luck of few pairs.
        slope=min(fitted_slope(together(part, of_trees, of_line)), 1.0),
        part=part,
        line=fit_line(known, scores, variants),
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
    """Trees from all pairs of some rows, or `MAX_PAIRS` of them, each once, from normalised values [n, indicators].

    Which of the two comes first goes by turns: trees are asked both ways round, and learn no more from both.
    """
    first, second = np.triu_indices(len(rows), 1)
    if len(first) > MAX_PAIRS:
        drawn = np.sort(np.random.default_rng(0).choice(len(first), MAX_PAIRS, replace=False))
        first, second = first[drawn], second[drawn]
    turned = (first + second) % 2 == 1
    first, second = rows[np.where(turned, second, first)], rows[np.where(turned, first, second)]
    apart = scores[first] != scores[second]
    first, second = first[apart], second[apart]
    better = (scores[first] > scores[second]).astype(np.float64)
    module = lightgbm()
    data = module.Dataset(features(known[first], known[second]), better)
    return module.train(SETTINGS, data, num_boost_round=round(NUM_TREES * max(1.0, len(rows) / MANY)))


def trained_on(
    known: Floats, scores: Floats, rows: np.ndarray, variants: Sequence[str]
) -> Callable[[np.ndarray, np.ndarray], Floats]:
    """Takes rows [pairs] and rows [pairs] to the logits of what is learnt from `rows`; 0 if those have one score."""
    own = [variants[row] for row in rows]
    part = OF_TREES
    if len(set(own)) >= MIN_CHOOSING:  # Otherwise the folds would be trained on in vain.
        part = _part(*_on_others(known[rows], scores[rows], own, num_folds=NUM_CHOOSING_FOLDS), own)
    fitted = _fitted(known, scores, rows, variants)
    return lambda first, second: together(part, *fitted(first, second))


def importances(booster: Booster, num: int) -> Floats:
    """[num]: of each of so many regressors, its share of the gain of all splits of the trees; the line has no part."""
    gains = np.asarray(booster.feature_importance("gain"), dtype=np.float64).reshape(len(KINDS), num).sum(axis=0)
    shares: Floats = gains / max(float(gains.sum()), SMALL)
    return shares


def tree_logits(booster: Booster, first: Floats, second: Floats) -> Floats:
    """[pairs]: half the difference of the trees' logits of a pair and of the pair turned round."""
    if not len(first):  # Which LightGBM refuses.
        return np.zeros(0)
    there, back = (
        np.asarray(booster.predict(features(*pair), raw_score=True)) for pair in ((first, second), (second, first))
    )
    logits: Floats = (there - back) / 2
    return logits


def together(part: float, of_trees: Floats, of_line: Floats) -> Floats:
    """Logits of both: the line's and half of the trees' where their part is a third."""
    logits: Floats = 1.5 * (part * of_trees + (1 - part) * of_line)
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


def _fitted(
    known: Floats, scores: Floats, rows: np.ndarray, variants: Sequence[str]
) -> Callable[[np.ndarray, np.ndarray], tuple[Floats, Floats]]:
    """Takes rows [pairs] and rows [pairs] to the trees' logits and the line's; see `trained_on`."""
    if np.ptp(scores[rows]) == 0:
        return lambda first, second: (np.zeros(len(first)), np.zeros(len(first)))
    booster = grow(known, scores, rows)
    line = fit_line(known[rows], scores[rows], [variants[row] for row in rows])
    return lambda first, second: (
        tree_logits(booster, known[first], known[second]),
        line.logits(known[first], known[second]),
    )


def _on_others(known: Floats, scores: Floats, variants: Sequence[str], *, num_folds: int) -> tuple[Floats, Floats]:
    """The trees' and the line's logits of the better one of each pair within a fold, learnt from the other folds."""
    found = []
    for out in folds(variants, num_folds):
        first, second = ordered_pairs(np.flatnonzero(out))
        better = scores[first] > scores[second]
        found.append(_fitted(known, scores, np.flatnonzero(~out), variants)(first[better], second[better]))
    of_trees, of_line = (np.concatenate(each) for each in zip(*found, strict=True))
    return of_trees, of_line


def _part(of_trees: Floats, of_line: Floats, variants: Sequence[str]) -> float:
    """Of `PARTS`, the likeliest by logits of what was the better one, each at its own slope."""
    num = len(set(variants))
    if num < MIN_CHOOSING:
        return OF_TREES
    costs = []
    for part in PARTS:
        logits = together(part, of_trees, of_line)
        loss = np.logaddexp(0, -fitted_slope(logits) * logits).mean()
        costs.append(num * loss + DOUBT * (part - OF_TREES) ** 2)
    return float(PARTS[int(np.argmin(costs))])
