"""What one unit of work of a trace computes: a batch with a probe vector, or a batch with labels drawn by the model.

A unit's values are a function of the model, its batch and (seed, batch, draw) alone, so units can be dealt over workers
in any way, saved, and averaged in a fixed order. Values are sums over a batch's predicted tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from raysweep.curvature.cost import Products
from raysweep.curvature.differences import Forms, logit_response, quadratic_forms
from raysweep.curvature.ghost import GhostNorms
from raysweep.curvature.head import OutputLayer, forms_beside, response_beside
from raysweep.curvature.language import IGNORED, Batch, slope, targets, token_logits
from raysweep.curvature.operators import (
    MovableParameters,
    inner,
    named_parameters,
)
from raysweep.curvature.probes import Tensors, key
from raysweep.curvature.settings import Distribution
from raysweep.curvature.tangents import reverse_over_forward_product

logger = logging.getLogger(__name__)

Tensor = torch.Tensor
Kind = Literal["probe", "fisher", "response", "step", "rest"]
"""`response` and `step` find the step of differences: how far logits move, and a probe with each step that is tried.
`rest` is what fills up a probe's batch; see `groups`."""
Values = Mapping[str, float]
"""`num_tokens`, and the sums that are named in `probe_unit` and `fisher_unit`; plain, to be saved as JSON."""

Labels = Literal["model", "data"]
"""Whose labels a Fisher matrix is of: drawn from the model, or those of the text (the *empirical* Fisher)."""
Sampling = Literal["sequence", "token"]
"""A Fisher draw: labels at all positions of a sequence, or at a single one drawn at random."""


@dataclass(frozen=True, order=True)
class Unit:
    """One batch with one draw: of a probe vector, or of labels.

    >>> sorted([Unit("probe", 1, 0), Unit("fisher", 2, 0), Unit("probe", 0, 1)])[0].kind
    'fisher'
    """

    kind: Kind
    batch: int
    """Or group of batches; see `groups`."""
    draw: int


def probe_unit(
    model: Any,
    batch: Batch,
    unit: Unit,
    *,
    seed: int,
    products: Products,
    movable: MovableParameters,
    distribution: Distribution = "rademacher",
    check: bool = False,
    here: Tensor | None = None,
    output: OutputLayer | None = None,
) -> Values:
    """Hutchinson's quadratic forms (1990) with one probe vector v: `gauss_newton` v'Gv and `residual` v'(H - G)v.

    Args:
        model: see `language.prepare`; weights in float32 or float64.
        batch: see `language`.
        unit: which probe vector.
        seed: of the estimate.
        products: see `cost.Products`. Those that know it add `parameter/NAME`, the part v_i (Hv)_i of v'Hv.
        movable: the model's parameters and the step of differences along v; see `differences.step_for`.
        distribution: of the entries of v.
        check: for differences, add `gauss_newton_2h` and `residual_2h`, made with twice the step; for exact products,
            compare them with differences.
        here: for differences of logits, those at the weights, where they are known; see `differences.quadratic_forms`.
        output: for differences of logits, what is taken in closed form; `movable` then holds the rest, `here` its
            states. See `head.forms_beside`.

    Raises:
        ValueError: if the loss or a product is not finite, or an exact one is far from differences; names the batch.

    >>> movable = MovableParameters(named_parameters(model), 1e-3)
    >>> values = probe_unit(model, batch, Unit("probe", 0, 0), seed=0, products="logit_differences", movable=movable)
    >>> sorted(values)
    ['gauss_newton', 'num_tokens', 'residual']
    """
    number = key(unit.batch, unit.draw)
    probe = movable.probe(seed=seed, probe=number, distribution=distribution)
    values = {"num_tokens": float((targets(model, batch) != IGNORED).sum())}
    if products == "logit_differences":
        if output is None:
            fine, coarse = quadratic_forms(model, batch, probe, movable, check=check, here=here)
        else:
            signs = output.probe(seed=seed, probe=number, distribution=distribution)
            chosen = output.is_chosen(unit.batch, seed=seed)
            fine, coarse = forms_beside(output, model, batch, signs, movable, is_chosen=chosen, check=check, here=here)
        values |= {"gauss_newton": fine.gauss_newton, "residual": fine.residual}
        if coarse:
            values |= {"gauss_newton_2h": coarse.gauss_newton, "residual_2h": coarse.residual}
        return _finite(values, unit)
    vector, counted = dict(probe), targets(model, batch) != IGNORED

    # v'Gv is the variance of J v under the model's distribution over labels, summed over tokens.
    def forms(product: Tensors, logits: Tensor, along: Tensor) -> dict[str, float]:
        p = logits.softmax(dim=-1)
        variance = (p * (along - (p * along).sum(dim=-1, keepdim=True)).square()).sum(dim=-1)[counted]
        gauss_newton = float(variance.sum(dtype=torch.float64))
        parts = {f"parameter/{name}": inner({name: vector[name]}, {name: part}) for name, part in product.items()}
        return {"gauss_newton": gauss_newton, "residual": math.fsum(parts.values()) - gauss_newton, **parts}

    if products == "exact":
        of_mean, logits, along = reverse_over_forward_product(model, batch, vector)
        # Of the mean loss; values are sums, so that batches of different numbers of tokens can be added.
        product = {name: part.mul_(values["num_tokens"]) for name, part in of_mean.items()}
        values |= forms(product, logits, along)
        if check:
            _confirm(values, *quadratic_forms(model, batch, vector, movable, check=True), unit)
    else:
        values |= forms(*_gradient_differences(model, batch, vector, movable, 1))
        if check:
            twice = forms(*_gradient_differences(model, batch, vector, movable, 2))
            values |= {f"{name}_2h": twice[name] for name in ("gauss_newton", "residual")}
    return _finite(values, unit)


def response_unit(
    model: Any,
    batch: Batch,
    unit: Unit,
    *,
    seed: int,
    movable: MovableParameters,
    distribution: Distribution,
    here: Tensor | None = None,
    output: OutputLayer | None = None,
) -> Values:
    """`gauss_newton`, roughly, with the vector of the batch's first probe; see `differences.logit_response`.

    With `output` as `head.response_beside`.
    """
    number = key(unit.batch, 0)
    num = float((targets(model, batch) != IGNORED).sum())
    if output is not None:
        signs = output.probe(seed=seed, probe=number, distribution=distribution)
        return _finite({"num_tokens": num} | response_beside(output, model, batch, signs, movable, here=here), unit)
    vector = movable.probe(seed=seed, probe=number, distribution=distribution)
    moved = logit_response(model, batch, vector, movable, here=here)
    return _finite({"num_tokens": num, "gauss_newton": moved}, unit)


def _confirm(exact: Mapping[str, float], fine: Forms, coarse: Forms | None, unit: Unit) -> None:
    """A layer whose gradient's graph is cut, or a kernel with a wrong second derivative, gives no error, only this."""
    assert coarse is not None
    by_graph = exact["gauss_newton"] + exact["residual"]
    by_steps, by_long_steps = (forms.sum for forms in (fine, coarse))
    # Of v'Gv, too, as v'Hv is near 0 where its parts cancel; and what a longer step changes is no fault of the graph.
    room = 0.05 * max(abs(fine.gauss_newton), abs(by_steps)) + abs(by_long_steps - by_steps)
    if abs(by_graph - by_steps) > room:
        raise ValueError(
            f"batch {unit.batch}: v'Hv is {by_graph:g} by double backward and {by_steps:g} by differences of logits: "
            "some operation of this model has no right second derivative, or kinks, as ReLU has, that differences see; "
            "measure with logit differences"
        )


def _gradient_differences(
    model: Any, batch: Batch, vector: Tensors, movable: MovableParameters, times: int
) -> tuple[Tensors, Tensor, Tensor]:
    """H v of the summed loss, logits and J v, by central differences of two gradients and their logits."""
    labels = targets(model, batch).flatten()
    sides = []
    with movable.moves() as move:
        for way in (times, -times):
            move(vector, way)
            logits = token_logits(model, batch)
            loss = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum")
            sides.append((logits.detach(), movable.gradients(loss)))
    (ahead, up), (behind, down) = sides
    width = 2 * times * movable.step
    product = {name: (part - down[name]) / width for name, part in up.items()}
    return product, (ahead + behind) / 2, (ahead - behind) / width


def fisher_unit(
    model: Any, batch: Batch, unit: Unit, *, seed: int, labels: Labels = "model", sampling: Sampling = "sequence"
) -> Values:
    """Squared gradient norms of sequences: `fisher`, whose mean per token estimates the trace of the Fisher matrix.

    With labels drawn independently at all positions of a sequence, cross terms vanish in expectation and the squared
    norm of the summed log-likelihood's gradient is unbiased for the sum over positions; it equals the trace of the
    Gauss-Newton matrix, and at a model that equals the data's distribution that of the Hessian (Liu et al., 2022).
    With labels of the data nothing vanishes: the empirical Fisher is another quantity (Kunstner et al., 2019).

    Args:
        model: in eval mode.
        batch: see `language`.
        unit: which draw.
        seed: of the estimate.
        labels: see `Labels`.
        sampling: see `Sampling`. By token, the squared norm is counted once for every token of its sequence.

    Returns:
        Sums over sequences, by parameter too (`parameter/NAME`).

    Raises:
        ValueError: if a norm is not finite; names the batch.

    >>> values = fisher_unit(model, batch, Unit("fisher", 0, 0), seed=0)
    >>> values["num_tokens"], values["fisher"] > 0
    (15.0, True)
    """
    wanted = targets(model, batch)
    counts = (wanted != IGNORED).sum(dim=1)
    try:
        ghost = GhostNorms(model, batch)
    except ValueError as error:
        logger.info("gradients are formed one sequence at a time: %s", error)
        squares = _one_by_one(model, batch, unit, seed=seed, labels=labels, sampling=sampling)
    else:
        given = [_row_seed(seed, unit, row) for row in _rows(batch)]
        cotangents = _cotangents(ghost.logits.detach(), wanted, given, labels=labels, sampling=sampling)
        squares = ghost.squared_norms(cotangents, last=True)
    # One position of `counts` was drawn, each as likely.
    weights = counts.double() if sampling == "token" else torch.ones_like(counts, dtype=torch.float64)
    parts = {f"parameter/{name}": float((square * weights).sum()) for name, square in squares.items()}
    values = {"num_tokens": float(counts.sum()), "fisher": math.fsum(parts.values()), **parts}
    return _finite(values, unit)


def _rows(batch: Batch) -> list[int]:
    """Numbers of the sequences in their batch, also where this is a part of it."""
    rows: list[int] = batch["row"].tolist() if "row" in batch else list(range(len(batch["input_ids"])))
    return rows


def _row_seed(seed: int, unit: Unit, row: int) -> int:
    return key(seed, "fisher", unit.batch, unit.draw, row)


def _cotangents(logits: Tensor, wanted: Tensor, seeds: Sequence[int], *, labels: Labels, sampling: Sampling) -> Tensor:
    """Gradient of each sequence's summed cross-entropy with respect to its logits [n, T, vocabulary]."""
    counted = wanted != IGNORED
    drawn = wanted.clamp(min=0)  # -100 is no index; such positions are masked below.
    p = logits.softmax(dim=-1)
    if labels == "model":
        drawn = torch.stack([sample_labels(row, seed=seed) for row, seed in zip(p, seeds, strict=True)])
    if sampling == "token":
        kept = torch.zeros_like(counted)
        for row, seed in enumerate(seeds):
            positions = counted[row].nonzero()[:, 0]
            if len(positions):
                generator = torch.Generator().manual_seed(key(seed, "position"))
                kept[row, positions[int(torch.randint(len(positions), (1,), generator=generator))]] = True
        counted = kept
    return slope(p, drawn.masked_fill(~counted, IGNORED))


def _one_by_one(
    model: Any, batch: Batch, unit: Unit, *, seed: int, labels: Labels, sampling: Sampling
) -> dict[str, Tensor]:
    """What `GhostNorms` gives, for models with layers that it has no rule for."""
    parameters = named_parameters(model)
    rows: dict[str, list[float]] = {name: [] for name in parameters}
    for row, number in enumerate(_rows(batch)):
        alone = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        logits = token_logits(model, alone)
        # Not `targets` of the one sequence: it may have none to predict, which only a whole batch must not.
        wanted = targets(model, batch)[row : row + 1]
        given = [_row_seed(seed, unit, number)]
        cotangents = _cotangents(logits.detach(), wanted, given, labels=labels, sampling=sampling)
        gradients = torch.autograd.grad(logits, list(parameters.values()), grad_outputs=cotangents, allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            rows[name].append(0.0 if gradient is None else float(gradient.double().square().sum()))
    return {name: torch.tensor(squares, dtype=torch.float64) for name, squares in rows.items()}


def sample_labels(p: Tensor, *, seed: int) -> Tensor:
    """One label for each row of probabilities [n, vocabulary], by inverse CDF from a generator of its own.

    `torch.multinomial` would depend on the device and on how rows are batched.
    """
    uniform = torch.rand(len(p), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cumulative = p.detach().cumsum(dim=-1, dtype=torch.float64)
    drawn = torch.searchsorted(cumulative, uniform.to(p.device)[:, None] * cumulative[:, -1:], right=True)
    return drawn[:, 0].clamp(max=p.shape[-1] - 1)


def _finite(values: dict[str, float], unit: Unit) -> Values:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(
                f"batch {unit.batch}: {name} is {value}; is the model's loss finite on this batch, in this precision?"
            )
    return values
