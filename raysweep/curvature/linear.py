"""Curvature of a loss over a fixed set of batches as a symmetric linear operator on flat vectors.

What `estimators.py` and `spectrum.py` work on. The text is taken as it is: their errors are those of the vectors alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from raysweep.curvature.language import IGNORED, Batch, mean_token_loss, targets
from raysweep.curvature.operators import (
    each_product,
    finite_difference_product,
    hessian_vector_products,
    inner,
    loss_gradients,
    named_parameters,
)
from raysweep.curvature.probes import Tensors, probe_vector
from raysweep.curvature.tangents import gauss_newton_product, reverse_over_forward_product

logger = logging.getLogger(__name__)

Tensor = torch.Tensor


# Sequences are taken through the model this many tokens at a time: as fast on a CPU, and lean.
TOKENS_AT_ONCE = 512


@dataclass(frozen=True)
class Operator:
    """A symmetric matrix [size, size], known by its products with blocks of vectors [size, k].

    Blocks are best the transpose of a contiguous [k, size], so that no vector has to be copied.

    >>> matrix = Operator(lambda block: 2 * block, size=3)
    >>> matrix.product(torch.ones(3)).tolist()
    [2.0, 2.0, 2.0]
    """

    columns: Callable[[Tensor], Tensor]
    size: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    def product(self, vector: Tensor) -> Tensor:
        """The product with one vector [size]."""
        return self.columns(vector[:, None])[:, 0]


def flat(parts: Mapping[str, Tensor]) -> Tensor:
    """All parts in a row [size], in their order."""
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
    tokens_at_once: int = TOKENS_AT_ONCE,
) -> Operator:
    """The Hessian or Gauss-Newton matrix of the mean token loss over all batches, on the chosen parameters.

    Exact Hessian products of one vector are made by reverse over forward mode, if it agrees with double backward;
    those of several by double backward, whose graph they share.

    Args:
        model: brought into shape by `language.prepare`.
        batches: see `language`; walked through once for each block.
        matrix: which; the Gauss-Newton one has exact products only.
        products: how; see `cost.Products`.
        tokens_at_once: what the memory of activations is for; a GPU is faster with more.

    >>> hessian = curvature_operator(model, batches)
    >>> hessian.size == model.num_parameters()
    True
    """
    parameters = named_parameters(model)
    first = next(iter(parameters.values()))
    pieces = [piece for batch in batches for piece in _pieces(model, batch, tokens_at_once)]
    num_tokens = sum(count for _, count in pieces)
    with_tangents = matrix == "hessian" and products == "exact" and _has_tangents(model, pieces[0][0], parameters)

    def products_of(piece: Batch, vectors: Sequence[Tensors]) -> Iterator[Tensors]:
        loss = partial(mean_token_loss, model, piece)
        if matrix == "gauss_newton":
            return (gauss_newton_product(model, piece, vector) for vector in vectors)
        if products == "gradient_differences":
            found = (finite_difference_product(loss, parameters, vector, precision=first.dtype) for vector in vectors)
            return (each.product for each in found)
        if with_tangents and len(vectors) == 1:
            return iter([reverse_over_forward_product(model, piece, vectors[0])[0]])
        return each_product(loss_gradients(model, piece, parameters), parameters, vectors)

    def columns(block: Tensor) -> Tensor:
        vectors = _Columns(block, parameters)
        # A row for each vector, so that each is contiguous; the transpose that is returned is a view.
        total = torch.empty(len(vectors), len(block), dtype=block.dtype, device=block.device)
        for index, (piece, count) in enumerate(pieces):
            for row, product in zip(total, products_of(piece, vectors), strict=True):
                for name, part in unflat(row, parameters).items():
                    if index == 0:
                        torch.mul(product[name], count / num_tokens, out=part)
                    else:
                        part.add_(product[name], alpha=count / num_tokens)
        return total.T

    size = sum(parameter.numel() for parameter in parameters.values())
    return Operator(columns, size, first.dtype, first.device)


class _Columns(Sequence[Tensors]):
    """Columns of a block as named parts, copied one at a time."""

    def __init__(self, block: Tensor, like: Tensors) -> None:
        self._block, self._like = block, like

    def __len__(self) -> int:
        return self._block.shape[1]

    def __getitem__(self, index: Any) -> Any:
        return unflat(self._block[:, index].contiguous(), self._like)


def _pieces(model: Any, batch: Batch, tokens_at_once: int) -> Iterator[tuple[Batch, int]]:
    """A few rows at a time, with the number of tokens that they predict, where there are any."""
    counts = (targets(model, batch) != IGNORED).sum(dim=1)
    num, length = batch["input_ids"].shape
    size = max(1, tokens_at_once // length)
    for start in range(0, num, size):
        if count := int(counts[start : start + size].sum()):
            yield {name: rows[start : start + size] for name, rows in batch.items()}, count


def _has_tangents(model: Any, piece: Batch, parameters: Tensors) -> bool:
    """Whether forward mode knows all operations of the model, and has their second derivatives right."""
    vector = probe_vector(parameters, seed=0, probe=0)
    try:
        found = reverse_over_forward_product(model, piece, vector)[0]
    except ValueError as error:
        logger.info("%s", error)
        return False
    exact = hessian_vector_products(partial(mean_token_loss, model, piece), parameters, [vector])[0]
    off = {name: found[name] - part for name, part in exact.items()}
    wrong = math.sqrt(inner(off, off)) > 1e-3 * math.sqrt(inner(exact, exact))
    if wrong:
        logger.info("forward mode is wrong for an operation of this model: products are by double backward")
    return not wrong
