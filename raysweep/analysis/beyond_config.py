"""What an indicator tells beyond the configuration: added to a fit on it, and among pairs that differ in one axis.

An indicator may order checkpoints well only because it follows a setting, such as the learning rate, that the sweep
file tells for nothing. Two answers, which need not agree:

* *Added*: the regression of scores on all config columns (`baselines`) with the indicator as one more regressor, every
  pair being predicted without both its variants. Its pairs right minus those of the regression without it.
* *Matched*: pairs right among pairs that differ in a single axis of the sweep, so that no other can be told by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raysweep.analysis.baselines import Ridge, credit_of, design, ridge, with_column
from raysweep.analysis.derived import is_axis
from raysweep.analysis.pairwise import Credit, Flags, Floats, IntervalEstimate, mean_credit, of_one, signs
from raysweep.analysis.refits import Parts

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Matched:
    """Pairs right among pairs of one configuration but for an axis."""

    axis: str | None
    """The column in which the pairs differ; None: in none, as rows of a table that was given may."""
    num_pairs: int
    accuracy: IntervalEstimate


@dataclass(frozen=True)
class ConfigFit:
    """The regression of some checkpoints' scores on all config columns."""

    rows: Flags
    """[n]: the checkpoints that it is fitted on, of those that were given."""
    ridge: Ridge
    """[rows, rows]."""
    credit: Credit
    """[rows, rows]: of the configuration alone."""
    scores: Floats
    variants: tuple[str, ...]

    def credit_by(self, block: int | None) -> Credit:
        """[rows, rows]: by what a column adds to the prediction; None: by all of it."""
        if block is None:
            return self.credit
        return credit_of(self.ridge.hat, self.ridge.part(block), self.scores, self.variants)

    def gain(self, values: Floats, among: Flags) -> float:
        """What `values` [n] add to the pairs right among the pairs [n, n]; NaN where there is none."""
        hat = with_column(self.ridge.hat, values[self.rows])
        more = credit_of(hat, None, self.scores, self.variants) - self.credit
        return mean_credit(more, self.within(among) & ~np.eye(len(more), dtype=bool))

    def within(self, among: Flags) -> Flags:
        """[rows, rows]: of pairs [n, n] those of the rows that it is fitted on."""
        # Several times as fast as by `np.ix_`, and row by row in memory, as credit is, unlike `[:, rows]`.
        return among[self.rows].compress(self.rows, axis=1)


def config_fits(config: pd.DataFrame, scores: Floats, variants: Sequence[str], parts: Parts) -> list[ConfigFit]:
    """The fit on all checkpoints, and that on each part of them; none where there is no config column.

    Args:
        config: columns of the configuration, without missing values.
        scores: [n], finite.
        variants: of each checkpoint.
        parts: of the same checkpoints.
    """
    from scipy.sparse import csr_array

    if not len(config.columns) or not len(scores):
        return []
    blocks = [csr_array(design(config[name])) for name in config]
    names = np.asarray(variants, dtype=str)
    fits = []
    for rows in (np.ones(len(scores), dtype=bool), *parts.rows):
        fit, own = ridge([block[rows] for block in blocks]), tuple(names[rows])
        fits.append(ConfigFit(rows, fit, credit_of(fit.hat, None, scores[rows], own), scores[rows], own))
    return fits


def num_parameters(config: pd.DataFrame) -> int:
    """Of the regression on all columns of a configuration, that are no function of others."""
    blocks = [np.ones((len(config), 1)), *(design(config[name]) for name in config)]
    return int(np.linalg.matrix_rank(np.concatenate(blocks, axis=1)))


def added(fits: Sequence[ConfigFit], indicator: Floats, groups: np.ndarray, parts: Parts) -> IntervalEstimate:
    """What an indicator adds to the pairs right by the configuration, which are predicted without both variants.

    Its ranks are the regressor, so that its scale does not matter; a fit may turn its direction round. 0 for what
    follows from the configuration; below it for noise, which a fit on few variants takes for something.

    Args:
        fits: as `config_fits` gives them, of the same checkpoints.
        indicator: [n], finite.
        groups: [n]: equal numbers for checkpoints whose values compare, and whose pairs count.
        parts: those that the fits are of.
    """
    if not fits:
        return IntervalEstimate(np.nan)
    values, among = ranks_within(indicator, groups), of_one(groups)
    whole, *left = (fit.gain(values, among) for fit in fits)
    return parts.interval(whole, np.array(left), among, low=-1.0)


def ranks_within(values: Floats, groups: np.ndarray) -> Floats:
    """[n]: mid-ranks within each group, from -1 to 1; 0 for a member that is alone."""
    alike = of_one(groups)
    ahead = (signs(values) * alike).sum(axis=1).astype(np.float64)
    ranks: Floats = ahead / np.maximum(alike.sum(axis=1) - 1, 1)
    return ranks


def axes_of(config: pd.DataFrame) -> dict[str | None, Flags]:
    """Axis -> [n, n], the pairs that differ in it alone; None: those that differ in none. Only those with pairs.

    Columns that move together are one axis, under the first one's name.
    """
    codes: dict[tuple[int, ...], str] = {}
    for name in filter(is_axis, map(str, config.columns)):
        codes.setdefault(tuple(config[name].factorize()[0]), name)
    differ = {name: np.not_equal.outer(code, code) for code, name in codes.items()}
    num = np.zeros((len(config),) * 2, dtype=np.int16)
    for flags in differ.values():
        num += flags
    pairs: dict[str | None, Flags] = {name: flags & (num == 1) for name, flags in differ.items()}
    pairs[None] = (num == 0) & ~np.eye(len(config), dtype=bool)
    return {name: flags for name, flags in pairs.items() if flags.any()}


def matched(
    axes: dict[str | None, Flags], every: Flags, accuracy: Callable[[Flags], IntervalEstimate]
) -> tuple[Matched, ...]:
    """Pairs right among the pairs of each axis.

    Args:
        axes: as `axes_of` gives them.
        every: [n, n]: the pairs that count at all.
        accuracy: pairs [n, n] -> pairs right among these.
    """
    found = []
    for axis, pairs in axes.items():
        num = int((every & pairs).sum()) // 2
        if num:
            found.append(Matched(axis, num, accuracy(pairs)))
    return tuple(found)
