"""Cross-entropy in the memory of the logits, which are the largest tensor of a training step with a small model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor

# What makes logits without keeping them for its own backward pass, by the names of autograd's nodes.
_PRODUCTS = {"MmBackward0", "AddmmBackward0", "BmmBackward0", "ToCopyBackward0"}
_VIEWS = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"}


def cross_entropy_sum(logits: Tensor, labels: Tensor, *, ignored: int) -> Tensor:
    """Sum of the cross-entropies in nats, as by `torch.nn.functional.cross_entropy`, but faster and in less memory.

    Torch writes log-probabilities, then their gradient, nearly all noughts, then that of the logits: three more
    tensors as large as the logits. Here the logits are overwritten by probabilities and these by the gradient, where
    nothing else needs them; the caller must not either.

    Args:
        logits: [n, classes].
        labels: [n], int64.
        ignored: label of rows that do not count.
    """
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    if not _may_be_overwritten(logits):
        return F.cross_entropy(logits, labels, ignore_index=ignored, reduction="sum")
    return _InPlace.apply(logits, labels, ignored)  # type: ignore[no-any-return, no-untyped-call]


def _may_be_overwritten(logits: Tensor) -> bool:
    node = logits.grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    return node is not None and node.name() in _PRODUCTS


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
        ctx.counted = labels != ignored
        ctx.at = labels.where(ctx.counted, 0)[:, None]
        of_label = logits.gather(-1, ctx.at)[:, 0]
        largest = logits.amax(dim=-1, keepdim=True)
        ctx.weights = logits.detach().sub_(largest).exp_()
        ctx.total = ctx.weights.sum(dim=-1, keepdim=True)
        losses: Tensor = (ctx.total.log() + largest)[:, 0] - of_label
        return losses.masked_fill_(~ctx.counted, 0).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, along: Tensor) -> tuple[Tensor, None, None]:
        if ctx.weights is None:
            raise RuntimeError("the logits were overwritten by their gradient; there is no second backward pass")
        weights, ctx.weights = ctx.weights, None
        scale = (ctx.counted * along)[:, None]
        return weights.mul_(scale / ctx.total).scatter_add_(-1, ctx.at, -scale), None, None
