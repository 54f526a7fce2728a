"""What the files of a run hold, and whether that is what stands in one: it may have been altered, or cut off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from raysweep.record import is_id

_COLUMN = {"kind", "task", "name", "direction", "unit"}

_EXACTLY = ConfigDict(strict=True, extra="forbid")
"""A line of trials.jsonl is one only with all fields, no others, and each of its very type."""


UNKNOWN = "unknown"


@dataclass(frozen=True)
class StageRow:
    """A stage of a started trial. `checkpoint` is the stage id of what it measures, `step` that checkpoint's step."""

    __pydantic_config__ = _EXACTLY

    id: str
    kind: str
    step: int | None
    checkpoint: str | None
    task: str | None
    inputs: Mapping[str, str]
    state_key: str | None = UNKNOWN
    """Of the resumable state that it shares with others; UNKNOWN in rows of before this was noted."""
    flops: float | None = None
    """By its own formula; None in rows of before this was noted, and of models whose size is not known."""


@dataclass(frozen=True)
class TrialRow:
    """A started trial: variant x seed."""

    __pydantic_config__ = _EXACTLY

    trial: str
    variant: str
    point: Mapping[str, Any]
    seed: int
    stages: tuple[StageRow, ...]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Zip -> path -> what its name in the point stands for. None in rows of before it was kept."""


_TRIAL_ROW = TypeAdapter(TrialRow)


def parse_trial_row(line: bytes) -> TrialRow:
    """A line of trials.jsonl. Raises ValueError if it is none."""
    try:
        row = _TRIAL_ROW.validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the line"
        raise ValueError(f"not the fields of a trial: {place}: {first['msg']}") from None
    for stage in row.stages:
        if not is_id(stage.id):
            raise ValueError(f"not the fields of a trial: {stage.id!r} is no id of a stage")
    return row


def is_failure(value: dict[str, Any]) -> bool:
    """Of failures/<stage>.json."""
    texts = all(isinstance(value.get(name), str) for name in ("kind", "trial", "cause", "log"))
    return texts and is_id(value.get("stage")) and isinstance(value.get("attempts"), int)


def is_driver(value: dict[str, Any]) -> bool:
    """Of driver.json."""
    return isinstance(value.get("host"), str) and isinstance(value.get("pid"), int)


def is_counts(value: Any) -> bool:
    """Of pruned.json: names with whole numbers."""
    return isinstance(value, dict) and all(isinstance(number, int) for number in value.values())


def has_columns(value: dict[str, Any]) -> bool:
    """Of columns.json."""
    rows = value.get("columns")
    return isinstance(rows, list) and all(isinstance(row, dict) and row.keys() - {"tasks"} == _COLUMN for row in rows)


def is_choice(value: dict[str, Any]) -> bool:
    """Of gangs.json."""
    decisions = value.get("decisions")
    return isinstance(decisions, list) and all(isinstance(each, dict) for each in decisions)


def is_plan(value: dict[str, Any]) -> bool:
    """Of planned.json."""
    return isinstance(value.get("num_trials"), int) and is_counts(value.get("stages"))
