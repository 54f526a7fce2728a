"""The loss made within the output layer, from a few tokens at a time, so that no step holds the logits of them all.

At a vocabulary of 50,000 and 16,384 tokens, logits and their gradient take 5 GB in 16 and 32 bits, more than a model of
350 M parameters and its optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from raysweep.objectives.base import IGNORED
from raysweep.objectives.cross_entropy import cross_entropy_sum

Tensor = torch.Tensor

# Of the logits that are there at a time, in 32 bits: large enough to fill a GPU, small beside a model.
CHUNK_BYTES = 2**29


class LossLayer(torch.nn.Linear):
    """An output layer that gives logits, or where labels are laid into it their summed cross-entropy.

    Args:
        layer: whose weights it shares.
    """

    def __init__(self, layer: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self._labels: Tensor | None = None

    @contextmanager
    def labelled(self, labels: Tensor) -> Iterator[None]:
        """Have it give the loss of these labels in place of logits; IGNORED ones do not count."""
        self._labels = labels
        try:
            yield
        finally:
            self._labels = None

    def forward(self, states: Tensor) -> Tensor:
        """Logits [..., vocabulary] of the states [..., width], or a loss in nats [], summed over labelled tokens."""
        if self._labels is None:
            return super().forward(states)
        flat, labels = states.flatten(0, -2), self._labels.flatten()
        # Its kernels are for GPUs.
        if states.is_cuda and find_spec("liger_kernel"):
            return _liger_sum(flat, self.weight, self.bias, labels)
        return linear_cross_entropy_sum(flat, self.weight, self.bias, labels)


def use_loss_layer(model: Any) -> None:
    """Give a model a `LossLayer`, if what its output layer gives are its logits, with nothing done to them after it.

    Args:
        model: a Hugging Face causal language model, not wrapped by anything yet.
    """
    head = _output_layer(model)
    if type(head) is torch.nn.Linear and _is_last(model, head):
        model.set_output_embeddings(LossLayer(head))


def loss_in_output(model: Any, labels: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
    """Cross-entropy in nats, summed over the labelled tokens; None if the model has no `LossLayer`.

    Args:
        model: a Hugging Face causal language model, or DeepSpeed's wrapping of one.
        labels: [n, M], int64: what the logits of each place predict, or IGNORED.
        inputs: the model's arguments.
    """
    head = _output_layer(getattr(model, "module", model))
    if not isinstance(head, LossLayer):
        return None
    with head.labelled(labels):
        loss: Tensor = model(**inputs).logits
    return loss


def linear_cross_entropy_sum(states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of `states @ weight.T + bias` in nats; its gradient is made along with it.

    Products are taken in autocast's type, where that is on, else in that of the weight; gradients of weight and bias
    are summed over tokens in float32.

    Args:
        states: [n, width].
        weight: [vocabulary, width].
        bias: [vocabulary].
        labels: [n], int64; IGNORED ones do not count.
    """
    return _Chunked.apply(states, weight, bias, labels)  # type: ignore[no-any-return, no-untyped-call]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        # Leaves of their own, cast once for all chunks, so that a chunk's gradient is no more than a product.
        leaves = [each.detach().to(dtype).requires_grad_() for each in (weight, bias) if each is not None]
        sums = [torch.zeros_like(each, dtype=torch.float32) for each in leaves]
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        size = max(1, CHUNK_BYTES // (4 * len(weight)))
        of_states = torch.empty_like(states)
        chunks = (torch.split(each, size) for each in (states, labels, of_states))
        for rows, wanted, out in zip(*chunks, strict=True):
            with torch.enable_grad():
                part = rows.detach().to(dtype).requires_grad_()
                logits = torch.addmm(leaves[1], part, leaves[0].T) if len(leaves) > 1 else part @ leaves[0].T
                loss = cross_entropy_sum(logits, wanted, ignored=IGNORED)
            gradient, *of_leaves = torch.autograd.grad(loss, [part, *leaves])
            total += loss.detach()
            out.copy_(gradient)
            for sum_, each in zip(sums, of_leaves, strict=True):
                sum_ += each
        ctx.gradients = of_states, *sums
        ctx.dtypes = weight.dtype, bias.dtype if bias is not None else None
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, along: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients were scaled in place; there is no second backward pass")
        (of_states, *of_leaves), ctx.gradients = ctx.gradients, None
        scaled = [each.mul_(along).to(dtype) for each, dtype in zip(of_leaves, ctx.dtypes, strict=False)]
        return of_states.mul_(along), scaled[0], scaled[1] if len(scaled) > 1 else None, None


def _liger_sum(states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum", accum_dtype=torch.float32)
    return loss(weight, states, labels, bias)  # type: ignore[no-any-return]


def _output_layer(model: Any) -> Any:
    """None where a model has none, as a classifier of texts."""
    return getattr(model, "get_output_embeddings", lambda: None)()


@torch.no_grad()
def _is_last(model: Any, head: torch.nn.Linear) -> bool:
    """Whether a model's logits are the very tensor that its output layer gives: not scaled, capped or cut."""
    given: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, inputs, output: given.append(output))
    ids = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
    try:
        return model(input_ids=ids).logits is given[0]
    finally:
        handle.remove()
