"""Curvature of a mean token loss as products with vectors. No matrix is ever formed.

Exact products differentiate twice, here by double backward, in `tangents.py` with forward mode;
`finite_difference_product` takes gradients only, and `differences.py` only forward passes.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from raysweep.curvature.language import IGNORED, Batch, slope, targets, token_logits
from raysweep.curvature.probes import PIECE, Packed, Probe, Tensors
from raysweep.curvature.settings import Distribution

Tensor = torch.Tensor

# Third derivatives of language models are large: a quarter of the textbook's step has a tenth of its error in float32,
# and 5 to 20 % in place of 24 to 78 in bfloat16 (a trained Llama of 5 M parameters, random ones of four styles).
STEP_SHARE = 0.25


def named_parameters(model: torch.nn.Module) -> Tensors:
    """The parameters that require a gradient, each once: tied ones under their first name.

    Raises:
        ValueError: if there is none.

    >>> "lm_head.weight" in named_parameters(model)  # Tied to the embedding.
    False
    """
    chosen: Tensors = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not chosen:
        raise ValueError("no parameter of the model requires a gradient")
    return chosen


def choose_parameters(model: torch.nn.Module, patterns: Sequence[str]) -> None:
    """Let only the parameters whose names match one of `patterns` (as of a shell: *.mlp.*) require a gradient.

    Raises:
        ValueError: if a pattern matches none; names the nearest.

    >>> choose_parameters(model, ["*.0.mlp.*"])
    >>> len(named_parameters(model))
    3
    >>> choose_parameters(model, ["*"])
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
    refuse_infinite(value)
    return every_one(
        torch.autograd.grad(value, list(parameters.values()), create_graph=create_graph, allow_unused=True), parameters
    )


def loss_gradients(model: Any, batch: Batch, parameters: Mapping[str, Tensor]) -> Sequence[Tensor]:
    """Gradients of the mean token loss with their graph; leaner than by `gradients_of`, and so are products from it.

    The slope at the logits is put in as the function of them that it is, in place of the loss.
    """
    logits, labels = token_logits(model, batch), targets(model, batch)
    down = slope(logits.softmax(dim=-1), labels) / (labels != IGNORED).sum()
    if not torch.isfinite(down.sum()):
        raise ValueError("the loss is not finite; curvature needs a finite one")
    found = torch.autograd.grad(
        logits, list(parameters.values()), grad_outputs=down, create_graph=True, allow_unused=True
    )
    return every_one(found, parameters)


def refuse_infinite(loss: Tensor) -> None:
    """Raises ValueError if it is not finite."""
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {loss.item()}; curvature needs a finite one")


def every_one(gradients: Sequence[Tensor | None], parameters: Mapping[str, Tensor]) -> Sequence[Tensor]:
    """The gradients. Raises ValueError if one is missing; names its parameter."""
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            raise ValueError(f"parameter {name!r} takes no part in the loss; leave it out of the parameters")
    return gradients  # type: ignore[return-value]


def hessian_vector_products(
    loss: Callable[[], Tensor], parameters: Mapping[str, Tensor], vectors: Sequence[Mapping[str, Tensor]]
) -> list[Tensors]:
    """Exact Hessian-vector products by double backward; the graph of the gradient is built once for all vectors.

    H v is the gradient of <g, v>, g the gradient with its graph (Pearlmutter, 1994).

    Args:
        loss: a scalar, twice differentiable function of `parameters`.
        parameters: name -> tensor that requires a gradient.
        vectors: each with the names and shapes of `parameters`.

    Returns:
        For each vector, name -> tensor like `parameters`.

    Raises:
        ValueError: if a parameter takes no part in the loss, the loss is not finite, or an operation has no second
            derivative.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> products = hessian_vector_products(lambda: (w**3).sum(), {"w": w}, [{"w": torch.ones(2)}])
    >>> products[0]["w"].tolist()
    [6.0, 12.0]
    """
    return list(each_product(gradients_of(loss(), parameters, create_graph=True), parameters, vectors))


def each_product(
    gradients: Sequence[Tensor], parameters: Mapping[str, Tensor], vectors: Sequence[Mapping[str, Tensor]]
) -> Iterator[Tensors]:
    """The products one by one, so that not all need to be held at once, from gradients with their graph."""
    names, tensors = list(parameters), list(parameters.values())
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
        # Zero is right for a parameter that the loss is linear in; but a graph that was cut looks the same.
        if any(part is None for part in parts):
            _refuse_delayed_errors(gradients)
        yield like(parameters, parts)


def like(parameters: Mapping[str, Tensor], parts: Sequence[Tensor | None]) -> Tensors:
    """Parts by name, in the parameters' order; zeros for what autograd leaves out."""
    return {
        name: torch.zeros_like(parameter) if part is None else part
        for (name, parameter), part in zip(parameters.items(), parts, strict=True)
    }


def _refuse_delayed_errors(gradients: Sequence[Tensor]) -> None:
    """A custom function that is differentiable once cuts the graph: a product through it would be 0, silently."""
    waiting, seen = [gradient.grad_fn for gradient in gradients], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "Error" in node.name():
            raise ValueError("a custom function has no second derivative; use gradient or logit differences")
        waiting.extend(following for following, _ in node.next_functions)


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

    Only gradients are taken, so any attention kernel, gradient checkpointing and autocast will do. The step is
    STEP_SHARE of the one that balances truncation and rounding where derivatives of all orders are alike,
    eps^(1/3) |w| / |v| (Nocedal and Wright, 2006, section 8.1).

    Args:
        loss: a scalar function of `parameters`, which are changed in place and put back.
        parameters: name -> float32 or float64 tensor that requires a gradient.
        vector: with the same names and shapes.
        precision: what the loss is computed in: bfloat16 under autocast.
        check: also take the product with twice the step (4 gradients, not 2). `relative_error` is what that changes:
            three times the error if it is of truncation, 1.1 times if it is of rounding. Otherwise NaN.

    Raises:
        ValueError: if a parameter takes no part in the loss, the loss is not finite, or all parameters or all of the
            vector are 0.

    >>> w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    >>> found = finite_difference_product(lambda: (w**3).sum(), {"w": w}, {"w": torch.ones(2).double()})
    >>> [round(value, 2) for value in found.product["w"].tolist()]
    [6.0, 12.0]
    """
    eps = torch.finfo(precision).eps
    size, length = inner(parameters, parameters), inner(vector, vector)
    if not (size and length):
        raise ValueError(f"no step for differences: |w|^2 of the parameters is {size}, |v|^2 of the vector {length}")
    step = STEP_SHARE * eps ** (1 / 3) * math.sqrt(size / length)
    movable = MovableParameters(parameters, step)

    def product(times: float) -> Tensors:
        with movable.moves() as move:
            move(vector, times)
            ahead = gradients_of(loss(), parameters)
            move(vector, -times)
            behind = gradients_of(loss(), parameters)
        return {name: (a - b).div_(2 * times * step) for name, a, b in zip(parameters, ahead, behind, strict=True)}

    found = product(1)
    if not check:
        return Approximate(found, step, math.nan)
    coarse = product(2)
    off = {name: coarse[name] - part for name, part in found.items()}
    return Approximate(found, step, math.sqrt(inner(off, off) / inner(found, found)))


class MovableParameters:
    """Parameters that can be moved along a vector; their own values are never written to.

    A moved parameter has its values in other memory, taken while it is moved: as much as all parameters take, to both
    sides twice that. Of small ones on a CPU a copy is kept from the first `sides` on, so the weights are not to be
    trained meanwhile.

    Args:
        parameters: name -> tensor, whose `data` is exchanged.
        step: the unit in which they are moved.
    """

    def __init__(self, parameters: Mapping[str, Tensor], step: float) -> None:
        self._parameters = parameters
        self._home = {name: parameter.detach() for name, parameter in parameters.items()}
        self.step = step

    @property
    def rms(self) -> float:
        """Root mean square of the parameters."""
        return math.sqrt(inner(self._home, self._home) / sum(home.numel() for home in self._home.values()))

    def gradients(self, loss: Tensor) -> Tensors:
        """Of a scalar, by name; see `gradients_of`."""
        return dict(zip(self._parameters, gradients_of(loss, self._parameters), strict=True))

    def probe(self, *, seed: int, probe: int, distribution: Distribution = "rademacher") -> Mapping[str, Tensor]:
        """A probe vector to move along, drawn anew whenever it is read; see `probes.Probe`."""
        return Probe(self._home, seed=seed, probe=probe, distribution=distribution)

    @contextlib.contextmanager
    def moves(self) -> Iterator[Callable[[Mapping[str, Tensor], float], None]]:
        """While in it, `move(vector, times)` makes the parameters w + times * step * vector, wherever they were."""
        moved = {name: torch.empty_like(home) for name, home in self._home.items()}

        def move(vector: Mapping[str, Tensor], times: float) -> None:
            for name, home in self._home.items():
                torch.add(home, vector[name], alpha=times * self.step, out=moved[name])
            self._take(moved)

        try:
            yield move
        finally:
            self._take(self._home)

    @contextlib.contextmanager
    def sides(
        self, vector: Mapping[str, Tensor], times: float
    ) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
        """While in it, the first of two makes the parameters w + times * step * vector, the second w - ...

        Both are written at once, piece by piece where the vector is drawn so: of a small model on a short sequence,
        writing and reading what is as large as the weights takes as long as a forward pass. So does what each of many
        small parameters costs beside its entries, so those of a CPU are written side by side.
        """
        ahead: Tensors = {}
        behind: Tensors = {}
        shift = times * self.step
        if isinstance(vector, Probe) and vector.has_signs and (small := self._small):
            flat = [small.home, torch.empty_like(small.home), torch.empty_like(small.home)]
            _write_sides(flat, vector.pieces_of(small), shift)
            ahead, behind = (small.views(side) for side in flat[1:])
        for name, home in self._home.items():
            if name not in ahead:
                ahead[name], behind[name] = torch.empty_like(home), torch.empty_like(home)
                pieces = vector.pieces(name) if isinstance(vector, Probe) else [vector[name].view(-1)]
                _write_sides([each.view(-1) for each in (home, ahead[name], behind[name])], pieces, shift)
        try:
            yield partial(self._take, ahead), partial(self._take, behind)
        finally:
            self._take(self._home)

    @cached_property
    def _small(self) -> Packed | None:
        """A copy of those of at most a piece, of the first one's dtype; None: there are none, or they are on a GPU."""
        on_cpu = {name: home for name, home in self._home.items() if home.device.type == "cpu"}
        dtype = next((home.dtype for home in on_cpu.values()), None)
        small = {name: home for name, home in on_cpu.items() if home.numel() <= PIECE and home.dtype == dtype}
        return Packed(small) if small else None

    def _take(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.data = values[name]


def _write_sides(flat: Sequence[Tensor], pieces: Iterable[Tensor], shift: float) -> None:
    """Write the second of three flat tensors as the first + shift * pieces, the third as the first - ..."""
    start = 0
    for part in pieces:
        here, there, back = (whole[start : start + len(part)] for whole in flat)
        torch.add(here, part, alpha=shift, out=there)
        torch.add(here, part, alpha=-shift, out=back)
        start += len(part)


def inner(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Inner product over all parts, accumulated in float64."""
    return math.fsum(float((left[name] * right[name].detach()).sum(dtype=torch.float64)) for name in left)
