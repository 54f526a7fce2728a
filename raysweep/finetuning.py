"""What every checkpoint is fine-tuned on: the section `sft` of a sweep file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from raysweep.data.corpora import Corpus
from raysweep.errors import collect
from raysweep.objectives.heads import Head
from raysweep.spec import Neutral, Provenance, Spec, check_name
from raysweep.stages.sft import Hyperparameters
from raysweep.tasks.families import Task

FIRST_LRS = (1e-4, 3e-4, 1e-3)
"""The fine-tuning rates that `sft.lrs: auto` begins with; `plan.LADDER` has those that it may come to."""


def _rates_or_word(lrs: Any) -> str | None:
    return "word" if lrs == "auto" else "rates" if isinstance(lrs, list | tuple) else None


Rates = Annotated[
    Annotated[tuple[float, ...], Tag("rates")] | Annotated[Literal["auto"], Tag("word")],
    Discriminator(
        _rates_or_word,
        custom_error_type="rates",
        custom_error_message="write a list of rates, such as [1e-4, 3e-4, 1e-3], or auto",
    ),
]


class Finetuning(Spec):
    """What every checkpoint is fine-tuned on: tasks x seeds x learning rates, the rate picked by validation score."""

    tasks: dict[str, Task] = Field(min_length=1)
    """Name to downstream task; names become metric columns."""
    families: Annotated[dict[str, Annotated[tuple[str, ...], Field(min_length=1)]], Provenance()] = Field(
        default_factory=dict
    )
    """Name of a family to the names of its tasks, such as cms: [arc_easy, comve]; means over them are targets, too."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1)
    """Of fine-tuning; each task is trained once with each."""
    lrs: Rates = (3e-4,)
    """Learning rates, of which that with the best validation score counts, for each checkpoint and task by itself; or
    auto: 1e-4, 3e-4 and 1e-3, and then lower and higher ones, until the best is inside."""
    hyperparameters: Hyperparameters = Hyperparameters()
    """What all fine-tuning runs share."""
    linear_probe: bool = True
    """Whether tasks with labels also get a linear probe on frozen features."""
    forgetting: Annotated[bool, Neutral(False)] = False
    """Whether it is measured how much the pretraining loss rises by fine-tuning: a target beside the score."""
    likelihood: Annotated[bool, Neutral(False)] = False
    """Whether the log-likelihood of right answers is measured: a target beside the score that tells more where scores
    are near chance, and then picks the rate."""

    @field_validator("tasks")
    @classmethod
    def _plain_names(cls, tasks: dict[str, Task]) -> dict[str, Task]:
        for name in tasks:
            check_name("task", name)
        return tasks

    @property
    def first_lrs(self) -> tuple[float, ...]:
        """The rates to begin with, whatever comes out."""
        return FIRST_LRS if isinstance(self.lrs, str) else self.lrs

    @field_validator("seeds", "lrs")
    @classmethod
    def _distinct(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if isinstance(values, tuple) and len(set(values)) != len(values):
            raise ValueError(f"{list(values)} holds one twice")
        return values

    @field_validator("lrs")
    @classmethod
    def _positive(cls, values: tuple[float, ...] | str) -> tuple[float, ...] | str:
        if not isinstance(values, str) and min(values, default=0.0) <= 0:
            raise ValueError(f"{list(values)}: give one or more learning rates above 0, or auto")
        return values

    def pin(self, base: Path) -> Finetuning:
        """With every task's data found, checked and fingerprinted."""
        tasks = collect((("tasks", name), partial(task.pin, base)) for name, task in self.tasks.items())
        return self.with_(tasks=dict(zip(self.tasks, tasks, strict=True)))  # type: ignore[no-any-return]

    def bind(self, corpus: Corpus, head: Head) -> dict[str, Task]:
        """Its tasks, each with what it takes from the corpus, for a model that predicts so.

        Raises:
            RaysweepError: with all that do not go together.
        """
        bound = collect((("tasks", name), partial(_bound, task, corpus, head)) for name, task in self.tasks.items())
        return dict(zip(self.tasks, bound, strict=True))


def _bound(task: Task, corpus: Corpus, head: Head) -> Task:
    task.check_head(head)
    return task.bind(corpus)
