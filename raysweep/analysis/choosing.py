"""The checkpoint that a sweep's `search.choose` picks: the best by one metric of those nearly the best by another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from raysweep.document import read_yaml
from raysweep.durable import parse_object
from raysweep.errors import SpaceError
from raysweep.runs import Run
from raysweep.search import Axis, Choose, Search, labels
from raysweep.spec import Spec
from raysweep.validation import validate

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Chosen:
    """A checkpoint, and among how many it was picked."""

    choose: Choose
    row: Mapping[str, Any]
    """Of the table of checkpoints."""
    num_within: int
    """Checkpoints that keep the bound."""
    num: int
    """Those that have both metrics."""

    def said(self) -> str:
        """By what it was chosen, in words."""
        better, within = "lowest" if self.choose.mode == "min" else "highest", self.choose.within
        return (
            f"{better} {self.choose.metric} of the {self.num_within} of {self.num} checkpoints within "
            f"{100 * within.part:g} % of the best {within.metric}"
        )


def identity_of(run: Run) -> dict[str, Any]:
    """What a run declares that makes its results; empty where it cannot be read."""
    try:
        return parse_object((run.folder / "identity.json").read_bytes())
    except (OSError, ValueError):
        return {}


def written_of(run: Run) -> dict[str, Any]:
    """A run's sweep file as plain values, without defaults; empty where it cannot be read."""
    try:
        document, _ = read_yaml(run.sweep_text, str)
    except (OSError, SpaceError):
        return {}
    return document if isinstance(document, dict) else {}


def values_of(run: Run) -> dict[str, tuple[Any, ...]]:
    """Axis -> its values, or their names, in the order of a run's sweep file; empty where that cannot be read.

    An identity has names in the order of the alphabet.
    """
    try:
        axes = validate(_Axes, {"sweep": written_of(run).get("sweep", {})}).sweep
    except ValidationError:
        return {}  # The file is checked where a run goes on; a page can do without.
    return {name: labels(axis) for name, axis in axes.items()}


class _Axes(Spec):
    """The part of a sweep file that lists values."""

    sweep: dict[str, Axis]


def search_of(run: Run) -> Search:
    """How a run's points are picked; a grid, where its identity cannot be read."""
    try:
        return validate(Search, identity_of(run).get("search") or {})
    except ValidationError:
        return Search()  # The identity is checked where a run goes on; a page can do without.


def chosen_of(table: pd.DataFrame, choose: Choose | None) -> Chosen | None:
    """The chosen row of a table of checkpoints; None where none is asked for, or no row has both metrics.

    Of equals it is the first.
    """
    names = [choose.metric, choose.within.metric] if choose else []
    if choose is None or not set(names) <= set(table.columns):
        return None
    rows = [{str(name): value for name, value in row.items()} for row in table.dropna(subset=names).to_dict("records")]
    if not rows:
        return None
    within = choose.within
    bounds = [float(row[within.metric]) for row in rows]
    best = within.best(bounds)
    kept = [row for row, value in zip(rows, bounds, strict=True) if within.excess(value, best) <= 0]
    pick = min if choose.mode == "min" else max
    return Chosen(choose, pick(kept, key=lambda row: float(row[choose.metric])), len(kept), len(rows))
