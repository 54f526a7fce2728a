"""A sweep file, as declared: its sections, and what can be wrong with it before any data is looked at."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from raysweep.errors import Finding, Place
from raysweep.plan import Finetuning
from raysweep.search import Axis, Choice, Grid, Resources, Search
from raysweep.spec import Provenance, Spec, check_name
from raysweep.stages.base import StageSpec
from raysweep.stages.fetch import Existing
from raysweep.stages.flatness import Flatness
from raysweep.stages.indicators import Indicators
from raysweep.stages.pretrain import Recipe

# More than any sweep has been; a grid of a few long axes is beyond it at once.
MAX_TRIALS = 10_000
MAX_STAGES = 1_000_000

_PHASE = re.compile(r"(?<=^pretrain)\.phases\.[^.]*")
"""Of a path, what leads into a phase."""


def _pretrain_tag(value: Any) -> str:
    if isinstance(value, Spec):
        return "from" if isinstance(value, Existing) else "recipe"
    return "from" if isinstance(value, dict) and "from" in value else "recipe"


PretrainSection = Annotated[
    Annotated[Recipe, Tag("recipe")] | Annotated[Existing, Tag("from")], Discriminator(_pretrain_tag)
]
"""A recipe, or a checkpoint that exists already."""


class Declared(Spec):
    """A sweep file, as declared."""

    name: str
    """Opens the run's name; of letters, digits, '_', '-' and '.'."""
    pretrain: PretrainSection
    """The base recipe, runnable as it stands; or, with `from`, a checkpoint that exists already."""
    # What is measured on every checkpoint, in this order: a stage of its own kind for each section that is a StageSpec.
    indicators: Indicators | None = None
    """Zero- and few-shot scores of the fine-tuning tasks, on every checkpoint; left out: none."""
    flatness: Flatness | None = None
    """Traces of Hessian, Gauss-Newton and Fisher matrices, on every checkpoint; left out: none."""
    sft: Finetuning | None = None
    """Tasks that every checkpoint is fine-tuned on; left out: none."""
    resources: Annotated[Resources, Provenance()] = Resources()
    """What runs it; no part of any result's identity."""
    search: Search = Search()
    """Who picks the points of the space."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1)
    """Of pretraining; each runs every point."""
    sweep: dict[str, Axis] = Field(default_factory=dict)
    """Axes: a path under pretrain, such as pretrain.optimizer.lr, to the values it takes."""

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        check_name("sweep", name)
        return name

    @property
    def measurements(self) -> Mapping[str, StageSpec]:
        """What is measured on every checkpoint beside its held-out loss, by section."""
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: section for name, section in sections.items() if isinstance(section, StageSpec)}

    @field_validator("*")
    @classmethod
    def _not_filled_by_hand(cls, section: Any) -> Any:
        if isinstance(section, StageSpec) and (given := section.model_fields_set & section.filled):
            raise ValueError(f"{min(given)} is taken from pretrain and sft.tasks; remove it here")
        return section

    @model_validator(mode="after")
    def _indicators_of_tasks(self) -> Declared:
        if self.indicators and not self.sft:
            raise ValueError("indicators are scores of the tasks of sft: add sft, or remove indicators")
        return self

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise ValueError(f"seeds {list(seeds)} holds one twice")
        return seeds


class Section(Spec):
    """The pretrain section alone, as a variant has it."""

    pretrain: PretrainSection


def named_values(axis: Axis | None) -> tuple[Any, ...] | dict[str, Any] | None:
    """The values of a grid or choice axis, or its labels with the values behind them; None for a range."""
    if isinstance(axis, Grid):
        return axis.grid
    return axis.choice if isinstance(axis, Choice) else None


def kind_of(axis: Axis) -> str:
    """grid, choice, uniform, ..."""
    return next(iter(type(axis).model_fields))


def axis_values(axis: Axis) -> dict[Place, Any]:
    """Place below the axis -> value: every value of a grid or choice, the bounds of a range."""
    kind = kind_of(axis)
    values = getattr(axis, kind)
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    return {(kind, place): value for place, value in pairs}


def axis_findings(declared: Declared) -> Iterator[Finding]:
    """What is wrong with the axes as such."""
    for path, axis in declared.sweep.items():
        loc = ("sweep", path)
        if not path.startswith("pretrain."):
            yield loc, "a sweep path starts with 'pretrain.'; what is measured is equal for all variants"
        elif path == "pretrain.from" and isinstance(declared.pretrain, Recipe):
            yield loc, "pretrain is a recipe; to sweep checkpoints that exist, write pretrain: {from: ..., data: ...}"
        elif _PHASE.sub("", path) == "pretrain.checkpoints":
            yield loc, "checkpoints is a list of one trajectory's steps, not an axis: write it under pretrain"
        elif _PHASE.sub("", path) == "pretrain.name":
            yield loc, "the name of a phase is no axis: it is part of no result"
        elif _PHASE.sub("", path).startswith("pretrain.data.domains"):
            yield loc, "a part of the domains cannot be swept: sweep pretrain.data (named values) or pretrain.data.mix"
        elif _PHASE.sub("", path).startswith("pretrain.data.model"):
            yield loc, "the model that writes the text cannot be swept by itself: sweep pretrain.data (named values)"
        elif path == "pretrain.model.config":
            yield loc, "a configuration cannot be swept by itself: sweep pretrain.model (named values)"
        elif declared.search.name == "grid" and not isinstance(axis, Grid | Choice):
            yield loc, "a grid search needs grid: [...] here, or set search.name to random or optuna"
        values = named_values(axis)
        if isinstance(values, tuple) and len(set(map(repr, values))) != len(values):
            yield loc, f"names a value twice: {list(values)}"
    if declared.search.name == "optuna" and len(declared.seeds) > 1:
        yield ("seeds",), f"optuna compares single trials, so seeds holds one, not {len(declared.seeds)}"
    yield from _size_findings(declared)


def _size_findings(declared: Declared) -> Iterator[Finding]:
    """A sweep that multiplies to more than could be run, or even listed."""
    axes = {path: len(named_values(axis) or ()) for path, axis in declared.sweep.items()}
    factors = axes | {"seeds": len(declared.seeds)}
    if declared.search.name != "grid":
        factors = {"num_trials": declared.search.num_trials or 0, "seeds": len(declared.seeds)}
    num_trials = math.prod(factors.values())
    product = " x ".join(f"{name} {num:,}" for name, num in factors.items())
    where = ("sweep",) if declared.search.name == "grid" else ("search", "num_trials")
    if num_trials > MAX_TRIALS:
        yield where, f"{product} are {num_trials:,} trials; at most {MAX_TRIALS:,} can be run"
    elif (num_stages := num_trials * _stages_of_a_trial(declared)) > MAX_STAGES:
        yield (
            where,
            f"{product} are {num_trials:,} trials with {num_stages:,} stages; at most {MAX_STAGES:,} can be run",
        )


def _stages_of_a_trial(declared: Declared) -> int:
    pretrain, sft = declared.pretrain, declared.sft
    each = 2 + len(declared.measurements)
    if sft:
        each += len(sft.tasks) * len(sft.seeds) * (len(sft.first_lrs) + sft.linear_probe)
    if isinstance(pretrain, Existing):
        return each
    listed = [pretrain.checkpoints, *(phase.checkpoints for phase in pretrain.phases)]
    return len(pretrain.phases) + each * sum(max(1, len(checkpoints)) for checkpoints in listed)
