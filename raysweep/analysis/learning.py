"""Comparers of a table's targets, and how well they compare variants that they have not seen, beside the configuration.

What a learner gains over a single indicator may be the configuration, told by way of many indicators. So the same
learner is given the configuration alone, and both; and importances are those of both together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from raysweep.analysis.associations import numbers
from raysweep.analysis.baselines import design
from raysweep.analysis.bases import Groups, bases_of
from raysweep.analysis.comparer import CompareError, Comparer, check_enough, grow, importances, learn
from raysweep.analysis.defects import collapsed_rows, copied_rows, leaks
from raysweep.analysis.derived import SEED, is_axis, is_config
from raysweep.analysis.earlier import is_of_training
from raysweep.analysis.pair_features import fit_scale, normalised
from raysweep.analysis.pairwise import Floats, IntervalEstimate, of_one
from raysweep.analysis.ranking import Ranking, check_compares, of_task, tasks_beside
from raysweep.analysis.unseen import (
    MIN_TRAINED,
    Split,
    Unseen,
    as_it_is,
    differences_over_splits,
    far_from,
    gain_over,
    learner,
    leave_group_out,
    on_unseen,
    over_splits,
    random_splits,
    shares_as_it_is,
)
from raysweep.scores import Column
from raysweep.validation import suggested

if TYPE_CHECKING:
    import pandas as pd

MAX_GROUPS = 12
"""An axis of more values than these is left out value by value no more than it is at random."""


NUM_BEST = (1, 3, 10)
"""Indicators that rank averages are of, beside that of all."""


@dataclass(frozen=True)
class RankAverage:
    """Pairs right by the mean of the checkpoints' ranks by some indicators: nothing but which they are is learnt."""

    accuracy: IntervalEstimate
    gain: IntervalEstimate | None
    """Over the learner of the configuration alone, on the same splits; None where there is none."""


@dataclass(frozen=True)
class Tested:
    """Pairs right on unseen variants, of learners of one target."""

    target: str
    num_checkpoints: int
    """Those tested on; learnt from are these without `rows_not_learnt_from`."""
    num_variants: int
    left_out: tuple[str, ...]
    """Indicators that the ranking flags as leaks of the target."""
    without: tuple[str, ...]
    """Indicators that were to be left out."""
    incomplete: Mapping[str, int]
    """Indicator that is left out -> checkpoints without a value. Which these are may follow from the configuration, as
    where objectives have no such number: what is missing would then tell it, by the name of an indicator."""
    rows_left_out: Mapping[str, str]
    """Checkpoint -> the flag by which it is a copy of another, and neither learnt from nor tested on."""
    rows_not_learnt_from: Mapping[str, str]
    """Checkpoint -> the flag by which an indicator in use has collapsed; it is tested on, as it would be met."""
    indicators: Unseen
    config: Unseen | None
    """Of the configuration alone; None where there is none."""
    both: Unseen | None
    gain: IntervalEstimate | None
    """`both` minus `config`, on the same splits."""
    single: Mapping[str, IntervalEstimate]
    """Each indicator as it is, on the same splits."""
    rank_averages: Mapping[str, RankAverage]
    """On the same splits: `all indicators`, and of the `best 3` those that have most pairs of the training split right,
    each in its declared direction."""
    without_group: Mapping[str, Unseen]
    """Axis -> with all variants of one of its values left out at a time, tested among these."""
    other_targets: Unseen | None
    """Learnt from the mean of the `others`, tested on this one; None where there is no other."""
    others: tuple[str, ...]
    """Targets of which none has a task of this one: of a task the other tasks, of a family the other families."""
    importances: Mapping[str, float]
    """Indicator or config column -> share of the gain of the splits of the trees of a learner of both. The line beside
    them, which is a part of a comparer, has none in it."""


@dataclass(frozen=True)
class Learnt:
    """What a ranking's table teaches of one target."""

    comparer: Comparer
    tested: Tested


def indicators_named(rankings: Sequence[Ranking], names: Sequence[str]) -> set[str]:
    """The indicators of some rankings that are meant by names, or by beginnings before a slash, such as early_sft.

    One that is skipped, as it does not vary among the rows of a ranking, is known all the same.

    Raises:
        CompareError: if a name means none.
    """
    known = {item.indicator for each in rankings for item in each.associations if item.source == "measured"}
    known |= {name for each in rankings for name in each.skipped if not is_config(name)}
    found = {name: {each for each in known if f"{each}/".startswith(f"{name}/")} for name in names}
    if unknown := [name for name, meant in found.items() if not meant]:
        heads = sorted({each.partition("/")[0] for each in known})
        called = suggested(unknown[0], heads, "names or beginnings of names are", also=sorted(known))
        raise CompareError(f"--without {unknown[0]!r}: no indicator is called so{called}")
    return set().union(*found.values())


def targets_of(ranking: Ranking, columns: Sequence[Column]) -> dict[str, tuple[str, ...]]:
    """What a table has comparers of: what it is ranked by, and the same of each family and task.

    Of each the other tasks, or the families without any of its tasks, which can be learnt from in its place.
    """
    own = tasks_beside(ranking.target, ranking.tasks)
    metric = ranking.target.rpartition("/")[2]
    families = {
        column.name: {*column.tasks}
        for column in columns
        if column.tasks and column.metric.name == metric and {*column.tasks} <= {*own}
    }
    targets: dict[str, tuple[str, ...]] = {ranking.target: ()}
    for group in (families, {of_task(ranking.target, task): {task} for task in own}):
        there = {name: tasks for name, tasks in group.items() if name in ranking.checkpoints}
        for name, tasks in there.items():
            targets[name] = tuple(other for other, of in there.items() if not of & tasks)
    return targets


def learn_target(ranking: Ranking, *, others: Sequence[str] = (), without: Collection[str] = ()) -> Learnt:
    """A comparer of the ranking's target, from its indicators; without its leaks and copies of rows.

    Rows in which an indicator in use has collapsed are tested on, and not learnt from. An indicator in use has a value
    in all rows.

    Args:
        ranking: of a run's checkpoints, or of a table's rows.
        others: columns of its table with other targets, to learn from in its place; those without a value in some row
            are not.
        without: indicators to leave out; see `indicators_named`.

    Raises:
        CompareError: if the target or no indicator compares all checkpoints, or there are too few variants.
    """
    check_compares(ranking)
    copied, leaked = copied_rows(ranking.flags), leaks(ranking.flags)
    table = ranking.checkpoints
    table = table[table[ranking.target].notna() & ~table["checkpoint"].isin(copied)].sort_values("checkpoint")
    check_enough(numbers(table[ranking.target]), list(table["variant"]), ranking.target)
    portable = {
        item.indicator: 1.0 if item.direction == "max" else -1.0
        for item in sorted(ranking.associations, key=lambda item: item.indicator)
        if item.source == "measured"
        and item.selection
        and item.indicator not in leaked
        and item.indicator not in without
        and not is_of_training(item.indicator)
    }
    missing = {name: int((~np.isfinite(numbers(table[name]))).sum()) for name in portable}
    incomplete = {name: num for name, num in missing.items() if num}
    used = {name: sign for name, sign in portable.items() if name not in incomplete}
    if not used:
        left = f"; left out as leaks of it: {', '.join(leaked)}" if leaked else ""
        left += f"; without a value on some checkpoints: {', '.join(incomplete)}" if incomplete else ""
        raise CompareError(f"no indicator of {ranking.target} can be learnt from: none compares all checkpoints{left}")
    collapsed = collapsed_rows(ranking.flags, used)
    fine = np.flatnonzero(~table["checkpoint"].isin(collapsed).to_numpy(dtype=bool))
    values = np.stack([numbers(table[name]) for name in used], axis=1)
    scores, variants = ranking.sign * numbers(table[ranking.target]), list(table["variant"].iloc[fine])
    comparer = learn(values[fine], scores[fine], indicators=list(used), variants=variants, target=ranking.target)
    config = [item.indicator for item in ranking.associations if item.source == "config" and item.indicator in table]
    config += [SEED] * (SEED in table and table[SEED].nunique() > 1)
    whole = sorted(name for name in config if table[name].notna().all())
    # Of the same kind as the target, so better where it is.
    table = table.assign(**{name: ranking.sign * table[name] for name in others})
    tested = _tested(table, ranking.target, scores, values, used, whole, others=others, fine=fine)
    told = replace(
        tested,
        left_out=leaked,
        without=tuple(sorted(without)),
        incomplete=incomplete,
        rows_left_out=copied,
        rows_not_learnt_from=collapsed,
    )
    return Learnt(comparer, told)


def _tested(
    table: pd.DataFrame,
    target: str,
    scores: Floats,
    values: Floats,
    used: Mapping[str, float],
    config: Sequence[str],
    *,
    others: Sequence[str],
    fine: np.ndarray,
) -> Tested:
    """Without what is left out, which `learn_target` knows; `fine` are the rows that may be trained on."""
    variants, bases = list(table["variant"]), bases_of(table)
    splits = _trained_on(fine, random_splits(variants))
    others = [name for name in others if table[name].notna().all()]
    ours = on_unseen(learner(values, scores, variants), scores, splits, bases, far=far_from(values, splits))
    blocks = {name: design(table[name]) for name in config}
    known = np.concatenate([np.zeros((len(table), 0)), *blocks.values()], axis=1)
    alone = on_unseen(learner(known, scores, variants), scores, splits, bases) if config else None
    whole = np.concatenate([values, known], axis=1)
    both = on_unseen(learner(whole, scores, variants), scores, splits, bases) if config else None
    axes = [name for name in config if is_axis(name) and 1 < table[name].nunique() <= MAX_GROUPS]
    groups = {name: _trained_on(fine, leave_group_out(list(table[name]), variants)) for name in axes}
    owners = [*used, *(name for name, block in blocks.items() for _ in range(block.shape[1]))]
    return Tested(
        target=target,
        num_checkpoints=len(table),
        num_variants=len(set(variants)),
        left_out=(),
        without=(),
        incomplete={},
        rows_left_out={},
        rows_not_learnt_from={},
        indicators=ours,
        config=alone,
        both=both,
        gain=gain_over(both, alone, splits) if both and alone else None,
        single={
            name: as_it_is(sign * column, scores, splits, bases)
            for (name, sign), column in zip(used.items(), values.T, strict=True)
        },
        rank_averages=_rank_averages(values * np.array(list(used.values())), scores, splits, bases, alone),
        without_group={
            name: on_unseen(learner(values, scores, variants), scores, each, bases, variants=variants)
            for name, each in groups.items()
            if len(each) > 1
        },
        other_targets=_by_others(table, values, scores, others, splits, bases) if others else None,
        others=tuple(others),
        importances=_importances(whole[fine], scores[fine], owners),
    )


def _trained_on(fine: np.ndarray, splits: Sequence[Split]) -> list[Split]:
    """The splits with no other rows to train on; without those that have too few left."""
    kept = [replace(split, train=np.intersect1d(split.train, fine)) for split in splits]
    return [split for split in kept if len(split.train) >= MIN_TRAINED]


def _rank_averages(
    oriented: Floats, scores: Floats, splits: Sequence[Split], bases: Groups, config: Unseen | None
) -> dict[str, RankAverage]:
    """Of indicators [rows, n], higher being better."""
    ranks = mean_ranks(oriented)
    of = {"all indicators": [np.arange(oriented.shape[1])] * len(splits)}
    orders = [_best_first(*(each[split.train] for each in (oriented, scores, bases))) for split in splits]
    of |= {f"best {num}": [order[:num] for order in orders] for num in NUM_BEST if num < oriented.shape[1]}
    found = {}
    for name, chosen in of.items():
        each = zip(chosen, splits, strict=True)
        shares = [shares_as_it_is(ranks[:, own].mean(axis=1), scores, [split], bases)[0] for own, split in each]
        gain = None
        if config:
            theirs = [share for _, share, _ in config.by_split]
            gain = differences_over_splits([a - b for a, b in zip(shares, theirs, strict=True)], splits)
        found[name] = RankAverage(over_splits(shares, splits), gain)
    return found


def mean_ranks(oriented: Floats) -> Floats:
    """[rows, n]: rank of each value in its column, from 0 to 1, best highest, ties alike; 1/2 where it is missing."""
    from scipy.stats import rankdata

    missing = np.isnan(oriented)
    ranks = rankdata(oriented, axis=0, nan_policy="omit")
    shares: Floats = np.where(missing, 0.5, (ranks - 0.5) / np.maximum((~missing).sum(axis=0), 1))
    return shares


def _best_first(oriented: Floats, scores: Floats, bases: Groups) -> np.ndarray:
    """[n]: the columns by falling pairs right; of equal ones the first."""
    apart = np.sign(scores[:, None] - scores) * of_one(bases)
    right = [float((np.sign(column[:, None] - column) * apart).sum()) for column in oriented.T]
    return np.argsort(-np.array(right), kind="stable")


def _by_others(
    table: pd.DataFrame,
    values: Floats,
    scores: Floats,
    others: Sequence[str],
    splits: Sequence[Split],
    bases: Groups,
) -> Unseen:
    """Each other target counts alike, whatever its spread."""
    there = [numbers(table[name]) for name in others]
    mean = np.mean([(each - each.mean()) / max(float(each.std()), 1e-12) for each in there], axis=0)
    return on_unseen(learner(values, mean, list(table["variant"])), scores, splits, bases)


def _importances(values: Floats, scores: Floats, owners: Sequence[str]) -> dict[str, float]:
    """Of each column's owner, largest first."""
    scales = [fit_scale(name, column) for name, column in zip(owners, values.T, strict=True)]
    booster = grow(normalised(scales, values), scores, np.arange(len(scores)))
    shares = importances(booster, len(owners))
    totals = dict.fromkeys(owners, 0.0)
    for name, share in zip(owners, shares, strict=True):
        totals[name] += float(share)
    return dict(sorted(totals.items(), key=lambda item: -item[1]))
