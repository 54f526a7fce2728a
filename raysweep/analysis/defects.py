"""What is wrong with a table's rows and columns, by their numbers alone: copies, collapses, leaks of the target.

None of these is proof: a row that is flagged is named with its reason, for a person to look at where it came from.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from raysweep.analysis.bases import Groups
from raysweep.analysis.derived import has_order
from raysweep.analysis.pairwise import SMALL, Flags, Floats

if TYPE_CHECKING:
    import pandas as pd

MIN_COPIED = 3
"""Numbers that two rows share, to the last bit, before one counts as a copy of the other: of columns in which most rows
that differ have a value of their own. A count of layers, or a rounded score, is shared by rows that are no copies."""
FAR = 6.0
"""Robust standard deviations from the median of a column."""
FACTOR = 2.0
"""And by this factor below it, or above it: a quarter point is no collapse, however alike the others are."""
MIN_SCALE = 0.01
"""Least robust standard deviation of logarithms: columns that hardly vary have no collapse at a hundredth."""
MAX_ALIKE = 2, 0.05
"""Rows, and part of them, of which more that are far off on one side are a kind of models, as of another objective."""
MIN_OTHERS = 6
"""Numbers of a column, of which fewer do not say what is usual."""
LEAKED = 0.99
"""Correlation with the target, of values or of ranks, that no measurement before fine-tuning is expected to have.

So only a leak that rises or falls throughout is found, such as a linear function; one that bends is not."""
GOOD = 0.95
"""Correlation of a very good indicator, which a part's few rows must exceed by three standard errors (Fisher, 1915)."""
MIN_ROWS = 10
"""Fewer rows correlate so by chance too often, over many columns and parts."""
MAX_LISTED = 4
"""Columns or checkpoints that a text names."""


@dataclass(frozen=True)
class Flag:
    """Something of a table that a reader should look at before believing it."""

    kind: Literal["copy", "collapsed", "leaked"]
    rows: tuple[str, ...]
    """Checkpoints that it is about; of copies, the first is the one that stays."""
    columns: tuple[str, ...]
    text: str
    """In words, with the first numbers."""
    opening: str = ""
    """Of a collapse, how its text begins, which ends with the first of `numbers`."""
    numbers: tuple[str, ...] = ()
    """Each column's beside its median, in words."""


def find_flags(
    table: pd.DataFrame,
    *,
    target: str,
    indicators: Sequence[str],
    config: Sequence[str],
    groups: Mapping[str, Groups] | None = None,
    labels: Mapping[str, str] | None = None,
) -> list[Flag]:
    """All flags of a checkpoint table.

    Args:
        table: with the column `checkpoint`, and numbers in `target` and `indicators`.
        config: columns of the configuration, in whose parts a leak is looked for, too.
        groups: indicator -> [rows]: equal numbers for rows whose values and targets are of one quantity each; all are
            of those that are left out.
        labels: how texts call a checkpoint; as the table does, if left out.
    """
    values = {name: np.asarray(table[name].astype("float64"), dtype=np.float64) for name in (target, *indicators)}
    rows = [str(name) for name in table["checkpoint"]]
    labels = labels or dict(zip(rows, rows, strict=True))
    flags = [*_copies(values, rows, labels), *_collapsed(values, rows, labels)]
    odd = {row for flag in flags for row in (flag.rows[1:] if flag.kind == "copy" else flag.rows)}
    kept = np.array([row not in odd for row in rows], dtype=bool)
    parts = [("", kept), *((text, part & kept) for text, part in _parts(table, config))]
    parts_of = {name: _within(parts, (groups or {}).get(name)) for name in indicators}
    return flags + list(_leaks(values, target, parts_of, rows))


def flagged_rows(flags: Sequence[Flag]) -> tuple[str, ...]:
    """Checkpoints that a ranking is better without: copies of others, and those whose numbers have collapsed."""
    odd = [flag.rows[1:] if flag.kind == "copy" else flag.rows for flag in flags if flag.kind != "leaked"]
    return tuple(dict.fromkeys(row for rows in odd for row in rows))


def copied_rows(flags: Sequence[Flag]) -> dict[str, str]:
    """Checkpoint -> the flag by which it is another one under a second name; the one that stays has none."""
    return {row: flag.text for flag in flags if flag.kind == "copy" for row in flag.rows[1:]}


def collapsed_rows(flags: Sequence[Flag], columns: Collection[str]) -> dict[str, str]:
    """Checkpoint -> how its numbers have collapsed in some columns."""
    found = {}
    for flag in flags:
        if used := [number for name, number in zip(flag.columns, flag.numbers, strict=False) if name in columns]:
            found[flag.rows[0]] = flag.opening + ", ".join(used)
    return found


def leaks(flags: Sequence[Flag]) -> tuple[str, ...]:
    """Indicators that are all but a function of the target."""
    return tuple(dict.fromkeys(name for flag in flags if flag.kind == "leaked" for name in flag.columns))


def _copies(values: Mapping[str, Floats], rows: Sequence[str], labels: Mapping[str, str]) -> Iterator[Flag]:
    """Rows that are alike in all numbers that they have: measured once and written twice."""
    alike: dict[tuple[float | None, ...], list[str]] = defaultdict(list)
    for row, numbers in zip(rows, zip(*values.values(), strict=True), strict=True):
        alike[tuple(None if math.isnan(number) else float(number) for number in numbers)].append(row)
    telling = [_tells_rows_apart([numbers[place] for numbers in alike]) for place in range(len(values))]
    for numbers, names in alike.items():
        same = list(dict.fromkeys(names))  # A checkpoint that two trials measured alike is no copy of itself.
        num = sum(number is not None for number in numbers)
        num_telling = sum(number is not None and tells for number, tells in zip(numbers, telling, strict=True))
        if len(same) > 1 and num_telling >= MIN_COPIED:
            who = _listed([labels[name] for name in same])
            text = f"{who} are alike in all {num} numbers: one model, counted {len(same)} times"
            yield Flag("copy", tuple(same), tuple(values), text)


def _tells_rows_apart(numbers: Sequence[float | None]) -> bool:
    """Whether most of a column's numbers, in rows that are not alike, are different ones."""
    known = [number for number in numbers if number is not None]
    return 2 * len(set(known)) > len(known)


def _collapsed(values: Mapping[str, Floats], rows: Sequence[str], labels: Mapping[str, str]) -> Iterator[Flag]:
    """Numbers far from their column's others, on a scale of factors: models that broke, or another unit."""
    of: dict[str, dict[str, str]] = defaultdict(dict)
    for name, column in values.items():
        for place in np.flatnonzero(_far(column)):
            of[rows[int(place)]][name] = f"{name} {column[place]:.4g} (median {np.nanmedian(column):.4g})"
    for row, texts in of.items():
        numbers = tuple(texts.values())
        opening = f"{labels[row]} is far from all others: "
        yield Flag("collapsed", (row,), tuple(texts), opening + _listed(numbers), opening, numbers)


def _far(column: Floats) -> Flags:
    """[n]: which values of a positive quantity are off the median by `FAR` deviations and a factor `FACTOR`.

    A single 0 is, where the others vary by less than a `FAR`th of their median; several are a value of their own, and
    more than `MAX_ALIKE` that are off on one side a kind of their own.
    """
    known, zeros = np.isfinite(column), column == 0
    positive = known & ~zeros
    if positive.sum() < MIN_OTHERS or zeros.sum() > 1 or (column[known] < 0).any():
        return np.zeros(len(column), dtype=bool)
    middle = float(np.median(column[positive]))
    off = np.log(np.where(positive, column, middle)) - math.log(middle)
    scale = max(1.4826 * float(np.median(np.abs(off[positive]))), MIN_SCALE)
    collapsed = zeros & (middle > FAR * float(column[positive].std()))
    far, most = max(FAR * scale, math.log(FACTOR)), max(MAX_ALIKE[0], MAX_ALIKE[1] * int(known.sum()))
    for side in (off > far, off < -far):
        collapsed = collapsed | (side & (side.sum() <= most))
    flags: Flags = collapsed
    return flags


def _parts(table: pd.DataFrame, config: Sequence[str]) -> Iterator[tuple[str, Flags]]:
    """Each value of a config column, and each end of one that has an order, in words, and the rows [n] that have it."""
    for name in config:
        column = table[name]
        short = name.removeprefix("point.").removeprefix("setting.")
        codes, levels = column.factorize()
        for code, level in enumerate(levels):
            yield f" where {short} is {level}", codes == code
        if has_order(column):
            ranks = column.rank(method="dense").to_numpy(dtype=np.float64, na_value=math.nan)
            for rank, level in enumerate(sorted(levels)[1:-1], start=2):
                yield f" where {short} is {level} or more", ranks >= rank
                yield f" where {short} is {level} or less", ranks <= rank


def _within(parts: Sequence[tuple[str, Flags]], groups: Groups | None) -> Iterable[tuple[str, Flags]]:
    """Of each part the rows of one group: what tells two losses apart may tell their scores apart, and is no leak.

    None of a group that has too few rows for a leak to be told.
    """
    names, sizes = np.unique([] if groups is None else groups, return_counts=True)
    if len(names) < 2:
        return parts
    large = names[sizes >= MIN_ROWS]
    return ((f"{text} among values that compare", part & (groups == name)) for text, part in parts for name in large)


def _leaks(
    values: Mapping[str, Floats],
    target: str,
    parts_of: Mapping[str, Iterable[tuple[str, Flags]]],
    rows: Sequence[str],
) -> Iterator[Flag]:
    """Indicators that are all but a function of the target in a part, those of the same rows in one flag."""
    of: dict[tuple[str, tuple[str, ...]], dict[str, float]] = defaultdict(dict)
    for name, parts in parts_of.items():
        if found := _leaked(values[name], values[target], parts):
            text, there, strength = found
            of[text, tuple(row for row, is_there in zip(rows, there, strict=True) if is_there)][name] = strength
    for (text, there_rows), strengths in of.items():
        least, most = (f"{strength:.3f}" for strength in (min(strengths.values()), max(strengths.values())))
        size = f"{least} to {most}" if least != most else least
        are, were = ("is", "it was") if len(strengths) == 1 else ("are each", "they were")
        said = (
            f"{_listed(list(strengths))} {are} all but a function of {target}{text} (correlation {size} over "
            f"{len(there_rows)} rows): see that {were} measured before fine-tuning"
        )
        yield Flag("leaked", there_rows, tuple(strengths), said)


def _leaked(values: Floats, target: Floats, parts: Iterable[tuple[str, Flags]]) -> tuple[str, Flags, float] | None:
    """The largest part of the rows, in words and as [n], in which values are all but a function of the target."""
    found: tuple[str, Flags, float] | None = None
    known = np.isfinite(values) & np.isfinite(target)
    codes, target_codes = (np.unique(each, return_inverse=True)[1] for each in (values, target))
    for text, part in parts:
        there = part & known
        num = np.count_nonzero(there)
        if num < MIN_ROWS or (found and num <= found[1].sum()):
            continue
        # Of ranks by codes, which need no sorting: a setting with a value for every row has thousands of parts.
        strength = max(
            _correlation(values[there], target[there]),
            _correlation(_ranks(codes[there]), _ranks(target_codes[there])),
        )
        if strength >= LEAKED and math.atanh(min(strength, 1 - SMALL)) - 3 / math.sqrt(num - 3) > math.atanh(GOOD):
            found = text, there, strength
    return found


def _correlation(first: Floats, second: Floats) -> float:
    """Pearson's, without its sign."""
    left, right = first - first.mean(), second - second.mean()
    scale = float(np.sqrt((left @ left) * (right @ right)))
    return abs(float(left @ right)) / scale if scale > SMALL * max(1.0, abs(first).max() * abs(second).max()) else 0.0


def _ranks(codes: np.ndarray) -> Floats:
    """[n]: how many are below each, minus those above it, of values that are numbered in their order."""
    nums = np.bincount(codes)
    ranks: Floats = (2 * np.cumsum(nums) - nums - len(codes))[codes].astype(np.float64)
    return ranks


def _listed(names: Sequence[str]) -> str:
    """The first of them; a flag has all."""
    shown = [*names[: MAX_LISTED - 1], f"{len(names) - MAX_LISTED + 1} more"] if len(names) > MAX_LISTED else names
    return " and ".join(part for part in (", ".join(shown[:-1]), shown[-1]) if part)
