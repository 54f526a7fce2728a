"""One self-contained HTML file about a run: which checkpoint is best, what predicted it, what it cost, what failed.

Every text that came from a user passes through Jinja's autoescape, `_for_script` or `_for_chart`. The page's policy
names its two scripts by hash and allows nothing else to run, and no request to anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysweep.analysis import formats
from raysweep.analysis.findings import headline, how_to_read, score_text
from raysweep.analysis.indicators import direction_of
from raysweep.analysis.ranking import MEAN_SCORE, Ranking, shown_indicators
from raysweep.durable import write_text
from raysweep.printable import printable
from raysweep.runs import Run

if TYPE_CHECKING:
    import pandas as pd
    from jinja2 import Environment

MAX_POINTS = 400
"""Of one loss curve in the page."""


def write_report(run: Run, stages: pd.DataFrame, ranking: Ranking) -> Path:
    """Writes report.html into the run's folder; its path."""
    path = run.folder / "report.html"
    write_text(path, render(run, stages, ranking))
    run.store.push(run.folder)
    return path


def render(run: Run, stages: pd.DataFrame, ranking: Ranking) -> str:
    """The page as text."""
    from markupsafe import Markup

    charts = {
        name: chart
        for name, chart in (
            ("scatter", _scatter(ranking)),
            ("agreement", _agreement_chart(ranking)),
            ("loss", _loss(run, stages)),
        )
        if chart
    }
    script = _shipped("report.js")
    plotly = _plotly() if charts else ""
    policy = " ".join(f"'sha256-{_digest(text)}'" for text in (plotly, script) if text)
    template = _environment().get_template("report.html")
    return template.render(
        name=run.name,
        headline=headline(ranking),
        location=None if ranking.best is None else ranking.best.get("location"),
        facts=_facts(stages, ranking),
        nav=[
            ("ranking", "Ranking"),
            ("scatter", "Indicator against score"),
            ("agreement", "What predicts it"),
            ("loss", "Loss curves"),
            ("failures", "Failures"),
            ("cost", "Cost"),
            ("sweep", "Sweep file"),
            ("provenance", "Provenance"),
        ],
        ranking=_ranking_table(ranking),
        reading=how_to_read(ranking),
        agreement=_agreement_table(ranking),
        skipped=sorted(ranking.skipped.items()),
        failures=_failure_table(run, stages),
        cost=_cost_table(stages),
        sweep_text=run.sweep_text,
        provenance=_provenance(run, stages),
        charts={"scatter": None, "loss": None} | charts,
        has_charts=bool(charts),
        charts_json=Markup(_for_script(charts)),
        max_points=MAX_POINTS,
        script_hashes=Markup(policy),
        style=Markup(_shipped("report.css")),
        plotly=Markup(plotly),
        script=Markup(script),
    )


def ranking_html(ranking: Ranking) -> str:
    """The headline and the checkpoints, best first, as a piece of HTML without scripts."""
    return (
        _environment().get_template("ranking.html").render(headline=headline(ranking), ranking=_ranking_table(ranking))
    )


def _facts(stages: pd.DataFrame, ranking: Ranking) -> list[tuple[str, str]]:
    unique = stages.drop_duplicates("id")
    done = int((unique["status"] == "done").sum())
    distances = ranking.checkpoints.get("flatness/samples_relative_distance")
    facts = [
        ("variants", str(stages["variant"].nunique())),
        ("checkpoints", str(len(ranking.checkpoints))),
        ("stages done", f"{done} of {len(unique)}"),
        ("stage time", formats.seconds(float(unique["wall_seconds"].sum()))),
        ("failed or diverged", str(int(unique["status"].isin(["failed", "diverged"]).sum()))),
    ]
    if distances is not None and distances.notna().any():
        low, middle, high = (f"{distances.quantile(part):+.1%}" for part in (0, 0.5, 1))
        facts.append(("Hessian trace on own samples, off that on the text", f"{middle} (median; {low} to {high})"))
    return facts


def _ranking_table(ranking: Ranking) -> dict[str, Any]:
    shown = shown_indicators(ranking)
    tasks = [
        name
        for name in ranking.checkpoints.columns
        if name.startswith("sft/") and name.endswith("_score") and name not in (ranking.target, MEAN_SCORE)
        and not name.endswith("_valid_score")
    ]  # fmt: skip
    before = [name for name in ("indicators/zeroshot_mean",) if name in ranking.checkpoints]
    titles = ["#", "checkpoint", "mean score, %"]
    columns = [_column(title, numeric=title != "checkpoint") for title in titles]
    columns += [_column(f"{name[4:-6]}, %", numeric=True) for name in tasks]
    columns += [_column("before, %", numeric=True) for _ in before]
    columns += [_column(name, numeric=True) for name in shown]
    rows = []
    for row in ranking.checkpoints.to_dict("records"):
        label = ranking.labels[row["checkpoint"]]
        why = "" if row["status"] == "done" else row["status"]
        cells = [_cell(row["rank"], formats.number), _cell(label, mark=why)]
        cells += [_cell(row[ranking.target], lambda _, row=row: score_text(row, ranking.target))]
        cells += [_cell(row[name], lambda _, row=row, name=name: score_text(row, name)) for name in tasks]
        cells += [_cell(row[name], formats.percent) for name in before]
        for name in shown:
            place = row[f"rank/{name}"]
            cells.append(_cell(row[name], formats.number, mark="" if _absent(place) else f"#{place}"))
        rows.append(cells)
    return {"columns": columns, "rows": rows}


def _agreement_table(ranking: Ranking) -> dict[str, Any]:
    titles = ["pairs right", "clear pairs right", "Spearman", "Kendall", "over best config", "checkpoints"]
    columns = [_column("indicator"), _column("better")] + [_column(title, numeric=True) for title in titles]
    rows = []
    for item in ranking.associations:
        if item.same_order_as:
            continue
        marks = ["config, direction in hindsight"] if item.source == "config" else []
        equal = [other.indicator for other in ranking.associations if other.same_order_as == item.indicator]
        marks += [f"the same order: {', '.join(equal)}"] if equal else []
        mark = " · ".join(marks)
        cells = [_cell(item.indicator, mark=mark), _cell(item.direction)]
        for value in (item.accuracy, item.clear_accuracy, item.spearman, item.kendall, item.gain):
            cells.append(_cell(value.value, lambda _, value=value: formats.estimate(value)))
        missing = f"{item.num_missing} missing" if item.num_missing else ""
        rows.append([*cells, _cell(item.num_checkpoints, formats.number, mark=missing)])
    return {"columns": columns, "rows": rows}


def _failure_table(run: Run, stages: pd.DataFrame) -> dict[str, Any]:
    failures = {failure["stage"]: failure for failure in run.failures()}
    rows = []
    unfinished = stages[stages["status"] != "done"].drop_duplicates("id")
    for row in unfinished[unfinished["status"] != "missing"].to_dict("records"):
        failure = failures.get(row["id"], {})
        cause = failure.get("cause", "")
        if row["status"] == "diverged":
            loss = formats.number(row.get(f"{row['kind']}/diverged_loss"))
            step = formats.number(row.get(f"{row['kind']}/diverged_step"))
            cause = f"loss {loss} nats per token at step {step}"
        rows.append([_cell(row["status"]), _cell(row["id"]), _cell(cause), _cell(str(failure.get("log", "")))])
    missing = unfinished[unfinished["status"] == "missing"]
    for kind, number in missing["kind"].value_counts(sort=False).sort_index().items():
        text = "not run: what they need failed or diverged, or the sweep is not finished"
        rows.append([_cell("missing"), _cell(f"{number} × {kind}"), _cell(text), _cell("")])
    return {"columns": [_column(title) for title in ("status", "stage", "cause", "log")], "rows": rows}


def _cost_table(stages: pd.DataFrame) -> dict[str, Any]:
    titles = ("stages", "time", "mean", "worker time", "tokens", "peak memory")
    rows = []
    done = stages[stages["wall_seconds"].notna()].drop_duplicates("id")
    for kind, group in [*done.groupby("kind", sort=True), ("all", done)]:
        if group.empty:
            continue
        wall = group["wall_seconds"]
        workers = float((wall * group["world_size"].astype("float64")).sum())
        tokens = _tokens(group)
        memory = float(group["peak_memory_bytes"].astype("Float64").max())
        rows.append(
            [
                _cell(str(kind)),
                _cell(len(group), formats.number),
                _cell(float(wall.sum()), formats.seconds),
                _cell(float(wall.mean()), formats.seconds),
                _cell(workers, formats.seconds),
                _cell(tokens, formats.count),
                _cell(memory, formats.memory),
            ]
        )
    return {"columns": [_column("kind"), *(_column(title, numeric=True) for title in titles)], "rows": rows}


def _tokens(group: pd.DataFrame) -> float:
    # A checkpoint's tokens are those of its whole trajectory so far: the last one of a trial has them all.
    pretrain = group["kind"] == "pretrain"
    whole = group[pretrain].groupby("trial")["num_tokens"].max().sum() if pretrain.any() else 0.0
    total = float(whole) + float(group.loc[~pretrain, "num_tokens"].sum())
    return total or math.nan


def _provenance(run: Run, stages: pd.DataFrame) -> list[tuple[str, str]]:
    def values(name: str) -> str:
        return ", ".join(sorted(set(stages[name].dropna()))) or "—"

    versions: dict[str, set[str]] = {}
    for text in stages["versions"].dropna().unique():
        for package, version in json.loads(text).items():
            versions.setdefault(package, set()).add(version)
    started = stages["started"].dropna()
    return [
        ("run", run.name),
        ("store", run.store.url),
        ("first stage started", str(started.min()) if len(started) else "—"),
        ("last stage started", str(started.max()) if len(started) else "—"),
        ("hosts", values("host")),
        ("devices", values("device")),
        ("raysweep commit", values("git_commit")),
        *((package, ", ".join(sorted(found))) for package, found in sorted(versions.items())),
    ]


def _scatter(ranking: Ranking) -> dict[str, Any] | None:
    """One trace a variant, so that its checkpoints share a colour; x and text for every indicator to choose from."""
    table = ranking.checkpoints[ranking.checkpoints[ranking.target].notna()]
    names = [item.indicator for item in ranking.associations if item.source == "measured"]
    if table.empty or not names:
        return None
    # The trace of the Hessian comes first: the claim a reader comes to check.
    names.sort(key=lambda name: name != "flatness/hessian_trace")
    traces = []
    for _, group in table.groupby("variant", sort=True):
        labels = [ranking.labels[checkpoint] for checkpoint in group["checkpoint"]]
        scores = [score_text(row, ranking.target) for row in group.to_dict("records")]
        traces.append(
            {
                "x": [_numbers(group[name]) for name in names],
                "x_error": [_numbers(group[f"{name}_stderr"]) if f"{name}_stderr" in group else [] for name in names],
                "y": _numbers(100 * group[ranking.target]),
                "y_error": _numbers(100 * group[f"{ranking.target}_stderr"])
                if f"{ranking.target}_stderr" in group
                else [],
                "text": [
                    [
                        _for_chart(f"{label}\nscore {score} %\n{name} {formats.number(value)}")
                        for label, score, value in zip(labels, scores, group[name], strict=True)
                    ]
                    for name in names
                ],
            }
        )
    return {
        "indicators": names,
        "titles": [_for_chart(f"{name} ({direction_of(name) or 'declared'} is better)") for name in names],
        "logs": [bool((table[name].dropna() > 0).all()) and "trace" in name for name in names],
        "y_title": _for_chart(f"{ranking.target}, %"),
        "traces": traces,
    }


def _agreement_chart(ranking: Ranking) -> dict[str, Any] | None:
    items = [item for item in ranking.associations if item.same_order_as is None]
    if not items:
        return None
    traces = []
    for source in ("measured", "config"):
        part = [item for item in items if item.source == source]
        if part:
            traces.append(
                {
                    "name": {"measured": "measured indicator", "config": "config only"}[source],
                    "x": _numbers(item.accuracy.value for item in part),
                    "y": [_for_chart(item.indicator) for item in part],
                    "above": _numbers(item.accuracy.high - item.accuracy.value for item in part),
                    "below": _numbers(item.accuracy.value - item.accuracy.low for item in part),
                    "text": [
                        _for_chart(
                            f"{item.indicator} ({item.direction})\n{formats.estimate(item.accuracy)} of pairs right"
                        )
                        for item in part
                    ],
                }
            )
    return {"order": [_for_chart(item.indicator) for item in reversed(items)], "traces": traces}


def _loss(run: Run, stages: pd.DataFrame) -> list[dict[str, Any]] | None:
    """A curve for each trial, of its last finished checkpoint: that one's curve.jsonl holds the trajectory so far."""
    finished = stages[(stages["kind"] == "pretrain") & (stages["status"] == "done")].sort_values("step")
    traces = []
    for _, row in finished.groupby("trial", sort=True).tail(1).sort_values("trial").iterrows():
        path = run.store.folder(row["id"]) / "curve.jsonl"
        if not path.exists():
            continue
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        size = max(1, math.ceil(len(lines) / MAX_POINTS))
        parts = [lines[start : start + size] for start in range(0, len(lines), size)]
        means = [sum(line["loss_nats_per_token"] for line in part) / len(part) for part in parts]
        steps = [part[-1]["step"] for part in parts]
        point = {
            name.removeprefix("point."): row[name]
            for name in stages.columns
            if name.startswith("point.") and not _absent(row[name])
        }
        label = f"{formats.point_text(point)}\nseed {row['seed']}"
        text = [
            _for_chart(f"{label}\nstep {step}: {formats.number(loss)}") for step, loss in zip(steps, means, strict=True)
        ]
        traces.append({"x": steps, "y": _numbers(means), "text": text})
    return traces or None


def _column(title: str, *, numeric: bool = False) -> dict[str, Any]:
    return {"title": title, "numeric": numeric}


def _cell(value: Any, text: Any = str, *, mark: str = "") -> dict[str, Any]:
    """A table cell: what is shown, and the key it is sorted by (empty where the value is missing)."""
    if _absent(value):
        return {"text": "—", "sort": "", "mark": mark}
    return {"text": text(value), "sort": value, "mark": mark}


def _absent(value: Any) -> bool:
    return value is None or str(value) in ("<NA>", "nan")


def _numbers(values: Any) -> list[float | None]:
    return [None if _absent(value) or math.isinf(value) else float(value) for value in values]


def _for_chart(text: str) -> str:
    """Plotly renders a little HTML in its texts: entities for the user's, line breaks for ours."""
    return html.escape(printable(text), quote=False).replace("\n", "<br>")


def _for_script(value: Mapping[str, Any] | Sequence[Any]) -> str:
    """JSON that cannot close the script element it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _environment() -> Environment:
    """Templates whose every value is escaped; so are characters that would turn or hide their neighbours."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def shown(value: Any) -> Any:
        return printable(value) if type(value) is str else value  # Not of Markup, which is ours.

    return Environment(autoescape=True, undefined=StrictUndefined, loader=FunctionLoader(_shipped), finalize=shown)


def _shipped(name: str) -> str:
    return files("raysweep.analysis").joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    # An inline script ends at the first closing tag, wherever it stands.
    return str(get_plotlyjs()).replace("</script", "<\\/script")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
