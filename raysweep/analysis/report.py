"""report.html: one file that needs nothing else, with all that a run found.

Whatever came from a user's file is escaped: as text where it is text, and inside scripts as JSON without a `<`.
"""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd

from raysweep.analysis.charts import Chart, accuracy_chart, loss_chart, trace_chart
from raysweep.analysis.ranking import Ranking, rank
from raysweep.analysis.tables import checkpoint_table, stage_table, write_tables
from raysweep.runs import Run

TEMPLATE = Path(__file__).with_name("report_template.html")


def write_report(run: Run) -> Path:
    """Write the tables and report.html into the run's folder; returns the report's path."""
    write_tables(run)
    stages, ranking = stage_table(run), rank(checkpoint_table(run))
    path = run.folder / "report.html"
    path.write_text(render(run, stages, ranking), encoding="utf-8")
    return path


def render(run: Run, stages: pd.DataFrame, ranking: Ranking) -> str:
    """The page, as HTML."""
    from plotly.offline import get_plotlyjs

    charts = [loss_chart(run, ranking), trace_chart(ranking), accuracy_chart(ranking)]
    return Template(TEMPLATE.read_text()).substitute(
        title=escape(run.name),
        headline=escape(headline(ranking)),
        summary=_summary(run, stages, ranking),
        ranking=_ranking_table(ranking),
        indicators=_indicator_table(ranking),
        charts="\n".join(_chart(index, chart) for index, chart in enumerate(charts) if chart),
        failures=_failures(run, ranking),
        cost=_cost(stages),
        provenance=_provenance(stages),
        sweep=escape(run.sweep_text),
        plotly=get_plotlyjs(),
    )


def headline(ranking: Ranking) -> str:
    """What was found, in one honest sentence or two."""
    scored = ranking.checkpoints[ranking.checkpoints[ranking.target].notna()] if len(ranking.checkpoints) else []
    if not len(scored):
        return "No checkpoint has a fine-tuned score yet."
    best = scored.iloc[0]
    said = f"{name_of(best)} fine-tunes best: {best[ranking.target]:.3f} mean test score over tasks."
    if not ranking.indicators:
        return f"{said} There are too few checkpoints to say which indicator would have told."
    first = ranking.indicators[0]
    accuracy = first.pairwise_accuracy
    if not (accuracy.low > 0.5):
        return (
            f"{said} No indicator is surely better than a coin: the best, {first.name}, orders {accuracy.value:.0%} of "
            f"pairs right (95 % interval {_percent(accuracy.low)} to {_percent(accuracy.high)})."
        )
    return (
        f"{said} {first.name} would have told most: it orders {accuracy.value:.0%} of pairs right "
        f"(95 % interval {_percent(accuracy.low)} to {_percent(accuracy.high)}, resampling trials)."
    )


def name_of(row: Any) -> str:
    """A checkpoint by its point, seed and step."""
    point = [
        f"{str(column).removeprefix('point.')}={row[column]}" for column in row.index if str(column)[:6] == "point."
    ]
    return ", ".join([*point, f"seed {row['seed']}", f"step {row['step']}"])


def _summary(run: Run, stages: pd.DataFrame, ranking: Ranking) -> str:
    kinds = stages.drop_duplicates("stage")["kind"].value_counts() if len(stages) else {}
    items = {
        "trials": len(run.trials()),
        "checkpoints": len(ranking.checkpoints),
        "stages done": sum(kinds.values) if len(kinds) else 0,
        "failed": len(run.failures()),
        "diverged": ranking.num_diverged,
        "without a score": ranking.num_without_target,
    }
    return "".join(f"<div><b>{value}</b><span>{escape(name)}</span></div>" for name, value in items.items())


def _ranking_table(ranking: Ranking) -> str:
    table = ranking.checkpoints
    if not len(table):
        return "<p>Nothing to rank yet.</p>"
    points = [column for column in table if str(column).startswith("point.")]
    tasks = [c for c in table if str(c).startswith("sft/") and str(c).endswith("_score") and c != ranking.target]
    wanted = [ranking.target, *tasks, "indicators/ppl", "indicators/entropy_gap_nats_per_token"]
    wanted += ["indicators/kshot_mean", "flatness/hessian_trace", "flatness/fisher_trace"]
    numbers = [column for column in wanted if column in table]
    head = ["#", *[str(point).removeprefix("point.") for point in points], "seed", "step", *map(_short, numbers)]
    rows = []
    for place, (_, row) in enumerate(table.iterrows(), 1):
        scored = _is_number(row.get(ranking.target))
        cells = [
            str(place) if scored else "–",
            *[str(row[point]) for point in points],
            str(row["seed"]),
            str(row["step"]),
        ]
        cells += [_with_error(row, column) for column in numbers]
        if row["status"] == "diverged":
            cells[len(points) + 3] = "diverged"
        rows.append(cells)
    return _table(head, rows, identity="ranking", num_words=len(points) + 1)


def _indicator_table(ranking: Ranking) -> str:
    head = [
        "indicator",
        "better",
        "pairwise accuracy",
        "Spearman",
        "Kendall",
        "clear pairs",
        "within noise",
        "ties",
        "missing",
    ]
    rows = []
    for one in ranking.indicators:
        pairs = one.pairs
        clear = pairs.clear_right + pairs.clear_wrong + pairs.clear_tied
        accuracy = f" ({pairs.clear_accuracy:.0%})" if clear else ""
        rows.append(
            [
                one.name,
                "low" if one.lower_is_better else "high",
                _interval(one.pairwise_accuracy, "{:.2f}"),
                _interval(one.spearman, "{:+.2f}"),
                _interval(one.kendall, "{:+.2f}"),
                f"{clear}{accuracy}",
                str(pairs.noisy),
                str(pairs.tied),
                str(one.num_missing),
            ]
        )
    return _table(head, rows, identity="indicators", num_words=2) if rows else "<p>Too few checkpoints.</p>"


def _failures(run: Run, ranking: Ranking) -> str:
    rows = [[f["stage"], f["trial"], str(f["attempts"]), f["cause"]] for f in run.failures()]
    table = ranking.checkpoints
    if len(table):
        for _, row in table[table["status"] == "diverged"].iterrows():
            rows.append([row["checkpoint"], row["trial"], "1", f"diverged: {name_of(row)}"])
    return _table(["stage", "trial", "attempts", "cause"], rows, identity="failures") if rows else "<p>None.</p>"


def _cost(stages: pd.DataFrame) -> str:
    if not len(stages):
        return "<p>Nothing ran yet.</p>"
    once = stages.drop_duplicates("stage")
    rows = []
    for kind, part in once.groupby("kind", sort=False):
        seconds, workers = part["wall_seconds"], part["world_size"]
        tokens = part.get(f"{kind}/num_tokens", pd.Series(dtype=float)).sum()
        rows.append(
            [
                str(kind),
                str(len(part)),
                f"{seconds.sum():,.1f}",
                f"{(seconds * workers).sum():,.1f}",
                f"{part['peak_memory_bytes'].max() / 2**30:.2f}",
                f"{tokens:,.0f}" if tokens else "",
            ]
        )
    head = ["kind", "stages", "wall seconds", "worker seconds", "peak memory, GiB", "tokens"]
    return _table(head, rows, identity="cost", num_words=1)


def _provenance(stages: pd.DataFrame) -> str:
    if not len(stages):
        return ""
    columns = ["host", "device", "git_commit", *[c for c in stages if str(c).startswith("version.")]]
    rows = [
        [str(column).removeprefix("version."), ", ".join(sorted({str(v) for v in stages[column].dropna()}))]
        for column in columns
        if column in stages
    ]
    return _table(["what", "values"], rows, identity="provenance")


def _table(head: list[str], rows: list[list[str]], *, identity: str, num_words: int | None = None) -> str:
    """`num_words`: how many leading columns are words; the rest are numbers, set to the right."""
    words = len(head) if num_words is None else num_words
    kinds = ["" if index < words else " class=n" for index in range(len(head))]
    top = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(head, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>\n"
        for row in rows
    )
    return f'<div class=scroll><table id="{identity}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _chart(index: int, chart: Chart) -> str:
    # Inside a script nothing is markup but `<`, which JSON can write otherwise.
    data = chart.figure.to_json().replace("<", "\\u003c")
    return (
        f"<section><h2>{escape(chart.title)}</h2><p>{escape(chart.caption)}</p>"
        f'<div class=chart id="chart{index}"></div>'
        f'<script type="application/json" data-chart="chart{index}">{data}</script></section>'
    )


def _short(column: Any) -> str:
    return str(column).removeprefix("indicators/").removeprefix("sft/").removeprefix("flatness/").replace("_", " ")


def _with_error(row: Any, column: str) -> str:
    value = row.get(column)
    if not _is_number(value):
        return ""
    error = row.get(f"{column}_stderr")
    if not _is_number(error) and _is_number(row.get(f"{column}_sd")):
        error = row[f"{column}_sd"] / math.sqrt(row[f"{column}_num_seeds"])
    return _digits(value) + (f" ± {_digits(error)}" if _is_number(error) else "")


def _digits(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 10_000 else f"{value:.3g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _interval(interval: Any, form: str) -> str:
    if math.isnan(interval.value):
        return "undefined"
    text = form.format(interval.value)
    return text if math.isnan(interval.low) else f"{text} [{form.format(interval.low)}, {form.format(interval.high)}]"


def _percent(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.0%}"
