"""Quadratic forms of curvature from three forward passes: no gradient is taken.

Along w + s v the logits are z(s) = z + s z' + s^2 z''/2 + ..., and the loss of a token with label y has the second
derivative  v'Hv = Var_p(z') + <p - e_y, z''>:  the Gauss-Newton part v'Gv and the residual v'(H - G)v. Central
differences of the logits give both: z' = (z(h) - z(-h)) / 2h and z'' = (z(h) - 2 z(0) + z(-h)) / h^2, wrong by
O(h^2) of truncation and O(eps / h^2) of rounding. Differencing logits rather than losses tells the two parts apart
and loses no digits to the size of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from raysweep.curvature.language import IGNORED, Batch, predicting_logits, targets
from raysweep.curvature.operators import MovableParameters

Tensor = torch.Tensor

# The first step that is tried: what moves the logits by this, in standard deviations (nats), but weights by no more
# than this part of their size. Trained Llamas of 2 and 5 M parameters keep it: in float32, against exact products,
# v'Hv is then wrong by 0.04 %, a part of that by rounding.
SHIFT_NATS = 0.03
SHIFT_WEIGHTS = 0.02


@dataclass(frozen=True)
class Forms:
    """v'Gv and v'(H - G)v of the summed token loss of a batch."""

    gauss_newton: float
    residual: float

    @property
    def sum(self) -> float:
        """v'Hv."""
        return self.gauss_newton + self.residual

    def __add__(self, other: Forms) -> Forms:
        return Forms(self.gauss_newton + other.gauss_newton, self.residual + other.residual)


def longest_step(movable: MovableParameters) -> float:
    """That `step_for` would choose. Raises ValueError if all parameters are 0."""
    if not (step := SHIFT_WEIGHTS * movable.rms):
        raise ValueError("no step for differences: the chosen parameters are all 0; measure others as well")
    return step


@torch.no_grad()
def logit_response(
    model: Any, batch: Batch, vector: Mapping[str, Tensor], movable: MovableParameters, *, here: Tensor | None = None
) -> float:
    """Sum over tokens of Var_p(z(w + s v) - z(w)) / s^2: v'Gv of the summed loss, about, from two forward passes.

    The step s is the longest that `step_for` would choose, so that rounding is nothing beside the difference.
    `here`: see `quadratic_forms`.

    Raises:
        ValueError: if all parameters are 0.
    """
    movable.step = longest_step(movable)
    here = predicting_logits(model, batch)[0] if here is None else here
    with movable.moves() as move:
        move(vector, 1)
        ahead = predicting_logits(model, batch)[0].sub_(here)
    p = here.softmax(dim=-1)
    variance = torch.linalg.vecdot(p, ahead.sub_(torch.linalg.vecdot(p, ahead)[..., None]).square_())
    return _total(variance) / movable.step**2


def step_for(trace: float, rms: float) -> float:
    """A step along a probe vector, to begin with.

    Args:
        trace: of the Gauss-Newton matrix, about.
        rms: root mean square of the parameters.

    Raises:
        ValueError: if no step can be chosen.
    """
    step = min(SHIFT_NATS / math.sqrt(trace), SHIFT_WEIGHTS * rms) if math.isfinite(trace) and trace > 0 else 0.0
    if step <= 0:
        raise ValueError(f"no step for differences: Gauss-Newton trace {trace}, root mean square of weights {rms}")
    return step


@torch.no_grad()
def quadratic_forms(
    model: Any,
    batch: Batch,
    vector: Mapping[str, Tensor],
    movable: MovableParameters,
    *,
    check: bool = False,
    here: Tensor | None = None,
) -> tuple[Forms, Forms | None]:
    """Both forms along a probe vector, by central differences.

    Args:
        model: in eval mode, its weights in float32 or float64; any attention implementation.
        batch: see `language`.
        vector: name -> tensor, of the parameters that `movable` holds.
        movable: the model's parameters, and the step; see `step_for`.
        check: also take the forms with twice the step; a third of the difference estimates the error.
        here: `predicting_logits` at the weights, where an earlier probe of the batch has made them already.

    Returns:
        The forms with the step, and with twice the step if `check`.
    """
    here = predicting_logits(model, batch)[0] if here is None else here
    labels = targets(model, batch)
    p, at = here.softmax(dim=-1), labels[labels != IGNORED][:, None]

    def forms(times: int) -> Forms:
        with movable.sides(vector, times) as (go_ahead, go_behind):
            go_ahead()
            ahead = predicting_logits(model, batch)[0].sub_(here)
            go_behind()
            behind = predicting_logits(model, batch)[0].sub_(here)
        # In place, and sums over the vocabulary as inner products: these tensors are as large as the logits, and each
        # pass over them counts.
        means = [torch.linalg.vecdot(p, side) for side in (ahead, behind)]
        residual = means[0] + means[1] - (ahead.gather(-1, at) + behind.gather(-1, at))[..., 0]
        slope = ahead.sub_(behind).sub_((means[0] - means[1])[..., None])
        variance = torch.linalg.vecdot(p, slope.square_())
        step = times * movable.step
        return Forms(_total(variance) / (2 * step) ** 2, _total(residual) / step**2)

    return forms(1), forms(2) if check else None


def _total(of_tokens: Tensor) -> float:
    return float(of_tokens.sum(dtype=torch.float64))
