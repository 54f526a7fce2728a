"""The search space: a base recipe, the axes that vary it, and what is measured on every checkpoint.

`load` reads a sweep file and pins its data; from then on a space is a value: `trial(point, seed)` touches no disk.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator

from raysweep.document import Document, findings, nearest, read_document, validate
from raysweep.errors import SpaceError
from raysweep.plan import Finetuning, Trial, chain
from raysweep.search import Axis, Choice, Grid, LogUniform, RandInt, Resources, Search, Uniform
from raysweep.spec import Provenance, Spec, canonical, fingerprint
from raysweep.stages.fetch import Existing
from raysweep.stages.flatness import Flatness
from raysweep.stages.indicators import Indicators
from raysweep.stages.pretrain import Recipe

Point = Mapping[str, Any]
"""Dotted path -> value (or label of a named value)."""


def _pretrain_tag(value: Any) -> str:
    if isinstance(value, Spec):
        return "from" if isinstance(value, Existing) else "recipe"
    return "from" if isinstance(value, dict) and "from" in value else "recipe"


Pretrain = Annotated[Annotated[Recipe, Tag("recipe")] | Annotated[Existing, Tag("from")], Discriminator(_pretrain_tag)]
"""A recipe, or a checkpoint that exists already."""


class Declared(Spec):
    """A sweep file, as declared."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    """Opens the run's name; of letters, digits, '_', '-' and '.'."""
    pretrain: Pretrain
    """The base recipe, runnable as it stands; or, with `from`, a checkpoint that exists already."""
    flatness: Flatness | None = None
    """Traces of Hessian, Gauss-Newton and Fisher matrices, on every checkpoint; left out: none."""
    indicators: Indicators | None = None
    """Perplexity, zero- and few-shot scores, on every checkpoint; left out: none."""
    sft: Finetuning | None = None
    """Tasks that every checkpoint is fine-tuned on; left out: none."""
    resources: Annotated[Resources, Provenance()] = Resources()
    """What runs it; no part of any result's identity."""
    search: Search = Search()
    """Who picks the points of the space."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Of pretraining; each runs every point."""
    sweep: dict[str, Axis] = Field(default_factory=dict)
    """Axes: a path under pretrain, such as pretrain.optimizer.lr, to the values it takes."""

    @field_validator("flatness", "indicators")
    @classmethod
    def _not_filled_by_hand(cls, section: Flatness | Indicators | None) -> Flatness | Indicators | None:
        given = section.model_fields_set & {"mix", "sequence_length", "tasks"} if section else set()
        if given:
            raise ValueError(f"{min(given)} is taken from pretrain and sft.tasks; remove it here")
        return section

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise ValueError(f"seeds {list(seeds)} holds one twice")
        return seeds


@dataclass(frozen=True)
class SearchSpace:
    """A validated sweep file with its data pinned."""

    declared: Declared
    base: Mapping[str, Any]
    """The pretrain section as plain values, as written, its data pinned."""
    text: str
    """The sweep file."""
    checkpoints: Mapping[str, Existing] = field(default_factory=dict)
    """Value of a `pretrain.from` axis -> the pinned checkpoint."""

    @property
    def name(self) -> str:
        """The sweep's name."""
        return self.declared.name

    def identity(self) -> str:
        """All that says which results this sweep asks for, as indented JSON."""
        whole = canonical(self.declared)
        # No stage's identity, but the run's: with another list its table would hold a checkpoint under two trials.
        if isinstance(self.declared.pretrain, Recipe):
            whole["checkpoints"] = list(self.declared.pretrain.checkpoint_steps)
        whole["from"] = {path: existing.fingerprint for path, existing in self.checkpoints.items()}
        return json.dumps(whole, indent=1, sort_keys=True)

    def run_name(self) -> str:
        """`name-` and eight hex digits of the identity: an edited sweep is another run of the same store."""
        return f"{self.name}-{fingerprint(self.identity())[:8]}"

    def values(self, path: str) -> list[Any]:
        """The values of a grid or choice axis, a named one by its label."""
        return list(_named_values(self.declared.sweep[path]) or ())

    def points(self) -> Iterator[Point]:
        """The points of a grid or random search; Optuna picks its own."""
        search = self.declared.search
        if search.name == "grid":
            names = list(self.declared.sweep)
            for values in itertools.product(*(self.values(name) for name in names)):
                yield dict(zip(names, values, strict=True))
        else:
            for index in range(search.num_trials or 0):
                # One generator a point: the first n points are the same however many are asked for.
                draw = random.Random(f"{search.seed}:{index}")
                yield {name: _sample(axis, self.values(name), draw) for name, axis in self.declared.sweep.items()}

    def metric_names(self) -> tuple[str, ...]:
        """What a search may ask for: the columns of a checkpoint of any variant."""
        alone = [{path: value} for path in self.declared.sweep for value in self.values(path)]
        seed = self.declared.seeds[0]
        return tuple(dict.fromkeys(name for point in [{}, *alone] for name in self.trial(point, seed).metric_names))

    def trial(self, point: Point, seed: int) -> Trial:
        """The chain of stages of one variant under one seed.

        Raises:
            SpaceError: if the point is not valid.
        """
        declared = self.declared
        pretrain = self._pretrain(point) if point else declared.pretrain
        return Trial(
            point=dict(point),
            seed=seed,
            stages=chain(
                pretrain, flatness=declared.flatness, indicators=declared.indicators, sft=declared.sft, seed=seed
            ),
            auto_lrs=declared.sft is not None and declared.sft.lrs == "auto",
        )

    def _pretrain(self, point: Point) -> Recipe | Existing:
        data = copy.deepcopy(dict(self.base))
        for path, value in point.items():
            _put(data, path, self._meant(path, value))
        if existing := self.checkpoints.get(point.get("pretrain.from", "")):
            data |= {"from": existing.from_, "fingerprint": existing.fingerprint}
        try:
            return validate(_Section, {"pretrain": data}).pretrain
        except ValidationError as error:
            said = "; ".join(f"{_dotted(loc)}: {text}" for loc, text in findings(_Section, {"pretrain": data}, error))
            where = ", ".join(f"{path} = {value!r}" for path, value in point.items())
            raise SpaceError(f"point {where}: {said}") from error

    def _meant(self, path: str, value: Any) -> Any:
        """The value behind a label."""
        named = _named_values(self.declared.sweep.get(path))
        return named[value] if isinstance(named, dict) else value


class _Section(Spec):
    pretrain: Pretrain


def load(path: str | Path) -> SearchSpace:
    """Read a sweep file, validate all of it and pin its data.

    Raises:
        SpaceError: with every finding, a line each: file, line, field, value, and what would be right.
        DataError: if data it names is missing, empty or malformed.
    """
    document = read_document(Path(path))
    try:
        declared = validate(Declared, document.data)
    except ValidationError as error:
        found = findings(Declared, document.data, error)
        raise SpaceError("\n".join(f"{document.at(loc)}: {text}" for loc, text in found)) from error
    if found := list(_axis_findings(declared)):
        raise SpaceError("\n".join(f"{document.at(loc)}: {text}" for loc, text in found))
    space = _pin(document, declared)
    if found := list(_value_findings(space)) or list(_metric_findings(space)):
        raise SpaceError("\n".join(f"{document.at(loc)}: {text}" for loc, text in found))
    return space


def _axis_findings(declared: Declared) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What is wrong with the axes as such."""
    for path, axis in declared.sweep.items():
        loc = ("sweep", path)
        if not path.startswith("pretrain."):
            yield loc, "a sweep path starts with 'pretrain.'; what is measured is equal for all variants"
        elif path == "pretrain.checkpoints":
            yield loc, "checkpoints is a list of one trajectory's steps, not an axis: write it under pretrain"
        elif path.startswith("pretrain.data.domains"):
            yield loc, "a part of the domains cannot be swept: sweep pretrain.data (named values) or pretrain.data.mix"
        elif declared.search.name == "grid" and not isinstance(axis, Grid | Choice):
            yield loc, "a grid search needs grid: [...] here, or set search.name to random or optuna"
        values = _named_values(axis)
        if isinstance(values, tuple) and len(set(map(repr, values))) != len(values):
            yield loc, f"names a value twice: {list(values)}"
    if declared.search.name == "optuna" and len(declared.seeds) > 1:
        yield ("seeds",), f"optuna compares single trials, so seeds holds one, not {len(declared.seeds)}"


def _value_findings(space: SearchSpace) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What is wrong with each value of each axis, put alone onto the base."""
    for path, axis in space.declared.sweep.items():
        bounds = next(iter(axis.model_dump().values()))
        for value in space.values(path) or bounds:
            try:
                space._pretrain({path: value})
            except SpaceError as error:
                yield ("sweep", path), str(error)


def _metric_findings(space: SearchSpace) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Metrics that the search asks for and no stage reports."""
    search = space.declared.search
    asked: dict[tuple[str | int, ...], str] = {
        ("search", "objectives", index, "metric"): objective.metric for index, objective in enumerate(search.objectives)
    }
    if search.scheduler:
        asked["search", "scheduler", "metric"] = search.scheduler.metric
    known = space.metric_names() if asked else ()
    for loc, metric in asked.items():
        if metric not in known:
            close = ", ".join(nearest(metric, known)) or ", ".join(known[:3]) + ", ..."
            yield loc, f"no stage of this sweep reports {metric!r}, did you mean: {close}; `raysweep plan` lists all"


def _pin(document: Document, declared: Declared) -> SearchSpace:
    """Fingerprints into all that names data or a checkpoint, so that workers need not look."""
    folder = document.path.absolute().parent
    pretrain = declared.pretrain.pin(folder)
    sft = declared.sft and declared.sft.pin(folder)
    if sft:
        for name, task in sft.tasks.items():
            bound = task.bind(name, pretrain.data)
            if declared.indicators or (task.is_classification and sft.linear_probe):
                bound.check_indicator(name)
    # What "auto" stands for here: a checkpoint trained in other numbers is another checkpoint.
    precision = "bf16" if declared.resources.gpus_per_worker else "fp32"
    if isinstance(pretrain, Recipe) and pretrain.precision == "auto":
        pretrain = pretrain.with_(precision=precision)
    if sft and sft.hyperparameters.precision == "auto":
        sft = sft.with_(hyperparameters=sft.hyperparameters.with_(precision=precision))
    base = document.data["pretrain"] | {"data": pretrain.data.model_dump(mode="json", by_alias=True)}
    if isinstance(pretrain, Recipe):
        base |= {"precision": pretrain.precision}
    else:
        base |= {"from": pretrain.from_, "fingerprint": pretrain.fingerprint}
    sweep = dict(declared.sweep)
    checkpoints: dict[str, Existing] = {}
    for path, axis in declared.sweep.items():
        values = _named_values(axis) or ()
        if path == "pretrain.from":
            for value in values:
                section = validate(_Section, {"pretrain": base | {"from": value}}).pretrain
                checkpoints[str(value)] = section.pin(folder)  # type: ignore[assignment]
        elif path == "pretrain.data" and isinstance(values, dict):
            pinned = {}
            for label, value in values.items():
                section = validate(_Section, {"pretrain": base | {"data": value}}).pretrain
                pinned[label] = section.pin(folder).data.model_dump(mode="json", by_alias=True)
            sweep[path] = Grid(grid=pinned) if isinstance(axis, Grid) else Choice(choice=pinned)
    declared = declared.with_(pretrain=pretrain, sft=sft, sweep=sweep)
    return SearchSpace(declared=declared, base=base, text=document.text, checkpoints=checkpoints)


def _named_values(axis: Axis | None) -> tuple[Any, ...] | dict[str, Any] | None:
    if isinstance(axis, Grid):
        return axis.grid
    return axis.choice if isinstance(axis, Choice) else None


def _put(data: dict[str, Any], path: str, value: Any) -> None:
    """Set `pretrain.a.b` in the pretrain section; parts that are not there are made, for validation to judge."""
    *parents, last = path.split(".")[1:]
    for part in parents:
        inner = data.get(part)
        data[part] = inner = inner if isinstance(inner, dict) else {}
        data = inner
    data[last] = copy.deepcopy(value)


def _sample(axis: Axis, values: list[Any], draw: random.Random) -> Any:
    if isinstance(axis, Uniform):
        return draw.uniform(*axis.uniform)
    if isinstance(axis, LogUniform):
        return math.exp(draw.uniform(*map(math.log, axis.loguniform)))
    if isinstance(axis, RandInt):
        return draw.randint(*axis.randint)
    return draw.choice(values)


def _dotted(loc: tuple[str | int, ...]) -> str:
    return ".".join(map(str, loc))
