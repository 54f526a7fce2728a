"""PyHessian and curvlinops on Hugging Face models; ours, in the same words. Installed by the extra `bench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from curvlinops import HessianLinearOperator
from pyhessian import hessian
from pyhessian.utils import group_product, hessian_vector_product
from torch import nn

Tensor = torch.Tensor


class Logits(nn.Module):
    """Both take models that map inputs to outputs, and a loss of outputs and targets."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits[:, :-1]


class TokenLoss(nn.CrossEntropyLoss):
    def forward(self, logits: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


class PlainSiLU(nn.Module):
    """The fused one has no forward mode, without which curvlinops gives no result on Llama."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class PlainLayerNorm(nn.Module):
    """Forward mode over the fused kernel's gradient is wrong, without an error: curvlinops' products then are, too."""

    def __init__(self, fused: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = fused.weight, fused.bias, fused.eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps) * self.weight + self.bias


def with_forward_mode(model: Any) -> Any:
    """The same model from operations of which curvlinops can make products at all."""
    return _replace(model, ("SiLU", "SiLUActivation"), lambda fused: PlainSiLU())


def with_right_norms(model: Any) -> Any:
    """The same model from operations whose products curvlinops gets right."""
    return _replace(model, ("LayerNorm",), PlainLayerNorm)


def _replace(model: Any, kinds: tuple[str, ...], make: Callable[[Any], nn.Module]) -> Any:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ in kinds:
                setattr(module, name, make(child))
    return model


class PyHessian:
    """PyHessian on one batch: the gradient's graph is made once, and kept."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        model.zero_grad()
        self._model = model
        self._hessian = hessian(Logits(model), TokenLoss(), data=(ids, ids), cuda=False)

    def forms(self, vectors: Sequence[Sequence[Tensor]]) -> list[float]:
        found = []
        for vector in vectors:
            product = hessian_vector_product(self._hessian.gradsH, self._hessian.params, list(vector))
            found.append(float(group_product(product, list(vector))))
        return found

    def trace(self, num: int | None) -> tuple[float, int]:
        """Its own `trace`, and how many probes it took.

        With None by its stopping rule: until the mean changes by less than a thousandth, or after 100 probes.
        """
        values = self._hessian.trace() if num is None else self._hessian.trace(maxIter=num, tol=-1.0)
        return float(sum(values) / len(values)), len(values)

    def close(self) -> None:
        self._model.zero_grad()


class Curvlinops(HessianLinearOperator):
    """curvlinops' Hessian, over batches."""

    def __init__(self, model: Any, batches: Sequence[Tensor]) -> None:
        super().__init__(
            Logits(model),
            TokenLoss(),
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            [(ids, ids) for ids in batches],
            check_deterministic=False,
        )
