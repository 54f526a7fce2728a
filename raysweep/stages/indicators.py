"""Cheap numbers of a checkpoint, known before any fine-tuning: zero- and few-shot scores of its tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from pydantic import Field

from raysweep.data.corpora import Corpus
from raysweep.data.tokenizers import load_tokenizer
from raysweep.spec import Metric, StageSpec
from raysweep.tasks.families import Task
from raysweep.train.checkpoints import load_model
from raysweep.worker import Worker


class Indicators(StageSpec):
    """Each fine-tuning task's score without training.

    Text tasks are scored with 0 and `kshot` solved examples before the question; a task with classes by the
    nearest mean state of `kshot` examples of each class. Pieces are dealt over ranks, each whole on one rank.
    """

    kind: ClassVar[str] = "indicators"

    kshot: int = Field(default=2, ge=1)
    """Solved examples before the question; of each class, for tasks with labels."""
    max_examples: int = Field(default=200, ge=1)
    """Of each task, from a split that no fine-tuning trains, validates or tests on."""
    tasks: dict[str, Task] = Field(default_factory=dict)
    """Filled from sft.tasks."""

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """See the class."""
        model = load_model(inputs["checkpoint"]).to(worker.device).eval()
        tokenizer = load_tokenizer(inputs["checkpoint"])
        pieces = self._pieces()
        mine = {
            name: self._score(model, tokenizer, task, shots)
            for index, (name, task, shots) in enumerate(pieces)
            if index % worker.world_size == worker.rank
        }
        scores = {name: score for part in worker.gather(mine) for name, score in part.items()}
        mean = fmean(scores[f"{name}/kshot"] for name in self.tasks)
        return {name: scores[name] for name, _, _ in pieces} | {"kshot_mean": mean}

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """A score of each task without and with solved examples, and the mean of the latter."""
        names = [name for name, _, _ in self._pieces()]
        return tuple(Metric(name, "max", "share") for name in (*names, "kshot_mean"))

    def _pieces(self) -> list[tuple[str, Task, int]]:
        """(name, task, shots) of every score."""
        return [
            (f"{name}/{prefix}", task, shots)
            for name, task in sorted(self.tasks.items())
            for prefix, shots in (("zeroshot", 0), ("kshot", self.kshot))
            if shots
            or task.num_classes is None  # Classes have no names to go by: without an example there is no score.
        ]

    def _score(self, model: Any, tokenizer: Any, task: Task, shots: int) -> float:
        scores = task.score_untrained(model, tokenizer, num_shots=shots, max_examples=self.max_examples)
        return fmean(scores) if scores else math.nan
