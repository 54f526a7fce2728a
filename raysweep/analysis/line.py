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
"""What the line is linear in: indicators; these, their hyperbolic tangents and squares; and products of two as well."""
DOUBT = 8.0
"""A form's error has to be less by this over the number of variants, as a share, to be taken in place of the one before
it: of few variants a bend fits the noise of some. With none, straight worlds of 36 variants are 0.4 points worse."""
MAX_CROSSED = 10
"""Indicators of which products are tried: of more there are more products than anything can be told of."""
FAR = 3.0
"""Standard deviations beyond which squares and products no longer rise: so far there was nothing to learn from."""
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

    def logits(self, first: Floats, second: Floats) -> Floats:
        """[pairs]: of "the first is better", from normalised values [pairs, indicators]."""
        found: Floats = (terms(first, self.form) - terms(second, self.form)) @ self.weights
        return found

    def by_indicator(self, first: Floats, second: Floats) -> Floats:
        """[indicators]: what each adds to the logit of a pair, from values [indicators]; half of a product to each."""
        num = len(first)
        parts = self.weights * (terms(first[None], self.form) - terms(second[None], self.form))[0]
        products = np.zeros((num, num))
        if self.form == "crossed":
            products[np.triu_indices(num, 1)] = parts[3 * num :]
        found: Floats = parts[: 3 * num].reshape(-1, num).sum(axis=0) + (products + products.T).sum(axis=1) / 2
        return found


def terms(values: Floats, form: Form) -> Floats:
    """[n, terms], kind by kind, of about variance 1, from normalised values [n, indicators]; a missing one is 0."""
    known = np.nan_to_num(values)
    if form == "straight":
        return known
    near = np.clip(known, -FAR, FAR)
    kinds = [known, np.tanh(known) / 0.63, np.square(near) / math.sqrt(2)]
    if form == "crossed":
        first, second = np.triu_indices(values.shape[1], 1)
        kinds.append(near[:, first] * near[:, second])
    return np.concatenate(kinds, axis=1)


def num_terms(form: Form, num_indicators: int) -> int:
    """So many weights a line of this form has."""
    return len(terms(np.zeros((1, num_indicators)), form)[0])


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
    errors = np.stack([_errors(terms(known, form), scores, groups) for form in forms])
    doubts = (1 + DOUBT / len(set(groups))) ** np.arange(len(forms))
    best, place = np.unravel_index(int((doubts[:, None] * errors).argmin()), errors.shape)
    values = terms(known, forms[best])
    weights = _ridges(values - values.mean(axis=0), scores - scores.mean())[place]
    return Line(forms[best], NORMAL_LOGIT * weights / max(math.sqrt(2 * errors[best, place]), SMALL))


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
