"""What tells a checkpoint of a table from the others: as a key, and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from raysweep.analysis import formatting

if TYPE_CHECKING:
    import pandas as pd

Key = tuple[str, str]
"""Trial and checkpoint: a checkpoint that exists may be measured by several trials, on other text."""


def row_key(row: Mapping[Any, Any] | pd.Series) -> Key:
    """What tells a row of a checkpoint table from the others."""
    return row["trial"], row["checkpoint"]


def checkpoint_labels(table: pd.DataFrame) -> dict[Key, str]:
    """Trial and checkpoint id -> what tells it from the others: the point's values that vary, the step, the seed."""
    points = varying_points(table)
    several_seeds = table["seed"].nunique() > 1 if "seed" in table else False
    labels = {}
    for row in table.to_dict("records"):
        point = {name.removeprefix("point."): row[name] for name in points if not is_missing(row[name])}
        parts = [formatting.point_text(point)] if point else []
        if not is_missing(row["step"]):
            parts.append(f"step {int(row['step'])}")
        if several_seeds:
            parts.append(f"seed {row['seed']}")
        labels[row_key(row)] = " · ".join(parts) or str(row["checkpoint"])
    return labels


def varying_points(table: pd.DataFrame) -> list[str]:
    """Columns of the swept values that are not the same for all."""
    return [name for name in table.columns if name.startswith("point.") and table[name].nunique(dropna=False) > 1]


def is_missing(value: Any) -> bool:
    """Whether a table's cell holds nothing: None, NaN or pandas' NA."""
    return value is None or str(value) == "<NA>" or value != value
