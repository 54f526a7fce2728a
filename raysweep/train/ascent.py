"""Steps that take gradients at more than one place of the weights, as methods for flat minima do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raysweep.objectives.base import IGNORED, Ints, Loss
from raysweep.objectives.causal_lm import CausalLM
from raysweep.objectives.cross_entropy import cross_entropy_sum
from raysweep.objectives.inputs import model_inputs
from raysweep.objectives.logits import logits_at
from raysweep.objectives.output_loss import draw_classes, loss_in_output
from raysweep.train.deepspeed_engine import DeepSpeedEngine
from raysweep.train.engines import Batch, LossSum, PlainEngine
from raysweep.train.micro_batches import Cutter, reseed
from raysweep.worker import Worker

Tensor = torch.Tensor

# So that a gradient of zero moves nothing.
TINY = 1e-12


class Step:
    """One step in the making: gradients of its batch, or of some rows of it, at the weights or beside them.

    All passes of a step draw alike (dropout), and cut the rows that they share into the same micro-batches. Gradients
    and moves are of the float32 weights that are stepped, whole on the gang whatever ranks and micro-batches there are;
    where products are taken in bfloat16, what moves is rounded as those weights are.

    Args:
        engine: that takes it.
        batch: the global one.
        objective: which counts what it predicts.
        cutter: of whole batches.
        worker: this rank.
        draws: seed of what the model draws on this rank.
        common_draws: seed of what is drawn for the batch, the same on all ranks.
        number: of the step, counted from 0.
        multiplier: of the learning rates.
    """

    def __init__(
        self,
        engine: PlainEngine | DeepSpeedEngine,
        batch: Mapping[str, Any],
        *,
        objective: Loss,
        cutter: Cutter,
        worker: Worker,
        draws: int,
        common_draws: int,
        number: int,
        multiplier: float,
    ) -> None:
        self.engine, self.objective, self.number = engine, objective, number
        self.batch = batch
        self._draws, self._common_draws = draws, common_draws
        self._cutter, self._worker, self._multiplier = cutter, worker, multiplier

    def accumulate(
        self,
        rows: Ints | None = None,
        *,
        num_tokens: int | None = None,
        loss_sum: LossSum | None = None,
        beside: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Add the gradients of these rows up, at the weights as they are; see `PlainEngine.accumulate`.

        Args:
            rows: of the global batch; None: all.
            num_tokens: that the mean is over; None: as many as the rows predict.
            loss_sum: in place of the objective's.
            beside: for `loss_sum`, further arrays of the global batch, by row.

        Returns:
            This rank's share of the mean loss, in nats per token.
        """
        batch, cutter = {**self.batch, **(beside or {})}, self._cutter
        if rows is not None:
            batch = {name: values[rows] for name, values in batch.items()}
            cutter = Cutter(self._worker, num_sequences=len(rows))
        # At least 1: a batch in which nothing is predicted has no loss and no gradient.
        num = max(1, self.objective.num_predicted(batch)) if num_tokens is None else num_tokens
        reseed(self._draws, self._worker.device)
        return self.engine.accumulate(cutter.cut(batch), num_tokens=num, loss_sum=loss_sum)

    def uniforms(self, num: int) -> npt.NDArray[np.float32]:
        """So many numbers in [0, 1) for each place of the global batch, [n, M, num]: whatever the ranks."""
        shape = (*self.batch["labels"].shape, num)
        return np.random.default_rng(self._common_draws).random(shape, dtype=np.float32)

    def plain(self) -> tuple[Tensor, Tensor]:
        """Down the gradient at the weights: this rank's share of the loss, and the gradient's norm."""
        return self.accumulate(), self.engine.apply(self._multiplier)

    def along(self, gradients: Sequence[Tensor]) -> Tensor:
        """Down these gradients, laid out like the engine's tensors; their norm."""
        return self.engine.step(gradients, self._multiplier)

    @contextmanager
    def moved(self, directions: Sequence[Tensor], length: Tensor) -> Iterator[None]:
        """While in it, weights are moved by `length` times `directions`, which are needed no more once it is entered.

        Behind it they are what they were, to the bit, but the model does not compute with them before it is stepped or
        moved again.
        """
        tensors = self.engine.tensors
        # The moved ones are written beside them, so that neither way is a copy.
        kept = [each.data for each in tensors]
        moved = torch._foreach_addcmul(kept, list(directions), [length.expand_as(each) for each in kept])
        _put(tensors, moved)
        self.engine.push()
        try:
            yield
        finally:
            _put(tensors, kept)


def _put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Have tensors hold these values, in the values' memory."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data = value


class DrawnLabels:
    """The loss of labels that are drawn from the model's own predictions, and then kept.

    Args:
        objective: which says what a label is predicted from.
    """

    def __init__(self, objective: Loss) -> None:
        self._is_causal = objective.head == "causal"  # type: ignore[attr-defined]
        # Others predict few places, of which alone logits are wanted.
        self._in_output = isinstance(objective, CausalLM)
        self._kept: list[Tensor] = []
        self._at: int | None = None

    def again(self) -> None:
        """From now on, labels are those that were drawn, micro-batch after micro-batch."""
        self._at = 0

    def loss_sum(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """Their cross-entropy in nats, summed over the places that the objective predicts; see `Loss.loss_sum`.

        Args:
            model: see there.
            batch: see there; at first `draws` [n, M, 2], too: uniform numbers, by which labels are drawn.
        """
        labels, draws = self._next(batch)
        inputs = model_inputs(model, batch) | ({"use_cache": False} if self._is_causal else {})
        if self._in_output and (loss := loss_in_output(model, labels, inputs, draws=draws)) is not None:
            return loss
        rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
        logits, _ = logits_at(model, rows, columns, **inputs)
        if draws is not None:
            labels[rows, columns] = draw_classes(logits.detach(), draws[rows, columns])
        return cross_entropy_sum(logits, labels[rows, columns], ignored=IGNORED)

    def _next(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What the logits of each place predict, [n, M], and by which numbers it is drawn first, [n, M, 2].

        What is drawn is written to the first, which is kept.
        """
        if self._at is not None:
            self._at += 1
            return self._kept[self._at - 1], None
        labels = batch["labels"]
        # The labels are shifted, not the logits: these are large, and a slice of them would be a copy.
        own = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED) if self._is_causal else labels.clone()
        self._kept.append(own)
        return own, batch["draws"]


def sharpness_aware(step: Step, *, rho: float, eta: float | None, rows: Ints | None) -> tuple[Tensor, Tensor]:
    """Down the gradient at w + e; the loss at w, of `rows`, and the norm of the gradient at w + e.

    Args:
        step: in the making.
        rho: length of e, in the norm of the method.
        eta: see `flat.ASAM`; None: e is `flat.SAM`'s.
        rows: that e is of; None: all.
    """
    engine = step.engine
    loss = step.accumulate(rows)
    directions = engine.take()
    if eta is None:
        length = engine.dot(directions, directions).sqrt()
    else:
        sizes = []
        for weight, direction in zip(engine.tensors, directions, strict=True):
            sizes.append(weight.detach().abs().add_(eta))
            direction.mul_(sizes[-1])
        length = engine.dot(directions, directions).sqrt()
        torch._foreach_mul_(directions, sizes)
        del sizes
    with step.moved(directions, rho / (length + TINY)):
        directions.clear()
        step.accumulate()
        gradients = engine.take()
    return loss, step.along(gradients)


def trace_penalised(step: Step, *, weight: float, rho: float, rows: Ints | None) -> tuple[Tensor, Tensor]:
    """Down the gradient of the loss and `weight` times the trace's estimate; see `flat.TracePenalty`."""
    engine = step.engine
    loss = step.accumulate()
    gradients = engine.take()
    drawn = DrawnLabels(step.objective)
    step.accumulate(rows, loss_sum=drawn.loss_sum, beside={"draws": step.uniforms(2)})
    here = engine.take()
    norm = engine.dot(here, here).sqrt()
    drawn.again()
    with step.moved(here, rho / (norm + TINY)):
        step.accumulate(rows, loss_sum=drawn.loss_sum)
        there = engine.take()
    labels = step.batch["labels"] if rows is None else step.batch["labels"][rows]
    num = max(1, step.objective.num_predicted({"labels": labels}))
    add_difference(gradients, there, here, scale=weight * 2 * num / rho * norm)
    return loss, step.along(gradients)


def agreeing(step: Step, *, weight: float, rho: float, is_one: Any) -> tuple[Tensor, Tensor]:
    """Down the gradient of the loss less `weight` times the cosine of two domains' gradients; see
    `flat.GradientAgreement`.

    Args:
        step: in the making.
        weight: of the cosine.
        rho: length of the differences.
        is_one: which rows are of the one side, [n], bool; both sides have some.
    """
    engine, num = step.engine, max(1, step.objective.num_predicted(step.batch))
    sides = [is_one.nonzero()[0], (~is_one).nonzero()[0]]
    losses = []
    gradients = []
    for rows in sides:
        # Over the tokens of both, so that the sum of the two is the batch's.
        losses.append(step.accumulate(rows, num_tokens=num))
        gradients.append(engine.take())
    norms = [engine.dot(each, each).sqrt() + TINY for each in gradients]
    cosine = engine.dot(*gradients) / (norms[0] * norms[1])
    whole = [one + other for one, other in zip(*gradients, strict=True)]
    for own, (rows, mine, other) in enumerate(zip(sides, gradients, gradients[::-1], strict=True)):
        # The cosine's derivative by this side's gradient is this direction over that gradient's norm.
        directions = [
            (b / norms[1 - own]).sub_((cosine * a).div_(norms[own])) for a, b in zip(mine, other, strict=True)
        ]
        length = engine.dot(directions, directions).sqrt()
        with step.moved(directions, rho / (length + TINY)):
            directions.clear()
            step.accumulate(rows, num_tokens=num)
            add_difference(whole, engine.take(), mine, scale=-weight * length / (rho * norms[own]))
    return losses[0] + losses[1], step.along(whole)


def add_difference(sums: Sequence[Tensor], there: Sequence[Tensor], here: Sequence[Tensor], *, scale: Tensor) -> None:
    """Add `scale` times `there - here` to `sums`; `there` is lost."""
    # Weight after weight, as long as a CPU has each in its cache.
    for total, after, before in zip(sums, there, here, strict=True):
        total.add_(after.sub_(before).mul_(scale))
