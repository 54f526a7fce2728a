"""The output layer's own block of the Hessian in closed form, so that probes are of all the rest alone.

Logits are z = U h + b of the last states h, so that  Tr H  is the sum of three:

- Tr of the block of U and b: sum over tokens of (|h|^2 + 1)(1 - |p|^2), exactly (1 for b); z is linear in them.
- Tr of the block of all other weights: E v'Hv, where v moves h alone. With h' and h'' along v, v'Gv = Var_p(U h') and
  v'(H - G)v = <U'(p - e_y), h''>.
- where U is the input's embedding, too, twice the trace of the block between its two uses: E of
  Cov_p(U h', V h) + <p - e_y, V h'>, V having v's signs of the tokens that are there.

A probe of all weights has the terms between U and the rest as well. Their mean is 0, but with a model that has learnt
little more than how frequent tokens are they are nearly all of its variance.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from raysweep.curvature.differences import Forms, longest_step
from raysweep.curvature.language import IGNORED, Batch, is_causal, predicting_logits, targets
from raysweep.curvature.operators import MovableParameters, named_parameters
from raysweep.curvature.probes import Probe, Tensors, key
from raysweep.curvature.settings import Distribution
from raysweep.objectives.inputs import model_inputs

logger = logging.getLogger(__name__)

Tensor = torch.Tensor

# Where the block between the two uses of a tied matrix takes a forward pass of its own, it is next to nothing: one
# batch of so many speaks for all of them.
EVERY = 4
MUCH_LESS = 0.03
# By how much logits made of the states may differ from the model's own, relative to the largest: rounding.
AGREES = 1e-4


@dataclass(frozen=True)
class OutputLayer:
    """A model's output layer, and the measured parameters beside it; see `of`."""

    layer: torch.nn.Linear
    rest: Tensors
    """Those that are moved: not the layer's own, nor its matrix where that is the input's embedding, too."""
    embedding: torch.nn.Embedding | None
    """The input's, if it has the layer's matrix, and that is measured."""
    name: str
    """Of that matrix."""
    uses: Literal["apart", "along"] = "along"
    """How the block between that matrix's two uses is measured: `apart` takes a pass of its own, on one batch of
    `EVERY`; `along` none, but the signs of all other weights are in it. See `given`."""

    @staticmethod
    @torch.no_grad()
    def of(model: Any, batch: Batch) -> OutputLayer | None:
        """None for a model whose logits are not a linear layer's, or that uses its matrix in other ways.

        Args:
            model: see `language.prepare`.
            batch: on which that is tried.
        """
        found = OutputLayer._linear(model)
        if found is None or not found._makes_the_logits_of(model, batch):
            logger.info("%s's logits are not its output layer's alone: all weights are probed", type(model).__name__)
            return None
        return found

    @staticmethod
    def _linear(model: Any) -> OutputLayer | None:
        """What makes the logits if these are the product with its output embeddings; None if they cannot be."""
        layer, measured = model.get_output_embeddings(), named_parameters(model)
        if type(layer) is not torch.nn.Linear:
            return None
        names = {id(parameter): name for name, parameter in measured.items()}
        rest = {name: part for name, part in measured.items() if all(part is not own for own in layer.parameters())}
        users = [
            module for module in model.modules() if any(part is layer.weight for part in module._parameters.values())
        ]
        try:
            lookup = model.get_input_embeddings()
        except NotImplementedError:  # transformers' word for a model of another kind.
            return None
        if not rest or any(user not in (layer, lookup) for user in users):
            return None
        name = names.get(id(layer.weight), "")
        return OutputLayer(layer, rest, lookup if name and lookup in users else None, name)

    def probe(self, *, seed: int, probe: int, distribution: Distribution) -> Probe:
        """As `MovableParameters.probe` of the rest, with entries of a matrix that is the input's, too."""
        also = {} if self.embedding is None else {self.name: self.layer.weight.detach()}
        return Probe(self.rest | also, seed=seed, probe=probe, distribution=distribution)

    def states(self, model: Any, batch: Batch) -> Tensor:
        """What the layer reads at the m positions that predict a token [m, width]; of size 0 if it reads others."""
        rows, columns = (targets(model, batch) != IGNORED).nonzero(as_tuple=True)
        read: list[Tensor] = []

        def pick(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if inputs[0].shape[:-1] != batch["input_ids"].shape:
                return inputs
            read.append(inputs[0][rows, columns])
            # What is needed of its product is made elsewhere.
            return (inputs[0][:1, :1], *inputs[1:])

        handle = self.layer.register_forward_pre_hook(pick)
        try:
            model(**model_inputs(model, batch), **({"use_cache": False} if is_causal(model) else {}))
        finally:
            handle.remove()
        return read[0] if len(read) == 1 else torch.empty(0)

    @contextlib.contextmanager
    def embedding_moved(self, by: Tensor | None, shift: float) -> Iterator[None]:
        """While in it, the input's embeddings are theirs + shift * `by` [n, L, width]; nothing is moved by None."""
        if self.embedding is None or by is None:
            yield
            return
        handle = self.embedding.register_forward_hook(lambda module, inputs, output: output.add(by, alpha=shift))
        try:
            yield
        finally:
            handle.remove()

    def given(self, response: Mapping[str, float]) -> OutputLayer:
        """With the block between the two uses measured as is cheaper, told by `response_beside` on a first batch.

        `along` makes it as noisy as a probe of all weights is there, `apart` takes 8 % longer. In a model that has
        learnt from context both add about as much; where the input matters little, `along` is most of the variance.
        """
        is_small = self.embedding is not None and abs(response["apart"]) < MUCH_LESS * abs(response["along"])
        return replace(self, uses="apart" if is_small else "along")

    def is_chosen(self, batch: int, *, seed: int) -> bool:
        """Whether that block is measured on a batch in a pass of its own: on one of `EVERY`, drawn at random."""
        part, place = divmod(batch, EVERY)
        return self.uses == "apart" and key(seed, "between", part) % EVERY == place

    def _makes_the_logits_of(self, model: Any, batch: Batch) -> bool:
        looked_up: list[bool] = []

        def look(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            looked_up.append(inputs[0].shape == batch["input_ids"].shape and output.equal(module.weight[inputs[0]]))

        handle = self.embedding.register_forward_hook(look) if self.embedding is not None else None
        # Where all other weights have moved: a bias behind the layer may be 0 at home, or a scale 1.
        movable = MovableParameters(self.rest, 1.0)
        movable.step = movable.rms
        try:
            with movable.moves() as move:
                move(movable.probe(seed=0, probe=0), 1)
                return self._agrees(model, batch) and (handle is None or looked_up == [True])
        finally:
            if handle is not None:
                handle.remove()

    def _agrees(self, model: Any, batch: Batch) -> bool:
        """Whether the model's logits are the layer's product with what it reads, where all weights are now."""
        rows, columns = (targets(model, batch) != IGNORED).nonzero(as_tuple=True)
        read: list[Tensor] = []
        # Before the positions that predict a token are picked: what `states` reads.
        handle = self.layer.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
        try:
            theirs = predicting_logits(model, batch)[0]
        finally:
            handle.remove()
        if [states.shape[:-1] for states in read] != [batch["input_ids"].shape]:
            return False
        ours = F.linear(read[0][rows, columns], self.layer.weight, self.layer.bias)
        return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= AGREES * theirs.abs().max())


@torch.no_grad()
def response_beside(
    output: OutputLayer,
    model: Any,
    batch: Batch,
    vector: Probe,
    movable: MovableParameters,
    *,
    here: Tensor | None = None,
) -> dict[str, float]:
    """`gauss_newton` v'Gv of the rest, about, as `differences.logit_response`; and what `OutputLayer.given` goes by.

    Those are `along` and `apart`: the block between a tied matrix's two uses by a probe's own passes, and by one where
    the input's embeddings alone are moved.
    """
    movable.step = longest_step(movable)
    at = _At.of(output, model, batch, vector, here)
    with movable.moves() as move:
        move(vector, 1)
        along = at.changes(movable.step)
    values = {"gauss_newton": at.variance(at.centred(along)) / movable.step**2}
    if output.embedding is not None:
        changes = {"along": along, "apart": at.changes(movable.step)}
        values |= {name: at.between(each, at.centred(each), movable.step).sum for name, each in changes.items()}
    return values


@torch.no_grad()
def forms_beside(
    output: OutputLayer,
    model: Any,
    batch: Batch,
    vector: Probe,
    movable: MovableParameters,
    *,
    is_chosen: bool,
    check: bool = False,
    here: Tensor | None = None,
) -> tuple[Forms, Forms | None]:
    """Both forms, their mean the traces of the whole matrices, with the output layer's part in closed form.

    Args:
        output: the model's.
        model, batch, check: see `differences.quadratic_forms`.
        vector: `output.probe`.
        movable: of `output.rest`, and the step.
        is_chosen: see `OutputLayer.is_chosen`.
        here: `output.states` at the weights, where an earlier probe of the batch has made them already.

    Returns:
        The forms with the step, and with twice the step if `check`.
    """
    at = _At.of(output, model, batch, vector, here)
    own, pulled = at.own, at.mean_row - output.layer.weight[at.labels]

    def forms(times: int) -> Forms:
        step = times * movable.step
        with movable.sides(vector, times) as (go_ahead, go_behind):
            go_ahead()
            ahead = at.changes(step)
            go_behind()
            behind = at.changes(-step)
        residual = _total(pulled * (ahead + behind)) / step**2
        both = ahead.sub_(behind)
        centred = at.centred(both)
        found = Forms(own + at.variance(centred) / (2 * step) ** 2, residual)
        is_along = at.of_text is not None and output.uses == "along"
        return found + at.between(both, centred, 2 * step) if is_along else found

    found = forms(1), forms(2) if check else None
    if not is_chosen:
        return found
    # A step to one side will do: what it is wrong by is odd in the signs, so that its mean is 0.
    changes = at.changes(movable.step)
    apart = at.between(changes, at.centred(changes), movable.step / EVERY)
    return found[0] + apart, found[1] and found[1] + apart


@dataclass(frozen=True)
class _At:
    """A batch at the weights, and along a vector."""

    output: OutputLayer
    model: Any
    batch: Batch
    vector: Probe
    here: Tensor
    """States [m, width]."""
    p: Tensor
    mean_row: Tensor
    """Of the layer's matrix, by p [m, width]; less that of the label it is the slope of the loss by the states."""
    labels: Tensor
    of_text: Tensor | None
    """The vector's entries at the input's embeddings [n, L, width], of a matrix that is the output layer's, too."""

    @staticmethod
    def of(output: OutputLayer, model: Any, batch: Batch, vector: Probe, here: Tensor | None) -> _At:
        here = output.states(model, batch) if here is None else here
        labels, ids = targets(model, batch), batch["input_ids"]
        p = F.linear(here, output.layer.weight, output.layer.bias).softmax(dim=-1)
        of_text = None
        if output.embedding is not None:
            of_text = vector.rows(output.name, ids.flatten()).view(*ids.shape, -1)
        return _At(output, model, batch, vector, here, p, p @ output.layer.weight, labels[labels != IGNORED], of_text)

    @property
    def own(self) -> float:
        """Trace of the block of the layer's measured parameters, summed over tokens; all of it is Gauss-Newton."""
        weight, bias = self.output.layer.weight, self.output.layer.bias
        sizes = weight.requires_grad * torch.linalg.vecdot(self.here, self.here)
        sizes = sizes + (bias is not None and bias.requires_grad)
        return _total(sizes * (1 - torch.linalg.vecdot(self.p, self.p)))

    def changes(self, shift: float) -> Tensor:
        """Of the states, with the input's embeddings so far along the vector and other weights where they are."""
        with self.output.embedding_moved(self.of_text, shift):
            return self.output.states(self.model, self.batch).sub_(self.here)

    def centred(self, changes: Tensor) -> Tensor:
        """Changes of logits that follow from those of states, less their mean by p."""
        logits = changes @ self.output.layer.weight.T
        return logits.sub_(torch.linalg.vecdot(self.mean_row, changes)[:, None])

    def variance(self, centred: Tensor) -> float:
        """Var_p of changes of logits, summed over tokens."""
        return _total(torch.linalg.vecdot(self.p, centred.square()))

    def between(self, changes: Tensor, centred: Tensor, step: float) -> Forms:
        """Twice the form between the matrix at the input, by which states and logits so change, and at the output."""
        ids = self.batch["input_ids"]
        # Other rows than those of the text's tokens do nothing at the input.
        tokens = torch.from_numpy(np.unique(ids.cpu().numpy())).to(ids.device)
        signs = self.vector.rows(self.output.name, tokens)
        p = self.p[:, tokens]
        gauss_newton = _total(p * centred[:, tokens] * (self.here @ signs.T))
        residual = _total((p - (self.labels[:, None] == tokens).to(p.dtype)) * (changes @ signs.T))
        return Forms(2 * gauss_newton / step, 2 * residual / step)


def _total(parts: Tensor) -> float:
    return float(parts.sum(dtype=torch.float64))
