"""The end of a stage as gangs tell it, for what minds but a part of it."""

from __future__ import annotations

from typing import Any

from raysweep.events import StageEnded


def ended(stage: str, **fields: Any) -> StageEnded:
    """That a stage was finished, unless `fields` say other; its kind is that of its id."""
    given: dict[str, Any] = {
        "event": "finished",
        "trial": "t",
        "kind": stage.rpartition("-")[0],
        "status": "done",
        "step": None,
        "task": None,
        "lr": None,
        "seed": None,
        "wall_seconds": 1.0,
        "num_workers": 1,
        "metrics": {},
    }
    return StageEnded(stage=stage, **given | fields)
