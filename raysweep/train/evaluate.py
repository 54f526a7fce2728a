"""Losses without gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def heldout_loss(model: PreTrainedModel, sequences: npt.NDArray[np.int64], *, batch_size: int = 16) -> float:
    """Mean cross-entropy, in nats per predicted token, of sequences [n, L]; NaN if it is not finite."""
    import torch

    from raysweep.train.objectives import CausalLM

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(sequences), batch_size):
            ids = torch.from_numpy(sequences[start : start + batch_size]).to(device)
            total += float(CausalLM().loss_sum(model, {"input_ids": ids, "labels": ids}).double())
    model.train(was_training)
    loss = total / (sequences.shape[0] * (sequences.shape[1] - 1))
    return loss if math.isfinite(loss) else math.nan


def perplexity(loss: float) -> float:
    """e to the loss in nats per token; infinite rather than an overflow."""
    return math.inf if loss >= 700 else math.exp(loss)
