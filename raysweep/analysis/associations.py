"""How well each indicator orders the checkpoints as the target does, beside what the sweep file alone tells."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from raysweep.analysis.bases import Groups, bases_of, whole_bases, within_bases
from raysweep.analysis.beyond_config import ConfigFit, Matched, added, axes_of, config_fits, matched, num_parameters
from raysweep.analysis.derived import SEED, has_order, is_config, moved_together
from raysweep.analysis.gaps import (
    GapAccuracy,
    GapPairs,
    OnPairs,
    by_gap,
    chance_within,
    gap_pairs,
    target_gaps,
    target_ranges,
)
from raysweep.analysis.objectives import loss_groups
from raysweep.analysis.pairwise import (
    MIN_CROSSED,
    Clusters,
    Comparison,
    Flags,
    Floats,
    IntervalEstimate,
    PairCounts,
    clusters_of,
    compare,
    comparison,
    credit_left,
    credit_within,
    interval,
    interval_of_pairs,
    kendall,
    mean_credit,
    of_one,
    spearman,
)
from raysweep.analysis.refits import Parts, parts_of
from raysweep.analysis.selection import Halves, Selection, halves, select
from raysweep.scores import Column
from raysweep.spec import Direction

if TYPE_CHECKING:
    import pandas as pd

TOGETHER = "all together"
"""The baseline of all config columns at once."""

NO_ESTIMATE = IntervalEstimate(math.nan)


@dataclass(frozen=True)
class Association:
    """How well one indicator orders the checkpoints as the target does; all statistics positive for agreement."""

    indicator: str
    source: Literal["measured", "config"]
    """config: known from the sweep file alone, the baseline that a measured indicator has to beat."""
    direction: Direction | None
    """Which values are better: declared for what is measured; for config, how scores went; None where words decide."""
    num_checkpoints: int
    num_missing: int
    """Scored checkpoints left out, for want of the indicator."""
    accuracy: IntervalEstimate
    """Share of pairs ordered as by the target, ties half; a config column by its levels on other variants.

    NaN where no two checkpoints compare by it, as by the losses of different objectives.
    """
    clear_accuracy: IntervalEstimate
    """The same over pairs whose target difference is clear; NaN where errors of the target are not known."""
    spearman: IntervalEstimate
    """NaN for config, whose order is another one for every pair, and where not all checkpoints compare."""
    kendall: IntervalEstimate
    gain: IntervalEstimate
    """`accuracy` minus that of `baseline`, on the same pairs of checkpoints."""
    baseline: str | None
    """The config row that orders most of these pairs right; None where the best one was known of other checkpoints."""
    added: IntervalEstimate
    """What it adds to the pairs right by a fit on all config columns, see `beyond_config`; NaN for config."""
    matched: tuple[Matched, ...]
    """Pairs right among those that differ in one axis of the sweep alone; of a config column, in its own."""
    by_gap: tuple[GapAccuracy, ...]
    """Pairs right by how far the pair differs in another column; none for config."""
    by_target_gap: tuple[GapAccuracy, ...]
    """Pairs right by fifths of the pairs, from those that differ least in the target on."""
    chance_within: GapAccuracy | None
    """The widest range of small differences in the target in which it is not shown to be better than chance; None where
    it is in all, or no interval is known."""
    selection: tuple[Selection, ...]
    """What fine-tuning only those that it puts first is worth; none where not all checkpoints compare by it."""
    pairs: PairCounts
    same_order_as: str | None
    """An indicator listed before, with the same order of the same checkpoints (perplexity and its loss)."""


@dataclass(frozen=True)
class _Row:
    association: Association
    have: Flags
    """[n]: the checkpoints that the indicator was measured on."""
    groups: Groups
    """[have]: equal numbers for those whose values are of one quantity and one base, and so compare."""
    accuracy: Mapping[bytes, tuple[float, Floats]]
    """Groups, as bytes -> its accuracy on pairs within these, and [parts] the same on each of the parts.

    Of a measured indicator by its own groups; of a config column by those of all measured ones.
    """
    parts: Parts
    order: Hashable
    """The same for indicators that order the same checkpoints alike."""
    compares_all: bool
    """Whether all values are of one quantity, if of several bases."""


def associate(
    table: pd.DataFrame,
    *,
    target: str,
    clear: Flags,
    columns: Mapping[str, Column],
    gaps_of: str | None = None,
    groups: Groups | None = None,
) -> tuple[tuple[Association, ...], dict[str, str]]:
    """Indicators, best first, and of each column that is none, why.

    Args:
        table: the rows of a checkpoint table that have a target.
        clear: [rows, rows], pairs whose target difference is clear.
        columns: what its metric columns are, by name; those of fine-tuning are no indicators.
        gaps_of: a column of numbers, by whose differences pairs are looked at apart.
        groups: [rows]: equal numbers for rows whose targets are of one quantity; only pairs of these count. None: all.
    """
    groups = np.zeros(len(table), dtype=np.int64) if groups is None else groups
    table = table.assign(**{target: _beside_others(numbers(table[target]), groups)})
    measured: dict[str, Column] = {}
    skipped, config = {}, []
    together = moved_together(table)
    for name in map(str, table.columns):
        column = columns.get(name)
        direction = column.metric.direction if column else None
        if name == target or (column and column.kind == "sft"):
            continue
        if name == SEED:
            if table[name].nunique() > 1:
                skipped[name] = "pairs are of one seed each"
            continue
        if not direction and not is_config(name):
            if "/" in name and column is None:
                skipped[name] = "no stage of this run declares it"
        elif name in together:
            skipped[name] = together[name]
        elif table[name].nunique() < 2:
            skipped[name] = "fewer than two different values"
        elif column and direction:
            measured[name] = column
        else:
            config.append(name)
    whole = [name for name in config if table[name].notna().all()]
    gaps = _gaps(table, gaps_of, columns.get(gaps_of)) if gaps_of else []
    # No row of its own, but in all fits: what a seed adds to all of its checkpoints is no other setting's doing.
    seed = [SEED] * (SEED in skipped)
    fitted = [*seed, *whole]
    shared = _Shared(table, fitted, [*seed, *config], target=target, gaps=gaps, groups=groups)
    # By the checkpoints that have one, all of them last, as of a config column: what these share is kept of one set.
    have = {name: np.isfinite(numbers(table[name])) for name in measured}
    rows = [
        _measured(table, name, measured[name], target=target, clear=clear, shared=shared)
        for name in sorted(measured, key=lambda name: (bool(have[name].all()), have[name].tobytes()))
    ]
    given: Any = {"target": target, "clear": clear, "shared": shared, "measured": tuple(rows)}
    rows += [_config(table, name, fitted, **given) for name in (*whole, *([TOGETHER] if len(whole) > 1 else []))]
    rows += [_config(table, name, [*fitted, name], **given) for name in config if name not in whole]
    return _ordered(rows), skipped


class _Shared:
    """What indicators of the same checkpoints have in common, made once: of a table whose rows all have a target."""

    def __init__(
        self,
        table: pd.DataFrame,
        config: Sequence[str],
        settings: Sequence[str],
        *,
        target: str,
        gaps: Sequence[GapPairs],
        groups: Groups,
    ) -> None:
        self.groups = groups
        self._table, self._config, self._settings, self._target = table, list(config), list(settings), target
        self._bases = bases_of(table)
        # Of all checkpoints, so that the ranges are the same for an indicator with missing values.
        self._gaps = gaps
        scores, groups = numbers(table[target]), within_bases(groups, self._bases)
        comparable = of_one(groups)
        self._target_gaps, self._target_ranges = target_gaps(scores, comparable), target_ranges(scores, comparable)
        self._known: tuple[bytes, _Alike] | None = None

    def of(self, have: Flags) -> _Alike:
        """Of the checkpoints [n] that `have` marks; kept until others are asked for."""
        key = have.tobytes()
        if self._known is None or self._known[0] != key:
            self._known = None  # Before there is another: a fit on each part is large.
            rows = self._table[have]
            config, variants = rows[self._config], list(rows["variant"])
            # Also of settings that are missing elsewhere: that of some optimizers is in the fit on their checkpoints.
            settings = rows[self._settings].dropna(axis="columns")
            parts = parts_of(variants, num_parameters=num_parameters(settings))
            bases = self._bases[have]
            whole = whole_bases(bases, variants)
            # How all variants go in a base is not told by one that has a few of them, nor is one chosen from these.
            in_whole = np.any(whole, axis=0)
            enough = len(whole) >= MIN_CROSSED
            alike = _Alike(
                clusters=clusters_of(variants),
                bases=bases,
                crossed=clusters_of(list(map(str, bases)), among=in_whole) if enough else None,
                parts=parts,
                config=tuple(self._config),
                fits=config_fits(config, numbers(rows[self._target]), variants, parts),
                axes=axes_of(config),
                gaps=_among(have, self._gaps),
                target_gaps=_among(have, self._target_gaps),
                target_ranges=_among(have, self._target_ranges),
                drawn=halves(variants, among=in_whole),
            )
            self._known = key, alike
        return self._known[1]


@dataclass(frozen=True)
class _Alike:
    """Of some checkpoints: bases, parts, fits on the configuration of each, pairs by axis and by gaps, and halves."""

    clusters: Clusters
    """Variants."""
    bases: Groups
    crossed: Clusters | None
    """Bases that have nearly all variants; None of too few."""
    parts: Parts
    config: tuple[str, ...]
    """The columns of the fits."""
    fits: list[ConfigFit]
    axes: dict[str | None, Flags]
    gaps: list[GapPairs]
    target_gaps: list[GapPairs]
    target_ranges: list[GapPairs]
    drawn: Halves


def _beside_others(scores: Floats, groups: Groups) -> Floats:
    """[n]: less the mean of the group, between which no pair counts: differences of groups would be noise in a fit.

    Where two variants are left out, what is left knows no more of their scores than the sum of the two.
    """
    names, index = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        return scores
    means: Floats = np.bincount(index, weights=scores) / np.bincount(index)
    return scores - means[index]


def _among(have: Flags, gaps: Sequence[GapPairs]) -> list[GapPairs]:
    if have.all():  # No second copy of as many pairs.
        return list(gaps)
    return [replace(each, pairs=each.pairs[np.ix_(have, have)]) for each in gaps]


def _measured(table: pd.DataFrame, name: str, column: Column, *, target: str, clear: Flags, shared: _Shared) -> _Row:
    direction, values = column.metric.direction, numbers(table[name])
    have = np.isfinite(values)
    # Of one number where both the indicator's values and the targets are of one quantity.
    losses = within_bases(loss_groups(table[have], column), shared.groups[have])
    alike = shared.of(have)
    groups = within_bases(losses, alike.bases)
    scores, oriented = numbers(table[target])[have], values[have] * (-1 if direction == "min" else 1)
    pairs = compare(oriented, scores, clear=clear[np.ix_(have, have)], comparable=of_one(groups))
    clusters, crossed = alike.clusters, alike.crossed

    def estimate(statistic: Callable[[Clusters], tuple[float, Floats]], low: float = 0.0) -> IntervalEstimate:
        return interval(*statistic(clusters), crossed=statistic(crossed)[1] if crossed else None, low=low)

    def on(among: Flags) -> IntervalEstimate:
        return estimate(partial(credit_left, pairs.credit, pairs.every & among))

    def of_fixed(among: Flags) -> IntervalEstimate:
        return interval_of_pairs(pairs.credit, pairs.every & among, clusters)

    row = _Row(
        _association(name, "measured", direction, pairs, have=have),
        have=have,
        groups=groups,
        accuracy={
            groups.tobytes(): (
                mean_credit(pairs.credit, pairs.every),
                credit_within(pairs.credit, pairs.every, alike.parts.rows),
            )
        },
        parts=alike.parts,
        order=("measured", tuple(_places(oriented, have)), groups.tobytes()),
        compares_all=len(set(losses)) < 2,
    )
    counted = _counted(pairs.every, on)
    association = replace(
        row.association,
        accuracy=on(pairs.every),
        clear_accuracy=on(pairs.clear),
        # Ranks among all checkpoints say nothing where some do not compare.
        spearman=estimate(partial(spearman, oriented, scores, among=pairs.every), low=-1.0)
        if row.compares_all
        else NO_ESTIMATE,
        kendall=estimate(partial(kendall, oriented, scores, among=pairs.every), low=-1.0),
        added=added(alike.fits, oriented, groups, alike.parts),
        matched=matched(alike.axes, pairs.every, of_fixed),
        by_gap=by_gap(alike.gaps, counted),
        by_target_gap=by_gap(alike.target_gaps, counted),
        chance_within=chance_within(alike.target_ranges, counted),
        selection=tuple(select(oriented, scores, alike.drawn, alike.bases)) if row.compares_all else (),
    )
    return replace(row, association=association)


def _gaps(table: pd.DataFrame, name: str, column: Column | None) -> list[GapPairs]:
    """Pairs by their difference in a column, of one loss and base each; a loss in nats differs as it is."""
    values, bases = numbers(table[name]), bases_of(table)
    if column is None:
        return gap_pairs(values, bases)
    # The perplexity, whose logarithm it is, as differences of positive numbers are of logarithms.
    scaled = np.exp(values) if column.metric.unit == "nats/token" else values
    return gap_pairs(scaled, within_bases(loss_groups(table, column), bases))


def _counted(every: Flags, accuracy: Callable[[Flags], IntervalEstimate]) -> OnPairs:
    """With the number of pairs that count."""

    def on(among: Flags) -> tuple[int, IntervalEstimate]:
        num = int(np.count_nonzero(every & among)) // 2
        return num, accuracy(among) if num else NO_ESTIMATE

    return on


def _config(
    table: pd.DataFrame,
    name: str,
    columns: Sequence[str],
    *,
    target: str,
    clear: Flags,
    shared: _Shared,
    measured: Sequence[_Row],
) -> _Row:
    """By the scores of other variants: from what one of the columns adds to a fit on them, or from all of it."""
    have: Flags = table[list(columns)].notna().all(axis=1).to_numpy(dtype=bool)
    there = table[have]
    scores, variants = numbers(there[target]), list(there["variant"])
    alike = shared.of(have)
    own = within_bases(shared.groups[have], alike.bases)
    fits, parts = alike.fits, alike.parts
    if tuple(columns) != alike.config:
        fits = config_fits(there[list(columns)], scores, variants, parts)
    # Of all checkpoints, and of each part.
    credits = [fit.credit_by(None if name == TOGETHER else columns.index(name)) for fit in fits]
    undecided = (credits[0] == 0.5) & (scores[:, None] != scores)
    pairs = comparison(
        credits[0],
        scores,
        clear=clear[np.ix_(have, have)],
        comparable=of_one(own),
        undecided=undecided,
    )

    def accuracy(among: Flags) -> tuple[float, Floats]:
        counted = pairs.every & among
        whole, *left = (mean_credit(each, fit.within(counted)) for each, fit in zip(credits, fits, strict=True))
        return whole, np.array(left)

    def on(among: Flags) -> IntervalEstimate:
        return parts.interval(*accuracy(among), pairs.every & among)

    direction: Direction | None = None
    if name != TOGETHER and has_order(there[name]) and there[name].nunique() > 1:
        rising = kendall(numbers(there[name]), scores, alike.clusters, among=pairs.every)[0] >= 0
        direction = "max" if rising else "min"
    counted = _counted(pairs.every, on)
    axes = {axis: flags for axis, flags in axes_of(there[list(columns)]).items() if name in (axis, TOGETHER)}
    association = replace(
        _association(name, "config", direction, pairs, have=have),
        accuracy=on(pairs.every),
        matched=matched(axes, pairs.every, on),
        by_target_gap=by_gap(alike.target_gaps, counted),
        chance_within=chance_within(alike.target_ranges, counted),
        clear_accuracy=on(pairs.clear),
    )
    # By the groups of those that this may be the baseline of.
    alike_groups = {row.groups.tobytes(): row.groups for row in measured if (row.have == have).all()}
    return _Row(
        association,
        have=have,
        groups=own,
        accuracy={key: accuracy(of_one(groups)) for key, groups in alike_groups.items()},
        parts=parts,
        order=("config", have.tobytes(), sha256(pairs.credit.tobytes()).digest()),
        compares_all=True,
    )


def without_clear(association: Association) -> Association:
    """As it is where errors of the target are not known: no pair is clear of them, or all are, which tells nothing."""
    pairs = replace(association.pairs, num_within_noise=None, num_clear=None)
    return replace(association, clear_accuracy=NO_ESTIMATE, pairs=pairs)


def _association(
    name: str,
    source: Literal["measured", "config"],
    direction: Direction | None,
    pairs: Comparison,
    *,
    have: Flags,
) -> Association:
    """An association whose statistics are still to be estimated."""
    return Association(
        indicator=name,
        source=source,
        direction=direction,
        num_checkpoints=int(have.sum()),
        num_missing=int((~have).sum()),
        accuracy=NO_ESTIMATE,
        clear_accuracy=NO_ESTIMATE,
        spearman=NO_ESTIMATE,
        kendall=NO_ESTIMATE,
        gain=NO_ESTIMATE,
        baseline=None,
        added=NO_ESTIMATE,
        matched=(),
        by_gap=(),
        by_target_gap=(),
        chance_within=None,
        selection=(),
        pairs=pairs.counts,
        same_order_as=None,
    )


def _ordered(rows: Sequence[_Row]) -> tuple[Association, ...]:
    """Best first, with the gain over the best config baseline, and repetitions of an order marked."""
    rows = sorted(rows, key=_place_in_order)
    config = [row for row in rows if row.association.source == "config"]
    seen: dict[Hashable, str] = {}
    ordered = []
    for row in rows:
        association = replace(row.association, same_order_as=seen.get(row.order))
        if association.source == "measured" and (baseline := _baseline(row, config)):
            ours, theirs = (each.accuracy[row.groups.tobytes()] for each in (row, baseline))
            among = of_one(row.groups)
            gain = row.parts.interval(ours[0] - theirs[0], ours[1] - theirs[1], among, low=-1.0)
            association = replace(association, gain=gain, baseline=baseline.association.indicator)
        ordered.append(association)
        seen.setdefault(row.order, association.indicator)
    return tuple(ordered)


def _baseline(row: _Row, config: Sequence[_Row]) -> _Row | None:
    """Of config rows, best first, the one that orders most of the pairs right that an indicator orders."""
    # Over other checkpoints than the indicator's, a difference would compare two things at once.
    if not config or (config[0].have != row.have).any():
        return None
    if row.compares_all:
        return config[0]
    # What tells objectives apart may be best over all pairs, and say nothing of those within one.
    alike = [each for each in config if (each.have == row.have).all()]
    return max(alike, key=lambda each: each.accuracy[row.groups.tobytes()][0])


def _place_in_order(row: _Row) -> tuple[bool, float, str]:
    """Sorts by falling accuracy, an unknown one last, and equal ones by name."""
    accuracy = row.association.accuracy.value
    return math.isnan(accuracy), -accuracy, row.association.indicator


def numbers(column: pd.Series) -> Floats:
    """[n], NaN where one is missing."""
    return np.array(column.astype("Float64").to_numpy(na_value=math.nan), dtype=np.float64)


def _places(oriented: Floats, have: Flags) -> list[int]:
    """Of every checkpoint, best first, equal values sharing a place; -1 where the indicator was not measured."""
    places = np.full(len(have), -1)
    places[have] = np.unique(-oriented, return_inverse=True)[1]
    return [int(place) for place in places]
