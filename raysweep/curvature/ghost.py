"""Squared norms of per-sequence gradients without forming one: from layers' inputs and their outputs' gradients.

For a linear layer y = W x the gradient of one sequence is G = sum_t g_t x_t', so |G|^2 = sum_{s,t} (g_s.g_t)(x_s.x_t)
(Goodfellow, 2015, arXiv 1510.01799; "ghost norms", Li et al., 2022, arXiv 2110.05679). An embedding is a linear layer
on one-hot inputs; the gain of a norm is a diagonal one. A weight that is both embedding and head gets both
contributions and twice their inner product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from raysweep.curvature.language import Batch, token_logits
from raysweep.curvature.probes import Tensors

Tensor = torch.Tensor


@dataclass(frozen=True)
class _Call:
    """One call of a layer: its input, its output, and the gradient of the loss with respect to the output."""

    layer: nn.Module
    x: Tensor
    y: Tensor


class GhostNorms:
    """A model's logits on a batch, differentiated to the norms of each sequence's parameter gradient.

    The forward pass is run once; each call of `squared_norms` is one backward pass to the layers' outputs, without
    the products that form parameter gradients.

    Args:
        model: a Hugging Face language model in eval mode; any attention implementation.
        batch: see `language`.

    Raises:
        ValueError: if a layer holds parameters of a kind that has no rule here; names it.

    >>> ghost = GhostNorms(model, batch)
    >>> loss_slope = ghost.logits.detach().softmax(dim=-1)
    >>> {len(norms) for norms in ghost.squared_norms(loss_slope).values()} == {len(batch["input_ids"])}
    True
    """

    def __init__(self, model: Any, batch: Batch) -> None:
        self._calls: list[_Call] = []
        self._num = len(batch["input_ids"])
        self._names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
        required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        hooks = [layer.register_forward_hook(self._capture) for layer in _layers(model).values()]
        try:
            # No parameter gradient is asked for: the graph starts at the embeddings' outputs.
            for parameter, _ in required:
                parameter.requires_grad_(False)
            with torch.enable_grad():
                self.logits: Tensor = token_logits(model, batch)
                """[n, T, vocabulary], aligned with `language.targets`."""
        finally:
            for hook in hooks:
                hook.remove()
            for parameter, was in required:
                parameter.requires_grad_(was)
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

    def squared_norms(self, cotangents: Tensor, *, last: bool = False) -> Tensors:
        """Squared norm of each sequence's gradient of <cotangents, logits>, by parameter.

        Args:
            cotangents: like `logits`; the softmax minus the one-hot label for the summed cross-entropy.
            last: whether the graph may be freed.

        Returns:
            name of each parameter that requires a gradient -> [n], float64.
        """
        gradients = torch.autograd.grad(
            self.logits, [call.y for call in self._calls], grad_outputs=cotangents, retain_graph=not last
        )
        squares: Tensors = {}
        by_weight: dict[int, list[tuple[_Call, Tensor]]] = {}

        def add(parameter: Tensor, terms: Callable[[], Tensor]) -> None:
            # Under the parameter's first name, which a tied one has once; frozen ones have none, and cost nothing.
            if (name := self._names.get(id(parameter))) is not None:
                squares[name] = squares[name] + terms() if name in squares else terms()

        with torch.no_grad():
            for call, g in zip(self._calls, gradients, strict=True):
                layer: Any = call.layer
                add(layer.weight, partial(_weight_terms, call, g))
                by_weight.setdefault(id(layer.weight), []).append((call, g))
                if getattr(layer, "bias", None) is not None:
                    add(layer.bias, partial(_bias_terms, g))
            for users in by_weight.values():
                if len(users) > 1:
                    shared: Any = users[0][0].layer
                    add(shared.weight, partial(_tied_terms, users))
        return squares


def _layers(model: Any) -> dict[str, nn.Module]:
    """The layers that hold parameters. Raises ValueError for one of a kind that has no rule."""
    layers = {name: layer for name, layer in model.named_modules() if any(True for _ in layer.parameters(False))}
    ruled = {name: layer for name, layer in layers.items() if _kind(layer)}
    covered = {id(parameter) for layer in ruled.values() for parameter in layer.parameters(False)}
    for name, layer in layers.items():
        # BERT's head registers the bias of its decoder a second time, for itself.
        if name not in ruled and any(id(p) not in covered for p in layer.parameters(False) if p.requires_grad):
            raise ValueError(f"no ghost norm for layer {name!r} ({type(layer).__name__}); use per-sequence gradients")
    return ruled


def _kind(layer: nn.Module) -> str | None:
    """Which rule of `_weight_terms` a layer follows, by its class; None: there is none for it."""
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    if isinstance(layer, nn.LayerNorm):
        return "layer_norm"
    if type(layer).__name__ == "Conv1D":  # GPT-2's linear layer, its weight transposed.
        return "linear"
    return "rms_norm" if type(layer).__name__.endswith("RMSNorm") else None


def _weight_terms(call: _Call, g: Tensor) -> Tensor:
    """The squared norms of a layer's own use of its weight."""
    kind = _kind(call.layer)
    layer: Any = call.layer
    if kind == "embedding":
        ids = call.x.expand(len(g), -1)
        # A padding row of an embedding is never trained: its gradient is 0.
        if layer.padding_idx is not None:
            g = g * (ids != layer.padding_idx)[..., None]
        same = (ids[:, :, None] == ids[:, None, :]).to(g.dtype)
        return (same * (g @ g.mT)).double().sum(dim=(1, 2))
    if kind == "linear":
        x = call.x
        # Gram matrices take T^2 numbers a sequence, the gradient in x out.
        if x.shape[1] ** 2 <= x.shape[2] * g.shape[2]:
            return ((x @ x.mT) * (g @ g.mT)).double().sum(dim=(1, 2))
        # Long sequences of narrow layers: the gradient itself is the smaller thing.
        return (x.mT @ g).double().square().sum(dim=(1, 2))
    return (g * _normalised(layer, call.x)).double().sum(dim=1).square().sum(dim=1)


def _bias_terms(g: Tensor) -> Tensor:
    return g.double().sum(dim=1).square().sum(dim=1)


def _normalised(layer: nn.Module, x: Tensor) -> Tensor:
    """A norm's output before its gain."""
    x = x if x.dtype == torch.float64 else x.float()
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    eps: float = getattr(layer, "variance_epsilon", None) or getattr(layer, "eps", None) or 1e-6
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def _tied_terms(users: Sequence[tuple[_Call, Tensor]]) -> Tensor:
    """Twice the inner product of the two contributions to a weight that is both embedding and head, by sequence."""
    kinds = {_kind(call.layer): (call, g) for call, g in users}
    if len(users) != 2 or set(kinds) != {"embedding", "linear"}:
        raise ValueError("a weight is shared in a way other than embedding and head; use per-sequence gradients")
    (lookup, g_in), (head, g_out) = kinds["embedding"], kinds["linear"]
    embedding: Any = lookup.layer
    if embedding.padding_idx is not None:
        g_in = g_in * (lookup.x != embedding.padding_idx)[..., None]
    # sum_{t,s} g_out[s, token_t] (g_in[t] . x[s])
    at_tokens = torch.gather(g_out, 2, lookup.x[:, None, :].expand(-1, g_out.shape[1], -1))
    products: Tensor = at_tokens * (head.x @ g_in.mT)
    return 2 * products.double().sum(dim=(1, 2))
