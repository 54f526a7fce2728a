"""What the sweep file alone tells of the scores: the baseline that a measured indicator has to beat.

A config column (an optimizer by name, a learning rate, a step) has no declared direction, and words have no order. So
its levels are given the order of their scores on *other* variants: for a pair of checkpoints, a ridge regression of the
scores is fitted without both their variants, and the pair ordered by what the column adds to its prediction. Without
both, since a mean that leaves out only the one predicted is low where that one is high, and would be wrong more often
than a coin. On all columns at once, since a grid is no longer balanced without two of its variants: means by the levels
of one column would tell of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from raysweep.analysis.derived import has_order
from raysweep.analysis.pairwise import SMALL, Floats

if TYPE_CHECKING:
    import pandas as pd

MAX_VALUES = 2**21
"""Of the matrices of pairs of variants that are solved at once."""

PENALTY = 1e-3
"""On squared coefficients: no more than decides where columns or levels cannot be told apart. At 1, what is taken from
the effect of one column would be found in another, in grids of few variants."""


def design(column: pd.Series) -> Floats:
    """A config column without missing values as regressors [n, p]: its levels, and its rank where they have an order.

    The rank tells of values between and beyond those of other variants; levels tell where scores are not monotonic.
    """
    import pandas as pd

    codes, levels = pd.factorize(column, sort=True)
    parts = [(codes[:, None] == np.arange(len(levels))).astype(np.float64)]
    if len(column) and has_order(column):
        ranks = column.rank().to_numpy(dtype=np.float64)
        parts.append((ranks[:, None] - ranks.mean()) / max(float(ranks.std()), SMALL))
    return np.concatenate(parts, axis=1)


def credit(blocks: Sequence[Floats], scores: Floats, variants: Sequence[str], *, block: int | None = None) -> Floats:
    """[n, n]: 1 for each pair that the regression on other variants' scores orders rightly, 0 wrongly, 1/2 not at all.

    Args:
        blocks: of each config column its regressors [n, p], as of `design`; an intercept is added.
        scores: [n], finite.
        variants: of each checkpoint.
        block: the column whose part of the prediction decides; None: the whole of it.
    """
    return credit_of(*smoothers(blocks, block), scores, variants)


def credit_of(hat: Floats, part: Floats, scores: Floats, variants: Sequence[str]) -> Floats:
    """`credit` by the matrices of a regression, as `smoothers` gives them."""
    predicted = _left_two_out(hat, part, scores, variants)
    lead = predicted - predicted.T
    # What is nothing beside the scores is rounding, whatever their unit.
    lead[np.abs(lead) < SMALL * (np.ptp(scores) if len(scores) else 0.0)] = 0.0
    return (1 + np.sign(lead) * np.sign(scores[:, None] - scores)) / 2


def with_column(hat: Floats, column: Floats) -> Floats:
    """The matrix of the regression that has one more regressor [n]: by the inverse of a matrix in blocks."""
    left = column - hat @ column
    wider: Floats = hat + np.outer(left, left) / (column @ left + PENALTY)
    return wider


def smoothers(blocks: Sequence[Floats], block: int | None) -> tuple[Floats, Floats]:
    """The ridge's matrices [n, n] from scores to fitted scores, and to what `block` adds to these.

    The intercept has no penalty.
    """
    if not len(blocks[0]):  # Without its only variant, nothing is left of a sweep.
        return np.zeros((0, 0)), np.zeros((0, 0))
    full = np.concatenate([np.ones((len(blocks[0]), 1)), *blocks], axis=1)
    penalty = np.diag([0.0] + [PENALTY] * (full.shape[1] - 1))
    coefficients = np.linalg.solve(full.T @ full + penalty, full.T)
    ends = np.cumsum([1, *(each.shape[1] for each in blocks)])
    columns = slice(None) if block is None else slice(ends[block], ends[block + 1])
    return full @ coefficients, full[:, columns] @ coefficients[columns]


def _left_two_out(hat: Floats, part: Floats, scores: Floats, variants: Sequence[str]) -> Floats:
    """[n, n]: the prediction for the row's checkpoint without its variant and the column's.

    Nothing is fitted anew: without rows B, the residuals there are r = (I - H_BB)^-1 (y - H y)_B, and what the part P
    of the smoother H predicts there is (P y)_B - P_BB r. Where nothing is left to fit (two variants in all), all
    predictions are 0.
    """
    names, index, sizes = np.unique(np.asarray(variants, dtype=str), return_inverse=True, return_counts=True)
    predicted = np.zeros_like(hat)
    if len(names) < 3:
        return predicted
    residual, fitted = scores - hat @ scores, part @ scores
    alone = np.flatnonzero(sizes[index] == 1)
    own = np.ix_(alone, alone)
    predicted[own] = _single_rows(hat[own], part[own], residual[alone], fitted[alone])
    if len(alone) == len(scores):
        return predicted
    # Rows of each variant, one beyond the last where it has fewer than others: there H, P and the residual are 0.
    last = len(scores)
    rows = np.full((len(names), int(sizes.max())), last)
    order = np.argsort(index, kind="stable")
    rows[index[order], np.arange(last) - np.repeat(np.cumsum(sizes) - sizes, sizes)] = order
    padded, parts = np.pad(hat, (0, 1)), np.pad(part, (0, 1))
    residual, fitted = np.append(residual, 0.0), np.append(fitted, 0.0)
    predicted = np.pad(predicted, (0, 1))
    several = np.flatnonzero(sizes > 1)
    size = max(1, MAX_VALUES // (len(names) * 4 * rows.shape[1] ** 2))
    for start in range(0, len(several), size):
        chosen = several[start : start + size]
        both = np.concatenate(np.broadcast_arrays(rows[chosen, None], rows[None]), axis=2)
        both[np.arange(len(chosen)), chosen, rows.shape[1] :] = last  # A variant's rows are left out once.
        left = _residuals(padded, residual, both)
        lost = (parts[both[..., :, None], both[..., None, :]] @ left[..., None])[..., 0]
        of_own, of_others = np.split(fitted[both] - lost, 2, axis=2)
        predicted[rows[None, :, :, None], rows[chosen, None, None, :]] = of_others[..., None]
        # Last, as of a variant with itself only this is known.
        predicted[rows[chosen, None, :, None], rows[None, :, None, :]] = of_own[..., None]
    return predicted[:last, :last]


def _single_rows(hat: Floats, part: Floats, residual: Floats, fitted: Floats) -> Floats:
    """`_left_two_out` of variants of one row each, whose blocks of two rows are inverted as such."""
    hat = hat - np.diag(own := np.diag(hat))
    determinant = np.outer(1 - own, 1 - own) - hat * hat.T
    np.fill_diagonal(determinant, 1.0)  # Of a row with itself there is no block.
    mine = ((1 - own) * residual[:, None] + hat * residual) / determinant
    predicted: Floats = fitted[:, None] - np.diag(part)[:, None] * mine - part * mine.T
    return predicted


def _residuals(hat: Floats, residual: Floats, rows: np.ndarray) -> Floats:
    """[..., rows]: of each set of rows, when it is left out."""
    blocks = np.eye(rows.shape[-1]) - hat[rows[..., :, None], rows[..., None, :]]
    # A padded row appears more than once in a set; its block is the identity's all the same, as H is 0 there.
    left: Floats = np.linalg.solve(blocks, residual[rows][..., None])[..., 0]
    return left
