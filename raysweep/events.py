"""What happens in a run: told by gangs, kept by the driver's journal, and shown. A new event: a class, and its name in
`Event`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict

from raysweep.record import is_id
from raysweep.run_files import TrialRow
from raysweep.worker import Reached


def _checked(value: str) -> str:
    if not is_id(value):
        raise ValueError("not the id of a stage")
    return value


# It becomes the name of a file in the run.
StageId = Annotated[str, AfterValidator(_checked)]


@dataclass(frozen=True, kw_only=True)
class _Event:
    # Of what comes over a connection: all fields, no others, and each of its very type.
    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    time: float = field(default_factory=time.time, compare=False)
    """Unix time, by the clock of the machine on which it happened."""


@dataclass(frozen=True, kw_only=True)
class Note(_Event):
    """What somebody who follows the run should know."""

    event: Literal["note"] = "note"
    message: str


@dataclass(frozen=True, kw_only=True)
class GangsChosen(_Event):
    """The gangs of the run are known."""

    event: Literal["gangs"] = "gangs"
    num_workers: int
    """Of the largest."""


@dataclass(frozen=True, kw_only=True)
class TrialStarted(_Event):
    """A gang has taken a trial, or the trial has got further stages."""

    event: Literal["trial"] = "trial"
    row: TrialRow


@dataclass(frozen=True, kw_only=True)
class StageEvent(_Event):
    """What happens to a stage; `trial` is the one that it is run for, of those that share it."""

    trial: str
    stage: StageId
    kind: str


@dataclass(frozen=True, kw_only=True)
class StageStarted(StageEvent):
    """A gang has it in work, or in a batch of which it has some in work."""

    event: Literal["started"] = "started"


@dataclass(frozen=True, kw_only=True)
class StageProgress(StageEvent):
    """How far it is."""

    event: Literal["progress"] = "progress"
    trial: str = ""
    """Empty until it is said by whoever runs the trial: a stage is not told for whom it is made."""
    at: Reached


@dataclass(frozen=True, kw_only=True)
class StageEnded(StageEvent):
    """It was finished just now, or found finished."""

    event: Literal["finished", "found"]
    status: str
    """Of its record: done or diverged."""
    step: int | None
    """Of the checkpoint that it makes or measures."""
    task: str | None
    lr: float | None
    seed: int | None
    wall_seconds: float
    num_workers: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class StageFailed(StageEvent):
    """A try at it failed, or its gang was lost. `retry`: it will be tried again in this run."""

    event: Literal["failed"] = "failed"
    cause: str
    log: str
    retry: bool


Event = Note | GangsChosen | TrialStarted | StageStarted | StageProgress | StageEnded | StageFailed

Report = Callable[[Event], None]
"""What takes the events of a run."""
