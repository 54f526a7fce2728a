"""Losses without gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from raysweep.objectives.base import Arrays, ObjectiveSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def heldout_loss(model: PreTrainedModel, rows: Arrays, objective: ObjectiveSpec, *, batch_size: int = 16) -> float:
    """Mean loss of an objective, in nats per predicted token; NaN if it is not finite or nothing is predicted.

    Args:
        model: put back into the mode that it comes in.
        rows: what the objective has prepared of held-out text.
        objective: whose loss it is.
        batch_size: rows of a forward pass.
    """
    import torch

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(rows["input_ids"]), batch_size):
            batch = {
                name: torch.from_numpy(values[start : start + batch_size]).to(device)
                for name, values in rows.items()
                if name != "lengths"
            }
            total += float(objective.loss_sum(model, batch).double())
    model.train(was_training)
    num_predicted = objective.num_predicted(rows)
    loss = total / num_predicted if num_predicted else math.nan
    return loss if math.isfinite(loss) else math.nan


def perplexity(loss: float) -> float:
    """e to the loss in nats per token; infinite rather than an overflow."""
    return math.inf if loss >= 700 else math.exp(loss)
