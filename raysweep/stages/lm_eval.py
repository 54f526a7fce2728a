"""Scores of a checkpoint on tasks of lm-evaluation-harness: those that it comes with, and YAML files of one's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, field_validator

from raysweep.costs import Size
from raysweep.data.corpora import Corpus
from raysweep.data.tokenizers import load_tokenizer
from raysweep.errors import SpaceError, collect
from raysweep.resources import Resources
from raysweep.spec import Metric, Provenance, Spec, check_name
from raysweep.stages.base import StageSpec, Subject
from raysweep.stages.harness import PinnedTask, check_answers, evaluate, pin_task
from raysweep.tasks.files import TYPICAL_LENGTH
from raysweep.tasks.multiple_choice import TYPICAL_CHOICES
from raysweep.train.checkpoints import load_model
from raysweep.worker import Worker

BATCH_SEQUENCES = 8
"""Rows that the harness reads at once; it pads them to the longest, so that more seldom pay."""
TYPICAL_EXAMPLES = 1000
"""Of a task without a limit, assumed for a plan."""
TYPICAL_ANSWER = 64
"""Tokens of an answer that is written, assumed for a plan."""


class HarnessTask(Spec):
    """A task of lm-evaluation-harness, and how it is asked."""

    task: Annotated[str | None, Provenance()] = None
    """Its name in the harness, or its YAML file, relative to the sweep file; left out: the name it goes by here. Files
    that a YAML file names as data_files are relative to it; modules that its functions import are found by PYTHONPATH,
    as the harness does. Results are tied to those beside a function's own module and in packages there, and not to what
    PYTHONPATH finds in other folders."""
    num_fewshot: Annotated[int | None, Provenance()] = Field(default=None, ge=0)
    """Solved examples before a question; left out: as many as the task says."""
    limit: int | None = Field(default=None, ge=1)
    """Examples, the first so many; left out: all."""
    pinned: PinnedTask | None = None
    """What was found; filled when the sweep file is loaded."""


class LmEval(StageSpec):
    """Scores by lm-evaluation-harness (Gao et al., 2024), by its own prompts and metrics, a stage for each task.

    Needs the extra `lm-eval`. A result is tied to the harness's version, to the bytes of the task's files, and to those
    of its data: files, or the commit of a data set of the hub. Models are read as they are, without a chat template.

    Writes `harness.json`, what the harness reports.
    """

    kind: ClassVar[str] = "lm_eval"
    wide: ClassVar[bool] = False

    tasks: dict[str, HarnessTask] = Field(min_length=1)
    """Name to task; names become metric columns."""

    @field_validator("tasks")
    @classmethod
    def _plain_names(cls, tasks: dict[str, HarnessTask]) -> dict[str, HarnessTask]:
        for name in tasks:
            check_name("task", name)
        return tasks

    def pin(self, base: Path, *, on_gpu: bool) -> LmEval:
        """With every task found and fingerprinted.

        Raises:
            DataError: with all that is missing; see `harness.pin_task`.
        """

        def pinned(name: str, task: HarnessTask) -> HarnessTask:
            found = pin_task(task.task or name, base, num_fewshot=task.num_fewshot)
            return task.with_(pinned=found)  # type: ignore[no-any-return]

        tasks = collect((("tasks", name), partial(pinned, name, task)) for name, task in self.tasks.items())
        return self.given(tasks=dict(zip(self.tasks, tasks, strict=True)))

    def bind(self, subject: Subject) -> LmEval:
        """As it is.

        Raises:
            SpaceError: if the model predicts in place, or its words are no language's that tasks could be of.
            DataError: if a task lets answers be longer than the model has positions.
        """
        if subject.objective.head != "causal":
            raise SpaceError(f"lm_eval needs a causal model, and {subject.objective.name} trains a masked one")
        if not subject.corpus.is_natural_language:
            raise SpaceError(f"lm_eval needs pretrain.data text, not {subject.corpus.name}: its words spell no text")
        longest = subject.objective.input_length(subject.sequence_length)
        num_positions = subject.model.named_positions(longest) if subject.model else None
        if num_positions is not None:
            pinned = ((name, task.pinned) for name, task in self.tasks.items() if task.pinned)
            collect((("tasks", name), partial(check_answers, task, num_positions)) for name, task in pinned)
        return self

    def by_task(self) -> Mapping[str | None, LmEval]:
        """A stage for each task: a further one leaves the others' results as they are."""
        return {name: self.with_(tasks={name: task}) for name, task in self.tasks.items()}

    def run(self, inputs: Mapping[str, Path], out: Path, worker: Worker) -> dict[str, float]:
        """Of its one task the harness's scores with their standard errors, NaN where it gives none."""
        task = self._only
        assert task.pinned
        model = load_model(inputs["checkpoint"]).to(worker.device).eval()
        found = evaluate(
            task.pinned,
            model,
            load_tokenizer(inputs["checkpoint"]),
            limit=task.limit,
            batch_sequences=BATCH_SEQUENCES,
        )
        (out / "harness.json").write_text(json.dumps(found.document, indent=1))
        return found.values | {"num_cut": float(found.num_cut)}

    def metrics(self, corpus: Corpus) -> tuple[Metric, ...]:
        """Of its one task each score, better as the harness says, and its standard error; requests that did not fit."""
        pinned = self._only.pinned
        scores = [
            metric
            for score in (pinned.scores if pinned else ())
            for metric in (Metric(score.name, score.direction), Metric(f"{score.name}_stderr"))
        ]
        return (*scores, Metric("num_cut", unit="requests"))

    def flops(self, size: Size, corpus: Corpus) -> float:
        """A forward pass over each request: prompts of typical length, read again for each of typical choices."""
        length = self._request_tokens
        is_choice = self._only.pinned is not None and self._only.pinned.output_type == "multiple_choice"
        num = (self._only.limit or TYPICAL_EXAMPLES) * (TYPICAL_CHOICES if is_choice else 1)
        return size.forward_flops(num * length, length)

    def memory_bytes(self, size: Size, resources: Resources) -> int:
        """Weights, one layer's activations, and logits with their log-softmax of a batch, all in 32 bits."""
        tokens = BATCH_SEQUENCES * self._request_tokens
        return size.weights_bytes + tokens * (size.forward_bytes + 8 * size.vocab_size)

    def disk_bytes(self, size: Size) -> int:
        """None: its numbers stand in its record."""
        return 0

    @property
    def _only(self) -> HarnessTask:
        (task,) = self.tasks.values()
        return task

    @property
    def _request_tokens(self) -> int:
        """Of a question with the solved ones before it, and an answer that is written, if it is."""
        pinned = self._only.pinned
        num_shots = pinned.num_fewshot if pinned else 0
        answer = TYPICAL_ANSWER if pinned and pinned.output_type == "generate_until" else 0
        return (1 + num_shots) * TYPICAL_LENGTH + answer
