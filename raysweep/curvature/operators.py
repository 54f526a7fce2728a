"""Curvature of a mean token loss as products with vectors. No matrix is ever formed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from raysweep.curvature.probes import Tensors

logger = logging.getLogger(__name__)


def named_parameters(model: torch.nn.Module) -> Tensors:
    """The parameters that require a gradient, each once: tied ones under their first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def prepare(model: Any) -> None:
    """Bring a Hugging Face model into the state in which its loss is a twice differentiable function of weights.

    Dropout off; attention by an implementation that has a second derivative, which fused kernels have not. Both are
    logged where they change something.
    """
    model.eval()
    if getattr(model.config, "_attn_implementation", "eager") != "eager":
        logger.info("attention is switched from %s to eager for exact curvature", model.config._attn_implementation)
        model.set_attn_implementation("eager")


def mean_token_loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of next-token prediction, in nats per predicted token.

    Args:
        model: takes `input_ids` and gives `.logits` [n, L, vocabulary].
        ids: token ids [n, L], int64, on the model's device.
    """
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits, ids[:, 1:].flatten())


def hessian_vector_products(
    loss: Callable[[], torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
    vectors: Sequence[Mapping[str, torch.Tensor]],
) -> list[Tensors]:
    """Exact Hessian-vector products by double backward; the graph of the gradient is built once for all vectors.

    Args:
        loss: a scalar, twice differentiable function of `parameters`.
        parameters: name -> tensor that requires a gradient.
        vectors: each with the names and shapes of `parameters`.

    Returns:
        For each vector, name -> tensor like `parameters`.

    Raises:
        ValueError: if a parameter takes no part in the loss, or the loss or a product is not finite.
    """
    names, tensors = list(parameters), list(parameters.values())
    value = loss()
    if not torch.isfinite(value):
        raise ValueError(f"the loss is {value.item()}; curvature needs a finite one")
    gradients = torch.autograd.grad(value, tensors, create_graph=True, allow_unused=True)
    unused = [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]
    if unused:
        raise ValueError(f"parameter {unused[0]!r} takes no part in the loss; leave it out of `parameters`")
    products = []
    for index, vector in enumerate(vectors):
        parts = torch.autograd.grad(
            gradients,
            tensors,
            grad_outputs=[vector[name] for name in names],
            retain_graph=index < len(vectors) - 1,
            allow_unused=True,
        )
        products.append(
            {
                name: torch.zeros_like(tensor) if part is None else part
                for name, tensor, part in zip(names, tensors, parts, strict=True)
            }
        )
    return products


def inner(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    """Inner product over all parts, accumulated in float64."""
    return float(sum((left[name].double() * right[name].double()).sum() for name in left))
