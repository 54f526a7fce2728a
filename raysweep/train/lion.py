"""Lion as an optimizer of torch, which has none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Evolved sign momentum (Chen et al., 2023, program 1).

    With gradient g, momentum m, rate lr and decay w, elementwise:
    step = sign(b1 m + (1 - b1) g);  weight = (1 - lr w) weight - lr step;  m = b2 m + (1 - b2) g.

    Args:
        groups: of `params`, each with its `weight_decay`.
        lr: step length of every element.
        betas: b1 and b2.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    >>> optimizer = Lion([{"params": [weight], "weight_decay": 0.5}], lr=0.1, betas=(0.9, 0.99))
    >>> weight.grad = torch.tensor([3.0, 0.01])
    >>> optimizer.step()
    >>> weight.data  # 0.95 of each, less 0.1: the size of a gradient does not count.
    tensor([ 0.8500, -1.0500])
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step all weights that have a gradient, in place; `closure` is not taken."""
        assert closure is None, "losses are computed before"
        for group in self.param_groups:
            if weights := [weight for weight in group["params"] if weight.grad is not None]:
                self._step(weights, lr=group["lr"], betas=group["betas"], decay=group["weight_decay"])

    def _step(self, weights: list[torch.Tensor], *, lr: float, betas: tuple[float, float], decay: float) -> None:
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        for weight in weights:
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        momenta = [self.state[weight]["momentum"] for weight in weights]
        # Over all weights in one call: a kernel for each would take longer to start than to run.
        steps = torch._foreach_lerp(momenta, gradients, 1 - betas[0])
        torch._foreach_sign_(steps)
        torch._foreach_mul_(weights, 1 - lr * decay)
        torch._foreach_add_(weights, steps, alpha=-lr)
        torch._foreach_lerp_(momenta, gradients, 1 - betas[1])
