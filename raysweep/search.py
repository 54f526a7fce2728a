"""How points of a space are picked: axes, search, scheduler. The picking itself is done in runners."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from raysweep.errors import Place
from raysweep.spec import Neutral, Spec

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
        return names or tuple(" / ".join(map(written, row)) for row in rows)


def written(value: Any) -> str:
    """A value of an axis as a key of a mapping has it: a text as it is, 256 as "256"."""
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
    def cells(self) -> Mapping[str, Any]:
        """Dotted path -> its value in a table: numbers and text as they are, all else as the sweep file has it."""
        return {
            path: value if isinstance(value, bool | int | float | str) else written(value)
            for path, value in self.values.items()
        }

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
    """A key of a mapping as `written` has what it means: 1e-3 is the number 0.001."""
    try:
        return written(json.loads(key))
    except ValueError:
        return key


def names_of(axis: Axis) -> tuple[str, ...]:
    """`labels`, each as a key of a mapping has it."""
    return tuple(map(written, labels(axis)))


def paths_of(name: str, axis: Axis) -> tuple[str, ...]:
    """What an axis varies: the path that it is called by, or those of a zip."""
    return tuple(axis.zip) if isinstance(axis, Zip) else (name,)


class Goal(Spec):
    """A metric of a trial's last checkpoint, as `kind/name`: sft/mean_score, flatness/hessian_trace, ..."""

    metric: str
    """As `kind/name`; `raysweep plan` lists those there are."""
    mode: Literal["min", "max"]
    """Whether the metric is to be small or large."""

    def best(self, values: Iterable[float]) -> float:
        """The one that is best by it, of one at least."""
        return min(values) if self.mode == "min" else max(values)


class Within(Goal):
    """A bound by the best that is known: at most a part of it worse."""

    part: float = Field(default=0.01, gt=0)
    """Of the best value's size: 0.01 is within 1 %."""

    def excess(self, value: float, best: float) -> float:
        """How much worse than allowed a value is, in the metric's unit; 0 or less where it keeps the bound.

        >>> Within(metric="heldout/loss_nats_per_token", mode="min", part=0.5).excess(5.0, best=4.0)
        -1.0
        """
        return abs(value - best) - self.part * abs(best)


class Choose(Goal):
    """Which checkpoint of a run is chosen: the best by one metric of those that are nearly the best by another."""

    within: Within
    """What it may not be worse by: {metric: heldout/loss_nats_per_token, mode: min, part: 0.01}. Optuna minds it, too;
    of a trial that ended, against the best known by then."""


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

    @property
    def metrics(self) -> dict[Place, str]:
        """What it asks for, by the place in its section."""
        return {("metric",): self.metric}


class ParetoAsha(Spec):
    """`Asha` by several metrics: a trial's place is the number of others that are as good in all and better in one.

    That rank is Fonseca and Fleming's (1993): with one metric it is the order by it.
    """

    name: Literal["pareto_asha"]
    """Which scheduler."""
    goals: tuple[Goal, ...] = Field(min_length=2)
    """What trials are compared by, such as loss and trace."""
    grace_checkpoints: int = Field(default=1, ge=1)
    """Checkpoints at which nobody is stopped, but for the last of them."""
    reduction_factor: float = Field(default=3.0, gt=1)
    """One in so many trials goes on from a checkpoint, and whoever no other beats."""

    @property
    def metrics(self) -> dict[Place, str]:
        """What it asks for, by the place in its section."""
        return {("goals", index, "metric"): goal.metric for index, goal in enumerate(self.goals)}


class Replicates(Spec):
    """Further seeds of some variants: how far trainings of one recipe differ, without training all of them again."""

    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    """Beside those that all variants run under."""
    of: dict[str, Annotated[tuple[Scalar, ...], Field(min_length=1)]] = Field(min_length=1)
    """Axis to its values, or their names; of several axes, the variants that have one of each."""

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise ValueError(f"seeds {list(seeds)} holds one twice")
        return seeds

    def holds(self, point: Mapping[str, Any]) -> bool:
        """Whether a variant is one of them."""
        return all(point.get(axis) in values for axis, values in self.of.items())


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
    scheduler: Annotated[Asha | ParetoAsha, Field(discriminator="name")] | None = None
    """Who stops weak trials early; left out: nobody."""
    choose: Annotated[Choose | None, Neutral(None)] = None
    """Which checkpoint the report names and `raysweep export --checkpoint chosen` takes, beside the best by score."""
    warm_start: Annotated[bool, Neutral(False)] = False
    """Whether optuna begins with what trials of other runs gave, as far as the store has all of their stages."""

    @model_validator(mode="after")
    def _complete(self) -> Search:
        if self.name == "grid" and self.num_trials is not None:
            raise ValueError("num_trials belongs to random and optuna; a grid runs every point")
        if self.name != "grid" and self.num_trials is None:
            raise ValueError(f"num_trials is missing: how many points shall {self.name} try?")
        if self.name == "optuna" and not self.objectives:
            raise ValueError("objectives is missing: optuna needs at least one {metric, mode}")
        if self.name != "optuna" and self.warm_start:
            raise ValueError(f"warm_start is of optuna alone, not of {self.name}: remove it; others find stages anyway")
        if self.name != "optuna" and self.objectives:
            raise ValueError(f"objectives is used by optuna alone, not by {self.name}: set name: optuna, or remove it")
        return self
