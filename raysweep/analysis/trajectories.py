"""What a trajectory's checkpoints measure, over steps: curvature, loss and scores side by side, one line a variant."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from raysweep.analysis import formatting
from raysweep.analysis.charts import Chart, drawn, escaped, numbers
from raysweep.analysis.colors import Color
from raysweep.analysis.derived import HESSIAN_TRACE
from raysweep.analysis.labels import is_missing
from raysweep.analysis.objectives import PERPLEXITY_OF
from raysweep.analysis.ranking import PROBE_MEAN, Ranking
from raysweep.scores import column_name

if TYPE_CHECKING:
    import pandas as pd

GAUSS_NEWTON_TRACE = column_name("flatness", "gauss_newton_trace")
GAP = column_name("heldout", "entropy_gap_nats_per_token")
_PROBE = re.compile(r"probes/(.+/)?labels_(\d+)")
LOSS = column_name("heldout", "loss_nats_per_token")


def steps_chart(ranking: Ranking, colors: Mapping[str, Color]) -> Chart | None:
    """Numbers of each variant's checkpoints, of each seed and as the mean over seeds; None where none has several.

    Of the loss the distance to the lowest one is shown where it is known, and nothing where variants have losses of
    different objectives. Where variants train for different numbers of steps, x is the part of each one's own.
    """
    table = ranking.checkpoints
    table = table[table["step"].notna()].sort_values("step")
    several = table.groupby("trial")["step"].nunique()
    table = table[table["trial"].isin(several[several > 1].index)]
    columns = [name for name in (_trace_column(table), _loss_column(table)) if name and name in table]
    scores = _score_columns(ranking, table)
    if table.empty or not (columns or scores):
        return None
    ends = table.groupby("trial")["step"].max()
    is_part = ends.nunique() > 1
    x = table["step"].astype("float64") / (table["trial"].map(ends).astype("float64") if is_part else 1.0)
    table = table.assign(x=x)
    lines = [
        line
        for variant, color in colors.items()
        for line in _lines(table[table["variant"] == variant], color, [*columns, *scores])
    ]
    return {
        "is_part": is_part,
        "x_title": "part of a variant's steps" if is_part else "step",
        "titles": [escaped(name) for name in (*columns, *scores)],
        # Traces and distances fall by factors; scores are shares.
        "logs": [bool((table[name].dropna() > 0).all()) for name in columns] + [False] * len(scores),
        "num_fixed": len(columns),
        "scores": scores,
        "lines": lines,
    }


def _trace_column(table: pd.DataFrame) -> str:
    """The Hessian's trace; Gauss-Newton's where that has less than half its error, as in a model with kinks."""
    errors = [
        (table[f"{name}_stderr"] / table[name]).abs().median()
        for name in (GAUSS_NEWTON_TRACE, HESSIAN_TRACE)
        if f"{name}_stderr" in table
    ]
    return GAUSS_NEWTON_TRACE if len(errors) == 2 and 2 * errors[0] < errors[1] else HESSIAN_TRACE


def _loss_column(table: pd.DataFrame) -> str | None:
    if PERPLEXITY_OF in table and table[PERPLEXITY_OF].nunique() > 1:
        return None
    return GAP if GAP in table and table[GAP].notna().any() else LOSS


def _score_columns(ranking: Ranking, table: pd.DataFrame) -> list[str]:
    """What probes say, of few labels first, and then the target: the first is shown until a reader picks another."""
    found = sorted((int(match[2]), match[0]) for name in table if (match := _PROBE.fullmatch(str(name))))
    names = [*(name for _, name in found), PROBE_MEAN, ranking.target]
    return [name for name in names if name in table and table[name].notna().any()]


def _lines(table: pd.DataFrame, color: Color, columns: Sequence[str]) -> list[Chart]:
    """Of one variant: a faint line for each of several seeds, and one of their means."""
    seeds = [(f"seed {group['seed'].iloc[0]}", group) for _, group in table.groupby("trial", sort=True)]
    if len(seeds) < 2:
        return [_line(group, color, columns, is_faint=False, who="") for _, group in seeds]
    # A mean is of all seeds or none: with one missing it would jump.
    together = table.groupby("x")[list(columns)]
    means = together.mean().where(together.count() == len(seeds)).reset_index()
    return [
        *(_line(group, color, columns, is_faint=True, who=who) for who, group in seeds),
        *([_line(means, color, columns, is_faint=False, who=f"mean of {len(seeds)} seeds")] if len(means) else []),
    ]


def _line(table: pd.DataFrame, color: Color, columns: Sequence[str], *, is_faint: bool, who: str) -> Chart:
    def text(x: float, name: str, value: object) -> str:
        shown = "—" if is_missing(value) else formatting.number(value)
        return escaped("\n".join(part for part in (color.label, who, f"{x:g}: {name} {shown}") if part))

    return {
        **drawn(color),
        "faint": is_faint,
        "checkpoints": list(table["checkpoint"]) if "checkpoint" in table else [],
        "x": numbers(table["x"]),
        "y": [numbers(table[name]) for name in columns],
        "text": [[text(x, name, value) for x, value in zip(table["x"], table[name], strict=True)] for name in columns],
    }
