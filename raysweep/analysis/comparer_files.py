"""Comparers in a folder: JSON beside LightGBM's own text format, and no pickle. What does not match is refused."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError, ValidationInfo, field_validator

from raysweep.analysis.comparer import CompareError, Comparer
from raysweep.analysis.gaps import GapAccuracy
from raysweep.analysis.line import Form, Line, bulk, num_terms
from raysweep.analysis.pair_features import Scale
from raysweep.analysis.pairwise import IntervalEstimate
from raysweep.durable import write_text
from raysweep.errors import dotted
from raysweep.spec import Spec
from raysweep.validation import findings, validate

FILE = "comparer.json"


class ScaleFile(Spec):
    """See `Scale`."""

    name: str
    is_log: bool
    mean: float
    deviation: float


class TestedFile(Spec):
    """Pairs of unseen variants right, of a range of distances: a `GapAccuracy`; see `distances`."""

    low: float
    high: float | None
    """None: no end."""
    num_pairs: int
    """Of all splits, which overlap."""
    pairs_right: float
    interval: tuple[float, float] | None
    """Of 95 %; None where there is none."""


class TreesFile(Spec):
    """A comparer of one target."""

    target: str
    slope: float
    tested: tuple[TestedFile, ...]
    trees: str
    """Name of the text file beside this one."""
    sha256: str
    scales: tuple[ScaleFile, ...]
    part: float
    """Of the trees."""
    form: Form
    weights: tuple[float, ...]
    """Of the line."""
    known: tuple[tuple[float | None, ...], ...] = Field(min_length=1)

    @field_validator("weights", "known")
    @classmethod
    def _as_many(cls, value: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
        num = len(info.data.get("scales", ()))
        own = info.field_name == "weights"
        expected = num_terms(info.data.get("form", "straight"), num) if own else num
        for row in [value] if own else value:
            if len(row) != expected:
                raise ValueError(f"holds {len(row)} number(s), where {num} scales have {expected}")
        return value


class IndicatorFile(Spec):
    """What a comparer needs to know of an indicator, to be told the same one."""

    versions: tuple[str, ...] = ()
    """Fingerprints of the stages that measured it; none where it is of a table."""
    seconds: float | None = None
    """Of worker time, to measure its stage on one checkpoint; the median."""
    flops: float | None = None
    """Of the same, as planned; None where they are not known."""


class Contents(Spec):
    """The file."""

    # 7: pairs right have their interval.
    format: Literal[7] = 7
    learnt_from: str
    """Name of the run or of the table."""
    indicators: dict[str, IndicatorFile]
    comparers: tuple[TreesFile, ...]


def save(
    folder: Path,
    comparers: Mapping[str, tuple[Comparer, Sequence[GapAccuracy]]],
    *,
    learnt_from: str,
    indicators: Mapping[str, IndicatorFile],
) -> Path:
    """Write comparers into a folder; the path of their JSON.

    Args:
        folder: made if it is not there.
        comparers: target -> comparer, and its pairs right on unseen variants by distance.
        indicators: of each that any of them takes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, (target, (comparer, tested)) in enumerate(comparers.items()):
        name = f"trees-{number}.txt"
        write_text(folder / name, comparer.text)
        files.append(
            TreesFile(
                target=target,
                slope=comparer.slope,
                tested=tuple(map(_tested_file, tested)),
                trees=name,
                sha256=_digest(comparer.text),
                scales=tuple(ScaleFile(**vars(scale)) for scale in comparer.scales),
                part=comparer.part,
                form=comparer.line.form,
                weights=tuple(map(float, comparer.line.weights)),
                known=tuple(tuple(None if math.isnan(each) else float(each) for each in row) for row in comparer.known),
            )
        )
    contents = Contents(
        learnt_from=learnt_from,
        indicators=dict(indicators),
        comparers=tuple(files),
    )
    path = folder / FILE
    write_text(path, contents.model_dump_json(indent=1))
    return path


def load(folder: Path) -> tuple[Contents, list[Comparer]]:
    """What `save` wrote.

    Raises:
        CompareError: if it is not there, is not whole, or was changed.
    """
    path = folder / FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CompareError(f"{folder}: no comparer there; `raysweep rank ... --learn {folder}` makes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CompareError(f"{path}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CompareError(f"{path}: no JSON: {error}; learn it anew") from error
    try:
        contents = validate(Contents, data)
    except ValidationError as error:
        place, words = findings(Contents, data, error)[0]
        raise CompareError(f"{path}: {dotted(place)}: {words}; learn it anew") from error
    return contents, [_comparer(folder, each) for each in contents.comparers]


def range_of(file: TreesFile, far: float) -> GapAccuracy | None:
    """The range that a pair so far away is in; None if no such pair was tested."""
    return next((each for each in map(_tested, file.tested) if each.low <= far < each.high), None)


def _tested_file(tested: GapAccuracy) -> TestedFile:
    right = tested.accuracy
    return TestedFile(
        low=tested.low,
        high=tested.high if math.isfinite(tested.high) else None,
        num_pairs=tested.num_pairs,
        pairs_right=right.value,
        interval=None if math.isnan(right.low) else (right.low, right.high),
    )


def _tested(file: TestedFile) -> GapAccuracy:
    high = math.inf if file.high is None else file.high
    return GapAccuracy(file.low, high, file.num_pairs, IntervalEstimate(file.pairs_right, *(file.interval or ())))


def check_versions(contents: Contents, measured: Mapping[str, str]) -> None:
    """See that checkpoints were measured as those were that a comparer was learnt from.

    Args:
        measured: indicator -> fingerprint of the stage that measured it.

    Raises:
        CompareError: names the indicator that is missing, or was measured in another way.
    """
    for name, needed in contents.indicators.items():
        if name not in measured:
            there = ", ".join(sorted(measured)) or "none"
            raise CompareError(f"the comparer needs {name}, which was not measured; there: {there}")
        if needed.versions and measured[name] not in needed.versions:
            raise CompareError(
                f"{name} was measured as version {measured[name]}, and the comparer was learnt from version "
                f"{', '.join(needed.versions)}: measure it with the comparer's sweep file, or learn it anew"
            )


def _comparer(folder: Path, file: TreesFile) -> Comparer:
    if Path(file.trees).name != file.trees:
        raise CompareError(f"{folder / FILE}: trees {file.trees!r} are not beside it")
    try:
        text = (folder / file.trees).read_text(encoding="utf-8")
    except OSError as error:
        raise CompareError(f"{folder / file.trees}: cannot be read: {error}") from error
    if _digest(text) != file.sha256:
        raise CompareError(f"{folder / file.trees}: was changed since it was saved; learn it anew")
    rows: list[list[Any]] = [[math.nan if each is None else each for each in row] for row in file.known]
    known = np.array(rows, dtype=np.float64).reshape(len(rows), len(file.scales))
    return Comparer(
        target=file.target,
        scales=tuple(Scale(**scale.model_dump()) for scale in file.scales),
        slope=file.slope,
        part=file.part,
        line=Line(file.form, np.array(file.weights), bulk(known)),
        known=known,
        text=text,
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
