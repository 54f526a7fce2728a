"""The tables of a report: columns, and rows of cells that know how they are sorted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from raysweep.analysis import formatting
from raysweep.analysis.colors import Color
from raysweep.analysis.derived import HESSIAN_TRACE, KSHOT, PPL
from raysweep.analysis.findings import direction_text, score_text
from raysweep.analysis.gaps import GapAccuracy
from raysweep.analysis.labels import is_missing, row_key
from raysweep.analysis.pairwise import IntervalEstimate
from raysweep.analysis.ranking import PROBE_MEAN, Ranking, of_task, score, shown_indicators
from raysweep.runs import Run
from raysweep.scores import (
    MEAN_LIKELIHOOD,
    MEAN_SCORE,
    by_method,
    column_name,
    mean_over_tasks,
    of_method,
    of_methods,
)

if TYPE_CHECKING:
    import pandas as pd

    from raysweep.analysis.learning import Tested

UNTUNED = column_name("indicators", "zeroshot_mean")


@dataclass(frozen=True)
class Heading:
    """A heading. `title` says more of it, where a pointer rests on it."""

    name: str
    numeric: bool = False
    title: str = ""


@dataclass(frozen=True)
class Cell:
    """What is shown, and the key it is sorted by (empty where the value is missing).

    `mark` stands small beside it, `title` where a pointer rests on it; `log` is a long text, folded away.
    """

    text: str
    sort: Any = ""
    mark: str = ""
    title: str = ""
    log: str = ""
    color: Color | None = None


@dataclass(frozen=True)
class Row:
    """Its cells; and, so that charts can find it, the checkpoint it is about."""

    cells: Sequence[Cell]
    checkpoint: str = ""
    is_best: bool = False


@dataclass(frozen=True)
class Table:
    """Rows may be none; `foot` stays last however the others are sorted."""

    columns: Sequence[Heading]
    rows: Sequence[Row]
    foot: Sequence[Cell] = ()


def cell(value: Any, text: Callable[[Any], str] = str, **more: Any) -> Cell:
    """A cell of a value that may be missing."""
    return Cell("—", **more) if is_missing(value) else Cell(text(value), value, **more)


def ranking_table(ranking: Ranking, colors: Mapping[str, Color], *, per_task: bool = True) -> Table:
    """Checkpoints, best first, with the level of chance last; `per_task`: with a column for each task."""
    table, target = ranking.checkpoints, ranking.target
    tasks = [task for task in _tasks(ranking) if of_task(target, task) in table] if per_task else []
    own = {task: of_task(target, task) for task in tasks}
    others = _same_by_others(ranking)
    extra = {name: title for name, title in ((PROBE_MEAN, "linear probe"), (UNTUNED, "before")) if name in table}
    short = indicator_names(ranking)
    shown = [name for name in shown_indicators(ranking) if name not in extra]
    columns = [Heading("#", numeric=True), Heading("checkpoint"), Heading(_heading(target), numeric=True, title=target)]
    columns += [Heading(f"by {method},{formatting.unit(name)}", numeric=True, title=name) for name, method in others]
    columns += [Heading(f"{task},{formatting.unit(own[task])}", numeric=True, title=own[task]) for task in tasks]
    columns += [Heading(f"{title}, %", numeric=True, title=_EXTRA[name]) for name, title in extra.items()]
    columns += [Heading(short[name], numeric=True, title=alike_text(ranking, name)) for name in shown]
    ties = {(tie.trial, tie.checkpoint) for tie in ranking.ties}
    edges = {(edge.trial, edge.checkpoint, edge.task): edge for edge in ranking.edges}
    rows = []
    for row in table.to_dict("records"):
        key = row_key(row)
        marks = [] if row["status"] == "done" else [row["status"]]
        marks += ["≈"] if key in ties else []
        cells = [
            cell(row["rank"], formatting.number),
            cell(ranking.labels[key], mark=" · ".join(marks), color=colors.get(row["variant"])),
            cell(row[target], lambda _, row=row: score_text(row, target)),  # type: ignore[misc]
        ]
        cells += [cell(row[name], lambda _, row=row, name=name: score_text(row, name)) for name, _ in others]  # type: ignore[misc]
        for task in tasks:
            name, edge = own[task], edges.get((*key, task))
            why = f"picked learning rate {edge.lr:g}, the {edge.side} of its grid" if edge else ""
            cells.append(
                cell(
                    row[name],
                    lambda _, row=row, name=name: score_text(row, name),  # type: ignore[misc]
                    mark="†" if edge else "",
                    title=why,
                )
            )
        cells += [cell(row[name], formatting.percent, mark=_place(row, name)) for name in extra]
        cells += [cell(row[name], formatting.number, mark=_place(row, name)) for name in shown]
        rows.append(Row(cells, checkpoint=row["checkpoint"], is_best=row["rank"] == 1))
    shown_scores = [target, *(name for name, _ in others), *own.values()]
    return Table(columns, rows, _chance_cells(ranking, shown_scores, width=len(columns)))


def _heading(target: str) -> str:
    names = {MEAN_SCORE: "mean score", MEAN_LIKELIHOOD: "mean log-likelihood"}
    return f"{names.get(target, target)},{formatting.unit(target)}"


def _place(row: Mapping[Any, Any], indicator: str) -> str:
    """A checkpoint's place by an indicator; empty where it has none."""
    place = row.get(f"rank/{indicator}")
    return "" if is_missing(place) else f"#{place}"


_EXTRA = {
    PROBE_MEAN: "mean test score of a linear classifier on frozen features",
    UNTUNED: "mean score without fine-tuning",
}


def _tasks(ranking: Ranking) -> list[str]:
    """Those with a column of their own, beside the target's."""
    return [task for task in ranking.tasks if of_task(ranking.target, task) != ranking.target]


def _same_by_others(ranking: Ranking) -> list[tuple[str, str]]:
    """Of a target that is a mean over tasks: the columns of the same mean by other methods, and these."""
    for mean in (MEAN_SCORE, MEAN_LIKELIHOOD):
        found = {of_method(mean, method): method for method in by_method(ranking.tasks)}
        if ranking.target in found:
            return [item for item in found.items() if item[0] != ranking.target and item[0] in ranking.checkpoints]
    return []


def _chance_cells(ranking: Ranking, columns: Sequence[str], *, width: int) -> list[Cell]:
    if not ranking.chance or not formatting.is_share(ranking.target):
        return []
    levels = {score(task): level for task, level in ranking.chance.items()}
    for method, tasks in by_method(ranking.tasks).items():
        levels[of_method(MEAN_SCORE, method)] = mean_over_tasks(ranking.chance.get(task, math.nan) for task in tasks)
    known = [cell(levels.get(name), formatting.percent) for name in columns]
    cells = [Cell(""), Cell("chance", title="guessing, or always giving the commonest answer"), *known]
    return cells + [Cell("")] * (width - len(cells))


# Which of those of one order stands for them: the one a reader knows.
_KNOWN = (HESSIAN_TRACE, PPL, KSHOT, "step")


def indicator_names(ranking: Ranking) -> dict[str, str]:
    """Indicator -> the short name it is shown by, that of a better known one of the same order where there is one."""
    groups = {item.indicator: [item.indicator] for item in ranking.associations if item.same_order_as is None}
    for item in ranking.associations:
        if item.same_order_as is not None:
            groups[item.same_order_as].append(item.indicator)
    known = {name: next((each for each in _KNOWN if each in group), name) for name, group in groups.items()}
    # A score of fine-tuning has the first claim on a name.
    scores = [MEAN_SCORE, *of_methods(MEAN_SCORE, ranking.tasks), *map(score, ranking.tasks)]
    short = formatting.short_names(list(dict.fromkeys([*known.values(), *shown_indicators(ranking), *scores])))
    return {name: short[shown] for name, shown in known.items()} | {
        name: short[name] for name in shown_indicators(ranking)
    }


def alike_text(ranking: Ranking, indicator: str) -> str:
    """An indicator's full name, and those of the same order."""
    first = {item.indicator: item.same_order_as or item.indicator for item in ranking.associations}
    equal = [name for name, other in first.items() if other == first.get(indicator) and name != indicator]
    return f"{indicator}; the same order: {', '.join(equal)}" if equal else indicator


def agreement_table(ranking: Ranking) -> Table:
    """Indicators, best first; those of one order as one row."""
    short = indicator_names(ranking)
    titles = ("pairs right", "clear pairs right", "pairs", "adds to config", "over best config", "Spearman", "Kendall")
    rows = []
    for item in ranking.associations:
        if item.same_order_as:
            continue
        num_equal = sum(other.same_order_as == item.indicator for other in ranking.associations)
        marks = ["config"] if item.source == "config" else []
        marks += [f"{num_equal} more of the same order"] if num_equal else []
        cells = [
            Cell(
                short[item.indicator], item.indicator, mark=" · ".join(marks), title=alike_text(ranking, item.indicator)
            ),
            cell(direction_text(item)),
        ]
        num_clear = "" if item.pairs.num_clear is None else f"{item.pairs.num_clear} of them clear"
        estimates = [item.accuracy, item.clear_accuracy, item.added, item.gain, item.spearman, item.kendall]
        cells += [cell(each.value, lambda _, each=each: formatting.with_interval(each)) for each in estimates]  # type: ignore[misc]
        cells.insert(4, cell(item.pairs.num_pairs, formatting.number, title=num_clear))
        missing = f"{item.num_missing} missing" if item.num_missing else ""
        rows.append(Row([*cells, cell(item.num_checkpoints, formatting.number, mark=missing)]))
    columns = [Heading("indicator"), Heading("better"), *(Heading(title, numeric=True) for title in titles)]
    return Table([*columns, Heading("checkpoints", numeric=True)], rows)


def beyond_tables(ranking: Ranking, tested: Tested | None = None) -> list[tuple[str, Table]]:
    """Titles and tables of what one number for an indicator does not tell; some may be empty."""
    return [
        (f"Pairs right by their difference in {ranking.target}", target_gap_table(ranking, tested)),
        ("Pairs right where one setting differs", matched_table(ranking)),
        ("What fine-tuning the first few is worth", selection_table(ranking)),
        (f"Pairs right by their difference in {ranking.gaps_of}", gap_table(ranking)),
    ]


def matched_table(ranking: Ranking) -> Table:
    """Pairs right among pairs that differ in one axis alone, a column each; best indicator first."""
    short = indicator_names(ranking)
    shown = [item for item in ranking.associations if item.matched and item.same_order_as is None]
    axes = _most((each.axis, each.num_pairs) for item in shown for each in item.matched)
    names = formatting.short_names([axis for axis in axes if axis is not None])
    rows = []
    for item in shown:
        found = {each.axis: each for each in item.matched}
        cells = [Cell(short[item.indicator], item.indicator, mark="config" if item.source == "config" else "")]
        for axis in axes:
            estimate = found[axis].accuracy if axis in found else IntervalEstimate(math.nan)
            cells.append(cell(estimate.value, lambda _, each=estimate: formatting.with_interval(each)))  # type: ignore[misc]
        rows.append(Row(cells))
    headings = [
        Heading(
            f"{names[axis] if axis else 'no setting'} ({formatting.counted(num, 'pair')})",
            numeric=True,
            title=axis or "alike in all settings",
        )
        for axis, num in axes.items()
    ]
    return Table([Heading("indicator"), *headings], rows if len(axes) > 1 else [])


def selection_table(ranking: Ranking) -> Table:
    """What fine-tuning only the first few by each indicator is worth, best first."""
    short = indicator_names(ranking)
    shown = [item for item in ranking.associations if item.selection and item.same_order_as is None]
    # An indicator with missing values may have too few checkpoints for the last of them.
    places = sorted({each.k for item in shown for each in item.selection})
    none = (IntervalEstimate(math.nan),) * 3
    rows = []
    for item in shown:
        found = {each.k: (each.recall, each.regret, each.ndcg) for each in item.selection}
        estimates = [estimate for k in places for estimate in found.get(k, none)]
        cells = [cell(each.value, lambda _, each=each: formatting.with_interval(each)) for each in estimates]  # type: ignore[misc]
        rows.append(Row([Cell(short[item.indicator], item.indicator), *cells]))
    titles = [f"{what} at {k}" for k in places for what in ("recall", "regret", "NDCG")]
    return Table([Heading("indicator"), *(Heading(title, numeric=True) for title in titles)], rows)


def gap_table(ranking: Ranking) -> Table:
    """Pairs right by how far the pair differs in the ranking's `gaps_of`, a column for each range."""
    short = indicator_names(ranking)
    shown = [item for item in ranking.associations if item.by_gap and item.same_order_as is None]
    ranges = _most(((each.low, each.high), each.num_pairs) for item in shown for each in item.by_gap)
    rows = []
    for item in shown:
        found = {(each.low, each.high): each.accuracy for each in item.by_gap}
        estimates = [found.get(span, IntervalEstimate(math.nan)) for span in sorted(ranges)]
        cells = [cell(each.value, lambda _, each=each: formatting.with_interval(each)) for each in estimates]  # type: ignore[misc]
        rows.append(Row([Cell(short[item.indicator], item.indicator), *cells]))
    headings = [
        Heading(f"{_span(low, high)} ({formatting.counted(ranges[low, high], 'pair')})", numeric=True)
        for low, high in sorted(ranges)
    ]
    return Table([Heading("indicator"), *headings], rows if len(ranges) > 1 else [])


def target_gap_table(ranking: Ranking, tested: Tested | None = None) -> Table:
    """Pairs right by how far the pair differs in the target, a column for each fifth of the pairs; beside the ceiling.

    Args:
        tested: what is learnt, on unseen variants; None: of single indicators and the configuration alone.
    """
    short = indicator_names(ranking)
    learnt = {"learnt from indicators": tested.indicators, "from the configuration": tested.config} if tested else {}
    learnt |= {"from both": tested.both} if tested else {}
    rows = []

    def add(name: Cell, parts: Mapping[float, IntervalEstimate], within: GapAccuracy | None) -> None:
        estimates = [parts.get(gap.high, IntervalEstimate(math.nan)) for gap in ranking.target_gaps]
        cells = [cell(each.value, lambda _, each=each: formatting.with_interval(each)) for each in estimates]  # type: ignore[misc]
        rows.append(Row([name, *cells, cell(within.high if within else None, lambda value: f"{value:.2g}")]))

    for name, each in learnt.items():
        # By place: without copies of rows its fifths end a little elsewhere.
        if each and len(each.by_target_gap) == len(ranking.target_gaps):
            pairs = zip(ranking.target_gaps, each.by_target_gap, strict=True)
            add(Cell(name, name), {gap.high: part.accuracy for gap, part in pairs}, each.chance_within)
    for item in ranking.associations:
        if item.same_order_as is None:
            mark = "config" if item.source == "config" else ""
            parts = {part.high: part.accuracy for part in item.by_target_gap}
            add(Cell(short[item.indicator], item.indicator, mark=mark), parts, item.chance_within)
    headings = [
        Heading(f"{gap.low:.2g} to {gap.high:.2g} ({formatting.counted(gap.num_pairs, 'pair')})", numeric=True)
        for gap in ranking.target_gaps
    ]
    last = Heading("no better than chance up to", numeric=True, title="pairs that differ by at most so much")
    foot = [
        Cell("ceiling: noise of fine-tuning"),
        *(cell(gap.ceiling, formatting.number) for gap in ranking.target_gaps),
    ]
    return Table(
        [Heading("indicator"), *headings, last],
        rows if len(ranking.target_gaps) > 1 else [],
        [] if math.isnan(ranking.ceiling) else [*foot, Cell("")],
    )


_Key = TypeVar("_Key")


def _most(counts: Iterable[tuple[_Key, int]]) -> dict[_Key, int]:
    """Largest count of each: an indicator with missing values has fewer pairs than there are."""
    found: dict[_Key, int] = {}
    for key, count in counts:
        found[key] = max(count, found.get(key, 0))
    return found


def _span(low: float, high: float) -> str:
    return f"equal within {high:.2g}" if low == 0 else f"{low:.2g} to {high:.2g}"


def failure_table(run: Run, stages: pd.DataFrame) -> Table:
    """What failed or diverged, a row each; what was pruned or did not run, a row for each kind."""
    failures = {failure["stage"]: failure for failure in run.failures()}
    rows = []
    unfinished = stages[stages["status"] != "done"].drop_duplicates("id")
    for row in unfinished[unfinished["status"].isin(["failed", "diverged"])].to_dict("records"):
        failure = failures.get(row["id"], {})
        cause = failure.get("cause", "")
        if row["status"] == "diverged":
            loss = formatting.number(row.get(f"{row['kind']}/diverged_loss"))
            step = formatting.number(row.get(f"{row['kind']}/diverged_step"))
            cause = f"loss {loss} nats per token at step {step}"
        log = str(failure.get("log", ""))
        rows.append(Row([cell(row["status"]), cell(row["id"]), Cell(cause, cause, log=log)]))
    for status, why in (
        ("pruned", "left out: the scheduler stopped their trials"),
        ("missing", "not run: what they need failed or diverged, or the sweep is not finished"),
    ):
        kinds = unfinished.loc[unfinished["status"] == status, "kind"]
        for kind, number in kinds.value_counts(sort=False).sort_index().items():
            rows.append(Row([cell(status), cell(f"{number} × {kind}"), cell(why)]))
    return Table([Heading("status"), Heading("stage"), Heading("cause")], rows)


def cost_table(stages: pd.DataFrame) -> Table:
    """Time, FLOPs, tokens and memory by kind of stage."""
    titles = ("stages", "time", "mean", "worker time", "tokens", "FLOPs, as planned", "peak memory")
    rows = []
    done = stages.assign(num_tokens=_computed(stages))
    done = done[done["wall_seconds"].notna()].drop_duplicates("id")
    for kind, group in [*done.groupby("kind", sort=True), ("all", done)]:
        if group.empty:
            continue
        wall = group["wall_seconds"]
        cells = [
            cell(str(kind)),
            cell(len(group), formatting.number),
            cell(float(wall.sum()), formatting.seconds),
            cell(float(wall.mean()), formatting.seconds),
            cell(float((wall * group["world_size"].astype("float64")).sum()), formatting.seconds),
            cell(float(group["num_tokens"].sum()) or math.nan, formatting.count),
            cell(float(group["flops"].astype("float64").sum(min_count=1)), formatting.count),
            cell(float(group["peak_memory_bytes"].dropna().astype("float64").max()), formatting.memory),
        ]
        rows.append(Row(cells))
    *kinds, total = rows or [Row([])]
    return Table([Heading("kind"), *(Heading(title, numeric=True) for title in titles)], kinds, total.cells)


def _computed(stages: pd.DataFrame) -> pd.Series:
    """The tokens of each stage: a checkpoint's are those since the one before it, of its phase or an earlier one."""
    trained = stages[(stages["kind"] == "pretrain") & stages["num_tokens"].notna()].sort_values("num_tokens")
    before = trained.groupby("trial")["num_tokens"].shift(fill_value=0.0)
    tokens = stages["num_tokens"].copy()
    tokens.loc[trained.index] = trained["num_tokens"] - before
    return tokens
