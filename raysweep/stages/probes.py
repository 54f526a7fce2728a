"""Linear probes of a checkpoint: how well its frozen states tell the labels of tasks, by number of labels and by layer.

With few labels a probe shows how easily features are found, with many how much is there at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from raysweep.costs import Size
from raysweep.data.corpora import Corpus
from raysweep.data.tokenizers import load_tokenizer
from raysweep.errors import SpaceError
from raysweep.resources import Resources
from raysweep.spec import Metric, Neutral
from raysweep.stages.base import StageSpec, Subject
from raysweep.tasks.base import Features, Split
from raysweep.tasks.families import Task
from raysweep.train.checkpoints import load_model
from raysweep.train.evaluate import ROWS_OF_STATES
from raysweep.worker import Worker

if TYPE_CHECKING:
    import torch

PENALTIES = (1e-1, 1e-2, 1e-3)
"""On half the squared weights, beside the mean loss in nats; that with the best validation accuracy counts. From strong
to weak, each fit beginning where the one before ended."""
MAX_ITERATIONS = 60
"""Of L-BFGS, for each penalty."""
RIDGE = 1e-3
"""Of ridge regression, relative to the largest eigenvalue of the labelled states' Gram matrix: nearly the least norm.
With none at all, scores fall where labels are as many as features, and rise again beyond."""


class Probes(StageSpec):
    """Logistic regression on frozen states, all tokens side by side (paper 1, Liu et al., 2022) or their mean.

    Each draw has labels of its own, disjoint from those of other draws as far as the training split goes, and an own
    part of the indicator split to be scored on: so the spread over draws holds all that a score has of chance where
    labels are enough for all draws. Of as many labels as there are, all draws have one fit, and their spread is that of
    the examples scored. Draws are the same for all checkpoints. Features are standardised by the examples that a probe
    is fitted to.

    With the head "ridge", which paper 1's theorem is about, it is a linear regression to one-hot labels with the least
    norm, but for RIDGE; features are only centred, by all training examples, whose other labels are not used, and not
    even that where a task's classes are told apart by a direction alone.
    """

    kind: ClassVar[str] = "probes"
    wide: ClassVar[bool] = False
    filled: ClassVar[frozenset[str]] = frozenset({"tasks"})

    num_labels: tuple[int, ...] = Field(default=(64, 5000), min_length=1)
    """Labelled examples that a probe is fitted to; a probe for each number."""
    num_draws: int = Field(default=5, ge=2)
    """Of labels and of examples to score."""
    layers: tuple[int, ...] = ()
    """Probes of the states after so many blocks, too, 0 being the embeddings; those after all blocks and the norm that
    follows are always probed."""
    head: Annotated[Literal["logistic", "ridge"], Neutral("logistic")] = "logistic"
    """What is fitted."""
    tasks: dict[str, Task] = Field(default_factory=dict)
    """Name to task; filled from sft.tasks, those that have labels."""

    @field_validator("num_labels", "layers")
    @classmethod
    def _distinct(cls, numbers: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(numbers)) != len(numbers) or min(numbers, default=0) < 0:
            raise ValueError(f"{list(numbers)}: give different numbers, none below 0")
        return numbers

    def bind(self, subject: Subject) -> Probes:
        """With the tasks that have labels.

        Raises:
            SpaceError: if no task has labels, a task not so many training examples, or the model not so many blocks.
        """
        blocks = subject.model.dimensions().num_layers if subject.model else math.inf
        if self.layers and (deepest := max(self.layers)) > blocks:
            raise SpaceError(f"{deepest}: the model has {blocks} blocks; layers are 0 to {blocks}", ("layers",))
        tasks = {name: task for name, task in subject.tasks.items() if task.num_classes is not None}
        if subject.tasks and not tasks:
            forms = ", ".join(sorted({task.form for task in subject.tasks.values()}))
            raise SpaceError(
                f"no task of sft has classes for a linear probe to tell apart (form {forms}); add one of form "
                "classification, or remove probes"
            )
        for name, task in tasks.items():
            if (most := max(self.num_labels)) > (there := task.workload().num_train):
                text = f"{most} labels: task {name} has {there} training examples; raise its num_train, or lower it"
                raise SpaceError(text, ("num_labels",))
        return self.with_(tasks=tasks)  # type: ignore[no-any-return]

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Accuracy for each number of labels: of each task, of each draw as a mean over tasks, and of all."""
        model = load_model(inputs["checkpoint"]).to(worker.device).eval()
        tokenizer = load_tokenizer(inputs["checkpoint"])
        hits: dict[tuple[int | None, int], dict[str, list[float]]] = {key: {} for key in self._keys()}
        layers = (None, *self.layers)
        for name, task in sorted(self.tasks.items()):
            splits: list[Split] = ["train", "valid", "indicator"]
            by_layer = zip(*(task.features(model, tokenizer, split, layers=layers) for split in splits), strict=True)
            for layer, (train, valid, test) in zip(layers, by_layer, strict=True):
                if self.head == "ridge" and task.needs_intercept:
                    mean = train.states.mean(dim=0)
                    train, test = (Features(part.states - mean, part.labels) for part in (train, test))
                for num in self.num_labels:
                    scores = self._scores(train, valid, test, num_labels=num, num_classes=task.num_classes or 0)
                    hits[layer, num][name] = scores
        return {name: value for key, scores in hits.items() for name, value in self._summary(*key, scores)}

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """Accuracies; the error is of the mean over draws."""
        names = {name: {task: [0.0] * self.num_draws for task in self.tasks} for name in self._keys()}
        return tuple(
            Metric(name, None if name.endswith("_stderr") or "_draw_" in name else "max", "share")
            for key, scores in names.items()
            for name, _ in self._summary(*key, scores)
        )

    def flops(self, size: Size, corpus: Corpus) -> float:
        """Features of all examples, and the probes' iterations."""
        total, probed = 0.0, 1 + len(self.layers)
        for task in self.tasks.values():
            load = task.workload()
            read = (load.num_train + load.num_valid + load.num_indicator) * load.length
            weights = load.num_states * size.hidden_size * (task.num_classes or 0)
            fits = self.num_draws * sum(self.num_labels) * len(PENALTIES) * MAX_ITERATIONS
            total += size.forward_flops(read, load.length) + probed * 4.0 * weights * fits
        return total

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """Weights, all layers' states of a task's examples, of one layer twice, and a batch that is read for them."""
        most, probed = 0, 1 + len(self.layers)
        for task in self.tasks.values():
            load = task.workload()
            rows = load.num_train + load.num_valid + load.num_indicator + max(self.num_labels)
            batch = min(ROWS_OF_STATES, load.num_train) * load.length * size.forward_bytes
            states = (probed * rows + load.num_train) * load.num_states
            most = max(most, 4 * states * size.hidden_size + batch)
        return size.weights_bytes + most

    def disk_bytes(self, size: Size) -> int:
        """None: its numbers stand in its record."""
        return 0

    def _keys(self) -> Iterator[tuple[int | None, int]]:
        return ((layer, num) for layer in (None, *self.layers) for num in self.num_labels)

    def _summary(self, layer: int | None, num: int, scores: Mapping[str, list[float]]) -> Iterator[tuple[str, float]]:
        """Metrics of one layer and number of labels, from the scores of each task's draws."""
        name = f"labels_{num}" if layer is None else f"labels_{num}_layer_{layer}"
        draws = [fmean(of_draw) for of_draw in zip(*scores.values(), strict=True)]
        yield name, fmean(draws) if draws else math.nan
        yield f"{name}_stderr", stdev(draws) / math.sqrt(len(draws)) if draws else math.nan
        if layer is None:
            yield from ((f"{name}_draw_{index + 1}", value) for index, value in enumerate(draws))
            yield from ((f"{task}/{name}", fmean(of_task)) for task, of_task in scores.items())

    def _scores(
        self, train: Features, valid: Features, test: Features, *, num_labels: int, num_classes: int
    ) -> list[float]:
        """Accuracy of each draw on its own part of `test`; NaN where states are no numbers."""
        import torch

        num = len(train.labels)
        order = torch.randperm(num, generator=torch.Generator().manual_seed(0))
        scores: list[float] = []
        for draw in range(self.num_draws):
            if draw == 0 or num_labels < num:  # Of all there are, every draw is the same.
                # One after another in a random order, from the front again where it ends.
                chosen = order[(draw * num_labels + torch.arange(num_labels)) % num].to(train.labels.device)
                labelled = Features(train.states[chosen], train.labels[chosen])
                if self.head == "ridge":
                    fitted = _Fitted(ridge(*labelled, num_classes=num_classes))
                else:
                    fitted = _Fitted.of(labelled, valid, num_classes=num_classes)
            rows = slice(draw, None, self.num_draws)
            scores.append(fitted.accuracy(Features(test.states[rows], test.labels[rows])))
        return scores


@dataclass(frozen=True)
class _Fitted:
    """A probe, and what its inputs are standardised by."""

    weights: torch.Tensor
    mean: torch.Tensor | float = 0.0
    spread: torch.Tensor | float = 1.0

    @staticmethod
    def of(train: Features, valid: Features, *, num_classes: int) -> _Fitted:
        """The fit of the penalty with the best validation accuracy, of equal ones the strongest."""
        mean, spread = train.states.mean(dim=0), train.states.std(dim=0) + 1e-6
        every = fits((train.states - mean) / spread, train.labels, num_classes=num_classes)
        return max((_Fitted(weights, mean, spread) for weights in every), key=lambda fitted: fitted.accuracy(valid))

    def accuracy(self, examples: Features) -> float:
        """Share of right answers; NaN where logits are no numbers."""
        logits = (examples.states - self.mean) / self.spread @ self.weights[:-1] + self.weights[-1]
        if not bool(logits.isfinite().all()):
            return math.nan
        return float((logits.argmax(dim=1) == examples.labels).double().mean())


def fits(states: torch.Tensor, labels: torch.Tensor, *, num_classes: int) -> Iterator[torch.Tensor]:
    """Logistic regressions of one penalty after another: mean cross-entropy + penalty / 2 |w|^2, to its minimum.

    Args:
        states: [n, d], standardised.
        labels: [n], in [0, num_classes).
        num_classes: that are told apart.

    Returns:
        Weights [d + 1, num_classes] for each of `PENALTIES`; the last row is the intercepts, which have no penalty.
    """
    import torch
    import torch.nn.functional as F

    inputs = F.pad(states, (0, 1), value=1.0)
    # A class's weights in a row: for a gradient [d + 1, few] a CPU's libraries take three to ten times as long.
    weights = torch.zeros(num_classes, inputs.shape[1], device=states.device, requires_grad=True)
    for penalty in PENALTIES:
        optimizer = torch.optim.LBFGS(
            [weights], max_iter=MAX_ITERATIONS, tolerance_grad=1e-4, line_search_fn="strong_wolfe"
        )

        def loss(optimizer: Any = optimizer, penalty: float = penalty) -> torch.Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(F.linear(inputs, weights), labels) + penalty / 2 * weights[:, :-1].square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(loss)  # type: ignore[no-untyped-call]
        yield weights.detach().clone().T


def ridge(states: torch.Tensor, labels: torch.Tensor, *, num_classes: int) -> torch.Tensor:
    """w = X' (X X' + RIDGE lambda_max(X X'))^-1 Y: regression to one-hot labels less 1 / num_classes.

    Args:
        states: X, [n, d].
        labels: [n], in [0, num_classes).
        num_classes: that are told apart.

    Returns:
        Weights [d + 1, num_classes]; the last row is 0, for it has no intercepts.
    """
    import torch
    import torch.nn.functional as F

    wide = states.double()
    gram = wide @ wide.T
    if not bool(gram.isfinite().all()):  # No eigenvalue can be had of what is no number.
        return states.new_full((states.shape[1] + 1, num_classes), math.nan)
    gram.diagonal().add_(RIDGE * torch.linalg.eigvalsh(gram)[-1])
    targets = F.one_hot(labels, num_classes).double() - 1 / num_classes
    weights = wide.T @ torch.linalg.lstsq(gram, targets).solution
    return F.pad(weights, (0, 0, 0, 1)).to(states.dtype)
