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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raysweep.analysis.derived import has_order
from raysweep.analysis.pairwise import SMALL, Credit, Floats, as_credit, signs

if TYPE_CHECKING:
    import pandas as pd

MAX_VALUES = 2**18
"""Of the matrices of pairs of variants that are solved at once, so that they stay in a cache."""
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


def credit(blocks: Sequence[Floats], scores: Floats, variants: Sequence[str], *, block: int | None = None) -> Credit:
    """[n, n]: 1 for each pair that the regression on other variants' scores orders rightly, 0 wrongly, 1/2 not at all.

    Args:
        blocks: of each config column its regressors [n, p], as of `design`; an intercept is added.
        scores: [n], finite.
        variants: of each checkpoint.
        block: the column whose part of the prediction decides; None: the whole of it.
    """
    fit = ridge(blocks)
    return credit_of(fit.hat, None if block is None else fit.part(block), scores, variants)


def credit_of(hat: Floats, part: Floats | None, scores: Floats, variants: Sequence[str]) -> Credit:
    """`credit` by the matrices of a regression: its own, and that of the part that decides, if not all does."""
    predicted = _left_two_out(hat, part, scores, variants)
    # What is nothing beside the scores is rounding, whatever their unit.
    ahead = predicted - predicted.T > SMALL * (np.ptp(scores) if len(scores) else 0.0)
    return as_credit((ahead.astype(np.float32) - ahead.T) * signs(scores))


def with_column(hat: Floats, column: Floats) -> Floats:
    """The matrix of the regression that has one more regressor [n]: by the inverse of a matrix in blocks."""
    left = column - hat @ column
    wider: Floats = hat + np.outer(left, left) / (column @ left + PENALTY)
    return wider


@dataclass(frozen=True)
class Ridge:
    """A ridge regression on blocks of columns by its matrices, from scores to fitted scores; made by `ridge`."""

    hat: Floats
    """[n, n]."""
    columns: tuple[Any, ...]
    """Of each block, sparse [n, p]."""
    coefficients: tuple[Floats, ...] | None
    """Of each block [p, n], from scores to its coefficients; None where there are many, which follow from the hat."""

    def part(self, block: int) -> Floats:
        """[n, n]: from scores to what a block adds to the fitted ones."""
        columns = self.columns[block]
        if self.coefficients is not None:
            return np.asarray(columns @ self.coefficients[block])
        # Where a penalised sum of squares is least, a coefficient times the penalty is its column times the residuals.
        return np.asarray(columns @ (columns.T @ (np.eye(len(self.hat)) - self.hat))) / PENALTY


def ridge(blocks: Sequence[Any]) -> Ridge:
    """Of the regressors [n, p] of each column, dense or sparse, and an intercept, which has no penalty."""
    from scipy.sparse import csr_array, hstack

    columns = tuple(map(csr_array, blocks))
    every = hstack(columns, format="csr")
    num, num_columns = every.shape
    if 2 * num_columns > num:
        return Ridge(_hat_by_rows(every), columns, None)
    full = np.concatenate([np.ones((num, 1)), every.toarray()], axis=1)
    penalty = np.diag([0.0] + [PENALTY] * num_columns)
    coefficients = np.linalg.solve(full.T @ full + penalty, full.T)
    starts = np.cumsum([1, *(each.shape[1] for each in columns)])[:-1]
    return Ridge(full @ coefficients, columns, tuple(np.split(coefficients, starts)[1:]))


def _hat_by_rows(columns: Any) -> Floats:
    """[n, n]: by the inverse of a matrix [n, n], as columns are many where one has a level for every row.

    With sparse regressors X [n, p] and A = X X' + penalty the residuals are penalty * A^-1 (scores - intercept), and
    sum to 0.
    """
    num = columns.shape[0]
    inverse = np.linalg.inv((columns @ columns.T).toarray() + PENALTY * np.eye(num))
    of_ones = inverse.sum(axis=1)
    hat: Floats = np.eye(num) - PENALTY * (inverse - np.outer(of_ones, of_ones) / of_ones.sum())
    return hat


def _left_two_out(hat: Floats, part: Floats | None, scores: Floats, variants: Sequence[str]) -> Floats:
    """[n, n]: the prediction for the row's checkpoint without its variant and the column's.

    Nothing is fitted anew: without rows B, the residuals there are r = (I - H_BB)^-1 (y - H y)_B, and what the part P
    of the smoother H predicts there is (P y)_B - P_BB r; all of it y_B - r. Where nothing is left to fit (two variants
    in all), all predictions are 0.
    """
    names, index, sizes = np.unique(np.asarray(variants, dtype=str), return_inverse=True, return_counts=True)
    if len(names) < 3:
        return np.zeros_like(hat)
    scores = scores - scores.mean()  # An offset is the intercept's, and would leave nothing but rounding.
    residual, fitted = scores - hat @ scores, scores if part is None else part @ scores
    if (sizes == 1).all():
        return _single_rows(hat, part, residual, fitted)
    # Rows of one variant side by side: what is read together then lies together.
    order = np.argsort(index, kind="stable")
    part = None if part is None else part[order].take(order, axis=1)
    predicted = _several_rows(hat[order].take(order, axis=1), part, residual[order], fitted[order], sizes)
    back = np.argsort(order)
    return predicted[back].take(back, axis=1)  # Row by row in memory, unlike what `[:, back]` gives.


def _single_rows(hat: Floats, part: Floats | None, residual: Floats, fitted: Floats) -> Floats:
    """`_left_two_out` of variants of one row each, whose blocks of two rows are inverted as such."""
    own = np.diag(hat)
    determinant = np.outer(1 - own, 1 - own) - hat * hat.T
    np.fill_diagonal(determinant, 1.0)  # Of a row with itself there is no block.
    mine: Floats = ((1 - own) * residual[:, None] + hat * residual) / determinant
    if part is None:
        return fitted[:, None] - mine
    return fitted[:, None] - np.diag(part)[:, None] * mine - part * mine.T


def _several_rows(hat: Floats, part: Floats | None, residual: Floats, fitted: Floats, sizes: np.ndarray) -> Floats:
    """`_left_two_out` of variants with so many rows, one after the other."""
    last, starts, most = len(hat), np.cumsum(sizes) - sizes, int(sizes.max())
    alone = starts[sizes == 1]
    own = np.ix_(alone, alone)
    predicted = np.zeros((last + 1, last + 1))
    predicted[own] = _single_rows(hat[own], None if part is None else part[own], residual[alone], fitted[alone])
    # Rows of each variant, one beyond the last where it has fewer than others: there H, P and the residual are 0.
    rows = np.where(np.arange(most) < sizes[:, None], starts[:, None] + np.arange(most), last)
    hat, part = np.pad(hat, (0, 1)), None if part is None else np.pad(part, (0, 1))
    residual, fitted = np.append(residual, 0.0), np.append(fitted, 0.0)
    # Each two variants once, for both ways round; and each with itself, whose rows are left out once.
    first, second = np.triu_indices(len(sizes))
    several = np.flatnonzero((sizes[first] > 1) | (sizes[second] > 1))
    for chosen in np.array_split(several, 1 + len(several) * 4 * most**2 // MAX_VALUES):
        ours, theirs = rows[first[chosen]], rows[second[chosen]]
        both = np.concatenate([ours, np.where((first == second)[chosen, None], last, theirs)], axis=1)
        cells = both[..., :, None] * (last + 1) + both[..., None, :]
        left = _residuals(hat.take(cells), residual[both])
        lost = left if part is None else (part.take(cells) @ left[..., None])[..., 0]
        of_ours, of_theirs = np.split(fitted[both] - lost, 2, axis=1)
        predicted[theirs[..., :, None], ours[..., None, :]] = of_theirs[..., None]
        # Last, as of a variant with itself only this is known.
        predicted[ours[..., :, None], theirs[..., None, :]] = of_ours[..., None]
    return predicted[:last, :last]


def _residuals(hat: Floats, residual: Floats) -> Floats:
    """[sets, rows]: of sets of rows that are left out, from H within each [sets, rows, rows] and residuals there."""
    # A padded row appears more than once in a set; its block is the identity's all the same, as H is 0 there.
    return np.asarray(np.linalg.solve(np.eye(hat.shape[1]) - hat, residual[..., None])[..., 0], dtype=np.float64)
