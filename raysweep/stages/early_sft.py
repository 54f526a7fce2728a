"""Early fine-tuning of a checkpoint: a short one on few examples, which foretells a whole one, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from raysweep.costs import Size
from raysweep.data.corpora import Corpus
from raysweep.data.tokenizers import load_tokenizer
from raysweep.errors import Diverged
from raysweep.resources import Resources
from raysweep.spec import Metric
from raysweep.stages.base import StageSpec, Subject
from raysweep.stages.sft import Hyperparameters, Sft
from raysweep.tasks.families import Task
from raysweep.train.checkpoints import load_model
from raysweep.worker import Worker


class EarlySft(StageSpec):
    """The baseline that other indicators have to beat at its price: what the target measures, made small.

    Each task's first training examples, a few steps, one learning rate. It is scored on the indicator split, which the
    target never sees, by the task's score and by the likelihood of the right answers, which has more resolution.
    """

    kind: ClassVar[str] = "early_sft"
    # 2: no more examples are scored than are asked for.
    VERSION: ClassVar[int] = 2
    wide: ClassVar[bool] = False
    filled: ClassVar[frozenset[str]] = frozenset({"tasks"})

    lr: float = Field(default=1e-3, gt=0)
    """Learning rate, one for all checkpoints."""
    hyperparameters: Hyperparameters = Hyperparameters(epochs=4, max_examples=64)
    """As of fine-tuning, with fewer examples."""
    seed: int = Field(default=0, ge=0)
    """Of fine-tuning."""
    max_examples: int = Field(default=200, ge=1)
    """Of the indicator split of each task, the first so many are scored."""
    tasks: dict[str, Task] = Field(default_factory=dict)
    """Name to task; filled from sft.tasks."""

    def pin(self, base: Path, *, on_gpu: bool) -> EarlySft:
        """With the precision that fine-tuning trains in."""
        return self.given(hyperparameters=self.hyperparameters.in_numbers_of(on_gpu=on_gpu))

    def bind(self, subject: Subject) -> EarlySft:
        """With the tasks that checkpoints are fine-tuned on."""
        return self.with_(tasks=dict(subject.tasks))  # type: ignore[no-any-return]

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Score and loss of each task and over tasks; NaN where fine-tuning diverges.

        Errors hold the chance of which examples are scored, not that of the one seed of fine-tuning.
        """
        scores, losses = {}, {}
        for name, task in sorted(self.tasks.items()):
            scores[name], losses[name] = self._examples(inputs["checkpoint"], task, worker)
        metrics: dict[str, float] = {}
        for measure, of_tasks in (("score", scores), ("loss_nats", losses)):
            metrics |= {f"{name}/{measure}": _mean(values) for name, values in of_tasks.items()}
            metrics[f"mean_{measure}"] = fmean(map(_mean, of_tasks.values()))
            errors = [
                float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else math.nan
                for values in of_tasks.values()
            ]
            metrics[f"mean_{measure}_stderr"] = math.hypot(*errors) / len(errors)
        return metrics

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """Scores from 0 to 1; losses are minus the log-likelihood of the right answer, of a text per token."""
        kinds = (Metric("score", "max", "share"), Metric("loss_nats", "min", "nats"))
        return tuple(
            metric
            for kind in kinds
            for metric in (
                *(replace(kind, name=f"{name}/{kind.name}") for name in self.tasks),
                replace(kind, name=f"mean_{kind.name}"),
                Metric(f"mean_{kind.name}_stderr", unit=kind.unit),
            )
        )

    def flops(self, size: Size, corpus: Corpus) -> float:
        """Training, and scoring of the indicator examples: once for their scores, once for likelihoods.

        Of a file's there may be fewer than are asked for, as no file is read for a plan.
        """
        total = 0.0
        for task in self.tasks.values():
            load = task.workload()
            num = self.max_examples if task.num_classes is None else min(self.max_examples, load.num_indicator)
            scored = size.forward_flops(num * (load.scored_length + load.length), load.length)
            total += self._finetuning(task).training_flops(size) + scored
        return total

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """That of the task that takes most; see `Sft.memory_bytes`."""
        return max(self._finetuning(task).memory_bytes(size, resources.alone) for task in self.tasks.values())

    def disk_bytes(self, size: Size) -> int:
        """None: its numbers stand in its record."""
        return 0

    def _finetuning(self, task: Task) -> Sft:
        return Sft(task=task, lr=self.lr, seed=self.seed, hyperparameters=self.hyperparameters)

    def _examples(self, checkpoint: Path, task: Task, worker: Worker) -> tuple[list[float], list[float]]:
        """Score and loss of each indicator example."""
        model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
        try:
            fitted = self._finetuning(task).fit(model, tokenizer, worker.alone())
        except Diverged:
            return [math.nan], [math.nan]
        asked: dict[str, Any] = {"split": "indicator", "max_examples": self.max_examples}
        scores = [row.scores["score"] for row in task.score(fitted.model, tokenizer, **asked)]
        return scores, [-value for value in task.log_likelihoods(fitted.model, tokenizer, **asked)]


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values and all(map(math.isfinite, values)) else math.nan
