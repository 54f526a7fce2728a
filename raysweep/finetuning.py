"""What every checkpoint is fine-tuned on: the section `sft` of a sweep file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from raysweep.data.corpora import Corpus
from raysweep.errors import SpaceError, collect
from raysweep.objectives.heads import Head
from raysweep.scores import FULL, mixture_name, tuning_name
from raysweep.spec import Neutral, Provenance, Spec, check_name
from raysweep.stages.sft import Hyperparameters
from raysweep.tasks.families import Task
from raysweep.tasks.mixture import Mixture
from raysweep.train.methods import Full, Method
from raysweep.train.models import Model


def _form_of_rates(lrs: Any) -> str | None:
    return "word" if lrs == "auto" else "rates" if isinstance(lrs, list | tuple) else None


def _form_of_lrs(lrs: Any) -> str | None:
    return "by_method" if isinstance(lrs, Mapping) else _form_of_rates(lrs)


Rates = Annotated[
    Annotated[tuple[float, ...], Tag("rates")] | Annotated[Literal["auto"], Tag("word")],
    Discriminator(
        _form_of_rates,
        custom_error_type="rates",
        custom_error_message="write a list of rates, such as [1e-4, 3e-4, 1e-3], or auto",
    ),
]
Lrs = Annotated[
    Annotated[tuple[float, ...], Tag("rates")]
    | Annotated[Literal["auto"], Tag("word")]
    | Annotated[dict[str, Rates], Tag("by_method")],
    Discriminator(
        _form_of_lrs,
        custom_error_type="lrs",
        custom_error_message="write a list of rates, such as [1e-4, 3e-4, 1e-3], or one for each method, or auto",
    ),
]
"""The rates of all methods, or by the method's name."""


class Finetuning(Spec):
    """What every checkpoint is fine-tuned on: tasks x methods x seeds x rates, the rate picked by validation score."""

    tasks: dict[str, Task] = Field(min_length=1)
    """Name to downstream task; names become metric columns."""
    families: Annotated[dict[str, tuple[str, ...]], Provenance()] = Field(default_factory=dict)
    """Name of a family to the names of its tasks, such as cms: [arc_easy, comve]: means over them are targets, too, and
    indicators those of what is measured by task."""
    mixtures: Annotated[dict[str, tuple[str, ...]], Neutral({})] = Field(default_factory=dict)
    """Name of a mixture to the names of its tasks, such as all: [arc_easy, comve], all of them answered in words: one
    training on the examples of all, beside those on each task, scored on each: sft/all/arc_easy/score, and their mean
    sft/all/mean_score. A task is drawn as often as it has examples, of which its max_train_examples is the limit."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1)
    """Of fine-tuning; each task is trained once with each."""
    methods: Annotated[dict[str, Method], Neutral({FULL: Full()})] = Field(default={FULL: Full()}, min_length=1)
    """Name to method of fine-tuning, such as {full: {name: full}, lora: {name: lora, r: 16}}. Columns of each name it,
    sft/lora/<task>/score, but those of full fine-tuning, whose name here is full."""
    lrs: Lrs = (3e-4,)
    """Learning rates, of which that with the best validation score counts, for each checkpoint and task by itself; or
    auto: 1e-4, 3e-4 and 1e-3 (of lora ten times these), and then lower and higher ones, until both ends do worse than
    the best, the upper one by more than a standard error of its score where a score picks. By method: {full:
    [1e-4, 3e-4], lora: auto}; else all methods have the same."""
    hyperparameters: Hyperparameters = Hyperparameters()
    """What all fine-tuning runs share."""
    linear_probe: bool = True
    """Whether tasks with labels also get a linear probe on frozen features."""
    forgetting: Annotated[bool, Neutral(False)] = False
    """Whether it is measured how much the pretraining loss rises by fine-tuning: a target beside the score."""
    likelihood: Annotated[bool, Neutral(False)] = False
    """Whether the log-likelihood of right answers is measured: a target beside the score that tells more where scores
    are near chance, and then picks the rate."""

    @field_validator("families", "mixtures")
    @classmethod
    def _groups(cls, groups: dict[str, tuple[str, ...]], info: ValidationInfo) -> dict[str, tuple[str, ...]]:
        what, least, words = ("family", 1, "one") if info.field_name == "families" else ("mixture", 2, "two")
        for name, tasks in groups.items():
            check_name(what, name)
            if len(tasks) < least or len(set(tasks)) < len(tasks):
                raise ValueError(f"{name}: {list(tasks)}: name {words} or more tasks, each once")
        return groups

    @field_validator("tasks")
    @classmethod
    def _plain_names(cls, tasks: dict[str, Task]) -> dict[str, Task]:
        for name in tasks:
            check_name("task", name)
        return tasks

    @field_validator("methods")
    @classmethod
    def _named_methods(cls, methods: dict[str, Method]) -> dict[str, Method]:
        for name, method in methods.items():
            check_name("method", name)
            if (name == FULL) != isinstance(method, Full):
                raise ValueError(
                    f"{name}: {{name: {method.name}}}: the name {FULL} is that of full fine-tuning, and of no other"
                )
        return methods

    @field_validator("seeds", "lrs")
    @classmethod
    def _distinct(cls, values: Any) -> Any:
        for each in values.values() if isinstance(values, dict) else [values]:
            if isinstance(each, tuple) and len(set(each)) != len(each):
                raise ValueError(f"{list(each)} holds one twice")
        return values

    @field_validator("lrs")
    @classmethod
    def _positive(cls, values: Any) -> Any:
        for each in values.values() if isinstance(values, dict) else [values]:
            if not isinstance(each, str) and min(each, default=0.0) <= 0:
                raise ValueError(f"{list(each)}: give one or more learning rates above 0, or auto")
        return values

    @model_validator(mode="after")
    def _go_together(self) -> Finetuning:
        named: dict[str, Iterable[str]] = {"task": self.tasks, "family": self.families, "mixture": self.mixtures}
        for of, names in named.items():
            for name in self.methods.keys() & {*names}:
                raise ValueError(f"{name!r} is a {of} and a method: columns could not tell them apart; rename one")
        if self.mixtures and self.hyperparameters.examples == "by_seed":
            raise ValueError(
                "hyperparameters.examples: by_seed draws of one task's examples; leave mixtures out, or it"
            )
        if isinstance(self.lrs, dict) and self.lrs.keys() != self.methods.keys():
            asked, given = ", ".join(self.methods), ", ".join(self.lrs)
            raise ValueError(f"lrs are by method, of {given}; methods are {asked}: give each its rates, and no other")
        return self

    def check_examples(self, task: Task) -> None:
        """See that a task of `bind` has labelled examples for every seed, where each has its own. Raises SpaceError."""
        size = self.hyperparameters.max_examples
        if self.hyperparameters.examples == "first" or size is None:
            return
        num = min(len(task.ids("train")), task.num_finetuned)
        if size > num or len({seed % (num // size) for seed in self.seeds}) < len(self.seeds):
            raise SpaceError(
                f"hyperparameters.examples: by_seed: of {num:,} training examples the first {num // size} seeds from 0 "
                f"on have {size:,} each that no other has, and seeds are {list(self.seeds)}; lower max_examples, take "
                "fewer seeds, or give the task more examples"
            )

    def lrs_of(self, method: str) -> tuple[float, ...] | Literal["auto"]:
        """The rates of a method of this name."""
        return self.lrs[method] if isinstance(self.lrs, dict) else self.lrs

    def first_lrs(self, method: str) -> tuple[float, ...]:
        """The rates that it begins with, whatever comes out; `plan.LADDER` has those that auto may come to."""
        lrs = self.lrs_of(method)
        return self.methods[method].first_lrs if isinstance(lrs, str) else lrs

    @property
    def auto_lrs(self) -> frozenset[str]:
        """The methods whose rates are auto."""
        return frozenset(method for method in self.methods if self.lrs_of(method) == "auto")

    @property
    def auto_tunings(self) -> frozenset[str]:
        """What stands before the tasks of their stages: see `scores.method_of`."""
        mixed = {tuning_name(mixture, method) for mixture in self.mixtures for method in self.auto_lrs}
        return self.auto_lrs | mixed

    def mixed(self, tasks: Mapping[str, Task]) -> dict[str, Mixture]:
        """Its mixtures, of the tasks of `bind`, each by its `scores.mixture_name`."""
        return {
            mixture_name(name, members): Mixture(tasks={each: tasks[each] for each in sorted(members)})
            for name, members in self.mixtures.items()
        }

    def pin(self, base: Path) -> Finetuning:
        """With every task's data found, checked and fingerprinted, and what methods need found to be installed."""
        tasks = [(("tasks", name), partial(task.pin, base)) for name, task in self.tasks.items()]
        needed = [(("methods", name), method.check_installed) for name, method in self.methods.items()]
        pinned = collect([*tasks, *needed])[: len(tasks)]
        return self.with_(tasks=dict(zip(self.tasks, pinned, strict=True)))  # type: ignore[no-any-return]

    def bind(self, corpus: Corpus, head: Head) -> dict[str, Task]:
        """Its tasks, each with what it takes from the corpus, for a model that predicts so.

        Raises:
            RaysweepError: with all that do not go together.
        """
        bound = collect((("tasks", name), partial(_bound, task, corpus, head)) for name, task in self.tasks.items())
        return dict(zip(self.tasks, bound, strict=True))

    def check_model(self, model: Model) -> None:
        """See that its methods fit such models. Raises SpaceError."""
        collect((("methods", name), partial(method.check_model, model)) for name, method in self.methods.items())


def _bound(task: Task, corpus: Corpus, head: Head) -> Task:
    task.check_head(head)
    return task.bind(corpus)
