"""An objective's loss, tried on logits at hand before anything is trained or measured by it.

A loss that is divided by another number of tokens than it is a sum over is off by a factor, and looks like any other.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from raysweep.errors import StageError
from raysweep.objectives.base import IGNORED, Arrays, ObjectiveSpec

NUM_ROWS, NUM_CLASSES = 2, 8


def check_loss(objective: ObjectiveSpec, rows: Arrays, *, sequence_length: int) -> None:
    """See that a loss is the cross-entropy of its rows' labels, summed over as many as it counts.

    Args:
        objective: whose loss it is; of one that measures another's, that.
        rows: what it prepared of text.
        sequence_length: tokens of a row of that text.

    Raises:
        StageError: if it is not, or rows are longer than `input_length` says.
    """
    objective = objective.measured
    width, most = rows["input_ids"].shape[1], objective.input_length(sequence_length)
    if width > most:
        raise StageError(
            f"objective {objective.name}: its rows have {width} tokens, and input_length({sequence_length}), by which "
            f"models and plans are made, is {most}"
        )
    some = {name: values[:NUM_ROWS] for name, values in rows.items() if name != "lengths"}
    # Few classes are enough, and a vocabulary of logits would take gigabytes.
    some |= {
        name: np.where(some[name] == IGNORED, IGNORED, some[name] % NUM_CLASSES) for name in ("input_ids", "labels")
    }
    model = _Fixed(some["input_ids"].shape)
    labels = torch.from_numpy(some["labels"])
    logits = model.logits
    if objective.head == "causal":
        labels, logits = labels[:, 1:], logits[:, :-1]
    num = int((labels != IGNORED).sum())
    with torch.no_grad():
        right = float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"))
        loss = float(objective.loss_sum(model, {name: torch.from_numpy(values) for name, values in some.items()}))
    counted = objective.num_predicted(some)
    # float32 sums of up to some thousand terms
    if counted != num or abs(loss - right) > 1e-4 * max(1.0, right):
        raise StageError(
            f"objective {objective.name}: of {num} labels whose cross-entropies sum to {right:.4f} nats, loss_sum "
            f"gives {loss:.4f} and num_predicted {counted}; all that is reported is the one over the other. "
            "DecoderObjective and MaskedObjective have both"
        )


class _Fixed(torch.nn.Module):
    """A model that gives the same logits whatever it reads."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.logits: torch.Tensor
        draw = torch.Generator().manual_seed(0)
        self.register_parameter("logits", torch.nn.Parameter(torch.randn(*shape, NUM_CLASSES, generator=draw)))

    def get_output_embeddings(self) -> None:
        """None: its logits are made by no layer."""

    def forward(self, **given: Any) -> SimpleNamespace:
        """Clones, which a loss may overwrite."""
        return SimpleNamespace(logits=self.logits.clone())
