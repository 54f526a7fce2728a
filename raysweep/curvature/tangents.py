"""Exact products by forward-mode differentiation: tangents along v are computed beside values.

The slope of the loss along v is phi = <p - y, J v> / tokens, with J v the tangents of the logits. Its gradient is H v:
reverse over forward mode, the cheapest exact product of a single vector, as no parameter gradient is formed that is
not needed (8 matrix products a layer, against 9 of double backward and 3 of a gradient).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from raysweep.curvature.language import IGNORED, Batch, mean_token_loss, targets, token_logits
from raysweep.curvature.operators import gradients_of, like, named_parameters
from raysweep.curvature.probes import Tensors

Tensor = torch.Tensor


def logits_derivative(model: Any, batch: Batch, vector: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits [n, T, vocabulary] and J v, their derivative along `vector`, in one forward pass.

    Both are functions of the parameters that can be differentiated, unless gradients are off.

    Raises:
        ValueError: if an operation has no forward mode.
    """
    parameters = named_parameters(model)
    with _forward_mode(_Twice()):
        duals = {f"model.{name}": _dual(parameter, vector[name]) for name, parameter in parameters.items()}
        primal, tangent = _parts(functional_call(_Whole(model, token_logits), duals, (batch,)))
    return primal, torch.zeros_like(primal) if tangent is None else tangent


def reverse_over_forward_product(
    model: Any, batch: Batch, vector: Mapping[str, Tensor]
) -> tuple[Tensors, Tensor, Tensor]:
    """One exact Hessian-vector product of the mean token loss, beside the logits and J v.

    The gradient of phi = <p - y, J v> / tokens, J v by forward mode; see the module.

    Args:
        model: brought into shape by `language.prepare`.
        batch: see `language`.
        vector: name -> tensor like the parameters.

    Returns:
        H v by name; logits and J v [n, T, vocabulary].

    Raises:
        ValueError: if an operation has no forward mode, or the loss is not finite.

    >>> vector = probe_vector(named_parameters(model), seed=0, probe=0)
    >>> product, logits, along = reverse_over_forward_product(model, batch, vector)
    >>> product.keys() == vector.keys(), logits.shape == along.shape
    (True, True)
    """
    parameters = named_parameters(model)
    logits, along = logits_derivative(model, batch, vector)
    labels = targets(model, batch)
    counted = labels != IGNORED
    of_label = along.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    slopes = ((logits.softmax(dim=-1) * along).sum(dim=-1) - of_label)[counted]
    # Outside of the dual level: inside it, the gradient too would be computed with tangents.
    parts = gradients_of(slopes.sum() / counted.sum(), parameters)
    return dict(zip(parameters, parts, strict=True)), logits.detach(), along.detach()


def forward_over_reverse_product(model: Any, batch: Batch, vector: Mapping[str, Tensor]) -> Tensors:
    """One exact Hessian-vector product of the mean token loss: a gradient, differentiated in forward mode.

    Args:
        model: brought into shape by `language.prepare`.
        batch: see `language`.
        vector: name -> tensor like the parameters.

    Raises:
        ValueError: if an operation's gradient cannot be differentiated in forward mode.

    >>> vector = probe_vector(named_parameters(model), seed=0, probe=0)
    >>> ours = forward_over_reverse_product(model, batch, vector)
    >>> theirs, _, _ = reverse_over_forward_product(model, batch, vector)
    >>> all(torch.allclose(ours[name], part, atol=1e-4) for name, part in theirs.items())
    True
    """
    parameters = named_parameters(model)
    with _forward_mode(_Composed()):
        duals = {
            name: _dual(parameter.detach().requires_grad_(), vector[name]) for name, parameter in parameters.items()
        }
        given = {f"model.{name}": dual for name, dual in duals.items()}
        gradients = gradients_of(functional_call(_Whole(model, mean_token_loss), given, (batch,)), duals)
        tangents = [_parts(gradient).tangent for gradient in gradients]
        return like(parameters, [tangent if tangent is None else tangent.detach() for tangent in tangents])


def gauss_newton_product(model: Any, batch: Batch, vector: Mapping[str, Tensor]) -> Tensors:
    """Product with the Gauss-Newton matrix of the mean token loss, J' (diag(p) - p p') J v averaged over tokens.

    Args:
        model: brought into shape by `language.prepare`.
        batch: see `language`.
        vector: name -> tensor like the parameters.

    Raises:
        ValueError: if an operation has no forward mode.

    >>> vector = probe_vector(named_parameters(model), seed=0, probe=0)
    >>> product = gauss_newton_product(model, batch, vector)
    >>> sum(float((vector[name] * part).sum()) for name, part in product.items()) > 0  # It is positive semidefinite.
    True
    """
    parameters = named_parameters(model)
    logits, along = logits_derivative(model, batch, vector)
    with torch.no_grad():
        counted = targets(model, batch) != IGNORED
        p = logits.softmax(dim=-1)
        cotangent = p * (along - (p * along).sum(dim=-1, keepdim=True)) * counted[..., None] / counted.sum()
    parts = torch.autograd.grad(logits, list(parameters.values()), grad_outputs=cotangent, allow_unused=True)
    return like(parameters, parts)


@contextlib.contextmanager
def _forward_mode(functions: TorchFunctionMode) -> Iterator[None]:
    try:
        with forward_ad.dual_level(), functions:
            yield
    except NotImplementedError as error:
        raise ValueError(
            f"an operation has no forward mode ({error}); use double backward, or gradient or logit differences"
        ) from error


class _Composed(TorchFunctionMode):
    """SiLU from what has a forward mode: the fused kernel's gradient has none."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.silu:
            return args[0] * torch.sigmoid(args[0])
        return function(*args, **kwargs or {})


class _Twice(_Composed):
    """Also functions whose tangents cannot be differentiated again, or not rightly, as they are in torch 2.13."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.layer_norm:
            return _layer_norm(*args, **kwargs)
        if function is F.softmax:
            return _softmax(*args, **kwargs)
        if function in _OF_TWO and len(args) == 2 and not kwargs:
            return _of_two(_OF_TWO[function], *args)
        return super().__torch_function__(function, types, args, kwargs)


def _layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """The gradient of the fused kernel's tangents is wrong, without an error."""
    axes = tuple(range(-len(shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    normal = centred * torch.rsqrt(_of_two(torch.add, centred.square().mean(axes, keepdim=True), eps))
    scaled = normal if weight is None else normal * weight
    return scaled if bias is None else scaled + bias


def _softmax(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The kernel's tangents are made in place, which cannot be differentiated."""
    primal, tangent = _parts(x)
    y = F.softmax(primal, *args, **kwargs)
    if tangent is None:
        return y
    dim = kwargs.get("dim", args[0] if args else -1)
    tangent = tangent.to(y.dtype)
    return _dual(y, y * (tangent - (y * tangent).sum(dim, keepdim=True)))


_OF_TWO = {
    torch.mul: torch.mul,
    torch.Tensor.mul: torch.mul,
    torch.add: torch.add,
    torch.Tensor.add: torch.add,
}


def _of_two(function: Any, left: Any, right: Any) -> Tensor:
    """A product or a sum, to the bit as torch's.

    Where one of the two has no tangent, torch makes one of zeros, by a detour through Python of 0.3 to 0.9 ms.
    """
    either: list[tuple[Any, Any]] = [
        _parts(each) if isinstance(each, Tensor) else (each, None) for each in (left, right)
    ]
    (a, of_a), (b, of_b) = either
    if (of_a is None) == (of_b is None):
        return function(left, right)  # type: ignore[no-any-return]
    made = function(a, b)
    if function is torch.mul:
        tangent = a * of_b if of_a is None else of_a * b
    else:
        tangent = (of_a if of_b is None else of_b).expand_as(made)
    return _dual(made, tangent.to(made.dtype))


def _dual(primal: Tensor, tangent: Tensor) -> Tensor:
    made: Tensor = forward_ad.make_dual(primal, tangent)  # type: ignore[no-untyped-call]
    return made


def _parts(dual: Tensor) -> Any:
    return forward_ad.unpack_dual(dual)  # type: ignore[no-untyped-call]


class _Whole(torch.nn.Module):
    """A function of a model and a batch as a module, for `functional_call`."""

    def __init__(self, model: Any, function: Callable[[Any, Batch], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._function = function
        self.training = model.training

    def forward(self, batch: Batch) -> Tensor:
        return self._function(self.model, batch)
