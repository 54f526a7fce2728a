"""What one fine-tuning rate for all checkpoints would have chosen, in place of a rate tuned for each.

Of every rate that all ranked checkpoints were fine-tuned at, on all tasks of the target: the checkpoint that is best at
it, what is lost by taking that one, and how far the two orders agree. Where a run diverged, its checkpoint comes last.
A checkpoint whose tuned rate this is stands in both orders by the same runs, luck included, so they agree more than two
fine-tunings of each would.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from raysweep.analysis import formatting
from raysweep.analysis.associations import numbers
from raysweep.analysis.bases import bases_of
from raysweep.analysis.findings import points_text, worse_side
from raysweep.analysis.labels import row_key
from raysweep.analysis.pairwise import IntervalEstimate, clusters_of, compare, credit_left, interval, kendall, of_one
from raysweep.analysis.ranking import Ranking
from raysweep.analysis.sections import Heading, Row, Table, cell
from raysweep.analysis.tables import result_of
from raysweep.scores import EACH_OF_MEAN, by_task, column_name, mean_over_tasks

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
    """By rising rate; none where there was no choice, no rate is every checkpoint's, or the target is not of `sft`, or
    does not compare all checkpoints.

    Args:
        stages: the run's, as `stage_table` gives them.
    """
    table = ranking.checkpoints
    table = table[table[ranking.target].notna()].drop_duplicates("checkpoint")
    if len(table) < 2 or ranking.num_groups > 1 or not ranking.target.startswith(column_name("sft", "")):
        return []
    tuned = ranking.sign * numbers(table[ranking.target])
    clusters, bases = clusters_of(list(table["variant"])), bases_of(table)
    labels = [ranking.labels[row_key(row)] for row in table.to_dict("records")]
    found = []
    for lr, scores in _at_each(stages, list(table["checkpoint"]), ranking):
        order = np.unique(scores, return_inverse=True)[1].astype(np.float64)  # As those that diverged have no number.
        pairs = compare(order, tuned, comparable=of_one(bases))
        chosen = int(np.lexsort((-tuned, -order))[0])
        found.append(
            FixedRate(
                lr=lr,
                checkpoint=str(table["checkpoint"].iloc[chosen]),
                label=labels[chosen],
                lost=float(tuned.max() - tuned[chosen]),
                accuracy=interval(*credit_left(pairs.credit, pairs.every, clusters)),
                kendall=interval(*kendall(order, tuned, clusters, among=pairs.every), low=-1.0),
                num_diverged=scores.count(-math.inf),
            )
        )
    return found


def _at_each(stages: pd.DataFrame, checkpoints: Sequence[str], ranking: Ranking) -> Iterator[tuple[float, list[float]]]:
    """(rate, a score of each checkpoint, -inf where a run diverged), of rates at which all have all tasks and seeds."""
    name = ranking.target.rpartition("/")[2]
    metric = EACH_OF_MEAN.get(column_name("sft", name), name)
    # Rate -> checkpoint, task -> seed -> score.
    found: dict[float, dict[tuple[str, str], dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    runs = stages[(stages["kind"] == "sft") & stages["status"].isin(["done", "diverged"])].drop_duplicates("id")
    for row in runs.to_dict("records"):
        for result in by_task([result_of(row)]):
            value = -math.inf if result.status == "diverged" else ranking.sign * result.metrics.get(metric, math.nan)
            if result.task in ranking.target_tasks and not math.isnan(value):
                found[float(result.lr or 0)][row["checkpoint"], result.task][int(result.seed or 0)] = value
    if len(found) < 2:
        return
    seeds = max(len(each) for at in found.values() for each in at.values())
    for lr, at in sorted(found.items()):
        means = [
            [
                fmean(each.values()) if len(each := at[checkpoint, task]) == seeds else math.nan
                for task in ranking.target_tasks
            ]
            for checkpoint in checkpoints
        ]
        scores = [mean_over_tasks(each) for each in means]
        if not any(map(math.isnan, scores)) and any(map(math.isfinite, scores)):
            yield lr, scores


def fixed_rate_table(ranking: Ranking, stages: pd.DataFrame) -> Table:
    """A row for each rate; no rows where `fixed_rates` has none."""
    behind = f"which is {worse_side(ranking)} the best by"
    titles = ("would have chosen", behind, "pairs as by tuned rates", "Kendall", "diverged")
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
