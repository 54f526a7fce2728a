"""What a checkpoint table keeps of its run in its file: what its columns are, and how each was measured.

So it can be ranked and learnt from where the run is not, in the same way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from raysweep.analysis.comparer_files import IndicatorFile
from raysweep.scores import Column
from raysweep.spec import fingerprint

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS: TypeAdapter[tuple[Column, ...]] = TypeAdapter(tuple[Column, ...])
_VERSIONS: TypeAdapter[dict[str, IndicatorFile]] = TypeAdapter(dict[str, IndicatorFile])


def keep(table: pd.DataFrame, columns: Sequence[Column], versions: Mapping[str, IndicatorFile]) -> pd.DataFrame:
    """The table with what its columns are and their `versions_of`, for pandas to write into a Parquet file."""
    there = tuple(column for column in columns if column.name in table)
    kept = table.copy(deep=False)
    kept.attrs = {
        "columns": _COLUMNS.dump_json(there).decode(),
        "versions": _VERSIONS.dump_json(dict(versions)).decode(),
    }
    return kept


def kept_of(table: pd.DataFrame) -> tuple[tuple[Column, ...], dict[str, IndicatorFile]]:
    """What `keep` gave it; nothing of a table that no run made.

    Raises:
        ValueError: if something else stands there.
    """
    attributes = table.attrs
    try:
        columns = _COLUMNS.validate_json(attributes.get("columns", "[]"))
        return columns, _VERSIONS.validate_json(attributes.get("versions", "{}"))
    except ValidationError as error:
        raise ValueError(error.errors(include_url=False)[0]["msg"]) from error


def versions_of(stages: pd.DataFrame, columns: Sequence[Column]) -> dict[str, IndicatorFile]:
    """Kind of stage, and column of a mean over a family -> the fingerprints of specs, and what they take."""
    found = {}
    done = stages[stages["settings"].notna()].drop_duplicates("id")
    for kind, rows in done.groupby("kind"):
        prints = sorted({version_of(json.loads(settings)) for settings in rows["settings"]})
        spent = (rows["wall_seconds"] * rows["world_size"].astype("float64")).median()
        flops = None if rows["flops"].isna().any() else float(rows["flops"].median())
        seconds = None if math.isnan(spent) else float(spent)
        found[str(kind)] = IndicatorFile(versions=tuple(prints), seconds=seconds, flops=flops)
    for column in columns:
        if column.tasks and column.kind in found:
            of = found[column.kind]
            prints = [of_mean(each, column) for each in of.versions]
            found[column.name] = of.with_(versions=tuple(prints))
    return found


def version_of(spec: Mapping[str, object]) -> str:
    """Of a stage, as its record has it: two of one version measure the same thing."""
    return fingerprint(dict(spec))


def of_mean(version: str, column: Column) -> str:
    """Of what a stage of some version measures, the mean over a family: its tasks are no part of the stage."""
    return fingerprint({"version": version, "tasks": list(column.tasks)}) if column.tasks else version
