"""Losses without gradients, and how far they are from the lowest possible."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raysweep.objectives.base import IGNORED, Arrays, Floats, Ints, ObjectiveSpec
from raysweep.spec import canonical

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from raysweep.objectives.optimum import TabledLaw

# Rows of a forward pass, and of a piece that an error bar reckons with.
BATCH = 16
# Places whose probabilities are in float64 at once: of a whole batch they would take several times what its logits do.
PLACES = 64
# Rows of one of which the last layer's states alone are read: without logits, more fit.
ROWS_OF_STATES = 128
# Of the latest models and rows; see `heldout_once`.
MAX_KNOWN = 64
_known: dict[bytes, HeldoutLosses] = {}


@dataclass(frozen=True)
class HeldoutLosses:
    """Losses of a model on the batches of held-out rows."""

    losses: Floats
    """In nats, summed over what is predicted, [batches]."""
    num_predicted: Ints
    """Tokens that they are sums over, [batches]."""

    def document(self) -> dict[str, list[float]]:
        """All of it, for a file."""
        return {"losses": self.losses.tolist(), "num_predicted": self.num_predicted.tolist()}

    @staticmethod
    def of(document: Mapping[str, Any]) -> HeldoutLosses:
        """From what `document` gave."""
        return HeldoutLosses(np.array(document["losses"], np.float64), np.array(document["num_predicted"], np.int64))

    @property
    def mean(self) -> float:
        """In nats per predicted token; NaN if it is not finite or nothing is predicted."""
        num = self.num_predicted.sum()
        loss = float(self.losses.sum() / num) if num else math.nan
        return loss if math.isfinite(loss) else math.nan

    def above(self, optimum: Floats) -> tuple[float, float]:
        """Mean loss above the lowest possible one, in nats per predicted token, and its standard error.

        With d_b the difference of the two losses of batch b and n_b its predicted tokens, gap = sum d_b / sum n_b, and
        its error sqrt(B / (B - 1) sum_b (d_b - gap n_b)^2) / sum n_b, that of a ratio of sums over B batches (Cochran,
        1977, chapter 6). As both losses are of the same tokens, most of what these have of chance cancels, and it is
        far below the error of either loss.

        Args:
            optimum: lowest loss of each row in nats, summed over what is predicted, [n]; in the order of the rows that
                the losses are of.

        Returns:
            (gap, error); the error of a single batch is NaN.

        >>> losses = HeldoutLosses(np.array([10.0, 30.0]), num_predicted=np.array([10, 10]))
        >>> losses.mean, losses.above(np.full(2 * BATCH, 0.5))
        (2.0, (1.2, 1.0))
        """
        batches = np.add.reduceat(optimum, np.arange(0, len(optimum), BATCH))
        return _ratio(self.losses - batches, self.num_predicted)

    def less(self, other: HeldoutLosses) -> tuple[float, float]:
        """Mean loss less that of other weights on the same batches, in nats per predicted token, and its error.

        Paired batch by batch, as in `above`: the error holds the chance of the text alone.

        >>> one, other = (HeldoutLosses(np.array(rows), np.array([10, 10])) for rows in ([12.0, 34.0], [10.0, 30.0]))
        >>> mean, error = one.less(other)
        >>> round(mean, 3), round(error, 3)
        (0.3, 0.1)
        """
        return _ratio(self.losses - other.losses, self.num_predicted)


def heldout(
    model: PreTrainedModel, rows: Arrays, objective: ObjectiveSpec, *, batch_size: int = BATCH
) -> HeldoutLosses:
    """Losses of an objective on held-out rows.

    Args:
        model: put back into the mode that it comes in.
        rows: what the objective has prepared of held-out text, n rows.
        objective: whose loss it is.
        batch_size: rows of a forward pass; `HeldoutLosses.above` takes that of the default.

    Returns:
        A loss for each `batch_size` rows, and one for those that are left.
    """
    import torch

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses, num_predicted = [], []
    with torch.inference_mode():
        for start in range(0, len(rows["input_ids"]), batch_size):
            # Without `lengths`, by which only the training loop sorts: padding has no label, and none attends to it.
            part = {name: values[start : start + batch_size] for name, values in rows.items() if name != "lengths"}
            batch = {name: torch.from_numpy(values).to(device) for name, values in part.items()}
            losses.append(float(objective.loss_sum(model, batch).double()))
            num_predicted.append(objective.num_predicted(part))
    model.train(was_training)
    return HeldoutLosses(np.array(losses), np.array(num_predicted))


def heldout_once(model: PreTrainedModel, rows: Arrays, objective: ObjectiveSpec) -> HeldoutLosses:
    """The same as `heldout`, on a CPU without another pass where this process had these weights and rows before.

    Fine-tunings of one checkpoint all begin with the same losses. What is known goes by the content of what it is of,
    so that it never depends on what the process did. A GPU reads the rows in less time than its weights are hashed in.
    """
    import torch

    device = next(model.parameters()).device
    if device.type != "cpu":
        return heldout(model, rows, objective)
    digest = hashlib.sha256(f"{canonical(objective)} {type(model).__name__} {model.config.to_json_string()}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    for name, values in rows.items():
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(values.tobytes())
    key = digest.digest()
    if key not in _known:
        while len(_known) >= MAX_KNOWN:
            del _known[next(iter(_known))]
        _known[key] = heldout(model, rows, objective)
    return _known[key]


def divergence(
    model: PreTrainedModel, rows: Arrays, objective: ObjectiveSpec, *, law: TabledLaw, ids: Ints
) -> tuple[float, float] | None:
    """Mean loss above the lowest possible one as E KL(true conditional || model), and its standard error over rows.

    KL_t = sum_w p_t(w) (log p_t(w) - log q_t(w)) at each place t that is predicted. Its mean over texts is that of the
    losses' difference, of which it leaves out the chance of the labels: what is left is how KL differs between rows.

    Args:
        model: in evaluation mode.
        rows: what the objective has prepared of held-out text, n rows.
        objective: whose loss it is.
        law: of the text.
        ids: [n, L] of text.

    Returns:
        (gap, error) in nats per predicted token; None where the objective has no conditionals.
    """
    import torch

    from raysweep.objectives.inputs import model_inputs
    from raysweep.objectives.logits import logits_at

    device = next(model.parameters()).device
    shift = 1 if objective.head == "causal" else 0
    sums, counts = np.zeros(len(ids)), np.zeros(len(ids))
    with torch.inference_mode():
        for start in range(0, len(ids), BATCH):
            part = {name: values[start : start + BATCH] for name, values in rows.items() if name != "lengths"}
            probabilities = objective.conditionals(law, ids[start : start + BATCH], part)
            if probabilities is None:
                return None
            row, place = np.nonzero(part["labels"][:, shift:] != IGNORED)
            batch = {name: torch.from_numpy(values).to(device) for name, values in part.items()}
            at = (torch.from_numpy(each).to(device) for each in (row, place))
            logits, _ = logits_at(model, *at, **model_inputs(model, batch))
            np.add.at(counts, start + row, 1.0)
            for first in range(0, len(row), PLACES):
                some = slice(first, first + PLACES)
                # A model may have rows for tokens that no text has, such as a mask.
                log_q = logits[some].double().log_softmax(dim=-1)[:, : probabilities.shape[2]].cpu().numpy()
                p = probabilities[row[some], place[some] + shift]
                log_p = np.log(p, out=np.zeros_like(p), where=p > 0)
                np.add.at(sums, start + row[some], (p * (log_p - log_q)).sum(axis=1))
    return _ratio(sums, counts)


def _ratio(sums: Floats, counts: Floats | Ints) -> tuple[float, float]:
    """Sum of `sums` over that of `counts`, and its error by the delta method, that of one term being unknown."""
    size, num = len(sums), float(counts.sum())
    ratio = float(sums.sum()) / num
    if size < 2:
        return ratio, math.nan
    left = sums - ratio * counts
    return ratio, math.sqrt(size / (size - 1) * float((left**2).sum())) / num


def perplexity(loss: float) -> float:
    """e to the loss in nats per token; infinite rather than an overflow, and NaN of NaN.

    >>> perplexity(0.0), perplexity(1e4)
    (1.0, inf)
    """
    return math.inf if loss >= 700 else math.exp(loss)
