"""How a gradient step is taken: plain torch in one process, here, or DeepSpeed on a gang: `deepspeed_engine.py`.

Both take weights that are the same on every rank, and give losses and full weights back; `loop.py` drives them. A step
is `accumulate`, then `apply`; or where it takes gradients at several weights, as in `ascent.py`, `accumulate` and
`take` for each of them, then `step`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from raysweep.objectives.base import LearningLoss, Loss
from raysweep.train.optimizers import Optimizer
from raysweep.train.saved_state import Range, SavedState, Stepped, ranges_of
from raysweep.worker import Worker

Batch = Mapping[str, torch.Tensor]
Tensors = dict[str, torch.Tensor]

LossSum = Callable[[torch.nn.Module, Batch], torch.Tensor]
"""See `Loss.loss_sum`."""

Mean = Callable[[Mapping[str, torch.Tensor]], torch.Tensor | None]
"""Of the optimizer's states of a weight, an average of its values; None: there is none yet."""


class Rates:
    """The learning rates of an optimizer's groups, which keep their ratios as a schedule goes."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # The groups themselves: ZeRO puts its partitions into them, and steps this optimizer.
        self._groups = optimizer.param_groups
        self._peaks = [group["lr"] for group in self._groups]

    def set(self, multiplier: float) -> None:
        """Each group's rate is its peak times `multiplier`."""
        for group, peak in zip(self._groups, self._peaks, strict=True):
            group["lr"] = peak * multiplier


class PlainEngine:
    """One process, whatever process group it may be part of: what `DeepSpeedEngine` is checked against.

    Args:
        model: moved to the worker's device; its weights are trained in place.
        objective: gives the loss of a micro-batch.
        optimizer: builds the optimizer of the model's trainable weights.
        clip_norm: largest norm of a step's gradient, over all weights; None: any.
        bf16: whether products are taken in bfloat16 (autocast); weights and gradients are float32 all the same.
        worker: says where.
    """

    def __init__(
        self,
        model: Any,
        *,
        objective: Loss | LearningLoss,
        optimizer: Optimizer,
        clip_norm: float | None,
        bf16: bool,
        worker: Worker,
    ) -> None:
        self.model = model.to(worker.device)
        self._objective, self._bf16 = objective, bf16
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._stepped: Stepped = {n: (each, None) for n, each in model.named_parameters() if each.requires_grad}
        self._optimizer = optimizer.build(model)
        self._rates = Rates(self._optimizer)
        self._max_norm = clip_norm
        self._device_type = worker.device.split(":")[0]

    def accumulate(
        self, micro_batches: Sequence[Batch], *, num_tokens: int, loss_sum: LossSum | None = None
    ) -> torch.Tensor:
        """Add the gradients of a step's micro-batches up; this rank's share of the mean loss, not waited for.

        Args:
            micro_batches: this rank's part of the global batch.
            num_tokens: predicted tokens that the mean is over, those of all ranks.
            loss_sum: of a model and a micro-batch; None: the objective's.

        Returns:
            A scalar, in nats per predicted token: the sum over ranks is the mean loss of the global batch.
        """
        total = torch.zeros((), device=self._parameters[0].device)
        for batch in micro_batches:
            with torch.autocast(self._device_type, torch.bfloat16) if self._bf16 else nullcontext():
                loss = (loss_sum or self._objective.loss_sum)(self.model, batch) / num_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def apply(self, multiplier: float) -> torch.Tensor:
        """Clip what was accumulated, step, and forget it.

        Args:
            multiplier: of each group's own peak learning rate, by the schedule.

        Returns:
            Norm over all weights of the gradient before clipping, a scalar, not waited for.
        """
        gradients = [each.grad for each in self._parameters if each.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._max_norm, norm)
        self._rates.set(multiplier)
        self._optimizer.step()
        self._forget_gradients()
        return norm

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What this rank steps, each once; of float32. Who changes them calls `push` before the next gradient."""
        return list(self._parameters)

    @property
    def states(self) -> list[dict[str, Any]]:
        """The optimizer's states of each of `tensors`; what is put there is saved and resumed with the rest."""
        return [self._optimizer.state[each] for each in self._parameters]

    def take(self) -> list[torch.Tensor]:
        """The gradients that were accumulated, of each of `tensors`, which are forgotten here."""
        taken = [torch.zeros_like(each) if each.grad is None else each.grad for each in self._parameters]
        self._forget_gradients()
        return taken

    def push(self) -> None:
        """Have the model compute with `tensors` as they are now."""

    def dot(self, left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sum of the products of two values of each weight, laid out like `tensors`; over all weights, on all ranks."""
        return dot(left, right)

    def step(self, gradients: Sequence[torch.Tensor], multiplier: float) -> torch.Tensor:
        """Clip these gradients, laid out like `tensors`, and step by them; see `apply`."""
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return self.apply(multiplier)

    def average(self, mean: Mean) -> Tensors:
        """The weights' `mean` of their optimizer's states in place of their own values: see `weights`."""
        return average_of(self.model, self._stepped, self._optimizer, mean)

    def weights(self) -> Tensors:
        """All weights and buffers by name, as the model holds them: a later step changes them."""
        return dict(self.model.state_dict())

    def ranges(self) -> dict[str, Range]:
        """This rank's part of the weights and of the optimizer's states, to be saved: see `saved_state`."""
        return ranges_of(self._stepped, self._optimizer, rank=0)

    def load(self, saved: SavedState) -> None:
        """Go on from where a gang of any shape saved its `ranges`; the model has its weights back by then."""
        saved.load(self._stepped, self._optimizer)

    def optimizer_state(self) -> Tensors:
        """NAME.KEY -> each state of a weight, whole: the same on a gang of any shape.

        A weight of [out, in] has states of [out, in], and numbers such as AdamW's count of steps.
        """
        return _named(optimizer_tensors(self._optimizer, self._parameters), list(self._stepped))

    def set_optimizer_state(self, state: Tensors) -> None:
        """Go on with what `optimizer_state` gave, of these weights.

        Raises:
            KeyError: if a name is of no trainable weight.
        """
        tensors = _indexed(state, list(self._stepped), self._parameters)
        set_optimizer_tensors(self._optimizer, self._parameters, tensors)

    def close(self) -> None:
        """Give the memory of gradients and optimizer back."""
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        # Not by the optimizer's own method, which opens a profiler's record first: longer than a small model's step.
        for parameter in self._parameters:
            parameter.grad = None


def dot(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum over all elements of tensors of like shapes, a scalar."""
    if left is right:
        return torch.stack(torch._foreach_norm(list(left))).square().sum()
    return torch.stack([torch.dot(a.flatten(), b.flatten()) for a, b in zip(left, right, strict=True)]).sum()


def average_of(model: Any, stepped: Stepped, optimizer: torch.optim.Optimizer, mean: Mean) -> Tensors:
    """Averages of whole weights, under all names of each; see `PlainEngine.average`."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    averages: Tensors = {}
    for own in names.values():
        tensor, piece = stepped.get(own[0], (None, None))
        average = None if tensor is None else mean(optimizer.state[tensor])
        if average is not None:
            whole = piece.join(average)[0] if piece else average
            averages |= dict.fromkeys(own, whole.detach().clone())
    return averages


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]) -> Tensors:
    """All that is saved of an optimizer, as state.INDEX.KEY; `parameters` are what it steps."""
    return {
        f"state.{index}.{name}": torch.as_tensor(value).detach().clone()
        for index, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def _named(tensors: Tensors, names: Sequence[str]) -> Tensors:
    """Tensors by state.INDEX.KEY, as an optimizer has them, by NAME.KEY, which holds for any."""
    split = {key: key.split(".", 2) for key in tensors}
    return {f"{names[int(split[key][1])]}.{split[key][2]}": value for key, value in tensors.items()}


def _indexed(state: Tensors, names: Sequence[str], parameters: Sequence[torch.Tensor]) -> Tensors:
    """The inverse of `_named`, on the weights' device; a KeyError if a name is of no weight."""
    index = {name: str(place) for place, name in enumerate(names)}
    split = {key: key.rpartition(".") for key in state}
    device = parameters[0].device
    return {f"state.{index[split[key][0]]}.{split[key][2]}": value.to(device) for key, value in state.items()}


def set_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Go on with what `optimizer_tensors` gave."""
    for key, value in tensors.items():
        _, index, name = key.split(".", 2)
        optimizer.state.setdefault(parameters[int(index)], {})[name] = value
