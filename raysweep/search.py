"""How points of a space are picked: axes, search, scheduler. The picking itself is done in runners."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from raysweep.errors import Place
from raysweep.spec import Spec, canonical
from raysweep.validation import validate

Scalar = str | int | float | bool | None
AxisValues = Annotated[tuple[Scalar, ...], Field(min_length=1)] | Annotated[dict[str, Any], Field(min_length=1)]
"""A list of plain values, or a mapping from a label to a value of any shape; tables show the label."""


class Grid(Spec):
    """Every value, crossed with every other grid axis."""

    grid: AxisValues
    """The values; a mapping names them."""


class Choice(Spec):
    """Values that a random or Optuna search picks from; a grid search takes them as `grid`."""

    choice: AxisValues
    """The values; a mapping names them."""


class Uniform(Spec):
    """A number drawn evenly between two bounds, for random and Optuna searches."""

    uniform: tuple[float, float]
    """[low, high]"""

    @model_validator(mode="after")
    def _ordered(self) -> Uniform:
        _check_bounds("uniform", self.uniform)
        return self


class LogUniform(Spec):
    """A positive number, its logarithm uniform between the bounds'."""

    loguniform: tuple[float, float]
    """[low, high], both above 0"""

    @model_validator(mode="after")
    def _ordered(self) -> LogUniform:
        _check_bounds("loguniform", self.loguniform)
        if self.loguniform[0] <= 0:
            raise ValueError(f"loguniform {list(self.loguniform)}: the lower bound must be above 0")
        return self


class RandInt(Spec):
    """A whole number, both bounds included."""

    randint: tuple[int, int]
    """[low, high], both whole"""

    @model_validator(mode="after")
    def _ordered(self) -> RandInt:
        _check_bounds("randint", self.randint)
        return self


class Zip(Spec):
    """Paths that move together: the first value of each, then the second of each. One axis, under a name of its own."""

    zip: Annotated[dict[str, AxisValues], Field(min_length=1)]
    """Path to its values, as many for each; mappings name them, with the same names in the same order."""

    @model_validator(mode="after")
    def _in_step(self) -> Zip:
        numbers = {path: len(values) for path, values in self.zip.items()}
        if len(set(numbers.values())) > 1:
            counted = ", ".join(f"{path} {number}" for path, number in numbers.items())
            raise ValueError(f"a zip has as many values for each path, and here are: {counted}")
        names = {path: tuple(values) for path, values in self.zip.items() if isinstance(values, dict)}
        if len(set(names.values())) > 1:
            listed = "; ".join(f"{path}: {', '.join(each)}" for path, each in names.items())
            raise ValueError(f"a zip names its values alike for each path, in one order, and here are: {listed}")
        if twice := [label for index, label in enumerate(self.labels) if label in self.labels[:index]]:
            raise ValueError(f"a zip sets the same values twice: {', '.join(twice)}")
        return self

    @property
    def labels(self) -> tuple[str, ...]:
        """What stands for each of its settings in points and tables: its name, or else the values, as "256 / 8"."""
        # Texts in any case: Optuna's study and Parquet columns hold no tuples.
        names = next((tuple(values) for values in self.zip.values() if isinstance(values, dict)), None)
        rows = zip(*self.zip.values(), strict=True)
        return names or tuple(" / ".join(map(_written, row)) for row in rows)


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _check_bounds(name: str, bounds: tuple[float, float]) -> None:
    if bounds[0] >= bounds[1]:
        raise ValueError(f"{name} {list(bounds)}: write [low, high] with low below high")


KINDS = dict.fromkeys(("grid", "choice", "uniform", "loguniform", "randint"), "[...]") | {"zip": "{path: [...], ...}"}
"""Kind of axis -> how its values are written."""


def _kind(value: Any) -> str | None:
    if isinstance(value, Spec):
        return next(iter(type(value).model_fields))
    return next((kind for kind in KINDS if kind in value), None) if isinstance(value, dict) else None


Axis = Annotated[
    Annotated[Grid, Tag("grid")]
    | Annotated[Choice, Tag("choice")]
    | Annotated[Zip, Tag("zip")]
    | Annotated[Uniform, Tag("uniform")]
    | Annotated[LogUniform, Tag("loguniform")]
    | Annotated[RandInt, Tag("randint")],
    Discriminator(
        _kind,
        custom_error_type="axis",
        custom_error_message="an axis is one of: " + ", ".join(f"{kind}: {form}" for kind, form in KINDS.items()),
    ),
]


class Setting(NamedTuple):
    """What one value of an axis sets; of a zip, one value of each path."""

    label: Any
    """What stands for it in a point: its name, or the value itself."""
    values: Mapping[str, Any]
    """Dotted path -> value."""
    places: Mapping[str, Place]
    """Dotted path -> where that value stands, below the axis."""

    @property
    def place(self) -> Place:
        """Where it stands, below the axis. Those of a zip stand nowhere in one piece, and go by their label."""
        return next(iter(self.places.values())) if len(self.places) == 1 else ("zip", self.label)


def settings(name: str, axis: Axis) -> list[Setting]:
    """Every setting of the axis that the sweep file calls `name`, of a range its two bounds; a grid is a zip of one."""
    kind, is_zip = kind_of(axis), isinstance(axis, Zip)
    written: Mapping[str, AxisValues] = axis.zip if isinstance(axis, Zip) else {name: getattr(axis, kind)}
    above: Mapping[str, Place] = {path: (kind, path) if is_zip else (kind,) for path in written}
    labels: tuple[Any, ...] = axis.labels if isinstance(axis, Zip) else tuple(written[name])
    # Keys say where in the file a value stands: an index of a list, or a name.
    rows = zip(*(_keyed(values).items() for values in written.values()), strict=True)
    return [
        Setting(
            label,
            values={path: value for path, (_, value) in zip(written, row, strict=True)},
            places={path: (*above[path], key) for path, (key, _) in zip(written, row, strict=True)},
        )
        for label, row in zip(labels, rows, strict=True)
    ]


def _keyed(values: AxisValues) -> Mapping[Any, Any]:
    return values if isinstance(values, dict) else dict(enumerate(values))


def kind_of(axis: Axis) -> str:
    """The word that the sweep file has for it: grid, choice, zip, uniform, ..."""
    return next(iter(type(axis).model_fields))


def labels(axis: Axis) -> tuple[Any, ...]:
    """What an axis puts into points: its values or their names; of a range, nothing that could be listed."""
    if isinstance(axis, Zip):
        return axis.labels
    if isinstance(axis, Grid):
        return tuple(axis.grid)
    return tuple(axis.choice) if isinstance(axis, Choice) else ()


def name_of(key: str) -> str:
    """A key of a mapping as `names_of` has it: 1e-3 is the number 0.001."""
    try:
        return _written(json.loads(key))
    except ValueError:
        return key


def names_of(axis: Axis) -> tuple[str, ...]:
    """`labels` as a key of a mapping has them: a text as it is, 256 as "256"."""
    return tuple(map(_written, labels(axis)))


def paths_of(name: str, axis: Axis) -> tuple[str, ...]:
    """What an axis varies: the path that it is called by, or those of a zip."""
    return tuple(axis.zip) if isinstance(axis, Zip) else (name,)


class Goal(Spec):
    """A metric of a trial's last checkpoint, as `kind/name`: sft/mean_score, flatness/hessian_trace, ..."""

    metric: str
    """As `kind/name`; `raysweep plan` lists those there are."""
    mode: Literal["min", "max"]
    """Whether the metric is to be small or large."""


class Asha(Spec):
    """Asynchronous successive halving (Li et al., 2020) over checkpoints: after each, only the best part goes on."""

    name: Literal["asha"] = "asha"
    """Which scheduler."""
    metric: str
    """What trials are compared by, as `kind/name`; `raysweep plan` lists those there are."""
    mode: Literal["min", "max"]
    """Whether the metric is to be small or large."""
    grace_checkpoints: int = Field(default=1, ge=1)
    """Checkpoints that every trial reaches."""
    reduction_factor: float = Field(default=3.0, gt=1)
    """One in so many trials goes on from a checkpoint."""


class Search(Spec):
    """Who picks the points, how many, and who is stopped early."""

    name: Literal["grid", "random", "optuna"] = "grid"
    """grid: every point; random: points drawn; optuna: points picked by what earlier ones scored."""
    num_trials: int | None = Field(default=None, ge=1)
    """Points to try, of random and optuna."""
    seed: int = Field(default=0, ge=0)
    """Of random and optuna."""
    objectives: tuple[Goal, ...] = ()
    """What optuna improves; several give a Pareto front."""
    scheduler: Asha | None = None
    """Who stops weak trials early; left out: nobody."""

    @model_validator(mode="after")
    def _complete(self) -> Search:
        if self.name == "grid" and self.num_trials is not None:
            raise ValueError("num_trials belongs to random and optuna; a grid runs every point")
        if self.name != "grid" and self.num_trials is None:
            raise ValueError(f"num_trials is missing: how many points shall {self.name} try?")
        if self.name == "optuna" and not self.objectives:
            raise ValueError("objectives is missing: optuna needs at least one {metric, mode}")
        if self.name != "optuna" and self.objectives:
            raise ValueError(f"objectives is used by optuna alone, not by {self.name}: set name: optuna, or remove it")
        return self


class Resources(Spec):
    """What a gang is made of. None of it changes a result, or a stage's id."""

    workers: int = Field(default=1, ge=1)
    """Processes of a gang."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """May be a fraction."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """May be a fraction, so that several workers share a GPU."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What ZeRO shards: 1 optimizer state, 2 gradients too, 3 weights too."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more work."""
    micro_batch_sequences: int | None = Field(default=None, ge=1)
    """Sequences per forward pass of a worker; None: its whole share of the batch."""
    compile: bool | None = None
    """Whether torch compiles a model's blocks for pretraining, once for all variants of a shape: faster, and rounded
    otherwise, as with another number of workers; None: on GPUs, but for zero_stage 3, which does not take it."""
    fine_tuning: Literal["split", "wide"] = "split"
    """split: each worker fine-tunes a model by itself; wide: all work on one, sharded by `zero_stage`, where the
    training of a model does not fit one worker. Rounded otherwise, as with another number of workers."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Gangs at once; None: as many as fit."""
    max_retries: int = Field(default=2, ge=0)
    """How often a failed stage, or a trial whose gang died, is tried again."""
    max_silence_seconds: float = Field(default=120, gt=0)
    """A gang is replaced if a worker gives no sign of life for so long or, without GPUs, all use no processor."""

    max_store_wait_seconds: float = Field(default=600, ge=0)
    """How long to wait for a store that does not answer, or has no room, before what needs it fails."""

    max_node_wait_seconds: float = Field(default=30, ge=0)
    """How long to wait for a cluster to have room for a first gang; an autoscaler takes minutes to bring nodes."""

    @field_validator("gpus_per_worker")
    @classmethod
    def _whole_above_one(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(f"{gpus:g} GPUs: more than one must be a whole number; less may be a fraction")
        return gpus

    @model_validator(mode="after")
    def _compilable(self) -> Resources:
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile true: zero_stage 3 gathers each weight as it is used, between pieces too small to compile; "
                "set zero_stage to 2, or remove compile"
            )
        return self

    @property
    def compiles(self) -> bool:
        """What `compile` comes to."""
        return self.gpus_per_worker > 0 and self.zero_stage < 3 if self.compile is None else self.compile

    @property
    def fine_tunes_wide(self) -> bool:
        """Whether several workers fine-tune one model."""
        return self.fine_tuning == "wide" and self.workers > 1

    @property
    def default(self) -> Resources:
        """What holds for the run as a whole."""
        return self

    @property
    def every(self) -> tuple[Resources, ...]:
        """Those that some variant is trained by, each once."""
        return (self,)

    def of(self, point: Mapping[str, Any]) -> Resources:
        """Those of a variant."""
        return self


_OF_THE_RUN = tuple(name for name in Resources.model_fields if name.startswith("max_"))


class ResourcesBy(Spec):
    """Gangs by the value of an axis, so that large models get large ones: `default`, and by label what differs."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Resources]

    by: str
    """The axis: its name under sweep."""
    default: Resources = Resources()
    """Of values that are not named here; what a named one leaves out is taken from it, and what is the run's."""

    @model_validator(mode="before")
    @classmethod
    def _filled_up(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        default = given.get("default", {})
        try:
            validate(Resources, default)
        except ValidationError:
            return given  # What is wrong with it is told once.
        default = canonical(default) if isinstance(default, Spec) else default
        sizes = {name: value for name, value in given.items() if name not in cls.model_fields}
        return given | {name: default | value for name, value in sizes.items() if isinstance(value, dict)}

    @model_validator(mode="after")
    def _alike(self) -> ResourcesBy:
        for label, resources in self.sizes.items():
            if differ := [name for name in _OF_THE_RUN if getattr(resources, name) != getattr(self.default, name)]:
                raise ValueError(f"{label}: {differ[0]} is the whole run's: set it in default")
            if bool(resources.gpus_per_worker) != bool(self.default.gpus_per_worker):
                raise ValueError(
                    f"{label}: gpus_per_worker {resources.gpus_per_worker:g} beside {self.default.gpus_per_worker:g} "
                    "in default: all variants are trained on GPUs, or none, as the numbers they are trained in differ"
                )
        return self

    @property
    def sizes(self) -> Mapping[str, Resources]:
        """By label, as in the file: of a number, as it is written there."""
        return self.__pydantic_extra__

    @property
    def every(self) -> tuple[Resources, ...]:
        """Those that some variant is trained by, each once; `default` first."""
        return tuple(dict.fromkeys([self.default, *self.sizes.values()]))

    def of(self, point: Mapping[str, Any]) -> Resources:
        """Those of a variant."""
        return self._by_name.get(_written(point[self.by]), self.default) if self.by in point else self.default

    @cached_property
    def _by_name(self) -> Mapping[str, Resources]:
        return {name_of(label): resources for label, resources in self.sizes.items()}
