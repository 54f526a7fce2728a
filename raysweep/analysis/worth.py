"""Which indicator is worth its cost: pairs right, and what is added to the configuration, against time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raysweep.analysis import formatting
from raysweep.analysis.associations import TOGETHER, Association
from raysweep.analysis.charts import Chart, escaped, numbers
from raysweep.analysis.earlier import EARLIER_LOSS
from raysweep.analysis.pairwise import IntervalEstimate
from raysweep.analysis.pareto import undominated
from raysweep.analysis.ranking import Ranking
from raysweep.analysis.sections import Cell, Heading, Row, Table, alike_text, cell, indicator_names
from raysweep.scores import tunings_of

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Worth:
    """An indicator beside what its stage takes."""

    item: Association
    seconds: float
    """That its stages take on one checkpoint, on average, of what `cost_unit` says: all that these stages measure is
    had for it."""
    flops: float
    """Of these as planned, on average; NaN where they are not known."""


def seconds_spent(stages: pd.DataFrame) -> pd.Series:
    """(kind, checkpoint) -> seconds of all stages of that kind on it: of all tasks, seeds and rates together.

    Of all GPUs of all workers, or of the workers where these have none; see `cost_unit`. Only where all stages have
    run, whatever came out: a part of them costs less than the whole.
    """
    own = _of_checkpoints(stages)
    gpus = own["gpus_per_worker"].astype("float64")
    # Where it was not noted, as it was not always, a worker counts as one GPU.
    spent = own["wall_seconds"] * own["world_size"].astype("float64") * gpus.where(gpus > 0, 1.0)
    return _sums(own, spent)


def cost_unit(stages: pd.DataFrame, time: str) -> str:
    """What `seconds_spent` counts, by where stages ran: `GPU hours`, `CPU worker hours`; if both, the kinds of either.

    Args:
        time: `hours`, or another word for it.
    """
    ran = _of_checkpoints(stages).dropna(subset="device")
    on_cpu = ran["device"] == "cpu"
    if on_cpu.all():
        return f"CPU worker {time}"
    parts = on_cpu.groupby(ran["kind"]).mean()
    kinds = ", ".join(f"{kind}{' in part' * (part < 1)}" for kind, part in parts[parts > 0].items())
    return f"GPU {time} (of {kinds} CPU worker {time})" if kinds else f"GPU {time}"


def _of_checkpoints(stages: pd.DataFrame) -> pd.DataFrame:
    return stages[stages["checkpoint"].notna()].drop_duplicates("id")


def _sums(own: pd.DataFrame, values: pd.Series) -> pd.Series:
    """(kind, checkpoint) -> sum of a value of each stage; none where one has none, as one that has not run no time."""
    totals: pd.Series = values.groupby([own["kind"], own["checkpoint"]]).agg(lambda each: each.sum(skipna=False))
    return totals.dropna()


def flops_by_kind(stages: pd.DataFrame) -> dict[str, float]:
    """Kind of stage -> planned FLOPs of all its stages on one checkpoint, on average where they are known."""
    own = _of_checkpoints(stages)
    means = _sums(own, own["flops"].astype("float64")).groupby(level="kind").mean()
    return {str(kind): float(flops) for kind, flops in means.items()}


def seconds_by_kind(stages: pd.DataFrame) -> dict[str, float]:
    """Kind of stage -> `seconds_spent` on one checkpoint, on average over those that have it."""
    means = seconds_spent(stages).groupby(level="kind").mean()
    return {str(kind): float(seconds) for kind, seconds in means.items() if seconds > 0}


def own_stages(ranking: Ranking, stages: pd.DataFrame) -> pd.DataFrame:
    """A stage table without fine-tuning on other tasks, or by other methods, than the target's."""
    others = {*ranking.tasks} - {*ranking.target_tasks}
    if not others:
        return stages
    names = {name for name in stages["task"].dropna() if {*tunings_of(name)} <= others}
    return stages[(stages["kind"] != "sft") | ~stages["task"].isin(names)]


def worths(ranking: Ranking, stages: pd.DataFrame) -> list[Worth]:
    """Of the measured indicators, best first; without those of pretraining, which come with it."""
    spent, flops = seconds_by_kind(stages), flops_by_kind(stages)
    return [
        Worth(item, spent[kind], flops.get(kind, math.nan))
        for item in ranking.associations
        if item.source == "measured" and item.same_order_as is None
        if (kind := _kind(item.indicator)) in spent and is_bought(item.indicator)
    ]


def is_bought(indicator: str) -> bool:
    """Whether its stage is all that it takes: not what comes with pretraining, nor what another checkpoint tells."""
    return _kind(indicator) != "pretrain" and indicator != EARLIER_LOSS.name


def _kind(indicator: str) -> str:
    return indicator.partition("/")[0]


def worth_table(ranking: Ranking, stages: pd.DataFrame, *, best_alone: bool = False) -> Table:
    """A row for each indicator: its cost, and what it tells.

    Args:
        best_alone: of each kind of stage, which cost alike, the one alone that has most pairs right.
    """
    short = indicator_names(ranking)
    tuning = seconds_by_kind(own_stages(ranking, stages)).get("sft")
    rows = []
    found = worths(ranking, stages)
    first: dict[str, Worth] = {}
    for worth in found:
        first.setdefault(_kind(worth.item.indicator), worth)
    for worth in first.values() if best_alone else found:
        name = worth.item.indicator
        share = formatting.percent(worth.seconds / tuning) if tuning else "—"
        cells = [
            Cell(short[name], name, title=alike_text(ranking, name)),
            Cell(_kind(name), _kind(name)),
            cell(worth.seconds, formatting.seconds),
            Cell(share, worth.seconds if tuning else ""),
            cell(worth.flops, formatting.count),
            _estimate(worth.item.accuracy),
            cell(worth.item.pairs.num_pairs, formatting.number),
            _estimate(worth.item.added),
        ]
        rows.append(Row(cells))
    titles = (
        f"{cost_unit(stages, 'time')} a checkpoint",
        "of fine-tuning, %",
        "FLOPs, as planned",
        "pairs right",
        "of pairs",
        "adds to config",
    )
    return Table([Heading("indicator"), Heading("stage"), *(Heading(title, numeric=True) for title in titles)], rows)


def worth_chart(ranking: Ranking, stages: pd.DataFrame) -> Chart | None:
    """Pairs right against cost, a dot an indicator; lines for the configuration alone and for the noise's ceiling."""
    found = worths(ranking, stages)
    if not found:
        return None
    short = indicator_names(ranking)
    accuracies = [worth.item.accuracy for worth in found]
    best = worthwhile(found)
    unit, count = cost_unit(stages, "time"), formatting.count
    return {
        "x": numbers(worth.seconds for worth in found),
        "y": numbers(each.value for each in accuracies),
        "above": numbers(each.high - each.value for each in accuracies),
        "below": numbers(each.value - each.low for each in accuracies),
        # With many indicators, names of all would cover one another: of the others a pointer tells.
        "names": [escaped(short[name]) if (name := worth.item.indicator) in best else "" for worth in found],
        "text": [
            escaped(
                f"{worth.item.indicator}\n{formatting.with_interval(worth.item.accuracy)} of "
                f"{formatting.counted(worth.item.pairs.num_pairs, 'pair')} right\n"
                f"adds {formatting.with_interval(worth.item.added)} to the configuration\n"
                f"{formatting.seconds(worth.seconds)} of {unit} a checkpoint, about {count(worth.flops)} FLOPs"
            )
            for worth in found
        ],
        "lines": _lines(ranking),
        "x_title": escaped(f"{cost_unit(stages, 'seconds')} a checkpoint"),
    }


def worthwhile(found: Sequence[Worth]) -> set[str]:
    """Names of those better than all that cost no more; of several at one place the first."""
    places = np.array([(-worth.seconds, worth.item.accuracy.value) for worth in found])
    _, first = np.unique(places, axis=0, return_index=True)
    return {found[at].item.indicator for at in first[undominated(places[first])]}


def _lines(ranking: Ranking) -> list[Mapping[str, object]]:
    """What needs no indicator, and what no indicator can pass."""
    config = {item.indicator: item for item in ranking.associations if item.source == "config"}
    whole = config.get(TOGETHER) or next(iter(config.values()), None)
    lines = [{"y": whole.accuracy.value, "name": "configuration alone"}] if whole else []
    lines += [{"y": ranking.ceiling, "name": "ceiling: noise of fine-tuning"}]
    return [line for line in lines if numbers([line["y"]]) != [None]]


def _estimate(estimate: IntervalEstimate) -> Cell:
    return cell(estimate.value, lambda _: formatting.with_interval(estimate))
