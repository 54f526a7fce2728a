"""The charts of the report, as plotly figures with what a point stands for on hover."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from html import escape
from typing import Any

from raysweep.analysis.ranking import Ranking
from raysweep.runs import Run

# Okabe and Ito (2008): told apart with any colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#B8A400")


@dataclass(frozen=True)
class Chart:
    """A figure, its title and what to see in it."""

    title: str
    caption: str
    figure: Any


def loss_chart(run: Run, ranking: Ranking) -> Chart | None:
    """Training loss over steps, a line for each trial."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for index, trial in enumerate(run.trials()):
        done = [s for s in trial.stages if s.kind == "pretrain" and (record := run.store.get(s.id)) and record.files]
        if not done:
            continue
        curve = [json.loads(line) for line in (run.store.folder(done[-1].id) / "curve.jsonl").read_text().splitlines()]
        steps, losses = thin([point["step"] for point in curve], [point["loss_nats_per_token"] for point in curve])
        figure.add_trace(
            go.Scatter(
                x=steps,
                y=losses,
                mode="lines",
                name=_label(trial.point, trial.seed),
                line={"color": COLOURS[index % len(COLOURS)], "width": 1.5},
                hovertemplate="step %{x}<br>%{y:.3f} nats<extra>%{fullData.name}</extra>",
            )
        )
    if not figure.data:
        return None
    _axes(figure, "step", "training loss, nats per token")
    return Chart("Loss curves", "Training loss of every trial, as the mean over equal runs of steps.", figure)


def thin(steps: list[int], losses: list[float], *, most: int = 300) -> tuple[list[float], list[float]]:
    """At most `most` points: means over equal runs of steps."""
    width = max(1, math.ceil(len(steps) / most))
    runs = [slice(start, start + width) for start in range(0, len(steps), width)]
    mean = [sum(losses[run]) / len(losses[run]) for run in runs]
    return [sum(steps[run]) / len(steps[run]) for run in runs], mean


def trace_chart(ranking: Ranking) -> Chart | None:
    """Hessian trace against fine-tuned score, a point for each checkpoint."""
    import plotly.graph_objects as go

    table = ranking.checkpoints
    x, y = "flatness/hessian_trace", ranking.target
    if x not in table or y not in table or table[[x, y]].dropna().empty:
        return None
    table = table[table[x].notna() & table[y].notna()]
    points = [str(column) for column in table if str(column).startswith("point.")]
    figure = go.Figure()
    groups = table.groupby(points[0], sort=False) if points else [("checkpoints", table)]
    for index, (value, part) in enumerate(groups):
        texts = [
            _label({point.removeprefix("point."): row[point] for point in points}, row["seed"])
            + f", step {row['step']}"
            for _, row in part.iterrows()
        ]
        name = f"{points[0].removeprefix('point.')}={value}" if points else str(value)
        figure.add_trace(
            go.Scatter(
                x=part[x].tolist(),
                y=part[y].tolist(),
                error_x={"type": "data", "array": part[f"{x}_stderr"].tolist(), "thickness": 1},
                error_y={"type": "data", "array": part.get(f"{y}_stderr", part[y] * 0).tolist(), "thickness": 1},
                mode="markers",
                name=escape(name),
                text=texts,
                marker={"size": 9, "color": COLOURS[index % len(COLOURS)]},
                hovertemplate="%{text}<br>trace %{x:.4g}<br>score %{y:.3f}<extra></extra>",
            )
        )
    _axes(figure, "trace of the Hessian", "mean fine-tuned score")
    positive = (table[x] > 0).all() and table[x].max() > 20 * table[x].min()
    figure.update_xaxes(type="log" if positive else "linear")
    caption = "Each point is a checkpoint; bars are one standard error. A flat minimum lies to the left."
    return Chart("Flatness and fine-tuning", caption, figure)


def accuracy_chart(ranking: Ranking) -> Chart | None:
    """Pairwise accuracy of each indicator with its interval."""
    import plotly.graph_objects as go

    if not ranking.indicators:
        return None
    ranked = list(reversed(ranking.indicators))
    values = [one.pairwise_accuracy for one in ranked]
    figure = go.Figure(
        go.Scatter(
            x=[one.value for one in values],
            y=[escape(one.name) for one in ranked],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [one.high - one.value if math.isfinite(one.high) else 0 for one in values],
                "arrayminus": [one.value - one.low if math.isfinite(one.low) else 0 for one in values],
                "thickness": 2,
            },
            mode="markers",
            marker={
                "size": 9,
                "color": [COLOURS[6] if one.name.startswith("config/") else COLOURS[0] for one in ranked],
            },
            hovertemplate="%{y}<br>%{x:.1%} of pairs right<extra></extra>",
        )
    )
    _axes(figure, "share of pairs ordered right", "")
    figure.add_vline(x=0.5, line_dash="dot", line_color="#999999")
    figure.update_xaxes(range=[0, 1.02], tickformat=".0%")
    figure.update_layout(height=max(260, 26 * len(ranked) + 90), showlegend=False)
    figure.update_yaxes(automargin=True)
    caption = (
        "Over all pairs of checkpoints, ties counted half; bars are 95 % bootstrap intervals over trials, the dotted "
        "line is a coin. Grey: what could be said from the configuration alone."
    )
    return Chart("Which indicator tells", caption, figure)


def _axes(figure: Any, x: str, y: str) -> None:
    figure.update_layout(
        xaxis_title=x,
        yaxis_title=y,
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        height=420,
        template="plotly_white",
        hovermode="closest",
        legend={"orientation": "h", "y": -0.2},
    )


def _label(point: Any, seed: int) -> str:
    parts = [f"{str(path).removeprefix('pretrain.')}={value}" for path, value in point.items()]
    return escape(", ".join([*parts, f"seed {seed}"]))
