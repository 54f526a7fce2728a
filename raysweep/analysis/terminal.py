"""A ranking on a terminal: its checkpoints, its indicators, and how to read them."""

from __future__ import annotations

import sys
from io import StringIO
from typing import TYPE_CHECKING

from raysweep.analysis import formats
from raysweep.analysis.findings import cautions, direction_text, how_to_read, score_text
from raysweep.analysis.ranking import Ranking, is_missing, shown_indicators
from raysweep.printable import printable

if TYPE_CHECKING:
    from rich.table import Table

PLAIN_WIDTH = 140
"""Columns of the tables where stdout is no terminal."""


def format_terminal(ranking: Ranking, *, width: int | None = None, color: bool | None = None) -> str:
    """Both tables and how to read them, for a terminal. None: as wide and coloured as stdout is."""
    from rich.console import Console
    from rich.text import Text

    color = sys.stdout.isatty() if color is None else color
    width = width or (None if sys.stdout.isatty() else PLAIN_WIDTH)
    console = Console(file=StringIO(), force_terminal=color, no_color=not color, width=width, highlight=False)
    if ranking.best is None:
        console.print("No checkpoint has a score yet.")
    else:
        console.print(_checkpoint_rows(ranking))
        if not is_missing(location := ranking.best.get("location")):
            console.print(Text(printable(f"best checkpoint: {location}")), soft_wrap=True)
        console.print(_indicator_rows(ranking))
    for line in cautions(ranking):
        console.print(Text(printable(line), style="bold yellow"))
    for line in how_to_read(ranking):
        console.print(Text(printable(line), style="dim"))
    for label in ranking.diverged:
        console.print(Text(printable(f"diverged: {label}"), style="red"))
    return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined, no-any-return]


def _checkpoint_rows(ranking: Ranking) -> Table:
    from rich.table import Table
    from rich.text import Text

    shown = shown_indicators(ranking)
    table = Table(title=f"Checkpoints by {ranking.target}, %", title_justify="left", title_style="bold")
    table.add_column("#", justify="right")
    table.add_column("checkpoint", overflow="fold")
    for name in ["score, %", *(name.partition("/")[2] for name in shown)]:
        table.add_column(Text(printable(name)), justify="right")
    for index, row in enumerate(ranking.checkpoints.to_dict("records")):
        place = "—" if is_missing(row["rank"]) else str(row["rank"])
        cells = [place, ranking.labels[row["checkpoint"]], score_text(row, ranking.target)]
        for name in shown:
            mark = "" if is_missing(row[f"rank/{name}"]) else f" #{row[f'rank/{name}']}"
            cells.append(formats.number(row[name]) + mark)
        table.add_row(*(Text(printable(cell)) for cell in cells), style="bold green" if index == 0 else None)
    return table


def _indicator_rows(ranking: Ranking) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Indicators by agreement with it", title_justify="left", title_style="bold")
    table.add_column("indicator", overflow="fold")
    table.add_column("better")
    for name in ("pairs right", "clear pairs", "Spearman"):
        table.add_column(name, justify="right")
    for item in ranking.associations:
        if item.same_order_as is None:
            name = item.indicator + (" (config)" if item.source == "config" else "")
            numbers = map(formats.estimate, (item.accuracy, item.clear_accuracy, item.spearman))
            table.add_row(*(Text(printable(cell)) for cell in (name, direction_text(item), *numbers)))
    return table
