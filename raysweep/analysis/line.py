"""A comparer that is linear in indicators, in bends of them and in products of two: what stands beside the trees.

Trees learn of pairs, of which there are many and none by itself; this learns of checkpoints, by ridge regression of
their scores, and is the better of the two where what decides is smooth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from raysweep.analysis.pairwise import SMALL, Flags, Floats

Form = Literal["straight", "curved", "crossed"]
"""What the line is linear in: indicators; these, their hyperbolic tangents and squares; and products of two as well.

As natural splines are, bends and products are linear outside the bulk of the values that were learnt from: the few
outermost of these do not tell a bend, which would go on to where there was nothing to learn from.
"""
BULK = 0.15, 0.85
"""The quantiles between which the line bends. On simulated tables one that bends everywhere has as many pairs wrong; on
the indicator study, where a few checkpoints are far below the others, a third more at a rate that was left out."""
DOUBT = 8.0
"""A form's error has to be less by this over the number of variants, as a share, to be taken in place of the one before
it: of few variants a bend fits the noise of some. With none, straight worlds of 36 variants are 0.4 points worse."""
MAX_CROSSED = 10
"""Indicators of which products are tried: of more there are more products than anything can be told of."""
PENALTIES = np.logspace(-3, 3, 25)
"""Of squared weights, a checkpoint."""
POWERS = (0, 1, 2, 4)
"""Of a term's correlation with the score, by which it is multiplied before weights are penalised: 0 penalises all
alike, 4 hardly leaves those that do not follow the score."""
NUM_FOLDS = 10
NORMAL_LOGIT = 1.702
"""Times a normal deviate it is the logit of about the same probability."""


@dataclass(frozen=True)
class Line:
    """Compares by a weighted sum of the terms of normalised indicators."""

    form: Form
    weights: Floats
    """[terms]."""
    bulk: Floats
    """[2, indicators]; see `bulk`."""

    def logits(self, first: Floats, second: Floats) -> Floats:
        """[pairs]: of "the first is better", from normalised values [pairs, indicators]."""
        found: Floats = (terms(first, self.form, self.bulk) - terms(second, self.form, self.bulk)) @ self.weights
        return found

    def by_indicator(self, first: Floats, second: Floats) -> Floats:
        """[indicators]: what each adds to the logit of a pair, from values [indicators]; half of a product to each."""
        num = len(first)
        of_first, of_second = (terms(each[None], self.form, self.bulk)[0] for each in (first, second))
        parts = self.weights * (of_first - of_second)
        products = np.zeros((num, num))
        if self.form == "crossed":
            products[np.triu_indices(num, 1)] = parts[3 * num :]
        found: Floats = parts[: 3 * num].reshape(-1, num).sum(axis=0) + (products + products.T).sum(axis=1) / 2
        return found


def bulk(known: Floats) -> Floats:
    """[2, indicators]: the ends of where a line may bend, of normalised values [n, indicators] that it learns from."""
    found: Floats = np.quantile(np.nan_to_num(known), BULK, axis=0)
    return found


def terms(values: Floats, form: Form, ends: Floats) -> Floats:
    """[n, terms], kind by kind, from normalised values [n, indicators]; a missing one is 0.

    Args:
        values: as they are measured, normalised.
        form: which kinds there are.
        ends: [2, indicators], of the bulk of the values learnt from, beyond which each term goes on along its tangent.
    """
    known = np.nan_to_num(values)
    if form == "straight":
        return known
    near = np.clip(known, *ends)
    beyond = known - near
    saturated = np.tanh(near)
    kinds = [
        known,
        (saturated + (1 - saturated**2) * beyond) / 0.63,
        (near**2 + 2 * near * beyond) / math.sqrt(2),
    ]
    if form == "crossed":
        one, other = np.triu_indices(values.shape[1], 1)
        kinds.append(near[:, one] * known[:, other] + beyond[:, one] * near[:, other])
    return np.concatenate(kinds, axis=1)


def num_terms(form: Form, num: int) -> int:
    """So many weights a line of this form has, of so many indicators."""
    return {"straight": num, "curved": 3 * num, "crossed": 3 * num + num * (num - 1) // 2}[form]


def fit_line(known: Floats, scores: Floats, variants: Sequence[str]) -> Line:
    """By ridge regression of scores [n] on the terms of normalised values [n, indicators].

    Each term is multiplied by a power of its correlation with the score before (as the adaptive lasso of Huang, Ma
    & Zhang, 2008, weighs penalties by marginal regressions), so that many that tell nothing do not drown a few that do.
    Form, power and penalty are those by which variants are predicted best from the other ones, correlations and all.
    The difference of two rows' predictions, over the error e of such a difference, is a logit as of a normal
    distribution (1.7 d / e).
    """
    # Of a single variant nothing else can be learnt than what its own rows say.
    groups = variants if len(set(variants)) > 1 else list(map(str, range(len(scores))))
    forms = [form for form in get_args(Form) if form != "crossed" or known.shape[1] <= MAX_CROSSED]
    ends = bulk(known)
    errors = np.stack([_errors(terms(known, form, ends), scores, groups) for form in forms])
    doubts = (1 + DOUBT / len(set(groups))) ** np.arange(len(forms))
    best, place = np.unravel_index(int((doubts[:, None] * errors).argmin()), errors.shape)
    values = terms(known, forms[best], ends)
    weights = _ridges(values - values.mean(axis=0), scores - scores.mean())[place]
    return Line(forms[best], NORMAL_LOGIT * weights / max(math.sqrt(2 * errors[best, place]), SMALL), ends)


def folds(variants: Sequence[str], num: int) -> list[Flags]:
    """Rows [n] that each sets aside, of whole variants; no more folds than there are variants."""
    names, index = np.unique(np.asarray(variants, dtype=str), return_inverse=True)
    fold = np.random.default_rng(0).permutation(len(names)) % num
    return [fold[index] == number for number in range(min(num, len(names)))]


def _errors(values: Floats, scores: Floats, groups: Sequence[str]) -> Floats:
    """[powers * penalties]: mean squared error of predicting groups from the others, by terms [n, terms]."""
    predicted = np.zeros((len(scores), len(POWERS) * len(PENALTIES)))
    for out in folds(groups, NUM_FOLDS):
        means, mean = values[~out].mean(axis=0), scores[~out].mean()
        predicted[out] = mean + (values[out] - means) @ _ridges(values[~out] - means, scores[~out] - mean).T
    errors: Floats = ((scores[:, None] - predicted) ** 2).mean(axis=0)
    return errors


def _ridges(values: Floats, scores: Floats) -> Floats:
    """[powers * penalties, terms]: weights by each of `POWERS` and `PENALTIES`, of what has mean 0."""
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
