"""How much the loss rises around the weights: in the worst direction, in the average one, and free of scale.

Plain curvature changes when weights are rescaled without changing the function (the gain of a norm against the layer
it feeds, one linear layer against the next). What is scaled by the weights themselves does not: see each docstring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from raysweep.curvature.averages import Estimate
from raysweep.curvature.estimators import at_least
from raysweep.curvature.geodesic import factors_of
from raysweep.curvature.language import IGNORED, Batch, mean_token_loss, targets
from raysweep.curvature.linear import Operator, flat
from raysweep.curvature.operators import MovableParameters, gradients_of, inner, named_parameters
from raysweep.curvature.probes import Tensors, key, probe_vector

Tensor = torch.Tensor
Scale = Literal["plain", "adaptive"]
"""A ball of radius rho in w; or in w / |w|, entry by entry, which rescaling leaves alone (ASAM; Kwon et al., 2021)."""


def worst_sharpness(
    model: Any,
    batches: Sequence[Batch],
    *,
    rho: float,
    scale: Scale | Literal["geodesic"] = "plain",
    num_steps: int = 1,
) -> float:
    """Largest rise of the loss found in a ball around the weights, in nats per token.

    One step is the ascent of SAM (Foret et al., 2021, arXiv 2010.01412), to first order the worst case; more are
    projected gradient ascent within the ball, keeping the largest rise seen. A lower bound of the maximum, always.

    Args:
        model: brought into shape by `language.prepare`.
        batches: see `language`.
        rho: radius.
        scale: see `Scale`; or the ball of `geodesic`, which is the adaptive one but for attention. These two survive
            rescaling, and the geodesic one alone all symmetries of attention.
        num_steps: of ascent.

    Raises:
        ValueError: if a loss is not finite, or the model is of a kind whose symmetries are not known.

    >>> worst_sharpness(model, batches[:2], rho=0.05) > 0
    True
    """
    parameters = named_parameters(model)
    loss = _Loss(model, batches)
    ball = _Ball(model, parameters, scale)
    before = loss.value()
    place: Tensors = {name: torch.zeros_like(part).detach() for name, part in parameters.items()}
    movable, worst = MovableParameters(parameters, 1.0), 0.0
    for step in range(num_steps):
        with movable.moves() as move:
            move(ball.to_weights(place), 1)
            ascent = ball.to_coordinates(loss.gradient(parameters))
        # A step of the radius first, then of half of it, back onto the ball.
        length = rho if step == 0 else rho / 2
        norm = math.sqrt(inner(ascent, ascent))
        place = {name: part + ascent[name] * (length / max(norm, 1e-30)) for name, part in place.items()}
        outside = math.sqrt(inner(place, place)) / rho
        if outside > 1:
            place = {name: part / outside for name, part in place.items()}
        with movable.moves() as move:
            move(ball.to_weights(place), 1)
            worst = max(worst, loss.value() - before)
    return worst


def average_sharpness(
    model: Any, batches: Sequence[Batch], *, noise: float, scale: Scale = "plain", num_draws: int = 8, seed: int = 0
) -> Estimate:
    """Mean rise of the loss when every weight is moved by `noise` at random (Andriushchenko et al., 2023), in nats.

    arXiv 2302.07011; with signs in place of their normal noise, each direction taken both ways, which cancels the
    slope: to second order it is noise^2 / 2 of the trace, and for the adaptive one, in which a weight is moved by that
    part of its size, of `adaptive_trace`. The adaptive one survives rescaling.

    Args:
        model: brought into shape by `language.prepare`.
        batches: see `language`.
        noise: by which each weight is moved, or which part of itself.
        scale: see `Scale`.
        num_draws: directions, two losses each; at least 2.
        seed: of the directions.

    Raises:
        ValueError: if there are fewer than 2 draws.

    >>> rise = average_sharpness(model, batches[:2], noise=1e-2, num_draws=4)
    >>> rise.df
    3
    """
    at_least(2, num_draws, "num_draws")
    parameters = named_parameters(model)
    loss = _Loss(model, batches)
    sizes = _sizes(parameters, scale)
    before, movable = loss.value(), MovableParameters(parameters, noise)
    rises = []
    for draw in range(num_draws):
        vector = _times(sizes, probe_vector(parameters, seed=seed, probe=draw))
        both = 0.0
        with movable.moves() as move:
            for way in (1, -1):
                move(vector, way)
                both += (loss.value() - before) / 2
        rises.append(both)
    return Estimate.of(rises)


def adaptive_trace(operator: Operator, model: Any, *, num_products: int, seed: int = 0) -> Estimate:
    """Sum of w_i^2 H_ii, the trace in the coordinates of ASAM; rescaling does not change it.

    The mean of (w v)'H(w v) over random signs v, w v being entry by entry.

    Args:
        operator: see `linear.curvature_operator`, of this model.
        model: whose parameters scale the probes.
        num_products: at least 2.
        seed: of the probe vectors.

    Raises:
        ValueError: if there are fewer than 2 products.

    >>> adaptive_trace(curvature_operator(model, batches[:1]), model, num_products=2).df
    1
    """
    parameters = named_parameters(model)
    return _mean_form(
        operator, num_products, lambda index: _times(parameters, probe_vector(parameters, seed=seed, probe=index))
    )


def relative_flatness(operator: Operator, model: Any, *, num_products: int, seed: int = 0) -> Estimate:
    """Sum over linear layers of sum_{s,s'} <w_s, w_s'> Tr H_{s,s'}, s and s' neurons (Petzka et al., 2021).

    arXiv 2001.00939, definition 3. With u and z random of mean 0 and covariance I, the direction V = (W u) z' has
    E V_si V_s'j = <w_s, w_s'> if i = j, so that v'Hv is unbiased. It survives a layer scaled as a whole; where its
    inputs are scaled unevenly (a norm's gain against its readers, one layer's neurons against the next layer), both
    <w_s, w_s'> and the trace change, and so does it. Embeddings and gains take no part.

    Args:
        operator: see `linear.curvature_operator`, of this model.
        model: whose linear layers are taken.
        num_products: at least 2.
        seed: of the directions.

    Raises:
        ValueError: if the model has no linear layer among its parameters.

    >>> relative_flatness(curvature_operator(model, batches[:1]), model, num_products=2).df
    1
    """
    parameters = named_parameters(model)
    layers = linear_weights(model, parameters)
    if not layers:
        raise ValueError("relative flatness needs a linear layer among the parameters")

    def draw(index: int) -> Tensors:
        vector = {name: torch.zeros_like(part) for name, part in parameters.items()}
        for name, rows_are_neurons in layers.items():
            weight = parameters[name].detach() if rows_are_neurons else parameters[name].detach().T
            inputs = {"u": weight[0], "z": weight[0]}
            drawn = probe_vector(inputs, seed=key(seed, name), probe=index)
            direction = torch.outer(weight @ drawn["u"], drawn["z"])
            vector[name] = direction if rows_are_neurons else direction.T
        return vector

    return _mean_form(operator, num_products, draw)


def linear_weights(model: nn.Module, parameters: Tensors) -> dict[str, bool]:
    """Name of each linear layer's weight, and whether its rows are neurons (GPT-2's Conv1D has them as columns)."""
    names = {id(part): name for name, part in parameters.items()}
    found = {}
    for module in model.modules():
        is_linear = isinstance(module, nn.Linear)
        if (is_linear or type(module).__name__ == "Conv1D") and (name := names.get(id(module.weight))) is not None:
            found[name] = is_linear
    return found


def _mean_form(operator: Operator, num: int, draw: Callable[[int], Tensors]) -> Estimate:
    """Mean of v'Av over vectors that are drawn one at a time: each is as large as the model."""
    at_least(2, num)
    forms = []
    for index in range(num):
        row = flat(draw(index))
        forms.append(float((row * operator.product(row)).sum(dtype=torch.float64)))
    return Estimate.of(forms)


class _Ball:
    """The coordinates e in which a ball is round: of w + s e, s the sizes of weights, and along geodesics."""

    def __init__(self, model: Any, parameters: Tensors, scale: Scale | Literal["geodesic"]) -> None:
        self._factors, inside = factors_of(model, parameters) if scale == "geodesic" else ([], set())
        self._sizes = _sizes(parameters, "plain" if scale == "plain" else "adaptive")
        self._sizes |= _sizes({name: parameters[name] for name in inside}, "plain")

    def to_weights(self, place: Tensors) -> Tensors:
        moved = _times(self._sizes, place)
        for factor in self._factors:
            factor.to_weights(moved)
        return moved

    def to_coordinates(self, gradient: Tensors) -> Tensors:
        """By the chain rule; along a geodesic that of its start."""
        slope = _times(self._sizes, gradient)
        for factor in self._factors:
            factor.to_coordinates(slope)
        return slope


def _sizes(parameters: Tensors, scale: Scale) -> Tensors:
    if scale == "plain":
        return {name: torch.ones_like(part).detach() for name, part in parameters.items()}
    return {name: part.detach().abs() for name, part in parameters.items()}


def _times(left: Tensors, right: Tensors) -> Tensors:
    return {name: part.detach() * right[name] for name, part in left.items()}


class _Loss:
    """The mean token loss over all batches."""

    def __init__(self, model: Any, batches: Sequence[Batch]) -> None:
        self._model, self._batches = model, batches
        counts = [int((targets(model, batch) != IGNORED).sum()) for batch in batches]
        self._shares = [count / sum(counts) for count in counts]

    @torch.no_grad()
    def value(self) -> float:
        losses = (mean_token_loss(self._model, batch).item() for batch in self._batches)
        return math.fsum(share * loss for share, loss in zip(self._shares, losses, strict=True))

    def gradient(self, parameters: Tensors) -> Tensors:
        total = {name: torch.zeros_like(part) for name, part in parameters.items()}
        for batch, share in zip(self._batches, self._shares, strict=True):
            for name, part in zip(
                parameters, gradients_of(mean_token_loss(self._model, batch), parameters), strict=True
            ):
                total[name].add_(part, alpha=share)
        return total
