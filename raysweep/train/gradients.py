"""Gradients of an objective's mean loss on held-out rows, by a model's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from raysweep.objectives.base import Arrays, ObjectiveSpec
from raysweep.train.evaluate import BATCH


def gradient(model: Any, rows: Arrays, objective: ObjectiveSpec) -> dict[str, torch.Tensor]:
    """Of the mean loss of rows, in nats per predicted token; the model is left without one.

    Args:
        model: in the mode that it is to be read in.
        rows: what the objective has prepared, n rows.
        objective: whose loss it is.

    Returns:
        name -> tensor like each weight that is trained, 0 for one that takes no part.
    """
    device = next(model.parameters()).device
    num = max(1, objective.num_predicted(rows))
    for start in range(0, len(rows["input_ids"]), BATCH):
        part = {name: values[start : start + BATCH] for name, values in rows.items() if name != "lengths"}
        batch = {name: torch.from_numpy(np.ascontiguousarray(values)).to(device) for name, values in part.items()}
        (objective.loss_sum(model, batch) / num).backward()  # type: ignore[no-untyped-call]
    taken = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return taken


def dot(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    """Sum of the products of all elements, in float64.

    >>> dot({"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])})
    6.0
    """
    return math.fsum((part.double() * right[name].double()).sum().item() for name, part in left.items())
