"""The search space: a base recipe, the axes that vary it, and what is measured on every checkpoint.

`load` reads a sweep file and pins its data; from then on a space is a value: `trial(point, seed)` touches no disk.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from raysweep.data.corpora import Corpus
from raysweep.declared import Declared, Section, axis_findings
from raysweep.document import Document, nearest, read_document
from raysweep.errors import DataError, Finding, Place, RaysweepError, SpaceError, below, collect, dotted
from raysweep.overrides import with_overrides
from raysweep.pinning import SOURCES, Pins, pinned, put, with_models_read
from raysweep.plan import Trial, chain, objective_of
from raysweep.resources import AskedResources, ByVariant, Resources
from raysweep.scores import Column
from raysweep.search import Axis, LogUniform, RandInt, Uniform, Zip, kind_of, labels, paths_of, settings
from raysweep.spec import Spec, canonical, fingerprint
from raysweep.stages.base import Subject
from raysweep.stages.fetch import Existing
from raysweep.stages.phases import segments
from raysweep.stages.pretrain import Recipe
from raysweep.tasks.families import Task
from raysweep.validation import findings, validate

T = TypeVar("T")

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
        """What its gangs are made of; nothing of it may be left to choose."""
        asked = self.declared.resources.by_variant
        assert self.chosen or not any(each.autos for each in asked.every), "resources are still to be chosen"
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

    def columns(self) -> tuple[Column, ...]:
        """Those of the checkpoints of any variant, each once."""
        return tuple(dict.fromkeys(column for trial in self._kinds_of_trial() for column in trial.columns))

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
            stages=chain(pretrain, measurements=declared.measurements.values(), sft=declared.sft, seed=seed),
            auto_lrs=declared.sft is not None and declared.sft.lrs == "auto",
        )

    def bind(self, point: Point) -> Recipe | Existing:
        """The pretrain section of a variant, seen to go together with what follows. Raises a RaysweepError if not."""
        pretrain = self._pretrain(point) if point else self.declared.pretrain
        sft = self.declared.sft
        measured: list[Recipe | Existing] = [pretrain]
        if isinstance(pretrain, Recipe):
            [made] = collect([(("pretrain",), partial(segments, pretrain))])
            measured = [segment.recipe for segment in made if segment.measured]
        parts: list[tuple[Place, Callable[[], object]]] = []
        for each in measured:
            objective = objective_of(each)
            parts += [(("sft",), partial(sft.bind, each.data, objective.head))] if sft else []
            # Without tasks, which may be what is wrong: all that does not go together is told at once.
            subject = Subject(each.data, objective, each.sequence_length, tasks={})
            parts += [((name,), partial(spec.bind, subject)) for name, spec in self.declared.measurements.items()]
        collect(parts)
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
    def _named(self) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
        """Axis whose values have names -> name -> path -> value."""
        return {
            name: {setting.label: setting.values for setting in settings(name, axis)}
            for name, axis in self.declared.sweep.items()
            if isinstance(axis, Zip) or isinstance(getattr(axis, kind_of(axis)), dict)
        }


def load(path: str | Path, overrides: Sequence[str] = ()) -> SearchSpace:
    """Read a sweep file, validate all of it and pin its data.

    Args:
        overrides: `key=value` in place of what the file says: see `with_overrides`.

    Raises:
        SpaceError: with every finding, a line each: file, line, field, value, and what would be right.
        DataError: if nothing else is wrong than that data it names is missing, empty or malformed.
    """
    document = with_overrides(read_document(Path(path)), overrides)
    folder = document.path.absolute().parent
    pins = Pins(folder)
    document = replace(document, data=with_models_read(document.data, pins))
    if pins.findings:
        raise _told(document, DataError, pins.findings)
    try:
        declared = validate(Declared, document.data)
    except ValidationError as error:
        # What can be looked at all the same is told at once, so that it need not be mended twice.
        problems = [*findings(Declared, document.data, error), *_data_findings(document.data, folder)]
        raise _told(document, SpaceError, problems) from error
    if problems := list(axis_findings(declared)):
        raise _told(document, SpaceError, problems)
    declared, base, checkpoints = pinned(declared, document.data["pretrain"], pins)
    space = SearchSpace(declared=declared, base=base, text=document.text, checkpoints=checkpoints)
    problems = list(_value_findings(space))
    if not problems and not pins.findings:
        pins.findings += [*_text_findings(space), *_indicator_findings(space)]
        problems += _metric_findings(space)
    if problems or pins.findings:
        raise _told(document, SpaceError if problems else DataError, [*pins.findings, *problems])
    return replace(space, warnings=tuple(f"{document.at(place)}: {text}" for place, text in _warnings(space)))


def _told(document: Document, kind: type[RaysweepError], problems: Iterable[Finding]) -> RaysweepError:
    """One error of all findings, each with its line of the sweep file."""
    lines = (f"{document.at(place)}: {line}" for place, text in problems for line in text.splitlines())
    return kind("\n".join(dict.fromkeys(lines)))


class _Data(Spec):
    data: Corpus


class _Task(Spec):
    task: Task


def _data_findings(declared: Mapping[str, Any], folder: Path) -> list[Finding]:
    """What is wrong with the data of those parts that are valid in themselves."""
    pins = Pins(folder)
    pretrain, sft = declared.get("pretrain"), declared.get("sft")
    with contextlib.suppress(ValidationError, KeyError, TypeError):
        corpus = validate(_Data, {"data": pretrain["data"]}).data  # type: ignore[index]
        pins(("pretrain", "data"), corpus, partial(corpus.pin, folder))
    tasks = sft.get("tasks") if isinstance(sft, dict) else None
    for name, given in tasks.items() if isinstance(tasks, dict) else ():
        with contextlib.suppress(ValidationError):
            task = validate(_Task, {"task": given}).task
            pins(("sft", "tasks", name), task, partial(task.pin, folder))
    return pins.findings


def _value_findings(space: SearchSpace) -> Iterator[Finding]:
    """What is wrong with the base, and with each value of each axis put alone onto it."""
    try:
        space.bind({})
    except RaysweepError as error:
        yield from below((), error)
        return
    for name, axis in space.declared.sweep.items():
        for setting in settings(name, axis):
            try:
                space.bind({name: setting.label})
            except RaysweepError as error:
                yield from ((("sweep", name, *setting.place), text) for _, text in error.findings)


def _indicator_findings(space: SearchSpace) -> Iterator[Finding]:
    """Tasks without examples to score indicators on."""
    declared = space.declared
    pretrain = declared.pretrain
    bound = declared.sft.bind(pretrain.data, objective_of(pretrain).head) if declared.sft else {}
    for name, task in bound.items():
        try:
            if declared.indicators or (task.num_classes is not None and declared.sft and declared.sft.linear_probe):
                task.check_indicator()
        except RaysweepError as error:
            yield from below(("sft", "tasks", name), error)


def _warnings(space: SearchSpace) -> Iterator[Finding]:
    """What can be run, and is hardly meant."""
    yield from _schedule_warnings(space)
    yield from _task_warnings(space)


def _task_warnings(space: SearchSpace) -> Iterator[Finding]:
    """Tasks whose data can be used, and is hardly meant."""
    for name, task in space.declared.sft.tasks.items() if space.declared.sft else ():
        yield from ((("sft", "tasks", name, *at), text) for at, text in task.warnings())


def _schedule_warnings(space: SearchSpace) -> Iterator[Finding]:
    """Rates that jump back to their peak, and steps beyond the last checkpoint."""
    pretrain = space.declared.pretrain
    if isinstance(pretrain, Recipe) and pretrain.phases:
        parts = segments(pretrain)[-len(pretrain.phases) :]
        for index, (phase, recipe) in enumerate(zip(pretrain.phases, (part.recipe for part in parts), strict=True)):
            falls = recipe.schedule.multiplier(recipe.num_steps, recipe.num_steps) < 1
            if falls and phase.schedule is None and (index or pretrain.num_steps):
                text = (
                    f"phase {phase.name} inherits the {recipe.schedule.name} schedule, which begins at the peak rate "
                    "again, over the steps of the phase; name a schedule here, or constant in the phase before"
                )
                yield ("pretrain", "phases", index), text
    yield from _checkpoint_warnings(space)


def _checkpoint_warnings(space: SearchSpace) -> Iterator[Finding]:
    """Steps beyond the last checkpoint, of the base or else of the first value of an axis that leaves some."""
    alone = [{name: value} for name in space.declared.sweep for value in space.values(name)]
    for point in [{}, *alone]:
        pretrain = space.bind(point)
        if not isinstance(pretrain, Recipe):
            continue
        recipe = segments(pretrain)[-1].recipe
        if left := recipe.num_steps - recipe.checkpoint_steps[-1]:
            last, of = f"{recipe.checkpoint_steps[-1]:,}", f"{recipe.num_steps:,}"
            variant = "".join(f" with {name} = {value}" for name, value in point.items())
            text = (
                f"the last is step {last} of {of}{variant}: the {left:,} after it are not trained, and the "
                f"{recipe.schedule.name} schedule does not come to its end; 1.0 is the end"
            )
            yield ("pretrain", "checkpoints"), text
            return


def _text_findings(space: SearchSpace) -> Iterator[Finding]:
    """Text that cannot hold even one sequence."""
    lengths = _alone(space, "pretrain.sequence_length")
    for place, point in _alone(space, "pretrain.data"):
        # Where one zip varies both, a corpus meets the length of its own setting only.
        met = [(at, other) for at, other in lengths if other.keys() != point.keys() or other == point]
        asked = {at: space.bind(other).sequence_length for at, other in met}
        yield from space.bind(point).data.length_findings(place, asked)


def _alone(space: SearchSpace, path: str) -> list[tuple[Place, Point]]:
    """Each value that axes give a path, or else the base's: its place, and the point that has nothing else swept."""
    swept: list[tuple[Place, Point]] = [
        (("sweep", name, *setting.places[path]), {name: setting.label})
        for name, axis in space.declared.sweep.items()
        for setting in settings(name, axis)
        if path in setting.places
    ]
    return swept or [(tuple(path.split(".")), {})]


def _decides_metrics(path: str) -> bool:
    """Whether what an axis sets there may change which metrics there are: the text, or whose loss is measured."""
    words = path.split(".")[1:]
    # A checkpoint brings its objective with it; a phase that is set as a whole may bring both.
    return bool({"data", "objective", "from"} & {*words}) or (words[0] == "phases" and len(words) <= 2)


def _metric_findings(space: SearchSpace) -> Iterator[Finding]:
    """Metrics that the search asks for and no stage reports."""
    search = space.declared.search
    asked: dict[Place, str] = {
        ("search", "objectives", index, "metric"): goal.metric for index, goal in enumerate(search.objectives)
    }
    if search.scheduler:
        asked["search", "scheduler", "metric"] = search.scheduler.metric
    known = space.metric_names() if asked else ()
    for loc, metric in asked.items():
        if metric not in known:
            close = ", ".join(nearest(metric, known)) or ", ".join(known[:3]) + ", ..."
            yield loc, f"no stage of this sweep reports {metric!r}, did you mean: {close}; `raysweep plan` lists all"
        elif len(words := _losses_compared(space, metric, at_each="scheduler" in loc)) > 1:
            text = f"{metric} would compare losses of {len(words)} objectives, which differ by what they predict"
            yield loc, f"{text} ({'; '.join(words[:2])}); search by a score instead, such as sft/mean_score"


def _losses_compared(space: SearchSpace, metric: str, *, at_each: bool) -> list[str]:
    """What a metric of trials is the loss of where they are compared, each in words; none for what all compare by.

    A scheduler compares their first checkpoints with each other, their second ones, and so on (`at_each`); a study the
    last ones.
    """
    kind = metric.partition("/")[0]
    alone = [{name: each.label} for name, axis in space.declared.sweep.items() for each in settings(name, axis)]
    trials = [space.trial(point, space.declared.seeds[0]) for point in [{}, *alone]]
    losses = [
        [stage.spec.loss_of for stage in trial.stages if stage.kind == kind and stage.step is not None]
        for trial in trials
    ]
    together = itertools.zip_longest(*losses) if at_each else [[each[-1] for each in losses if each]]
    words = (
        list(dict.fromkeys(f"{loss.name}: {loss.predicts()}" for loss in compared if loss)) for compared in together
    )
    return max(words, key=len, default=[])


def _sample(axis: Axis, values: list[Any], draw: random.Random) -> Any:
    if isinstance(axis, Uniform):
        return draw.uniform(*axis.uniform)
    if isinstance(axis, LogUniform):
        return math.exp(draw.uniform(*map(math.log, axis.loguniform)))
    if isinstance(axis, RandInt):
        return draw.randint(*axis.randint)
    return draw.choice(values)
