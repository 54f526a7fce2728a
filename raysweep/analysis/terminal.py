"""A ranking on a terminal: its checkpoints, its indicators, how to read them, and where the best one lies."""

from __future__ import annotations

import sys
from io import StringIO
from typing import TYPE_CHECKING

from raysweep.analysis.cut_prompts import cut_lines
from raysweep.analysis.findings import agreement_lines, cautions, gap_lines, how_to_read
from raysweep.analysis.formatting import unit
from raysweep.analysis.labels import is_missing
from raysweep.analysis.ranking import Ranking
from raysweep.analysis.sections import Cell, Row, Table, agreement_table, beyond_tables, ranking_table
from raysweep.printable import printable

if TYPE_CHECKING:
    from rich import table as rich_table
    from rich.console import Console
    from rich.text import Text

PLAIN_WIDTH = 140
"""Columns of the tables where stdout is no terminal."""
INDICATOR_COLUMNS = 6
"""Of the report's table of indicators, those that a terminal has room for."""


def format_terminal(ranking: Ranking, *, width: int | None = None, color: bool | None = None) -> str:
    """Both tables and how to read them, for a terminal. None: as wide and coloured as stdout is."""
    console = _console(width, color)
    if not ranking.has_scores:
        console.print("No checkpoint has a score yet.")
    else:
        by_task = ranking_table(ranking, {}, per_task=False)
        console.print(_rich(by_task, title=f"Checkpoints by {ranking.target},{unit(ranking.target)}"))
        console.print(_rich(_indicators(ranking), title="Indicators by agreement with it"))
    for line in cautions(ranking):
        console.print(_text(line, style="bold yellow"))
    for line in how_to_read(ranking):
        console.print(_text(line, style="dim"))
    for label in ranking.diverged:
        console.print(_text(f"diverged: {label}", style="red"))
    if ranking.best is not None and not is_missing(location := ranking.best.get("location")):
        console.print(_text(f"best checkpoint: {location}", style="bold"), soft_wrap=True)
    return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined, no-any-return]


def format_indicators(ranking: Ranking, *, width: int | None = None, color: bool | None = None) -> str:
    """The indicators alone: of a table, whose targets may be of any unit."""
    console = _console(width, color)
    better = "higher" if ranking.sign > 0 else "lower"
    title = f"Indicators by agreement with {ranking.target}, taken as {better} is better"
    console.print(_rich(_indicators(ranking), title=title))
    for title, table in beyond_tables(ranking):
        if table.rows:
            console.print(_rich(table, title=title))
    for line in cut_lines(ranking.cut_prompts):
        console.print(_text(line, style="bold yellow"))
    for flag in ranking.flags:
        console.print(_text(f"{flag.kind}: {flag.text}", style="bold yellow"))
    for line in (*agreement_lines(ranking), *gap_lines(ranking)):
        console.print(_text(line, style="dim"))
    for name, why in sorted(ranking.skipped.items()):
        console.print(_text(f"not ranked: {name}: {why}", style="dim"))
    return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined, no-any-return]


def format_table(table: Table, title: str, *, width: int | None = None, color: bool | None = None) -> str:
    """One of the report's tables, under its title."""
    console = _console(width, color)
    console.print(_rich(table, title=title))
    return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined, no-any-return]


def _console(width: int | None, color: bool | None) -> Console:
    from rich.console import Console

    color = sys.stdout.isatty() if color is None else color
    width = width or (None if sys.stdout.isatty() else PLAIN_WIDTH)
    return Console(file=StringIO(), force_terminal=color, no_color=not color, width=width, highlight=False)


def _indicators(ranking: Ranking) -> Table:
    """As many of the columns as a terminal has room for."""
    whole = agreement_table(ranking)
    return Table(whole.columns[:INDICATOR_COLUMNS], [Row(row.cells[:INDICATOR_COLUMNS]) for row in whole.rows])


def _rich(table: Table, *, title: str) -> rich_table.Table:
    from rich.table import Table as RichTable

    shown = RichTable(
        title=_text(title, style="bold"), title_justify="left", show_footer=bool(table.foot), footer_style="dim"
    )
    foot = [_cell_text(cell) for cell in table.foot] or [_text("")] * len(table.columns)
    for column, below in zip(table.columns, foot, strict=True):
        justify, overflow = ("right", "ellipsis") if column.numeric else ("left", "fold")
        shown.add_column(_text(column.name), below, justify=justify, overflow=overflow)  # type: ignore[arg-type]
    for row in table.rows:
        shown.add_row(*map(_cell_text, row.cells), style="bold green" if row.is_best else None)
    return shown


def _cell_text(cell: Cell) -> Text:
    mark = f"({cell.mark})" if cell.mark[:1].isalnum() else cell.mark
    return _text(f"{cell.text} {mark}".rstrip())


def _text(text: str, *, style: str = "") -> Text:
    from rich.text import Text

    return Text(printable(text), style=style)
