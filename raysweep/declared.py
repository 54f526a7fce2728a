"""A sweep file, as declared: its sections, and what can be wrong with it before any data is looked at."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from raysweep.errors import Finding, Place
from raysweep.finetuning import Finetuning
from raysweep.resources import AskedResources, ResourcesBy
from raysweep.scores import SAME_LOSS_NATS
from raysweep.search import (
    Axis,
    Choice,
    Grid,
    Replicates,
    Search,
    Zip,
    kind_of,
    labels,
    name_of,
    names_of,
    paths_of,
)
from raysweep.spec import Neutral, Provenance, Spec, check_name
from raysweep.stages.agreement import Agreement
from raysweep.stages.base import StageSpec
from raysweep.stages.curve import Curve
from raysweep.stages.early_sft import EarlySft
from raysweep.stages.enlarge import Enlarge
from raysweep.stages.features import FeatureRank
from raysweep.stages.fetch import Existing
from raysweep.stages.flatness import Flatness
from raysweep.stages.gradient_noise import GradientNoise
from raysweep.stages.heldout import HeldoutSection
from raysweep.stages.indicators import Indicators
from raysweep.stages.lm_eval import LmEval
from raysweep.stages.noise import Noise
from raysweep.stages.other_text import OtherText
from raysweep.stages.pretrain import Recipe
from raysweep.stages.probes import Probes
from raysweep.stages.quantization import Quantization
from raysweep.stages.span_loss import SpanLoss
from raysweep.stages.updates import Updates
from raysweep.tasks.mixture import can_be_mixed
from raysweep.validation import suggested

# More than any sweep has been; a grid of a few long axes is beyond it at once.
MAX_TRIALS = 10_000
MAX_STAGES = 1_000_000

_PHASE = re.compile(r"(?<=^pretrain)\.phases\.[^.]*")
"""Of a path, what leads into a phase."""


_STRENGTH = re.compile(r"pretrain\.(phases\.[^.]*\.)?objective\.strength")
"""The path of an adversary's strength."""


def _with_zero(axis: Axis) -> Axis:
    """A list of values with 0 behind it, where it has none; as it is where values have names."""
    values = getattr(axis, kind_of(axis))
    if isinstance(axis, Grid | Choice) and isinstance(values, tuple) and 0 not in values:
        return axis.with_(**{kind_of(axis): (*values, 0.0)})  # type: ignore[no-any-return]
    return axis


def _pretrain_tag(value: Any) -> str:
    if isinstance(value, Spec):
        return "from" if isinstance(value, Existing) else "recipe"
    return "from" if isinstance(value, dict) and "from" in value else "recipe"


PretrainSection = Annotated[
    Annotated[Recipe, Tag("recipe")] | Annotated[Existing, Tag("from")], Discriminator(_pretrain_tag)
]
"""A recipe, or a checkpoint that exists already."""


def _resources_tag(value: Any) -> str:
    is_by = isinstance(value, ResourcesBy) or (isinstance(value, dict) and "by" in value)
    return "by" if is_by else "resources"


ResourcesSection = Annotated[
    Annotated[AskedResources, Tag("resources")] | Annotated[ResourcesBy, Tag("by")], Discriminator(_resources_tag)
]
"""What all gangs are made of; or, with `by`, gangs by the value of an axis."""


class Declared(Spec):
    """All sections of a sweep file, valid each by itself; whether they go together, `space.load` finds out."""

    name: str
    """Opens the run's name; of letters, digits, '_', '-' and '.'."""
    pretrain: PretrainSection
    """The base recipe, runnable as it stands; or, with `from`, a checkpoint that exists already."""
    heldout: Annotated[HeldoutSection | None, Neutral(None)] = None
    """Of the held-out loss, which every checkpoint has; left out: of 256 sequences a domain, 2,000 where these are
    sentences of a language."""
    # What is measured on every checkpoint, in this order: a stage of its own kind for each section that is a StageSpec.
    indicators: Indicators | None = None
    """Zero- and few-shot scores of the fine-tuning tasks, on every checkpoint; left out: none."""
    enlarge: Annotated[Enlarge | None, Neutral(None)] = None
    """A larger model that every checkpoint is embedded in, with the same function, for what is measured of its weights:
    sizes compare in one parametrisation. Left out: each is measured as it is."""
    flatness: Flatness | None = None
    """Traces of Hessian, Gauss-Newton and Fisher matrices, on every checkpoint; left out: none."""
    probes: Annotated[Probes | None, Neutral(None)] = None
    """Linear probes of the fine-tuning tasks by number of labels and by layer, on every checkpoint; left out: none."""
    agreement: Annotated[Agreement | None, Neutral(None)] = None
    """Cosines between the gradients of domains, on every checkpoint; left out: none."""
    noise: Annotated[Noise | None, Neutral(None)] = None
    """Rises of the loss under noise on the weights, on every checkpoint; left out: none."""
    quantization: Annotated[Quantization | None, Neutral(None)] = None
    """Rises of the loss where weights are rounded to few bits, on every checkpoint; left out: none."""
    updates: Annotated[Updates | None, Neutral(None)] = None
    """Sharpness along the loss's own updates and those of fine-tuning, on every checkpoint; left out: none."""
    other_text: Annotated[OtherText | None, Neutral(None)] = None
    """Loss on text of other corpora, of every checkpoint; left out: none."""
    span_loss: Annotated[SpanLoss | None, Neutral(None)] = None
    """Loss on spans cut out of held-out text, of every checkpoint of a causal model; left out: none."""
    gradient_noise: Annotated[GradientNoise | None, Neutral(None)] = None
    """Noise of gradients from batch to batch, on every checkpoint; left out: none."""
    curve: Annotated[Curve | None, Neutral(None)] = None
    """Slope and curvature of the training loss, of every checkpoint; left out: none."""
    features: Annotated[FeatureRank | None, Neutral(None)] = None
    """Effective rank of the last layer's states, on every checkpoint; left out: none."""
    lm_eval: Annotated[LmEval | None, Neutral(None)] = None
    """Scores on tasks of lm-evaluation-harness, of every checkpoint of a causal model; left out: none."""
    early_sft: Annotated[EarlySft | None, Neutral(None)] = None
    """A short fine-tuning on each task, on every checkpoint; left out: none."""
    sft: Finetuning | None = None
    """Tasks that every checkpoint is fine-tuned on; left out: none."""
    resources: Annotated[ResourcesSection, Provenance()] = AskedResources()
    """What runs it; no part of any result's identity. With `by`, an axis of the sweep, each of its values may have a
    gang of its own: {by: pretrain.model, default: {...}, large: {workers: 8}}."""
    search: Search = Search()
    """Who picks the points of the space."""
    same_loss_nats: Annotated[float, Neutral(SAME_LOSS_NATS)] = Field(default=SAME_LOSS_NATS, gt=0)
    """Checkpoints whose held-out loss is within so many nats per token of the lowest count as of the same loss."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1)
    """Of pretraining; each runs every point."""
    replicates: Annotated[Replicates | None, Neutral(None)] = None
    """Variants that run under further seeds; left out: none."""
    sweep: dict[str, Axis] = Field(default_factory=dict)
    """Axes: a path under pretrain, such as pretrain.optimizer.lr, to the values it takes; or a name of your own to a
    zip of paths that move together."""

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
        for name in ("indicators", "probes", "early_sft"):
            if getattr(self, name) and not self.sft:
                raise ValueError(f"{name} are scores of the tasks of sft: add sft, or remove {name}")
        return self

    @field_validator("sweep")
    @classmethod
    def _with_controls(cls, sweep: dict[str, Axis]) -> dict[str, Axis]:
        """Doses of an adversary are compared with the same training without one: strength 0."""
        return {path: _with_zero(axis) if _STRENGTH.fullmatch(path) else axis for path, axis in sweep.items()}

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise ValueError(f"seeds {list(seeds)} holds one twice")
        return seeds


class Section(Spec):
    """The pretrain section alone, as a variant has it."""

    pretrain: PretrainSection


def section_findings(declared: Declared) -> Iterator[Finding]:
    """What is wrong with the axes as such, or between sections that are valid each by itself."""
    for name, axis in declared.sweep.items():
        loc: Place = ("sweep", name)
        for path in paths_of(name, axis):
            where = (*loc, "zip", path) if isinstance(axis, Zip) else loc
            yield from ((where, text) for text in _path_findings(declared, path))
        if isinstance(axis, Zip):
            yield from ((loc, text) for text in _zip_name_findings(name))
        elif "." not in name:
            yield loc, f"{name!r} is no path; only a zip has a name of its own: zip: {{pretrain...: [...], ...}}"
        values = labels(axis)
        if declared.search.name == "grid" and not values:
            yield loc, "a grid search needs grid: [...] here, or set search.name to random or optuna"
        if len(set(map(repr, values))) != len(values):
            yield loc, f"names a value twice: {list(values)}"
    yield from _overlap_findings(declared)
    if declared.search.name == "optuna" and len(declared.seeds) > 1:
        yield ("seeds",), f"optuna compares single trials, so seeds holds one, not {len(declared.seeds)}"
    yield from _replicate_findings(declared)
    yield from _gang_findings(declared)
    yield from _size_findings(declared)
    yield from _group_findings(declared)
    yield from _shot_findings(declared)


def _path_findings(declared: Declared, path: str) -> Iterator[str]:
    """Why no axis can vary a path."""
    inside = _PHASE.sub("", path)
    if not path.startswith("pretrain."):
        yield "a sweep path starts with 'pretrain.'; what is measured is equal for all variants"
    elif path == "pretrain.from" and isinstance(declared.pretrain, Recipe):
        yield "pretrain is a recipe; to sweep checkpoints that exist, write pretrain: {from: ..., data: ...}"
    elif inside == "pretrain.checkpoints":
        yield "checkpoints is a list of one trajectory's steps, not an axis: write it under pretrain"
    elif inside == "pretrain.name":
        yield "the name of a phase is no axis: it is part of no result"
    elif inside.startswith("pretrain.data.domains"):
        yield "a part of the domains cannot be swept: sweep pretrain.data (named values) or pretrain.data.mix"
    elif inside.startswith("pretrain.data.model"):
        yield "the model that writes the text cannot be swept by itself: sweep pretrain.data (named values)"
    elif path == "pretrain.model.config":
        yield "a configuration cannot be swept by itself: sweep pretrain.model (named values)"


def _zip_name_findings(name: str) -> Iterator[str]:
    """Names that no zip can have: beside it in tables and trackers stand the seed, the trial and paths."""
    if name.partition(".")[0] in ("pretrain", "seed", "trial"):
        yield f"a zip goes by a name of its own, such as size, not {name!r}; its paths stand below zip"
    try:
        check_name("zip", name)
    except ValueError as error:
        yield str(error)


def _overlap_findings(declared: Declared) -> Iterator[Finding]:
    """Axes that undo what another one sets: each is put onto what those before it have made."""
    varied = [(name, path) for name, axis in declared.sweep.items() for path in paths_of(name, axis)]
    for (first, path), (second, over) in itertools.combinations(varied, 2):
        where: Place = ("sweep", second)
        if path == over:
            yield where, f"{path} is varied by the axis {first} already; leave it in one of them"
        elif path.startswith(f"{over}."):
            yield where, f"{over} replaces what {path} sets before it; let {over} come first"


def _replicate_findings(declared: Declared) -> Iterator[Finding]:
    """Further seeds of variants that there are not, or that run under them already."""
    replicates = declared.replicates
    if not replicates:
        return
    if declared.search.name != "grid":
        yield ("replicates",), f"search.name {declared.search.name} draws its points: list all seeds in seeds"
    if twice := {*replicates.seeds} & {*declared.seeds}:
        yield ("replicates", "seeds"), f"seeds has {min(twice)} already: all variants run under it"
    for axis, values in replicates.of.items():
        where: Place = ("replicates", "of", axis)
        if axis not in declared.sweep:
            yield where, f"no axis {axis!r}" + suggested(axis, list(declared.sweep), "axes")
            continue
        taken = labels(declared.sweep[axis])
        for value in values:
            if value not in taken:
                yield where, f"{axis} takes no {value!r}" + suggested(str(value), [*map(str, taken)], "values")


def _gang_findings(declared: Declared) -> Iterator[Finding]:
    """Gangs by an axis that there is not, or for values that it does not take."""
    resources = declared.resources
    if not isinstance(resources, ResourcesBy):
        return
    if resources.by not in declared.sweep:
        yield ("resources", "by"), f"no axis {resources.by!r}" + suggested(resources.by, list(declared.sweep), "axes")
        return
    taken = names_of(declared.sweep[resources.by])
    for label in resources.sizes:
        if name_of(label) not in taken:
            yield ("resources", label), f"{resources.by} takes no {label!r}" + suggested(label, taken, "values")


def _shot_findings(declared: Declared) -> Iterator[Finding]:
    """Tasks with a number of solved examples of their own that there are not."""
    tasks = list(declared.sft.tasks) if declared.sft else []
    for name in declared.indicators.kshot_by_task if declared.indicators else ():
        if name not in tasks:
            yield ("indicators", "kshot_by_task", name), f"sft has no task {name!r}" + suggested(name, tasks, "tasks")


def _group_findings(declared: Declared) -> Iterator[Finding]:
    """Families and mixtures of tasks that there are not, or by a name that is taken; and mixtures of what cannot be
    trained together."""
    sft = declared.sft
    if not sft:
        return
    for section, groups in {"families": sft.families, "mixtures": sft.mixtures}.items():
        for name, members in groups.items():
            where: Place = ("sft", section, name)
            what = "family" if section == "families" else "mixture"
            if name in sft.tasks:
                yield where, f"{name} is a task of sft; call the {what} otherwise"
            elif section == "mixtures" and name in sft.families:
                yield where, f"{name} is a family of sft; call the mixture otherwise"
            # Two names of one training would be two trainings, and one stage id.
            same = next(other for other, its in groups.items() if set(its) == set(members))
            if section == "mixtures" and same != name:
                yield where, f"{same} has the same tasks, {', '.join(sorted(members))}; name it once"
            for task in members:
                if task not in sft.tasks:
                    yield where, f"sft has no task {task!r}" + suggested(task, list(sft.tasks), "tasks")
                elif section == "mixtures" and not can_be_mixed(sft.tasks[task]):
                    form = sft.tasks[task].form
                    yield (
                        where,
                        f"{task} is of form {form}, whose classes are read by a head of their own that no other task "
                        "trains; a mixture takes tasks that are answered in words: multiple_choice, qa",
                    )


def _size_findings(declared: Declared) -> Iterator[Finding]:
    """A sweep that multiplies to more than could be run, or even listed."""
    axes = {path: len(labels(axis)) for path, axis in declared.sweep.items()}
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
    each = 2 + sum(len(spec.by_task()) for spec in declared.measurements.values())
    if sft:
        num_rates = sum(len(sft.first_lrs(method)) for method in sft.methods)
        each += len(sft.seeds) * (len(sft.tasks) * (num_rates + sft.linear_probe) + len(sft.mixtures) * num_rates)
    if isinstance(pretrain, Existing):
        return each
    listed = [pretrain.checkpoints, *(phase.checkpoints for phase in pretrain.phases)]
    return len(pretrain.phases) + each * sum(max(1, len(checkpoints)) for checkpoints in listed)
