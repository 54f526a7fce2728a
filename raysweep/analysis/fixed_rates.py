"""What one fine-tuning rate for all checkpoints would have chosen, in place of a rate tuned for each.

Of every rate that all ranked checkpoints were fine-tuned at, on all tasks of the target: the checkpoint that is best at
it, what is lost by taking that one, and how far the two orders agree. Where a run diverged, its checkpoint comes last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from raysweep.analysis import formatting
from raysweep.analysis.associations import numbers
from raysweep.analysis.findings import points_text
from raysweep.analysis.labels import row_key
from raysweep.analysis.pairwise import IntervalEstimate, compare, interval, kendall, leave_one_out
from raysweep.analysis.ranking import Ranking
from raysweep.analysis.sections import Heading, Row, Table, cell
from raysweep.scores import EACH_OF_MEAN, TOGETHER, column_name, task_of, tunings_of

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class FixedRate:
    """Fine-tuning at one rate for all, against the order by tuned rates."""

    lr: float
    checkpoint: str
    """The stage id of the one that is best at it; of equal ones, the best by tuned rates."""
    label: str
    lost: float
    """Of the target at tuned rates: the best checkpoint's minus this one's; 0 or more."""
    accuracy: IntervalEstimate
    """Pairs that it orders as tuned rates do."""
    kendall: IntervalEstimate
    num_diverged: int
    """Checkpoints of which a run at it diverged."""


def fixed_rates(ranking: Ranking, stages: pd.DataFrame) -> list[FixedRate]:
    """By rising rate; none where there was no choice of rates, or no rate is every checkpoint's, as of `lrs: auto`.

    Args:
        stages: the run's, as `stage_table` gives them.
    """
    table = ranking.checkpoints
    table = table[table[ranking.target].notna()].drop_duplicates("checkpoint")
    name = ranking.target.rpartition("/")[2]
    metric = column_name("sft", EACH_OF_MEAN.get(column_name("sft", name), name))
    runs = stages[(stages["kind"] == "sft") & stages["checkpoint"].isin(table["checkpoint"])].drop_duplicates("id")
    runs = _by_task(runs, metric)
    runs = runs[runs["task"].isin(ranking.target_tasks)]
    if len(table) < 2 or metric not in runs or runs["lr"].nunique() < 2:
        return []
    tuned = ranking.sign * numbers(table[ranking.target])
    weights = leave_one_out(list(table["variant"]))
    labels = [ranking.labels[row_key(row)] for row in table.to_dict("records")]
    found = []
    for lr, scores, diverged in _at_each(runs, metric, list(table["checkpoint"]), ranking):
        order = np.unique(scores, return_inverse=True)[1].astype(np.float64)  # As those that diverged have no number.
        right, alike = compare(order, tuned).accuracy, partial(kendall, order, tuned)
        chosen, every = int(np.lexsort((-tuned, -order))[0]), np.ones((1, len(tuned)))
        found.append(
            FixedRate(
                lr=lr,
                checkpoint=str(table["checkpoint"].iloc[chosen]),
                label=labels[chosen],
                lost=float(tuned.max() - tuned[chosen]),
                accuracy=interval(float(right(every)[0]), right(weights)),
                kendall=interval(float(alike(every)[0]), alike(weights), low=-1.0),
                num_diverged=diverged,
            )
        )
    return found


def _by_task(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A run on a mixture as one on each of its tasks, with the metric of that task."""
    names = runs["task"]
    apart = runs.assign(task=names.map(tunings_of), is_mixed=names.str.contains(TOGETHER, regex=False)).explode("task")
    for at in {*apart.loc[apart["is_mixed"], "task"]}:
        rows = apart["is_mixed"] & (apart["task"] == at)
        own = column_name("sft", metric.partition("/")[2], task_of(at))
        apart[metric] = apart[metric].mask(rows, apart.get(own, np.nan))
    return apart


def _at_each(
    runs: pd.DataFrame, metric: str, checkpoints: Sequence[str], ranking: Ranking
) -> list[tuple[float, np.ndarray, int]]:
    """(rate, scores [checkpoints], -inf for those that diverged, and how many these are) of rates that all have."""
    scores = (ranking.sign * runs[metric]).where(runs["status"] != "diverged", -np.inf)
    keys = [runs[name] for name in ("lr", "checkpoint", "task")]
    # Of a run that is missing or failed there is no number, and no mean over seeds or tasks.
    by_task = scores.groupby(keys).agg(lambda each: each.mean(skipna=False)).unstack("task")
    by_task = by_task.reindex(columns=list(ranking.target_tasks))
    wide = by_task.mean(axis=1, skipna=False).unstack("checkpoint").reindex(columns=list(checkpoints))
    return [
        (float(lr), values, int(np.isinf(values).sum()))
        for lr, values in zip(wide.index, wide.to_numpy(dtype=np.float64), strict=True)
        if not np.isnan(values).any() and np.isfinite(values).any()
    ]


def fixed_rate_table(ranking: Ranking, stages: pd.DataFrame) -> Table:
    """A row for each rate; no rows where `fixed_rates` has none."""
    titles = ("would have chosen", "which is below the best by", "pairs as by tuned rates", "Kendall", "diverged")
    rows = [
        Row(
            [
                cell(each.lr, formatting.number),
                cell(each.label),
                cell(each.lost, lambda lost: points_text(IntervalEstimate(lost), ranking.target)),
                cell(each.accuracy.value, lambda _, each=each: formatting.with_interval(each.accuracy)),  # type: ignore[misc]
                cell(each.kendall.value, lambda _, each=each: formatting.with_interval(each.kendall)),  # type: ignore[misc]
                cell(each.num_diverged, formatting.number),
            ],
            checkpoint=each.checkpoint,
        )
        for each in fixed_rates(ranking, stages)
    ]
    return Table([Heading("one rate for all", numeric=True), *(Heading(title, numeric=True) for title in titles)], rows)
