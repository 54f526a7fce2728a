"""What the charts of a report show, as JSON values: one colour a variant, one dot a checkpoint, one line a trial."""

from __future__ import annotations

import html
import json
import logging
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from raysweep.analysis import formatting
from raysweep.analysis.colors import Color
from raysweep.analysis.findings import direction_text, half_width, score_text
from raysweep.analysis.labels import is_missing, row_key
from raysweep.analysis.pareto import Front
from raysweep.analysis.ranking import Ranking
from raysweep.analysis.sections import indicator_names
from raysweep.errors import LostError
from raysweep.printable import printable
from raysweep.runs import Run

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

MAX_POINTS = 400
"""Of one loss curve in the page."""

Chart = dict[str, Any]


def all_charts(
    run: Run, stages: pd.DataFrame, ranking: Ranking, *, colors: Mapping[str, Color], front: Front | None
) -> dict[str, Chart]:
    """Those that have something to show, by name."""
    charts = {
        "front": _front(front, ranking, colors) if front else None,
        "scatter": _scatter(ranking, colors),
        "agreement": _agreement(ranking),
        "loss": _loss(run, stages, colors),
    }
    return {name: chart for name, chart in charts.items() if chart}


def _scatter(ranking: Ranking, colors: Mapping[str, Color]) -> Chart | None:
    """One trace a variant; x and text for every indicator to choose from, the best one first."""
    table = ranking.checkpoints[ranking.checkpoints[ranking.target].notna()]
    measured = [item for item in ranking.associations if item.source == "measured"]
    names = [item.indicator for item in measured]
    if table.empty or not names:
        return None
    scale, unit = 100 if formatting.is_share(ranking.target) else 1, formatting.unit(ranking.target)
    traces = []
    for variant, color in colors.items():
        group = table[table["variant"] == variant]
        if group.empty:
            continue
        labels = [ranking.labels[row_key(row)] for row in group.to_dict("records")]
        scores = [score_text(row, ranking.target) for row in group.to_dict("records")]
        traces.append(
            {
                **drawn(color),
                "checkpoints": list(group["checkpoint"]),
                "x": [numbers(group[name]) for name in names],
                "x_error": [numbers(group[f"{name}_stderr"]) if f"{name}_stderr" in group else [] for name in names],
                "y": numbers(scale * group[ranking.target]),
                "y_error": numbers(scale * half_width(row, ranking.target) for row in group.to_dict("records")),
                "text": [
                    [
                        escaped(f"{label}\nscore {score}{unit}\n{name} {formatting.number(value)}")
                        for label, score, value in zip(labels, scores, group[name], strict=True)
                    ]
                    for name in names
                ],
            }
        )
    short = indicator_names(ranking)
    return {
        "indicators": [short.get(name, name) for name in names],
        "titles": [escaped(f"{item.indicator} ({direction_text(item)} is better)") for item in measured],
        "logs": [bool((table[name].dropna() > 0).all()) and "trace" in name for name in names],
        "y_title": escaped(f"{ranking.target},{unit}"),
        "traces": traces,
    }


def _front(front: Front, ranking: Ranking, colors: Mapping[str, Color]) -> Chart:
    """The first two goals, a dot for each trial's last checkpoint; the front's dots are joined."""
    first, second = front.goals[:2]
    dots = [
        {
            **drawn(colors[row["variant"]]),
            "checkpoints": [row["checkpoint"]],
            "x": numbers([row[first.metric]]),
            "y": numbers([row[second.metric]]),
            "on_front": on_front,
            "text": [
                escaped(
                    ranking.labels[row_key(row)]
                    + "".join(f"\n{goal.metric} {formatting.number(row[goal.metric])}" for goal in front.goals)
                )
            ],
        }
        for row, on_front in zip(front.rows, front.on_front, strict=True)
    ]
    # With three or more goals the front is no line in two of them.
    line = sorted((dot["x"][0], dot["y"][0]) for dot in dots if dot["on_front"]) if len(front.goals) == 2 else []
    return {
        "x_title": escaped(f"{first.metric} ({first.mode})"),
        "y_title": escaped(f"{second.metric} ({second.mode})"),
        "traces": dots,
        "line": {"x": [x for x, _ in line], "y": [y for _, y in line]},
    }


def _agreement(ranking: Ranking) -> Chart | None:
    items = [item for item in ranking.associations if item.same_order_as is None]
    if not items:
        return None
    short = {name: escaped(text) for name, text in indicator_names(ranking).items()}
    traces = []
    for source, title in (("measured", "measured indicator"), ("config", "config only")):
        part = [item for item in items if item.source == source]
        if part:
            traces.append(
                {
                    "name": title,
                    "x": numbers(item.accuracy.value for item in part),
                    "y": [short[item.indicator] for item in part],
                    "above": numbers(item.accuracy.high - item.accuracy.value for item in part),
                    "below": numbers(item.accuracy.value - item.accuracy.low for item in part),
                    "text": [
                        escaped(
                            f"{item.indicator} ({direction_text(item)})\n"
                            f"{formatting.with_interval(item.accuracy)} of pairs right"
                        )
                        for item in part
                    ],
                }
            )
    return {"order": [short[item.indicator] for item in reversed(items)], "traces": traces}


def _loss(run: Run, stages: pd.DataFrame, colors: Mapping[str, Color]) -> Chart | None:
    """A curve for each trial, of its last finished checkpoint: that one's curve.jsonl holds the trajectory so far."""
    trained = stages[(stages["kind"] == "pretrain") & stages["step"].notna()]
    finished = trained[trained["status"] == "done"].sort_values("step")
    traces = []
    for _, row in finished.groupby("trial", sort=True).tail(1).sort_values("trial").iterrows():
        try:
            path = run.store.file(row["id"], "curve.jsonl")
        except LostError as error:
            logger.warning("%s; its loss is not drawn", error)
            continue
        if not path.exists():
            continue
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        size = max(1, math.ceil(len(lines) / MAX_POINTS))
        parts = [lines[start : start + size] for start in range(0, len(lines), size)]
        means = [sum(line["loss_nats_per_token"] for line in part) / len(part) for part in parts]
        steps = [part[-1]["step"] for part in parts]
        color = colors[row["variant"]]
        text = [
            escaped(f"{color.label}\nseed {row['seed']}\nstep {step}: {formatting.number(loss)}")
            for step, loss in zip(steps, means, strict=True)
        ]
        # A row about any checkpoint of the trajectory finds its line.
        own = stages[(stages["trial"] == row["trial"]) & (stages["kind"] == "pretrain")]["id"]
        traces.append({**drawn(color), "checkpoints": list(own), "x": steps, "y": numbers(means), "text": text})
    return {"traces": traces} if traces else None


def drawn(color: Color) -> Chart:
    """How a variant looks, and what it is called."""
    return {"name": escaped(color.label), "color": color.hue, "symbol": color.shape}


def numbers(values: Iterable[Any]) -> list[float | None]:
    """As JSON has them: null where there is none, or none that is finite."""
    return [None if is_missing(value) or math.isinf(value) else float(value) for value in values]


def escaped(text: str) -> str:
    """Plotly renders a little HTML in its texts: entities for the user's, line breaks for ours."""
    return html.escape(printable(text), quote=False).replace("\n", "<br>")
