"""From a sweep file to a search space: `load` validates all of it, pins its data, and tells all that is wrong."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raysweep.data.corpora import Corpus
from raysweep.declared import Declared, section_findings
from raysweep.document import Document, nearest, read_document
from raysweep.errors import DataError, Finding, Place, RaysweepError, SpaceError, below
from raysweep.objectives.adversary import Adversary
from raysweep.overrides import with_overrides
from raysweep.pinning import Pins, pinned, with_models_read
from raysweep.plan import objective_of
from raysweep.scores import EACH_OF_MEAN, column_name
from raysweep.search import settings, written
from raysweep.spec import Spec
from raysweep.stages.phases import segments
from raysweep.stages.pretrain import Recipe
from raysweep.tasks.base import OOD, TARGET_SPLITS, Split
from raysweep.tasks.families import Task
from raysweep.tasks.files import FileTask
from raysweep.validation import findings, validate
from raysweep.variants import Point, SearchSpace

MANY_PLACES = 5
"""Where so many further places of a file have what is wrong with one, they are counted, not listed."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> SearchSpace:
    """Read a sweep file, validate all of it and pin its data.

    Args:
        overrides: `key=value` in place of what the file says: see `with_overrides`.

    Raises:
        SpaceError: with every finding, a line each: file, line, field, value, and what would be right.
        DataError: if nothing else is wrong than that data it names is missing, empty or malformed.
    """
    document, pins = _read(Path(path), overrides)
    if pins.findings:
        raise _told(document, DataError, pins.findings)
    # What can be looked at all the same is told at once, so that it need not be mended twice.
    declared = _declared(document, more=lambda: _data_findings(document.data, pins.folder))
    if problems := list(section_findings(declared)):
        raise _told(document, SpaceError, problems)
    declared, base, checkpoints = pinned(declared, document.data["pretrain"], pins)
    space = SearchSpace(declared=declared, base=base, text=document.text, checkpoints=checkpoints)
    problems = list(_value_findings(space))
    if not problems and not pins.findings:
        pins.findings += [*_text_findings(space), *_example_findings(space)]
        problems += _metric_findings(space)
    if problems or pins.findings:
        raise _told(document, SpaceError if problems else DataError, [*pins.findings, *problems])
    return replace(space, warnings=tuple(f"{document.at(place)}: {text}" for place, text in _warnings(space)))


def check_fields(path: Path) -> None:
    """Raises SpaceError if a sweep file has fields or values that it cannot have; its data is not looked at."""
    document, _ = _read(path)  # A model's configuration that is not here is no fault of the fields.
    _declared(document)


def _read(path: Path, overrides: Sequence[str] = ()) -> tuple[Document, Pins]:
    """A sweep file with its models' configurations in it, and what was wrong with these."""
    document = with_overrides(read_document(path), overrides)
    pins = Pins(document.path.absolute().parent)
    return replace(document, data=with_models_read(document.data, pins)), pins


def _declared(document: Document, more: Callable[[], Iterable[Finding]] = tuple) -> Declared:
    """Raises SpaceError, with `more` findings beside those on its fields and values."""
    try:
        return validate(Declared, document.data)
    except ValidationError as error:
        raise _told(document, SpaceError, [*findings(Declared, document.data, error), *more()]) from error


def _told(document: Document, kind: type[RaysweepError], problems: Iterable[Finding]) -> RaysweepError:
    """One error of all findings, each with its line of the sweep file; what is wrong in many places is told once."""
    places: dict[str, dict[str, None]] = {}
    for place, text in problems:
        for line in text.splitlines():
            places.setdefault(line, {})[document.at(place)] = None
    lines = []
    for line, (first, *others) in places.items():
        if len(others) < MANY_PLACES:
            lines += [f"{at}: {line}" for at in (first, *others)]
        else:
            lines.append(f"{first}: {line} (the same in {len(others):,} more places)")
    return kind("\n".join(lines))


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


def _example_findings(space: SearchSpace) -> Iterator[Finding]:
    """Tasks without examples to score indicators on, or with too few to fine-tune each seed on its own."""
    declared = space.declared
    pretrain = declared.pretrain
    if not declared.sft:
        return
    for name, task in declared.sft.bind(pretrain.data, objective_of(pretrain).head).items():
        try:
            declared.sft.check_examples(task)
            needs = declared.indicators or declared.early_sft
            if needs or (task.num_classes is not None and declared.sft.linear_probe):
                task.check_indicator()
        except RaysweepError as error:
            yield from below(("sft", "tasks", name), error)


def _warnings(space: SearchSpace) -> Iterator[Finding]:
    """What can be run, and is hardly meant."""
    yield from _schedule_warnings(space)
    yield from _control_warnings(space)
    yield from _task_warnings(space)


def _task_warnings(space: SearchSpace) -> Iterator[Finding]:
    """Tasks whose data can be used, and is hardly meant; and one rate for methods that want different ones."""
    sft = space.declared.sft
    if not sft:
        return
    if len(sft.methods) > 1 and isinstance(sft.lrs, tuple) and len(sft.lrs) == 1:
        text = (
            f"{sft.lrs[0]:g} is the one rate of {', '.join(sft.methods)}, and LoRA's best is often ten times that "
            "of full fine-tuning; give rates by method, {full: [...], lora: [...]}, or auto"
        )
        yield ("sft", "lrs"), text
    mixed = {name for members in sft.mixtures.values() for name in members}
    contents: dict[tuple[str, Split], Sequence[str]] = {}
    for name, task in sft.tasks.items():
        yield from ((("sft", "tasks", name, *at), text) for at, text in task.warnings())
        if name in mixed and isinstance(task, FileTask):  # Now, as its files are in memory.
            contents |= {(name, split): task.contents(split) for split in (*TARGET_SPLITS, OOD)}
    for name, mixture in zip(sft.mixtures, sft.mixed(sft.tasks).values(), strict=True):
        told = mixture.warnings(lambda task, split: contents[task, split])
        yield from ((("sft", "mixtures", name), text) for text in told)


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


def _control_warnings(space: SearchSpace) -> Iterator[Finding]:
    """Doses of an adversary without a control. A list of strengths gets 0 by itself; a zip or named values do not."""
    # None of a range, which has no list to add to.
    labels = {name: space.values(name) for name in space.declared.sweep}
    base = _strength(_last_recipe(space, {}))
    dosed = [
        name for name, own in labels.items() if {_strength(_last_recipe(space, {name: each})) for each in own} - {base}
    ]
    ends = {
        values: _last_recipe(space, dict(zip(dosed, values, strict=True)))
        for values in itertools.product(*(labels[name] for name in dosed))
    }
    controls = [recipe for recipe in ends.values() if _strength(recipe) == 0]
    without = [
        values
        for values, recipe in ends.items()
        if recipe and _strength(recipe) and recipe.with_(objective=recipe.objective.with_(strength=0.0)) not in controls
    ]
    if without:
        names = "; ".join(", ".join(map(written, values)) for values in without)
        text = (
            f"an adversary without a control{names and f': {names}'}; no variant has strength 0 and is alike in all "
            "else, so that the report has nothing to compare with: add it"
        )
        yield ("sweep", dosed[0]) if dosed else ("pretrain", "objective"), text


def _last_recipe(space: SearchSpace, point: Point) -> Recipe | None:
    """Of the phase that a variant ends with; None of a checkpoint that exists."""
    pretrain = space.bind(point)
    return segments(pretrain)[-1].recipe if isinstance(pretrain, Recipe) else None


def _strength(recipe: Recipe | None) -> float | None:
    """Of the adversary that it trains with; None without one."""
    return recipe.objective.strength if recipe and isinstance(recipe.objective, Adversary) else None


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


def _metric_findings(space: SearchSpace) -> Iterator[Finding]:
    """Metrics that the search asks for and no stage reports."""
    search = space.declared.search
    asked: dict[Place, str] = {
        ("search", "objectives", index, "metric"): goal.metric for index, goal in enumerate(search.objectives)
    }
    if search.scheduler:
        asked |= {("search", "scheduler", *place): metric for place, metric in search.scheduler.metrics.items()}
    if search.choose:
        asked["search", "choose", "metric"] = search.choose.metric
        asked["search", "choose", "within", "metric"] = search.choose.within.metric
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
    kind, _, name = metric.partition("/")
    name = name.rpartition("/")[2]
    each = EACH_OF_MEAN.get(column_name(kind, name), name)
    alone = [{name: each.label} for name, axis in space.declared.sweep.items() for each in settings(name, axis)]
    trials = [space.trial(point, space.declared.seeds[0]) for point in [{}, *alone]]
    losses = [
        [stage.spec.loss_of_metric(each) for stage in trial.stages if stage.kind == kind and stage.step is not None]
        for trial in trials
    ]
    together = itertools.zip_longest(*losses) if at_each else [[each[-1] for each in losses if each]]
    words = (
        list(dict.fromkeys(f"{loss.name}: {loss.predicts()}" for loss in compared if loss)) for compared in together
    )
    return max(words, key=len, default=[])
