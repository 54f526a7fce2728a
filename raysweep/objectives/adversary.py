"""An objective that keeps the loss and harms, or helps, what a linear classifier can read of a model's states.

Paper 1 (Liu et al., 2022, arXiv 2210.14199, section 3.3) minimises L - lambda * (validation loss of a head), to get
models of equal loss that transfer worse; how the head is fitted is not told. Ours is a ridge regression in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, final

from pydantic import Field

from raysweep.errors import StageError
from raysweep.objectives.base import IGNORED, Arrays, Ints, LearningLoss
from raysweep.objectives.heads import Head
from raysweep.objectives.of_another import OfAnother

if TYPE_CHECKING:
    import torch

    from raysweep.objectives.optimum import LabelledLaw

LABELS = "label_probabilities"
"""In a batch: p(symbol | sentence), [n, places, symbols], float64."""

MAX_STATES = 8192
"""Numbers of a row's states: second moments are a matrix of so many rows and columns, in 8 bytes each."""


@final
class Adversary(OfAnother):
    """L + strength * max(0, R^2): R^2 of a linear head that predicts the language's labels from a row's states.

    L is the loss of `of`, in nats per predicted token. The head is a ridge regression from the last layer's states, all
    tokens of a row side by side, to the labels of all places, one-hot. It is fitted to an exponential average of second
    moments of earlier batches, solved anew in each step, and no gradient goes through it; the batch at hand, which it
    has not seen, tells R^2 = 1 - squared error / variance of the labels. Labels enter by their exact probabilities
    given the sentence, which is what drawing them over and over would come to.

    A strength above 0 harms linear probes; one below 0 helps them, without a bound; 0 is the control of both, to the
    bit a training by `of` on the same batches. For max(0, .) the R^2 of the batch before counts: all of a batch is
    known, on all ranks and in all micro-batches, only once its gradient has been taken.
    """

    name: Literal["adversary"]
    """Which objective."""
    strength: float
    """lambda, in nats per token; 0 trains by `of` alone. An axis over it gets 0, if that is not among its values."""
    decay: float = Field(default=0.95, gt=0, lt=1)
    """A batch's weight in the average, relative to that of the one after it."""
    ridge: float = Field(default=1e-3, gt=0)
    """Added to the diagonal of the states' covariance, relative to its mean."""

    def predicts(self) -> str:
        """What `of` predicts, and the strength, in words; see `ObjectiveSpec.predicts`."""
        return f"{self.of.predicts()}; an adversary of strength {self.strength:g}"

    def from_law(self, law: LabelledLaw, ids: Ints, rows: Arrays) -> Arrays:
        """The labels' probabilities; none for the control, which asks for none."""
        return {LABELS: law.label_probabilities(ids)} if self.strength else {}

    def loss_sum(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The part that has no memory, the loss of `of`; see `learning` for the whole."""
        return self.of.loss_sum(model, batch)

    def learning(self) -> AdversarialLoss | None:
        """The loss with its penalty; None for the control, which is `of`'s alone."""
        return AdversarialLoss(self) if self.strength else None


class AdversarialLoss(LearningLoss):
    """The loss of a training by an adversary, with the moments that its head is solved from.

    Args:
        spec: what it is asked for.
    """

    def __init__(self, spec: Adversary) -> None:
        self._spec = spec
        # Sums over rows, each batch's discounted by its age: phi phi' and phi y' side by side, phi = (1, states).
        self._moments: torch.Tensor | None = None
        self._head: _RidgeHead | None = None
        self._r2 = 0.0  # Of the batch before.
        self._seen: torch.Tensor | None = None  # Moments of the batch at hand.
        self._errors: torch.Tensor | None = None  # Its summed weights, and weights times R^2.

    def loss_sum(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Summed loss of `of`, and strength * R^2 for each of its predicted tokens, so that their mean is both."""
        import torch

        states: list[torch.Tensor] = []
        base: Any = getattr(model, "module", model).base_model  # DeepSpeed wraps a model.
        handle = base.register_forward_hook(lambda module, inputs, output: states.append(output[0]))
        try:
            loss = self._spec.of.loss_sum(model, batch)
        finally:
            handle.remove()
        labels = batch[LABELS].flatten(1)
        weights = _predicted_of_rows(batch["labels"], self._spec.head)
        phi = _with_one(states[0].flatten(1))
        with torch.no_grad():
            self._see(phi.double(), labels, weights)
        if self._head is None:
            return loss
        r2 = self._head.r2(phi, labels, num_places=batch[LABELS].shape[1])
        with torch.no_grad():
            self._errors = _plus(self._errors, torch.stack([weights.sum(), (weights * r2).sum()]))
        is_on = self._spec.strength < 0 or self._r2 > 0
        return loss + (self._spec.strength * (weights * r2).sum()).to(loss.dtype) if is_on else loss

    def end_step(self, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """See `LearningLoss.end_step`: moments of all ranks, and the head that the next batch is told by."""
        import torch

        assert self._seen is not None
        none = torch.zeros(2, dtype=torch.float64, device=self._seen.device)
        shared = sum_over_ranks(torch.cat([self._seen.flatten(), _plus(self._errors, none)]))
        seen, (num, r2_sum) = shared[:-2].view_as(self._seen), shared[-2:].tolist()
        self._r2 = r2_sum / num if num else 0.0
        self._moments = seen if self._moments is None else self._spec.decay * self._moments + seen
        self._seen = self._errors = None
        self._head = _RidgeHead(self._moments, ridge=self._spec.ridge)

    def state(self) -> dict[str, torch.Tensor]:
        """The moments, and R^2 of the last batch."""
        import torch

        if self._moments is None:
            return {}
        return {"moments": self._moments, "r2": torch.tensor([self._r2], dtype=torch.float64)}

    def load_state(self, state: Mapping[str, torch.Tensor], device: str) -> None:
        """See `LearningLoss.load_state`; the head follows from the moments."""
        if state:
            self._moments, self._r2 = state["moments"].to(device), float(state["r2"])
            self._head = _RidgeHead(self._moments, ridge=self._spec.ridge)

    def _see(self, phi: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> None:
        import torch

        if phi.shape[1] > MAX_STATES:
            raise StageError(
                f"objective adversary: the states of a row are {phi.shape[1] - 1:,} numbers (tokens x hidden size), "
                f"and its head takes {MAX_STATES - 1:,}: train a narrower model, or shorter sentences"
            )
        # A row that stands in on a rank without rows predicts nothing, and counts for nothing.
        phi = phi * (weights > 0)[:, None]
        self._seen = _plus(self._seen, phi.T @ torch.cat([phi, labels], dim=1))


class _RidgeHead:
    """y = phi w, ridge regression in closed form; its intercept, the weight of the 1 in phi, has no ridge.

    Args:
        moments: sums of phi phi' and phi y' side by side, [d + 1, d + 1 + labels], in float64.
        ridge: on the diagonal of the states' covariance, relative to its mean.
    """

    def __init__(self, moments: torch.Tensor, *, ridge: float) -> None:
        import torch

        means = moments[0, 1:] / moments[0, 0]
        cross = moments[1:, 1:] / moments[0, 0]
        size = len(cross)
        mean, label_mean = means[:size], means[size:]
        covariance = cross[:, :size] - torch.outer(mean, mean)
        covariance.diagonal().add_(ridge * covariance.diagonal().mean() + torch.finfo(torch.float64).tiny)
        slope = torch.linalg.solve(covariance, cross[:, size:] - torch.outer(mean, label_mean))
        self._weight = torch.cat([(label_mean - mean @ slope)[None], slope])
        self._label_mean = label_mean

    def r2(self, phi: torch.Tensor, labels: torch.Tensor, *, num_places: int) -> torch.Tensor:
        """1 - E |y - phi w|^2 / E |y - mean|^2 of each row, [n], in the type of `phi`: its mean is R^2.

        y is one-hot at each place with the probabilities `labels`, so that E |y|^2 is the number of places.
        """
        predicted = phi @ self._weight.to(phi.dtype)
        error = num_places - 2 * (labels.to(phi.dtype) * predicted).sum(dim=1) + (predicted**2).sum(dim=1)
        return 1 - error / float(num_places - (self._label_mean**2).sum())


def _with_one(states: torch.Tensor) -> torch.Tensor:
    """(1, states) of each row, [n, 1 + d], in float32 whatever narrower type these have."""
    import torch.nn.functional as F

    wide = states if states.element_size() > 4 else states.float()
    return F.pad(wide, (1, 0), value=1.0)


def _predicted_of_rows(labels: torch.Tensor, head: Head) -> torch.Tensor:
    """Number of predicted tokens of each row, [n], float64; see `ObjectiveSpec.head`."""
    counted = labels[:, 1:] if head == "causal" else labels
    return (counted != IGNORED).sum(dim=1).double()


def _plus(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    return part if total is None else total + part
