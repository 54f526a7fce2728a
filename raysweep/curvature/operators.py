"""Curvature of a mean token loss as products with vectors. No matrix is ever formed.

Exact products differentiate twice, by double backward or forward over reverse; `finite_difference_product` takes
gradients only, and `differences.py` only forward passes.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call

from raysweep.curvature.language import IGNORED, Batch, mean_token_loss, targets, token_logits
from raysweep.curvature.probes import Tensors

Tensor = torch.Tensor


def named_parameters(model: torch.nn.Module) -> Tensors:
    """The parameters that require a gradient, each once: tied ones under their first name.

    Raises:
        ValueError: if there is none.
    """
    chosen: Tensors = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not chosen:
        raise ValueError("no parameter of the model requires a gradient")
    return chosen


def choose_parameters(model: torch.nn.Module, patterns: Sequence[str]) -> None:
    """Let only the parameters whose names match one of `patterns` (as of a shell: *.mlp.*) require a gradient.

    Raises:
        ValueError: if a pattern matches none; names the nearest.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            raise ValueError(f"no parameter matches {pattern!r}; the nearest name is {near[0]!r}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def gradients_of(value: Tensor, parameters: Mapping[str, Tensor], *, create_graph: bool = False) -> Sequence[Tensor]:
    """Gradients of a scalar. Raises ValueError if it is not finite, or a parameter takes no part in it."""
    if not torch.isfinite(value):
        raise ValueError(f"the loss is {value.item()}; curvature needs a finite one")
    gradients = torch.autograd.grad(value, list(parameters.values()), create_graph=create_graph, allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            raise ValueError(f"parameter {name!r} takes no part in the loss; leave it out of the parameters")
    return gradients


def hessian_vector_products(
    loss: Callable[[], Tensor], parameters: Mapping[str, Tensor], vectors: Sequence[Mapping[str, Tensor]]
) -> list[Tensors]:
    """Exact Hessian-vector products by double backward; the graph of the gradient is built once for all vectors.

    Args:
        loss: a scalar, twice differentiable function of `parameters`.
        parameters: name -> tensor that requires a gradient.
        vectors: each with the names and shapes of `parameters`.

    Returns:
        For each vector, name -> tensor like `parameters`.

    Raises:
        ValueError: if a parameter takes no part in the loss, the loss is not finite, or an operation has no second
            derivative.
    """
    names, tensors = list(parameters), list(parameters.values())
    gradients = gradients_of(loss(), parameters, create_graph=True)
    products = []
    for index, vector in enumerate(vectors):
        try:
            parts = torch.autograd.grad(
                gradients,
                tensors,
                grad_outputs=[vector[name] for name in names],
                retain_graph=index < len(vectors) - 1,
                allow_unused=True,
            )
        except RuntimeError as error:
            raise ValueError(
                f"an operation has no second derivative ({error}); use gradient or logit differences"
            ) from error
        if any(part is None for part in parts):
            _refuse_delayed_errors(gradients)
        products.append(
            {
                name: torch.zeros_like(tensor) if part is None else part
                for name, tensor, part in zip(names, tensors, parts, strict=True)
            }
        )
    return products


def _refuse_delayed_errors(gradients: Sequence[Tensor]) -> None:
    """A custom function that is differentiable once cuts the graph: a product through it would be nought, silently."""
    waiting, seen = [gradient.grad_fn for gradient in gradients], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "Error" in node.name():
            raise ValueError("a custom function has no second derivative; use gradient or logit differences")
        waiting.extend(following for following, _ in node.next_functions)


def forward_over_reverse_product(model: Any, batch: Batch, vector: Mapping[str, Tensor]) -> Tensors:
    """One exact Hessian-vector product of the mean token loss: a gradient, differentiated in forward mode.

    Its graph is freed as it is walked, so it holds less than `hessian_vector_products`, which is as fast for one
    vector and faster for several.

    Raises:
        ValueError: if an operation's gradient cannot be differentiated in forward mode.
    """
    parameters = named_parameters(model)
    with _composed_silu(model), forward_ad.dual_level():
        duals = {
            name: _dual(parameter.detach().requires_grad_(), vector[name]) for name, parameter in parameters.items()
        }
        try:
            loss = functional_call(
                _Whole(model, mean_token_loss), {f"model.{k}": v for k, v in duals.items()}, (batch,)
            )
            gradients = gradients_of(loss, duals)
        except NotImplementedError as error:
            raise ValueError(f"no forward mode for a gradient here ({error}); use double backward") from error
        tangents = [_parts(gradient).tangent for gradient in gradients]
        return {
            name: torch.zeros_like(parameter) if tangent is None else tangent.detach()
            for (name, parameter), tangent in zip(parameters.items(), tangents, strict=True)
        }


@contextlib.contextmanager
def _composed_silu(model: torch.nn.Module) -> Iterator[None]:
    """While in it, SiLU is x sigmoid(x): the fused kernel's gradient has no forward mode."""
    layers = [module for module in model.modules() if type(module).__name__ in ("SiLU", "SiLUActivation")]
    for layer in layers:
        layer.forward = lambda x: x * torch.sigmoid(x)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@dataclass(frozen=True)
class Approximate:
    """A product by finite differences, the step it was made with, and an estimate of its relative error."""

    product: Tensors
    step: float
    relative_error: float


def finite_difference_product(
    loss: Callable[[], Tensor],
    parameters: Mapping[str, Tensor],
    vector: Mapping[str, Tensor],
    *,
    precision: torch.dtype = torch.float32,
    check: bool = False,
) -> Approximate:
    """Hessian-vector product by central differences of the gradient: (g(w + h v) - g(w - h v)) / 2h.

    Only gradients are taken, so any attention kernel, gradient checkpointing and autocast will do. The step is the
    one that balances truncation and rounding, eps^(1/3) |w| / |v| (Nocedal and Wright, 2006, section 8.1).

    Args:
        loss: a scalar function of `parameters`, which are changed in place and put back.
        parameters: name -> float32 or float64 tensor that requires a gradient.
        vector: with the same names and shapes.
        precision: what the loss is computed in: bfloat16 under autocast.
        check: also take the product with twice the step, from which the error is estimated (4 gradients, not 2).
            Otherwise `relative_error` is NaN.

    Raises:
        ValueError: if a parameter takes no part in the loss, or the loss is not finite.
    """
    eps = torch.finfo(precision).eps
    step = eps ** (1 / 3) * math.sqrt(inner(parameters, parameters) / inner(vector, vector))
    shifted = Shifted(parameters, step)

    def product(times: float) -> Tensors:
        with shifted.by(vector, times):
            ahead = gradients_of(loss(), parameters)
        with shifted.by(vector, -times):
            behind = gradients_of(loss(), parameters)
        return {name: (a - b) / (2 * times * step) for name, a, b in zip(parameters, ahead, behind, strict=True)}

    found = product(1)
    if not check:
        return Approximate(found, step, math.nan)
    # The error grows as the square of the step, so it is a third of the difference.
    coarse = product(2)
    off = {name: (coarse[name] - part) / 3 for name, part in found.items()}
    return Approximate(found, step, math.sqrt(inner(off, off) / inner(found, found)))


class Shifted:
    """Parameters that can be moved along a vector and are put back to the bit; keeps one copy of them.

    Args:
        parameters: name -> tensor, changed in place.
        step: the unit in which they are moved.
    """

    def __init__(self, parameters: Mapping[str, Tensor], step: float) -> None:
        self._parameters = parameters
        self._home = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.step = step
        num = sum(parameter.numel() for parameter in parameters.values())
        self.rms = math.sqrt(inner(self._home, self._home) / num)
        """Root mean square of the parameters."""

    @contextlib.contextmanager
    def by(self, vector: Mapping[str, Tensor], times: float) -> Iterator[None]:
        """While in it, the parameters are w + times * step * vector."""
        try:
            for name, parameter in self._parameters.items():
                torch.add(self._home[name], vector[name], alpha=times * self.step, out=parameter.data)
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data.copy_(self._home[name])


def logits_derivative(model: Any, batch: Batch, vector: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits [n, T, vocabulary] and J v, their derivative along `vector`, in one forward pass of dual numbers."""
    parameters = named_parameters(model)
    with torch.no_grad(), forward_ad.dual_level():
        duals = {f"model.{name}": _dual(p.detach(), vector[name]) for name, p in parameters.items()}
        primal, tangent = _parts(functional_call(_Whole(model, token_logits), duals, (batch,)))
        return primal, torch.zeros_like(primal) if tangent is None else tangent


def gauss_newton_product(model: Any, batch: Batch, vector: Mapping[str, Tensor]) -> Tensors:
    """Product with the Gauss-Newton matrix of the mean token loss, J' (diag(p) - p p') J v averaged over tokens."""
    parameters = named_parameters(model)
    logits, along = logits_derivative(model, batch, vector)
    counted = targets(model, batch) != IGNORED
    p = logits.softmax(dim=-1)
    cotangent = p * (along - (p * along).sum(dim=-1, keepdim=True)) * counted[..., None] / counted.sum()
    parts = torch.autograd.grad(
        token_logits(model, batch), list(parameters.values()), grad_outputs=cotangent, allow_unused=True
    )
    return {
        name: torch.zeros_like(parameter) if part is None else part
        for (name, parameter), part in zip(parameters.items(), parts, strict=True)
    }


def _dual(primal: Tensor, tangent: Tensor) -> Tensor:
    made: Tensor = forward_ad.make_dual(primal, tangent)  # type: ignore[no-untyped-call]
    return made


def _parts(dual: Tensor) -> Any:
    return forward_ad.unpack_dual(dual)  # type: ignore[no-untyped-call]


def inner(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Inner product over all parts, accumulated in float64."""
    return float(sum((left[name].detach().double() * right[name].detach().double()).sum() for name in left))


class _Whole(torch.nn.Module):
    """A function of a model and a batch as a module, for `functional_call`."""

    def __init__(self, model: Any, function: Callable[[Any, Batch], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._function = function
        self.training = model.training

    def forward(self, batch: Batch) -> Tensor:
        return self._function(self.model, batch)
