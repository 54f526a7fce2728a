"""Squared norms of per-sequence gradients without forming one: from layers' inputs and their outputs' gradients.

For a linear layer y = W x the gradient of one sequence is G = sum_t g_t x_t', so |G|^2 = sum_{s,t} (g_s.g_t)(x_s.x_t)
(Goodfellow, 2015, arXiv 1510.01799; "ghost norms", Li et al., 2022, arXiv 2110.05679). An embedding is a linear layer
on one-hot inputs; the gain of a norm is a diagonal one. A weight that is both embedding and head gets both
contributions and twice their inner product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Tensor = torch.Tensor


@dataclass(frozen=True)
class _Call:
    """One call of a layer: its input, its output, and the gradient of the loss with respect to the output."""

    layer: nn.Module
    x: Tensor
    y: Tensor


class GhostNorms:
    """A model's loss on token ids, differentiated to the norms of each sequence's parameter gradient.

    The forward pass is run once; each call of `squared_norms` is one backward pass to the layers' outputs, without
    the products that form parameter gradients.

    Args:
        model: a Hugging Face causal model in eval mode; any attention implementation.
        ids: token ids [n, L].

    Raises:
        ValueError: if a layer holds parameters of a kind that has no rule here; names it.
    """

    def __init__(self, model: Any, ids: Tensor) -> None:
        self._calls: list[_Call] = []
        self._num = len(ids)
        layers = {name: layer for name, layer in model.named_modules() if any(True for _ in layer.parameters(False))}
        for name, layer in layers.items():
            if _kind(layer) is None:
                raise ValueError(
                    f"no ghost norm for layer {name!r} ({type(layer).__name__}); use per-sequence gradients"
                )
        required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        hooks = [layer.register_forward_hook(self._capture) for layer in layers.values()]
        try:
            # No parameter gradient is asked for: the graph starts at the embeddings' outputs.
            for parameter, _ in required:
                parameter.requires_grad_(False)
            with torch.enable_grad():
                logits = model(input_ids=ids, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
            for parameter, was in required:
                parameter.requires_grad_(was)
        self.logits: Tensor = logits[:, :-1]
        """[n, L - 1, vocabulary]."""
        called = [id(call.layer) for call in self._calls]
        if len(set(called)) != len(called):
            raise ValueError("a layer is called more than once in a forward pass; use per-sequence gradients")

    def _capture(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # Positions are looked up once for all sequences; their gradients must not be summed over these.
        output = output.expand(self._num, *output.shape[1:])
        if not output.requires_grad:
            output.requires_grad_(True)
        self._calls.append(_Call(layer, inputs[0].detach(), output))
        return output

    def squared_norms(self, labels: Tensor, *, last: bool = False) -> Tensor:
        """Squared norm of the gradient of each sequence's summed cross-entropy, over all parameters.

        Args:
            labels: [n, L - 1], what is predicted at each position; -100 is not.
            last: whether the graph may be freed.

        Returns:
            [n], float64.
        """
        loss = F.cross_entropy(self.logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
        gradients = torch.autograd.grad(loss, [call.y for call in self._calls], retain_graph=not last)
        by_weight: dict[int, list[tuple[_Call, Tensor]]] = {}
        total = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
        with torch.no_grad():
            for call, g in zip(self._calls, gradients, strict=True):
                total += _own_terms(call, g)
                by_weight.setdefault(id(call.layer.weight), []).append((call, g))
            for users in by_weight.values():
                if len(users) > 1:
                    total += 2 * _tied_term(users)
        return total


def _kind(layer: nn.Module) -> str | None:
    """Which rule a layer follows."""
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    if isinstance(layer, nn.LayerNorm):
        return "layer_norm"
    if type(layer).__name__ == "Conv1D":  # GPT-2's linear layer, its weight transposed.
        return "linear"
    return "rms_norm" if type(layer).__name__.endswith("RMSNorm") else None


def _own_terms(call: _Call, g: Tensor) -> Tensor:
    """The squared norms of a layer's own weight and bias."""
    kind = _kind(call.layer)
    layer: Any = call.layer
    if kind == "embedding":
        ids = call.x.expand(len(g), -1)
        # A padding row of an embedding is never trained: its gradient is nought.
        if layer.padding_idx is not None:
            g = g * (ids != layer.padding_idx)[..., None]
        same = (ids[:, :, None] == ids[:, None, :]).to(g.dtype)
        return (same * (g @ g.mT)).double().sum(dim=(1, 2))
    if kind == "linear":
        x = call.x
        if x.shape[1] ** 2 <= x.shape[2] * g.shape[2]:
            squares = ((x @ x.mT) * (g @ g.mT)).double().sum(dim=(1, 2))
        else:  # Long sequences of narrow layers: the gradient itself is the smaller thing.
            squares = (x.mT @ g).double().square().sum(dim=(1, 2))
    else:
        squares = (g * _normalised(layer, call.x)).double().sum(dim=1).square().sum(dim=1)
    if getattr(layer, "bias", None) is not None:
        squares = squares + g.double().sum(dim=1).square().sum(dim=1)
    return squares


def _normalised(layer: nn.Module, x: Tensor) -> Tensor:
    """A norm's output before its gain."""
    x = x.float()
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    eps: float = getattr(layer, "variance_epsilon", None) or getattr(layer, "eps", None) or 1e-6
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def _tied_term(users: Sequence[tuple[_Call, Tensor]]) -> Tensor:
    """Inner product of the two contributions to a weight that is both embedding and head, by sequence."""
    kinds = {_kind(call.layer): (call, g) for call, g in users}
    if len(users) != 2 or set(kinds) != {"embedding", "linear"}:
        raise ValueError("a weight is shared in a way other than embedding and head; use per-sequence gradients")
    (lookup, g_in), (head, g_out) = kinds["embedding"], kinds["linear"]
    # sum_{t,s} g_out[s, token_t] (g_in[t] . x[s])
    at_tokens = torch.gather(g_out, 2, lookup.x[:, None, :].expand(-1, g_out.shape[1], -1))
    return (at_tokens * (head.x @ g_in.mT)).double().sum(dim=(1, 2))
