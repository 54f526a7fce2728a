"""Traces of the Hessian and of the Fisher information of a mean token loss, each from independent units of work.

A unit is one batch with probe vectors or label draws of its own, all derived from (seed, unit): units can be dealt
over workers in any way, and are averaged in the order of their index.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from raysweep.curvature.ghost import GhostNorms
from raysweep.curvature.operators import hessian_vector_products, inner, mean_token_loss, named_parameters
from raysweep.curvature.probes import Distribution, key, probe_vector

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Estimate:
    """A mean over independent units and its standard error (NaN for a single unit)."""

    mean: float
    stderr: float
    num_units: int


def summarize(values: Sequence[float]) -> Estimate:
    """Mean and standard error of independent, identically distributed values, summed in the given order.

    The values of units differ by their probes and by their data, so the error holds both.
    """
    num = len(values)
    if num == 0:
        raise ValueError("an estimate needs at least one unit")
    mean = math.fsum(values) / num
    if num == 1:
        return Estimate(mean, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (num - 1)
    return Estimate(mean, math.sqrt(variance / num), num)


def hessian_trace_unit(
    model: Any,
    ids: torch.Tensor,
    *,
    seed: int,
    unit: int,
    num_probes: int = 1,
    distribution: Distribution = "rademacher",
) -> float:
    """One unit of Hutchinson's estimate (1990) of the trace of the Hessian of the mean token loss on `ids`.

    The mean of v' H v over `num_probes` probe vectors v with E[v v'] = I; unbiased for Tr H of this batch.

    Args:
        model: prepared by `operators.prepare`.
        ids: token ids [n, L].
        seed: of the estimate.
        unit: index of the unit; its probes are numbered unit * num_probes, ...
        num_probes: probe vectors, which share the graph of one gradient.
        distribution: of their entries.

    Raises:
        ValueError: if the loss or a product is not finite.
    """
    parameters = named_parameters(model)
    first = unit * num_probes
    vectors = [
        probe_vector(parameters, seed=seed, probe=probe, distribution=distribution)
        for probe in range(first, first + num_probes)
    ]
    products = hessian_vector_products(lambda: mean_token_loss(model, ids), parameters, vectors)
    values = [inner(vector, product) for vector, product in zip(vectors, products, strict=True)]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"unit {unit}: a Hessian-vector product is not finite; is the model in a finite range here?")
    return math.fsum(values) / num_probes


def fisher_trace_unit(model: Any, ids: torch.Tensor, *, seed: int, unit: int) -> float:
    """One unit of the trace of the Fisher information (equal to that of the Gauss-Newton matrix) on `ids`.

    For each sequence, labels are drawn from the model's own distribution at every position, and the squared norm of
    the gradient of their summed log-likelihood is divided by the number of positions: labels being independent, cross
    terms vanish in expectation, which leaves the mean over tokens. At a model that equals the data's distribution it
    is the trace of the Hessian (papers: Liu et al., 2022, section on estimating Tr H).

    Args:
        model: in eval mode.
        ids: token ids [n, L]; label t is drawn given the tokens before t.
        seed: of the estimate.
        unit: index of the unit.

    Raises:
        ValueError: if a norm is not finite.
    """
    try:
        ghost = GhostNorms(model, ids)
    except ValueError as error:
        logger.info("gradients are formed one sequence at a time: %s", error)
        squares = _squared_norms_one_by_one(model, ids, seed=seed, unit=unit)
    else:
        rows = [sample_labels(logits, seed=key(seed, "fisher", unit, row)) for row, logits in enumerate(ghost.logits)]
        squares = ghost.squared_norms(torch.stack(rows), last=True).tolist()
    value = math.fsum(squares) / (len(ids) * (ids.shape[1] - 1))
    if not math.isfinite(value):
        raise ValueError(f"unit {unit}: the norm of a gradient is not finite; is the model in a finite range here?")
    return value


def _squared_norms_one_by_one(model: Any, ids: torch.Tensor, *, seed: int, unit: int) -> list[float]:
    """What `GhostNorms` gives, for models with layers that it has no rule for."""
    parameters = list(named_parameters(model).values())
    squares = []
    for row in range(len(ids)):
        logits = model(input_ids=ids[row : row + 1], use_cache=False).logits[0, :-1].float()
        labels = sample_labels(logits.detach(), seed=key(seed, "fisher", unit, row))
        loss = F.cross_entropy(logits, labels, reduction="sum")
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        squares.append(sum(float(g.double().square().sum()) for g in gradients if g is not None))
    return squares


def sample_labels(logits: torch.Tensor, *, seed: int) -> torch.Tensor:
    """One label for each row of logits [n, vocabulary], by inverse CDF from a generator of its own.

    `torch.multinomial` would depend on the device and on how rows are batched.
    """
    logits = logits.detach()
    uniform = torch.rand(len(logits), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, uniform.to(logits.device)[:, None] * cumulative[:, -1:], right=True)
    return drawn[:, 0].clamp(max=logits.shape[-1] - 1)
