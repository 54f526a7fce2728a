"""A table of indicators and targets from a file, whoever measured them, as a checkpoint table that can be ranked."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raysweep.analysis.comparer_files import IndicatorFile
from raysweep.analysis.defects import flagged_rows
from raysweep.analysis.kept import kept_of
from raysweep.analysis.labels import is_missing
from raysweep.analysis.objectives import LOSSES
from raysweep.analysis.ranking import Ranking, default_target, rank
from raysweep.errors import DataError
from raysweep.scores import Column
from raysweep.spec import Metric, fingerprint
from raysweep.validation import suggested

if TYPE_CHECKING:
    import pandas as pd

VARIANT = "variant"
"""A column that is taken for the rows' variants, where no other is named."""

OF_CHECKPOINTS = ("trial", "variant", "seed", "checkpoint", "step", "status")
"""Columns by which a checkpoint table tells its rows."""

POINT = "point."
"""Before the name of a setting, in a checkpoint table."""


@dataclass(frozen=True)
class Roles:
    """What the columns of a table are; others are left out.

    A target's standard error may stand beside it, in `<target>_stderr`; and whose loss indicators called as in a run
    are of (`heldout/ppl`), in columns called as there (`perplexity_of`): those of different ones do not compare. A
    table that a run wrote tells its indicators and configuration by itself, where none are named.
    """

    target: str = ""
    """The score after fine-tuning, higher being better; empty: what the run is ranked by that wrote the table."""
    higher: tuple[str, ...] = ()
    """Indicators of which higher values are better."""
    lower: tuple[str, ...] = ()
    """Indicators of which lower values are better."""
    config: tuple[str, ...] = ()
    """What was known before anything was measured: numbers, or names."""
    variant: str | None = None
    """Rows of one variant are no independent witnesses; None: `variant` where there is such a column, else rows of one
    configuration, or each row by itself where no configuration is given."""

    gaps: str | None = None
    """An indicator, such as perplexity, by whose differences pairs are looked at apart."""

    def named(self) -> Iterator[tuple[str, str]]:
        """(option, column) of each."""
        yield "--target", self.target
        yield from (("--higher", name) for name in self.higher)
        yield from (("--lower", name) for name in self.lower)
        yield from (("--config", name) for name in self.config)

    @property
    def numbers(self) -> tuple[str, ...]:
        """Columns that hold numbers."""
        return (self.target, *self.higher, *self.lower)


@dataclass(frozen=True)
class Given:
    """A file's rows as a checkpoint table, what its columns are, and what it is ranked by."""

    rows: pd.DataFrame
    columns: tuple[Column, ...]
    target: str
    gaps: str | None
    versions: Mapping[str, IndicatorFile]
    """See `versions_of`; empty where that is not known."""

    def ranking(self, *, without: Collection[str] = ()) -> Ranking:
        """As of a run's checkpoints; `without` some of them."""
        rows = self.rows[~self.rows["checkpoint"].isin(without)].reset_index(drop=True)
        return rank(rows, columns=self.columns, target=self.target, gaps_of=self.gaps)


def take(path: Path, roles: Roles) -> Given:
    """A table from a .csv (with a line of names) or .parquet file.

    Raises:
        DataError: if the file cannot be read, or a column or a value is not what its role asks for.
    """
    table = read_file(path)
    try:
        columns, versions = kept_of(table)
    except ValueError as error:
        raise DataError(f"{path}: what it says of its columns cannot be read: {error}") from error
    table.attrs = {}
    if not columns or roles.higher or roles.lower or roles.config or roles.variant:
        if not roles.target:
            raise DataError(f"{path}: which column is the score after fine-tuning? Name it: --target COLUMN")
        rows = checkpoint_rows(table, roles, name=path.name)
        return Given(rows, columns_of_roles(roles), roles.target, roles.gaps, versions={})
    columns = _check_kept(table, columns, path.name)
    there = [column.name for column in columns if column.may_be_target]
    target = roles.target or default_target(table, columns)
    if target not in there:
        raise DataError(f"{path}: --target: no column {target!r}{suggested(target, there, 'targets')}")
    _check_gaps(roles, [column.name for column in columns if column.metric.direction], path.name)
    return Given(table, columns, target, roles.gaps, versions)


def rank_table(path: Path, roles: Roles, *, drop_flagged: bool = False) -> Ranking:
    """The ranking of a table's rows and indicators, as of a run's checkpoints.

    Args:
        path: of a .csv (with a line of names) or .parquet file.
        drop_flagged: leave out what is flagged as a copy of another row or as collapsed; the flags stay.

    Raises:
        DataError: if the file cannot be read, or a column or a value is not what its role asks for.
    """
    given = take(path, roles)
    ranking = given.ranking()
    odd = flagged_rows(ranking.flags) if drop_flagged else ()
    if odd:
        ranking = replace(given.ranking(without=odd), flags=ranking.flags)
    # A row of a table has no step: that there is none says nothing of the table.
    return replace(ranking, skipped={column: why for column, why in ranking.skipped.items() if column != "step"})


def columns_of_roles(roles: Roles) -> tuple[Column, ...]:
    """What the indicators of a table are, under the names that they have there."""
    directions = dict.fromkeys(roles.higher, "max") | dict.fromkeys(roles.lower, "min")
    kinds = {name: name.rpartition("/") for name in directions}
    return tuple(
        Column(kind, Metric(metric, directions[name]))  # type: ignore[arg-type]
        for name, (kind, _, metric) in kinds.items()
    )


def read_file(path: Path) -> pd.DataFrame:
    """A table as it is in a file: of a CSV file, texts, empty ones missing.

    Raises:
        DataError: if there is no such file, or it is none of the two kinds.
    """
    import pandas as pd

    if path.suffix not in (".csv", ".parquet"):
        ending = repr(path.suffix) if path.suffix else "one without an ending"
        raise DataError(f"{path}: a table is a .csv or a .parquet file, not {ending}")
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
            # By places, as all that follows: a sorted or filtered table calls its rows otherwise.
            return table.reset_index(drop=table.index.names == [None])
        _check_separator(path)
        # Without a header, so that a name that is there twice is seen, and not made into another.
        rows = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, skipinitialspace=True)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except pd.errors.EmptyDataError:
        raise DataError(f"{path}: the file is empty; give a line of names and a line for each row") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    table = rows.iloc[1:].reset_index(drop=True)
    table.columns = pd.Index(rows.iloc[0])
    return table.mask(table == "")


def _check_separator(path: Path) -> None:
    with path.open(encoding="utf-8", errors="replace") as file:
        names = file.readline()
    for sign, called in ((";", "';'"), ("\t", "tabs")):
        if sign in names and "," not in names:
            raise DataError(f"{path}: its columns are separated by {called}; separate them by commas")


def checkpoint_rows(table: pd.DataFrame, roles: Roles, *, name: str) -> pd.DataFrame:
    """A checkpoint table of the rows: targets and indicators by name, the configuration as `point.<column>`.

    Raises:
        DataError: names the column, the value and its row (`name`: of the file).
    """
    import pandas as pd

    _check_roles(table, roles, name)
    errors = f"{roles.target}_stderr"
    numbers = [*roles.numbers, *([errors] if errors in table else [])]
    parts = {column: _numbers(table[column], f"{name}: column {column!r}") for column in numbers}
    points = {POINT + column.removeprefix(POINT): _config(table[column]) for column in roles.config}
    if np.isfinite(parts[roles.target]).sum() < 2:
        raise DataError(f"{name}: column {roles.target!r} holds fewer than 2 numbers, and there is nothing to compare")
    rows = [f"row {number}" for number in range(1, len(table) + 1)]
    scores = parts[roles.target].dropna()
    if scores.nunique() == 1:
        raise DataError(
            f"{name}: column {roles.target!r}: all {len(scores)} scores are equal ({scores.iloc[0]:.4g}): nothing "
            "to rank"
        )
    known = {
        "variant": _variants(table, roles, points, rows),
        "trial": rows,
        "seed": 0,
        "checkpoint": rows,
        "step": pd.Series([None] * len(rows), dtype="Int64"),
        "status": "done",
    }
    objectives = {column: table[column].astype("string") for column in LOSSES if column in table}
    return pd.DataFrame({**known, **objectives, **points, **parts})


def _check_roles(table: pd.DataFrame, roles: Roles, name: str) -> None:
    there = [str(column) for column in table.columns]
    twice = sorted({column for column in there if there.count(column) > 1})
    if twice:
        raise DataError(f"{name}: two columns are called {twice[0]!r}; rename one")
    asked = [*roles.named(), *([("--variant", roles.variant)] if roles.variant else [])]
    for option, column in asked:
        if column not in there:
            raise DataError(f"{name}: {option}: no column {column!r}{suggested(column, there, 'columns')}")
    of: dict[str, str] = {}
    for option, column in roles.named():
        if column in of:
            raise DataError(f"{name}: column {column!r} is given by {of[column]} and by {option}; leave it in one")
        of[column] = option
    points = {column.removeprefix(POINT): column for column in roles.config}
    for column in roles.config:
        if (other := points[column.removeprefix(POINT)]) != column:
            raise DataError(f"{name}: --config: {column!r} and {other!r} are one setting by two names; leave one out")
    indicators = [*roles.higher, *roles.lower]
    if tuned := [column for column in indicators if column.startswith("sft/")]:
        raise DataError(
            f"{name}: {of[tuned[0]]}: {tuned[0]!r} is a score of fine-tuning by its name; rename the column"
        )
    _check_gaps(roles, indicators, name)
    if not (indicators or roles.config):
        raise DataError(f"{name}: no indicators: name at least one column by --higher, --lower or --config")


def _check_kept(table: pd.DataFrame, columns: Sequence[Column], name: str) -> tuple[Column, ...]:
    """The columns that are still there of a table that a run wrote, and others may have changed since."""
    import pandas as pd

    if lost := [column for column in OF_CHECKPOINTS if column not in table]:
        raise DataError(
            f"{name}: no column {lost[0]!r}, which the run that wrote it gave it; put it back, or name indicators by "
            "--higher and --lower"
        )
    left = tuple(column for column in columns if column.name in table)
    for column in left:
        if not pd.api.types.is_numeric_dtype(table[column.name]):
            raise DataError(f"{name}: column {column.name!r} holds no numbers, as it did when a run wrote it")
    return left


def _check_gaps(roles: Roles, indicators: Sequence[str], name: str) -> None:
    if roles.gaps and roles.gaps not in indicators:
        raise DataError(
            f"{name}: --gaps: {roles.gaps!r} is no indicator{suggested(roles.gaps, indicators, 'those are')}"
        )


def _numbers(column: pd.Series, where: str) -> pd.Series:
    """As floats, NaN where a cell is empty; raises DataError on what is no finite number."""
    import pandas as pd

    values = []
    for number, value in enumerate(column, start=1):
        try:
            values.append(math.nan if is_missing(value) else float(value))
        except (TypeError, ValueError):
            raise DataError(f"{where}, row {number}: {value!r} is no number; {_mend(str(value))}") from None
        if math.isinf(values[-1]):
            raise DataError(f"{where}, row {number}: {value!r} is not finite; leave it empty if it is missing")
    return pd.Series(values, dtype="float64")


def _mend(text: str) -> str:
    """What to do about a text that is no number."""
    for sign, words in (("%", "leave the % out"), (",", "decimals take a point, thousands no sign")):
        with contextlib.suppress(ValueError):
            if sign in text:
                float(text.replace(sign, ""))
                return words
    return "leave it empty if it is missing"


def _config(column: pd.Series) -> pd.Series:
    """Numbers if all of it that is there are, else names."""
    import pandas as pd

    numbers = pd.to_numeric(column, errors="coerce")
    are_numbers = bool((numbers.notna() | column.isna()).all())
    return numbers.astype("float64") if are_numbers else column.astype("string")


def _variants(table: pd.DataFrame, roles: Roles, points: Mapping[str, pd.Series], rows: list[str]) -> list[str]:
    """Of each row; as in a run a hash, so that neighbours by name have nothing in common."""
    column = roles.variant or (VARIANT if VARIANT in table.columns else None)
    names: list[Any] = rows
    if column:
        # Two rows whose variant is not known are not therefore of one.
        names = [row if is_missing(value) else str(value) for value, row in zip(table[column], rows, strict=True)]
    elif points:
        names = [[str(value) for value in values] for values in zip(*points.values(), strict=True)]
    return [fingerprint(name) for name in names]
