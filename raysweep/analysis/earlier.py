"""The held-out loss of the checkpoint before, beside that of a later one: with it, how a trajectory has come there."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from raysweep.scores import Column, column_name
from raysweep.spec import Metric

if TYPE_CHECKING:
    import pandas as pd

EARLIER_LOSS = Column("heldout", Metric("earlier_loss_nats_per_token", "min", "nats/token"))
_LOSS = column_name("heldout", "loss_nats_per_token")


def earlier_losses(stages: pd.DataFrame) -> dict[tuple[str, str], dict[str, float]]:
    """(trial, checkpoint) -> the column of the loss of the checkpoint before it on the same trajectory.

    Only where both were measured alike, by one objective on one text: of a phase that changed either, its first
    checkpoint has none. Nor has one behind a checkpoint whose loss is missing.
    """
    if _LOSS not in stages:
        return {}
    rows = stages[stages["kind"] == "heldout"].sort_values("step")
    rows = rows.assign(tokens=rows["inputs"].map(lambda text: json.loads(text).get("tokens")))
    before = rows.groupby("trial")[["settings", "tokens", _LOSS]].shift()
    alike = (rows["settings"] == before["settings"]) & (rows["tokens"] == before["tokens"]) & before[_LOSS].notna()
    there = rows.assign(before=before[_LOSS])[alike.fillna(False)]
    return {
        (str(trial), str(checkpoint)): {EARLIER_LOSS.name: float(loss)}
        for trial, checkpoint, loss in zip(there["trial"], there["checkpoint"], there["before"], strict=True)
    }


def is_of_training(name: str) -> bool:
    """Whether an indicator tells of how a checkpoint was trained, so that of any other's it is not known."""
    return name.startswith((column_name("pretrain", ""), column_name("curve", ""))) or name == EARLIER_LOSS.name
