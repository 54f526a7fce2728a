"""Zero- and few-shot scores of a checkpoint on its tasks, known before any fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, ClassVar

from pydantic import Field

from raysweep.costs import Size
from raysweep.data.corpora import Corpus
from raysweep.data.tokenizers import load_tokenizer
from raysweep.resources import Resources
from raysweep.spec import Metric, Neutral
from raysweep.stages.base import StageSpec, Subject
from raysweep.tasks.families import Task
from raysweep.tasks.rows import batch_tokens
from raysweep.tasks.text import TextTask
from raysweep.train.checkpoints import load_model
from raysweep.train.evaluate import ROWS_OF_STATES
from raysweep.worker import Worker

LIKELIHOOD = "_log_likelihood"
"""Ends the name of the mean log-likelihood of right answers, beside that of the score."""
NUM_CUT = "_num_cut"
"""Ends the name of how many prompts did not fit."""

CLASS_VERSION = 2
"""See `Indicators.class_version`."""


class Indicators(StageSpec):
    """Each fine-tuning task's score without training, and the log-likelihood of its right answers.

    Likelihoods tell more than scores where these are near chance; see `TaskSpec.log_likelihoods`. Text tasks are scored
    with 0 and k solved examples before the question, in the prompts of their form (`tasks/`); a task with classes
    by the nearest mean state of k examples of each class. A prompt that does not fit loses its beginning, solved
    examples first, and is counted. Pieces are dealt over ranks, each whole on one rank.
    """

    kind: ClassVar[str] = "indicators"
    # 2: with likelihoods. 3: with the number of prompts that did not fit.
    VERSION: ClassVar[int] = 3

    kshot: int = Field(default=2, ge=1)
    """Solved examples before the question; of each class, for tasks with labels."""
    kshot_by_task: Annotated[dict[str, Annotated[int, Field(ge=1)]], Neutral({})] = Field(default_factory=dict)
    """Task -> its own number in place of kshot."""
    max_examples: int = Field(default=200, ge=1)
    """Of each task, from a split that no fine-tuning trains, validates or tests on."""
    tasks: dict[str, Task] = Field(default_factory=dict)
    """Name to task; filled from sft.tasks."""
    class_version: Annotated[int, Neutral(1)] = 1
    """Raised by a fix that changes results of tasks with classes; filled, and 1 where there are none, whose results
    stay. 2: likelihoods by a temperature that is fitted to the examples."""
    filled: ClassVar[frozenset[str]] = frozenset({"tasks", "class_version"})

    def bind(self, subject: Subject) -> Indicators:
        """With the tasks that checkpoints are fine-tuned on."""
        has_classes = any(task.num_classes is not None for task in subject.tasks.values())
        return self.with_(  # type: ignore[no-any-return]
            tasks=dict(subject.tasks), class_version=CLASS_VERSION if has_classes else 1
        )

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Means over each task's examples, without and, where there are some, with shots; NaN where none was left."""
        model = load_model(inputs["checkpoint"]).to(worker.device).eval()
        tokenizer = load_tokenizer(inputs["checkpoint"])
        # Each piece whole on one rank: a score does not hang on how its examples would be batched over ranks.
        mine = {
            name: value
            for index, (name, task, shots) in enumerate(self._pieces())
            if index % worker.world_size == worker.rank
            for name, value in self._score(model, tokenizer, name, task, shots).items()
        }
        values = {name: value for part in worker.gather(mine) for name, value in part.items()}
        for end in ("", LIKELIHOOD):
            values[f"kshot{end}_mean"] = fmean(values[f"{name}/kshot{end}"] for name in self.tasks)
        return values

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """Of each task without and with solved examples, and the means of the latter over all tasks."""
        names = [name for name, _, _ in self._pieces()]
        return (
            *(Metric(name, "max", "share") for name in (*names, "kshot_mean")),
            *(Metric(f"{name}{LIKELIHOOD}", "max", "nats") for name in names),
            *(
                Metric(f"{name}{NUM_CUT}", unit="prompts")
                for name, task, _ in self._pieces()
                if task.num_classes is None
            ),
            Metric(f"kshot{LIKELIHOOD}_mean", "max", "nats"),
        )

    def flops(self, size: Size, corpus: Corpus) -> float:
        """A forward pass over each task's examples, and those they are solved by; of texts one more, for answers."""
        rows = ((task, *self._rows(name, task)) for name, task in self.tasks.items())
        return sum(
            (2 if task.num_classes is None else 1) * size.forward_flops(num * length, length)
            for task, num, length in rows
        )

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """Weights, and what the largest batch takes, all in 32 bits."""
        on_gpu = resources.gpus_per_worker > 0
        batches = (self._batch_bytes(name, task, size, on_gpu=on_gpu) for name, task in self.tasks.items())
        return size.weights_bytes + max(batches, default=0)

    def disk_bytes(self, size: Size) -> int:
        """None: its numbers stand in its record."""
        return 0

    def _shots(self, name: str) -> int:
        return self.kshot_by_task.get(name, self.kshot)

    def _rows(self, name: str, task: Task) -> tuple[int, int]:
        """Rows that are read for a task, and tokens of each.

        A text is of typical length, as no file is read for a plan, with its solved examples before it and an answer.
        """
        if isinstance(task, TextTask):
            return self.max_examples, task.typical_prompt_length(self._shots(name))
        # Of each class examples to go by, read once; and then those that are asked for.
        load = task.workload()
        return self._shots(name) * task.num_classes + min(self.max_examples, load.num_indicator), load.length

    def _batch_bytes(self, name: str, task: Task, size: Size, *, on_gpu: bool) -> int:
        num, length = self._rows(name, task)
        if task.num_classes is None:
            return min(batch_tokens(on_gpu=on_gpu), num * length) * size.prompt_bytes
        return min(ROWS_OF_STATES, num) * length * size.forward_bytes

    def _pieces(self) -> list[tuple[str, Task, int]]:
        """(name, task, shots) of every score."""
        return [
            (f"{name}/{prefix}", task, shots)
            for name, task in sorted(self.tasks.items())
            for prefix, shots in (("zeroshot", 0), ("kshot", self._shots(name)))
            if shots
            or task.num_classes is None  # Classes have no names to go by: without an example there is no score.
        ]

    def _score(self, model: Any, tokenizer: Any, name: str, task: Task, shots: int) -> dict[str, float]:
        guesses = task.score_untrained(model, tokenizer, num_shots=shots, max_examples=self.max_examples)
        values = {
            name: fmean(guess.score for guess in guesses) if guesses else math.nan,
            f"{name}{LIKELIHOOD}": fmean(guess.log_likelihood for guess in guesses) if guesses else math.nan,
        }
        cut = {f"{name}{NUM_CUT}": float(sum(guess.is_cut for guess in guesses))}
        return values | (cut if task.num_classes is None else {})
