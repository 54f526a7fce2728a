"""Curvature of a loss over a fixed set of batches as a symmetric linear operator on flat vectors.

What `estimators.py` and `spectrum.py` work on. The text is taken as it is: their errors are those of the vectors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from raysweep.curvature.language import IGNORED, Batch, mean_token_loss, targets
from raysweep.curvature.operators import (
    finite_difference_product,
    gauss_newton_product,
    hessian_vector_products,
    named_parameters,
)
from raysweep.curvature.probes import Tensors

Tensor = torch.Tensor


@dataclass(frozen=True)
class Operator:
    """A symmetric matrix [size, size], known by its products with vectors [size]."""

    product: Callable[[Tensor], Tensor]
    size: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    def columns(self, block: Tensor) -> Tensor:
        """Products with the columns of a block [size, k]."""
        return torch.stack([self.product(column) for column in block.T], dim=1)


def flat(parts: Mapping[str, Tensor]) -> Tensor:
    """All parts in a row."""
    return torch.cat([part.detach().reshape(-1) for part in parts.values()])


def unflat(row: Tensor, like: Mapping[str, Tensor]) -> Tensors:
    """The reverse of `flat`; views of `row`."""
    pieces = row.split([part.numel() for part in like.values()])  # type: ignore[no-untyped-call]
    return {name: piece.view_as(part) for (name, part), piece in zip(like.items(), pieces, strict=True)}


def curvature_operator(
    model: Any,
    batches: Sequence[Batch],
    *,
    matrix: Literal["hessian", "gauss_newton"] = "hessian",
    products: Literal["exact", "gradient_differences"] = "exact",
) -> Operator:
    """The Hessian or Gauss-Newton matrix of the mean token loss over all batches, on the chosen parameters.

    Args:
        model: brought into shape by `language.prepare`.
        batches: see `language`; walked through once for each product.
        matrix: which; the Gauss-Newton one has exact products only.
        products: how; see `cost.Products`.
    """
    parameters = named_parameters(model)
    first = next(iter(parameters.values()))
    counts = [int((targets(model, batch) != IGNORED).sum()) for batch in batches]

    def one(batch: Batch, vector: Tensors) -> Tensors:
        if matrix == "gauss_newton":
            return gauss_newton_product(model, batch, vector)
        if products == "exact":
            return hessian_vector_products(lambda: mean_token_loss(model, batch), parameters, [vector])[0]
        return finite_difference_product(
            lambda: mean_token_loss(model, batch), parameters, vector, precision=first.dtype
        ).product

    def product(row: Tensor) -> Tensor:
        vector = unflat(row, parameters)
        total = torch.zeros_like(row)
        for batch, count in zip(batches, counts, strict=True):
            total.add_(flat(one(batch, vector)), alpha=count / sum(counts))
        return total

    size = sum(parameter.numel() for parameter in parameters.values())
    return Operator(product, size, first.dtype, first.device)
