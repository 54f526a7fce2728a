"""One colour and shape for each variant, in the ranking, the charts and their key."""

from __future__ import annotations

from dataclasses import dataclass

from raysweep.analysis import formatting
from raysweep.analysis.labels import is_missing, varying_points
from raysweep.analysis.ranking import Ranking

# Told apart on white and on black, also by most who see fewer colours; then again in another shape.
HUES = ("#3b76e8", "#e8743b", "#19a979", "#c04cd0", "#d8a800", "#13a4b4", "#e0425e", "#7b61d9", "#7c8a3a", "#8c6d5a")
SHAPES = ("circle", "square", "diamond")


@dataclass(frozen=True)
class Color:
    """Of a variant; `shape` as Plotly names it. `label`: its point, as far as it varies."""

    hue: str
    shape: str
    label: str


def variant_colors(ranking: Ranking) -> dict[str, Color]:
    """Variant -> its colour, in the order in which the ranking names them."""
    table = ranking.checkpoints
    points = varying_points(table)
    colors: dict[str, Color] = {}
    for row in table.to_dict("records"):
        if row["variant"] not in colors:
            point = {name.removeprefix("point."): row[name] for name in points if not is_missing(row[name])}
            shape, hue = divmod(len(colors), len(HUES))
            label = formatting.point_text(point) or "base"
            colors[row["variant"]] = Color(HUES[hue], SHAPES[shape % len(SHAPES)], label)
    return colors
