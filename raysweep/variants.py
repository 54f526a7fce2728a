"""A sweep as a value: its points, and the chain of stages of each. Pure: `trial(point, seed)` touches no disk."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any

from pydantic import ValidationError

from raysweep.declared import Declared, Section
from raysweep.errors import Place, SpaceError, collect, dotted
from raysweep.pinning import SOURCES, put
from raysweep.plan import Trial, chain, model_of, objective_of
from raysweep.resources import AskedResources, ByVariant, Resources
from raysweep.scores import Column, family_columns
from raysweep.search import Axis, LogUniform, RandInt, Uniform, Zip, kind_of, labels, paths_of, settings
from raysweep.spec import canonical, fingerprint
from raysweep.stages.base import Subject
from raysweep.stages.fetch import Existing
from raysweep.stages.phases import segments
from raysweep.stages.pretrain import Recipe
from raysweep.validation import findings, validate

Point = Mapping[str, Any]
"""Axis -> its value here, or the name of a value. A zip goes by its own name, any other axis by its path."""


@dataclass(frozen=True)
class SearchSpace:
    """A validated sweep file with its data pinned."""

    declared: Declared
    base: Mapping[str, Any]
    """The pretrain section as plain values, as written, its data pinned."""
    text: str
    """The sweep file, with the values given in place of its own."""
    checkpoints: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Value of a `pretrain.from` or `pretrain.start` axis -> what the pinned checkpoint is in the pretrain section."""
    warnings: tuple[str, ...] = ()
    """What may be meant, but seldom is; with its line of the sweep file."""
    chosen: ByVariant[Resources] | None = None
    """What its gangs are made of, once the planner has chosen what the file leaves to it (`auto`)."""

    @cached_property
    def resources(self) -> ByVariant[Resources]:
        """What its gangs are made of. Raises SpaceError while some of it is left to choose."""
        asked = self.declared.resources.by_variant
        if not self.chosen and (left := {name: None for each in asked.every for name in each.autos}):
            raise SpaceError(
                f"{', '.join(left)} auto: raysweep plan and run choose it by the memory of what there is; say numbers "
                "where neither does",
                at=("resources",),
            )
        return self.chosen or asked.map(AskedResources.without_autos)

    @property
    def name(self) -> str:
        """As the file has it; runs add eight digits of the identity."""
        return self.declared.name

    def identity(self) -> str:
        """All that says which results this sweep asks for, as indented JSON."""
        whole = canonical(self.declared)
        # No stage's identity, but the run's: with another list its table would hold a checkpoint under two trials.
        if isinstance(self.declared.pretrain, Recipe):
            # Parts and tokens are other steps in other variants, so they are taken as written.
            given = self.declared.pretrain.checkpoints
            in_steps = all(isinstance(checkpoint, int) for checkpoint in given)
            whole["checkpoints"] = list(self.declared.pretrain.checkpoint_steps if in_steps else given)
            if self.declared.pretrain.phases:  # As compiled: where data lies, and a phase's name, change no result.
                parts = segments(self.declared.pretrain)
                whole["pretrain"]["phases"] = [
                    [canonical(part.recipe), part.keeps_optimizer, list(part.measured)] for part in parts
                ]
        whole["from"] = {label: given.get("start", given)["fingerprint"] for label, given in self.checkpoints.items()}
        return json.dumps(whole, indent=1, sort_keys=True)

    def run_name(self) -> str:
        """`name-` and eight hex digits of the identity: an edited sweep is another run of the same store."""
        return f"{self.name}-{fingerprint(self.identity())[:8]}"

    def values(self, name: str) -> list[Any]:
        """What a grid, choice or zip puts into points: values, or their names; nothing of a range."""
        return list(labels(self.declared.sweep[name]))

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

    def trials(self) -> Iterator[Trial]:
        """Each point of a grid or random search under each of its seeds."""
        return iter(self._trials)

    @cached_property
    def _trials(self) -> tuple[Trial, ...]:
        # Made once for all that a run and its screen ask of them: 2 ms each, of a hundred stages.
        declared, found = self.declared, []
        for point in self.points():
            more = declared.replicates.seeds if declared.replicates and declared.replicates.holds(point) else ()
            found += [self.trial(point, seed) for seed in (*declared.seeds, *more)]
        return tuple(found)

    def __getstate__(self) -> dict[str, Any]:
        # To a gang goes what was declared: it makes the one trial that it runs.
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def columns(self) -> tuple[Column, ...]:
        """Those of the checkpoints of any variant, each once; and the means over families of tasks."""
        declared = dict.fromkeys(column for trial in self._kinds_of_trial() for column in trial.columns)
        return *declared, *family_columns(declared, sft.families if (sft := self.declared.sft) else {})

    def metric_names(self) -> tuple[str, ...]:
        """What a search may ask for: the columns of the last checkpoint of any variant."""
        ends = (column for trial in self._kinds_of_trial() for column in trial.columns_at(trial.last_step))
        return tuple(dict.fromkeys(column.name for column in ends))

    def _kinds_of_trial(self) -> Iterator[Trial]:
        """A trial for all that decides which metrics there are: the domains of text, and whose loss is measured."""
        decisive = [
            name for name, axis in self.declared.sweep.items() if any(map(_decides_metrics, paths_of(name, axis)))
        ]
        points = self.points()
        if self.declared.search.name == "optuna":  # Whatever it may pick.
            values = {name: listed for name in decisive if (listed := self.values(name))}
            points = (dict(zip(values, each, strict=True)) for each in itertools.product(*values.values()))
        kinds = {tuple(repr(point.get(name)) for name in decisive): point for point in points}
        return (self.trial(point, self.declared.seeds[0]) for point in kinds.values())

    def trial(self, point: Point, seed: int) -> Trial:
        """The chain of stages of one variant under one seed.

        Raises:
            SpaceError: if the point is not valid.
        """
        declared = self.declared
        try:
            pretrain = self._pretrain(point) if point else declared.pretrain
        except SpaceError as error:
            where = ", ".join(f"{path} = {value!r}" for path, value in point.items())
            raise SpaceError(f"point {where}: {error}") from error
        return Trial(
            point=dict(point),
            seed=seed,
            stages=chain(
                pretrain,
                measurements=declared.measurements.values(),
                sft=declared.sft,
                seed=seed,
                heldout=declared.heldout,
            ),
            auto_lrs=declared.sft.auto_tunings if declared.sft else frozenset(),
            settings={name: self._settings[name][label] for name, label in point.items() if name in self._settings},
        )

    def bind(self, point: Point) -> Recipe | Existing:
        """The pretrain section of a variant, seen to go together with what follows. Raises a RaysweepError if not."""
        pretrain = self._pretrain(point) if point else self.declared.pretrain
        sft = self.declared.sft
        model = model_of(pretrain)
        measured: list[tuple[Recipe | Existing, frozenset[str] | None]] = [(pretrain, None)]
        if isinstance(pretrain, Recipe):
            [made] = collect([(("pretrain",), partial(segments, pretrain))])
            measured = [(segment.recipe, segment.shown_tokens) for segment in made if segment.measured]
        parts: list[tuple[Place, Callable[[], object]]] = []
        subjects: list[Subject] = []
        for each, shown_tokens in measured:
            objective = objective_of(each)
            parts += [(("sft",), partial(sft.bind, each.data, objective.head))] if sft else []
            parts += [(("sft",), partial(sft.check_model, model))] if sft and model else []
            # Without tasks, which may be what is wrong: all that does not go together is told at once.
            subject = Subject(
                each.data, objective, each.sequence_length, tasks={}, model=model, shown_tokens=shown_tokens
            )
            parts += [((name,), partial(spec.bind, subject)) for name, spec in self.declared.measurements.items()]
            subjects.append(subject)
        collect(parts)
        if sft:
            whole = [replace(each, tasks=sft.bind(each.corpus, each.objective.head)) for each in subjects]
            measurements = self.declared.measurements.items()
            collect(((name,), partial(spec.bind, each)) for each in whole for name, spec in measurements)
        return pretrain

    def _pretrain(self, point: Point) -> Recipe | Existing:
        data = copy.deepcopy(dict(self.base))
        # Axes as in the file, in whatever order a study or a caller names them: one may refine what is set before it.
        order = {name: index for index, name in enumerate(self.declared.sweep)}
        names = sorted(point, key=lambda name: order.get(name, len(order)))
        meant = [(path, value, point[name]) for name in names for path, value in self._meant(name, point[name])]
        # A checkpoint brings an objective of its own, which an axis may change.
        for path, value, label in sorted(meant, key=lambda change: change[0] not in SOURCES):
            put(data, path, value)
            if path in SOURCES:
                data |= self.checkpoints.get(label, {})
        try:
            return validate(Section, {"pretrain": data}).pretrain
        except ValidationError as error:
            said = (f"{dotted(at)}: {text}" for at, text in findings(Section, {"pretrain": data}, error))
            raise SpaceError("; ".join(said)) from error

    def _meant(self, name: str, label: Any) -> Iterable[tuple[str, Any]]:
        """The paths and values that an axis' part of a point stands for."""
        named = self._named.get(name)
        return named[label].items() if named else [(name, label)]

    @cached_property
    def _settings(self) -> Mapping[str, Mapping[Any, Mapping[str, Any]]]:
        """Zip -> its label in a point -> path -> value, as a table has it."""
        return {
            name: {setting.label: setting.cells for setting in settings(name, axis)}
            for name, axis in self.declared.sweep.items()
            if isinstance(axis, Zip)
        }

    @cached_property
    def _named(self) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
        """Axis whose values have names -> name -> path -> value."""
        return {
            name: {setting.label: setting.values for setting in settings(name, axis)}
            for name, axis in self.declared.sweep.items()
            if isinstance(axis, Zip) or isinstance(getattr(axis, kind_of(axis)), dict)
        }


def _decides_metrics(path: str) -> bool:
    """Whether what an axis sets there may change which metrics there are: the text, or whose loss is measured."""
    words = path.split(".")[1:]
    # A checkpoint brings its objective with it; a phase that is set as a whole may bring both.
    return bool({"data", "objective", "from"} & {*words}) or (words[0] == "phases" and len(words) <= 2)


def _sample(axis: Axis, values: list[Any], draw: random.Random) -> Any:
    if isinstance(axis, Uniform):
        return draw.uniform(*axis.uniform)
    if isinstance(axis, LogUniform):
        return math.exp(draw.uniform(*map(math.log, axis.loguniform)))
    if isinstance(axis, RandInt):
        return draw.randint(*axis.randint)
    return draw.choice(values)
