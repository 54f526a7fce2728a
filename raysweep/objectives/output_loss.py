"""The loss made within the output layer, from a few tokens at a time, so that no step holds the logits of them all.

At a vocabulary of 50,000 and 16,384 tokens, logits and their gradient take 5 GB in 16 and 32 bits, more than a model of
350 M parameters and its optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from raysweep.objectives.base import IGNORED, LOGIT_CHUNK_BYTES

Tensor = torch.Tensor

DRAWN_BLOCK = 256
"""Classes of a block, by which `draw_classes` goes."""


class LossLayer(torch.nn.Linear):
    """An output layer that gives logits, or where labels are laid into it their summed cross-entropy.

    Not compiled, it uses liger's kernel on a GPU, where that is installed. Compiled, it does without: liger cuts into
    some 20 chunks, and waits for the device in every micro-batch to count labels.

    Args:
        layer: whose weights it shares.
        compiled: see `linear_cross_entropy_sum`.
    """

    def __init__(self, layer: torch.nn.Linear, *, compiled: bool = False) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self._labels: Tensor | None = None
        self._draws: Tensor | None = None
        self._compiled = compiled

    @contextmanager
    def labelled(self, labels: Tensor, draws: Tensor | None = None) -> Iterator[None]:
        """Have it give the loss of these labels in place of logits; IGNORED ones do not count.

        Args:
            labels: [...], int64.
            draws: [..., 2]: see `linear_cross_entropy_sum`.
        """
        self._labels, self._draws = labels, draws
        try:
            yield
        finally:
            self._labels = self._draws = None

    def forward(self, states: Tensor) -> Tensor:
        """Logits [..., vocabulary] of the states [..., width], or a loss in nats [], summed over labelled tokens."""
        if self._labels is None:
            return super().forward(states)
        flat, labels = states.flatten(0, -2), self._labels.view(-1)
        draws = None if self._draws is None else self._draws.view(-1, 2)
        if draws is None and states.is_cuda and not self._compiled and _has_liger():
            return liger_sum(flat, self.weight, self.bias, labels)
        return linear_cross_entropy_sum(flat, self.weight, self.bias, labels, draws, compiled=self._compiled)


def use_loss_layer(model: Any, *, compiled: bool = False) -> None:
    """Give a model a `LossLayer`, if what its output layer gives are its logits, with nothing done to them after it.

    Args:
        model: a Hugging Face causal language model, not wrapped by anything yet.
        compiled: see `linear_cross_entropy_sum`.
    """
    head = _output_layer(model)
    if type(head) is torch.nn.Linear and _is_last(model, head):
        model.set_output_embeddings(LossLayer(head, compiled=compiled))


def loss_in_output(
    model: Any, labels: Tensor, inputs: Mapping[str, Any], *, draws: Tensor | None = None
) -> Tensor | None:
    """Cross-entropy in nats, summed over the labelled tokens; None if the model has no `LossLayer`.

    Args:
        model: a Hugging Face causal language model, or DeepSpeed's wrapping of one.
        labels: [n, M], int64, contiguous: what the logits of each place predict, or IGNORED.
        inputs: the model's arguments.
        draws: [n, M, 2]: see `linear_cross_entropy_sum`.
    """
    head = _output_layer(getattr(model, "module", model))
    if not isinstance(head, LossLayer):
        return None
    with head.labelled(labels, draws):
        loss: Tensor = model(**inputs).logits
    return loss


def linear_cross_entropy_sum(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    draws: Tensor | None = None,
    *,
    compiled: bool = False,
) -> Tensor:
    """Sum of the cross-entropies of `states @ weight.T + bias` in nats; its gradient is made along with it, of those of
    the three that ask for one.

    Products are taken in autocast's type, where that is on, else in that of the weight; what is between them, and the
    sums over tokens of the gradients of weight and bias, in float32.

    Args:
        states: [n, width].
        weight: [vocabulary, width].
        bias: [vocabulary].
        labels: [n], int64; IGNORED ones do not count.
        draws: [n, 2], uniform numbers: if given, each label that counts is first replaced, in `labels`, by a class
            drawn by the model's own probabilities; see `draw_classes`.
        compiled: whether torch compiles what is between the products, which then reads the logits twice and writes
            their gradient once, all in the products' type.
    """
    return _Chunked.apply(states, weight, bias, labels, draws, compiled)  # type: ignore[no-any-return, no-untyped-call]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        draws: Tensor | None,
        compiled: bool,
    ) -> Tensor:
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        loss_of = _compiled_chunk_loss() if compiled else _chunk_loss
        matrix, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        # Frozen weights, as beside adapters, get none: at a vocabulary of 128,000 and a width of 4096 it takes 2 GB.
        states_ask, weight_asks, bias_asks, *_ = ctx.needs_input_grad
        of_states = torch.empty_like(states) if states_ask else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if weight_asks else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and bias_asks else None
        # Of like size, as each size is compiled. With each chunk the gradient of the weight is read and written once,
        # which would be most of the time in chunks as small as would already fill a GPU.
        num_chunks = -(-4 * len(labels) * len(weight) // LOGIT_CHUNK_BYTES) or 1
        size = max(1, -(-len(labels) // num_chunks))
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            part = states[rows].to(dtype)
            logits = torch.nn.functional.linear(part, matrix, shift)
            if draws is not None:
                drawn = draw_classes(logits, draws[rows], compiled=compiled)
                labels[rows] = drawn.where(labels[rows] != IGNORED, IGNORED)
            loss, gradient = loss_of(logits, labels[rows])
            total += loss
            if of_states is not None:
                of_states[rows] = gradient @ matrix
            if of_weight is not None:
                of_weight += gradient.T @ part
            if of_bias is not None:
                of_bias += gradient.sum(dim=0, dtype=torch.float32)
        ctx.gradients = of_states, of_weight, of_bias
        ctx.dtypes = states.dtype, weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, along: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients were scaled in place; there is no second backward pass")
        gradients, ctx.gradients = ctx.gradients, None
        given = [
            None if each is None else each.mul_(along).to(dtype)
            for each, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *given, None, None, None


def draw_classes(logits: Tensor, draws: Tensor, *, compiled: bool = False) -> Tensor:
    """A class of each row by its probability, softmax(logits): first a block of classes, then one of that block.

    So the logits are read once, and no number for each of them is drawn or written.

    Args:
        logits: [n, classes].
        draws: [n, 2], uniform in [0, 1).
        compiled: whether torch compiles what reads the logits.

    Returns:
        [n], int64; of a row that is not finite, some class, as the loss will tell that training diverged.

    >>> draws = torch.tensor([[0.5, 0.0], [0.0, 0.49], [0.0, 0.5]])
    >>> draw_classes(torch.tensor([[0.0, 0.0, -torch.inf]]).expand(3, 3), draws)
    tensor([0, 0, 1])
    """
    of_blocks = (_compiled_block_sums() if compiled else _block_sums)(logits)
    block = _pick(of_blocks, draws[:, :1])
    within = torch.arange(DRAWN_BLOCK, device=logits.device) + DRAWN_BLOCK * block
    last = logits.shape[-1] - 1
    of_classes = logits.gather(-1, within.clamp(max=last)).float().masked_fill(within > last, -torch.inf)
    return (DRAWN_BLOCK * block + _pick(of_classes, draws[:, 1:])).clamp(max=last)[:, 0]


def _pick(logs: Tensor, draws: Tensor) -> Tensor:
    """By uniform numbers [n, 1], an index of each row of log weights [n, k], never one without weight: [n, 1]."""
    below = logs.softmax(dim=-1).cumsum(dim=-1)
    # Times the last, which rounding leaves a little off 1.
    return torch.searchsorted(below, draws * below[:, -1:], right=True).clamp(max=logs.shape[-1] - 1)


def _block_sums(logits: Tensor) -> Tensor:
    """Logarithms of the blocks' sums of e^logit, [n, blocks], float32."""
    room = -logits.shape[-1] % DRAWN_BLOCK
    padded = torch.nn.functional.pad(logits.float(), (0, room), value=-torch.inf) if room else logits.float()
    return padded.view(len(padded), -1, DRAWN_BLOCK).logsumexp(dim=-1)


@cache
def _compiled_block_sums() -> Callable[[Tensor], Tensor]:
    return torch.compile(_block_sums, dynamic=False)


def _chunk_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss in float32, and its gradient in the type of the logits, [n, vocabulary]."""
    wide, is_counted = logits.float(), (labels != IGNORED)[:, None]
    at = labels[:, None].where(is_counted, 0)
    total = wide.logsumexp(dim=-1, keepdim=True)
    loss = ((total - wide.gather(-1, at)) * is_counted).sum()
    is_label = torch.arange(wide.shape[-1], device=wide.device) == at
    gradient = ((wide - total).exp() - is_label.float()) * is_counted
    return loss, gradient.to(logits.dtype)


@cache
def _compiled_chunk_loss() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_chunk_loss, dynamic=False)


@cache
def _has_liger() -> bool:
    return find_spec("liger_kernel") is not None


def liger_sum(states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """`linear_cross_entropy_sum` by liger-kernel, whose kernels are for GPUs."""
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
