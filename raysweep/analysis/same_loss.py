"""Among checkpoints of the same pretraining loss: which of their measures goes with transfer, and how surely.

A *variant* is a way of training, a *base* a seed; see `within_bases`. Checkpoints count as of the same loss where their
held-out losses are within a band; a variant is compared where it is within the band in every base. Measured against an
adversary's control, a variant is a *dose* of it; all others are *natural*. What variants differ by is told from a
*reference*: that control, or where there is none the first variant of the sweep file.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from raysweep.analysis import formatting
from raysweep.analysis.derived import HESSIAN_TRACE
from raysweep.analysis.labels import is_missing, varying_points
from raysweep.analysis.measure_errors import Known, error_column, known
from raysweep.analysis.objectives import loss_groups
from raysweep.analysis.paired_losses import Losses, paired_difference
from raysweep.analysis.pairwise import Floats, IntervalEstimate
from raysweep.analysis.transfer import Target, numbers, probes_by_layer, transfer_measures, transfer_targets
from raysweep.analysis.within_bases import (
    MIN_VARIANTS,
    Spread,
    correlation,
    permutation_p,
    student,
    true_spread,
    within_recipes,
    within_recipes_p,
)
from raysweep.scores import SAME_LOSS_NATS, Column, column_name
from raysweep.spec import Metric

if TYPE_CHECKING:
    import pandas as pd

DOSES = "doses of the adversary and their control"

# Spearman's coefficient, of which there is nothing to leave.
NO_CORRELATION = 0.05

GAP = column_name("heldout", "entropy_gap_nats_per_token")
GAP_ERROR = column_name("heldout", "entropy_gap_stderr")
LOSS = column_name("heldout", "loss_nats_per_token")
_LOSS_COLUMN = Column("heldout", Metric("loss_nats_per_token", "min", unit="nats/token"))


@dataclass(frozen=True)
class Pivot:
    """The variant that a measure's correlation hangs on most."""

    variant: str
    rho: float
    """Without it."""


@dataclass(frozen=True)
class Association:
    """How a measure goes with transfer; below 0 where smaller values, such as a flatter loss, go with higher scores."""

    measure: str
    rho: IntervalEstimate
    """Mean over bases of Spearman's correlation within each."""
    pivot: Pivot | None
    """By leaving out one variant at a time; None of too few."""
    given_loss: IntervalEstimate
    """The same with the loss partialled out."""
    same_recipe: IntervalEstimate
    """The same between seeds of one variant: with the configuration partialled out."""
    p: float
    """By permuting variants, corrected for the number of measures."""
    p_given_loss: float
    """NaN where the loss leaves too little of both to tell."""
    p_same_recipe: float
    """By permuting seeds of one variant, corrected as well."""
    loss_tells: bool
    """Whether the loss orders the models of each base just as the measure, or transfer, does: it says as much."""


@dataclass(frozen=True)
class Contrast:
    """What a variant differs by from the reference, means over bases with 95 % intervals."""

    variant: str
    gap: IntervalEstimate
    """Of the loss, in nats per token."""
    gap_error: float
    """Of its mean, over the held-out text, which all bases share, so that the interval has nothing of it; NaN where the
    lowest loss is known or no losses are kept."""
    trace: IntervalEstimate
    """Of the logarithm of the Hessian's trace."""
    transfer: Mapping[str, IntervalEstimate]
    """By target."""
    measures: Mapping[str, IntervalEstimate]
    """Of every measure, as a share of the reference's mean size over bases; NaN where that is 0."""


@dataclass(frozen=True)
class Group:
    """Variants that are compared: doses of an adversary, or natural ones."""

    name: str
    variants: tuple[str, ...]
    num_bases: int
    ordered: bool
    """Whether they are steps of one knob: what follows its order goes with all else that does."""
    spreads: Mapping[str, Spread | None]
    """By target."""
    recipe_spreads: Mapping[str, Spread | None]
    """By target: between seeds of one variant, beyond what a base does to all of them."""
    associations: Mapping[str, tuple[Association, ...]]
    """By target, the strongest first."""


@dataclass(frozen=True)
class ProbedLayers:
    """How well probes of one number of labels do by layer, means over bases."""

    num_labels: int
    layers: tuple[int | None, ...]
    """Blocks that states have come through; None: all, and the norm that follows."""
    scores: Mapping[str, tuple[float, ...]]
    """Variant -> accuracy at each layer."""
    trace: Mapping[str, tuple[IntervalEstimate, ...]]
    """Group -> Spearman's correlation of the Hessian's trace with them, within a base."""


@dataclass(frozen=True)
class SameLoss:
    """All that is said of checkpoints of the same loss."""

    loss: str
    """The column that says what is the same."""
    band: float
    lowest: float
    """Loss of the best checkpoint."""
    error: float
    """Standard error of the loss of the worst known checkpoint in the band; where the lowest possible one is not known,
    of its difference from the lowest one, paired over the same text. NaN where none was measured."""
    unsure: int
    """Checkpoints of which such differences do not tell whether they are in the band."""
    inside: int
    outside: tuple[str, ...]
    """Variants with a checkpoint out of the band, or missing in a base."""
    ungrouped: tuple[str, ...]
    """Variants in the band that no group holds: doses without their control, or of a group of too few."""
    other_losses: tuple[str, ...]
    """Variants whose loss is another quantity: of another objective, or on another text."""
    other_seeds: tuple[Any, ...]
    """Those that are no bases, as too few variants are in the band under them."""
    incomplete: tuple[str, ...]
    """Targets and measures that are left out, as a compared checkpoint lacks them, or the loss is another quantity."""
    control: str | None
    """Of an adversary, if there is one."""
    reference: str
    """What contrasts are taken from."""
    apart: tuple[str, ...]
    """Variants whose bases are not the reference's, such as those of another size: alike in their seeds alone."""
    groups: tuple[Group, ...]
    contrasts: tuple[Contrast, ...]
    measures: tuple[Known, ...]
    """How well each is known, and what a random change of scale that keeps the function makes of it."""
    own_factors: bool
    """Whether each model has factors of its own there; else all of a shape have the same."""
    same_examples: bool
    """Whether fine-tuning takes the same labelled examples under every seed."""
    seconds: Mapping[str, float]
    """Kind of stage -> mean seconds of one, which all its measures share."""
    layers: tuple[ProbedLayers, ...]
    """By rising number of labels; empty where no layers were probed."""
    at_edge: int
    """Checkpoints of which a tuned rate stands at an end of its grid."""


def compare_same_loss(
    checkpoints: pd.DataFrame,
    stages: pd.DataFrame,
    columns: Sequence[Column],
    read: Callable[[str], Floats | None],
    *,
    band: float = SAME_LOSS_NATS,
    values: Mapping[str, Sequence[Any]] | None = None,
    read_losses: Callable[[str], Losses | None] = lambda stage: None,
) -> SameLoss | str:
    """What goes with transfer among checkpoints of the same loss.

    Args:
        checkpoints: the checkpoint table.
        stages: the stage table.
        columns: what its columns are.
        read: gives the test examples' scores of a fine-tuning stage, by its id, in one order; None if they are lost.
        band: losses within so many nats per token of the lowest are the same.
        values: axis to its values in the sweep file's order, as `choosing.values_of` has them.
        read_losses: gives the losses of a held-out measurement, by its id; asked where no lowest loss is known.

    Returns:
        In words, why nothing can be compared: too few variants in the band, or no measure or no score of transfer.
    """
    table = checkpoints[checkpoints["status"] == "done"].reset_index(drop=True)
    loss = GAP if GAP in table else LOSS
    if loss not in table or table[loss].isna().all():
        return "of no checkpoint that is done a held-out loss is known"
    table = table[table[loss].notna()].reset_index(drop=True)
    # No loss of another objective, or on another text, is the same, however near.
    groups_of_loss = loss_groups(table, _LOSS_COLUMN) if loss == LOSS else np.zeros(len(table), dtype=np.int64)
    of_one = groups_of_loss == np.bincount(groups_of_loss).argmax()
    all_names = _variant_names(table)
    other_losses = tuple(sorted({name for name, is_one in zip(all_names, of_one, strict=True) if not is_one}))
    table = table[of_one].reset_index(drop=True)
    losses = table[loss].to_numpy(dtype=np.float64)
    is_in = losses <= losses.min() + band
    names = [name for name, is_one in zip(all_names, of_one, strict=True) if is_one]
    grid = _grid(names, list(table["seed"]), is_in)
    strengths, control = _strengths(names, table, stages)
    control = control if control in grid.variants else None
    kinds_in = list(_split(grid.variants, strengths, control))
    split = [(name, kept) for name, kept in kinds_in if len(kept) >= MIN_VARIANTS]
    if not split:  # Before the test examples' scores are read.
        kinds = " and ".join(f"{len(kept)} of {name}" for name, kept in kinds_in)
        return (
            f"within {band:g} nats per token (same_loss_nats) of the lowest {loss}, {losses.min():.4f}, in each of "
            f"{formatting.counted(len(grid.bases), 'base')} (seeds) are {len(grid.variants)} of "
            f"{formatting.counted(len(set(names)), 'variant')}, {kinds}, and of one kind {MIN_VARIANTS} are needed"
        )
    held = _held_losses(table, stages, read_losses) if loss == LOSS else [None] * len(table)
    from_lowest = [paired_difference([each], [held[int(losses.argmin())]]) for each in held]
    whole, error = table, _error(table, loss, from_lowest, is_in)
    # What a checkpoint lacks that is not compared is no reason to leave out what the others have.
    rows = np.unique(grid.rows)
    table, held = table.iloc[rows].reset_index(drop=True), [held[row] for row in rows]
    grid = replace(grid, rows=np.searchsorted(rows, grid.rows))
    runs = stages[(stages["kind"] == "sft") & (stages["status"] == "done")].drop_duplicates("id")
    tried, measured = list(transfer_targets(table, runs, read)), transfer_measures(table, columns, loss)
    targets = [each for each in tried if each.is_complete]
    measures = {name: values for name, values in measured.items() if np.isfinite(values).all()}
    if not targets:
        return "no score of transfer is known of all variants within the band"
    if len(measures) < 2:
        return "fewer than two measures are known of all variants within the band"
    groups = [_group(name, grid.only(kept), table, loss, targets, measures) for name, kept in split]
    places = _places(table, stages, values or {})
    natural = [name for name in grid.variants if not strengths.get(name)]
    reference = control or min(natural, key=lambda name: places[grid.row(name)])
    roots = _roots(table, stages)
    errors = {name: numbers(table, column) for name in measures if (column := error_column(name, table.columns))}
    edges = [name for name in whole if str(name).startswith("sft/") and str(name).endswith("/lr_edge")]
    return SameLoss(
        loss=loss,
        band=band,
        lowest=float(losses.min()),
        error=error,
        unsure=sum(abs(value - band) < 2 * error for value, error in from_lowest),
        inside=int(is_in.sum()),
        outside=tuple(sorted(set(names) - set(grid.variants))),
        ungrouped=tuple(sorted(set(grid.variants).difference(*(group.variants for group in groups)))),
        other_losses=other_losses,
        other_seeds=tuple(sorted(set(whole["seed"]) - set(grid.bases))),
        incomplete=(
            *(each.name for each in tried if not each.is_complete),
            *(name for name in measured if name not in measures),
        ),
        control=control,
        reference=reference,
        apart=tuple(name for name in grid.variants if roots[grid.row(name)] != roots[grid.row(reference)]),
        groups=tuple(groups),
        contrasts=tuple(_contrasts(grid, table, loss, targets, measures, reference, held)),
        measures=tuple(known(*({name: grid.take(each) for name, each in of.items()} for of in (measures, errors)))),
        own_factors=any(given.get("rescaled") == "own" for given in _settings(stages, "flatness")),
        same_examples=all(
            given.get("hyperparameters", {}).get("examples") != "by_seed" for given in _settings(stages, "sft")
        ),
        seconds=_seconds(stages),
        layers=tuple(_layers(grid, table, split)),
        at_edge=int((whole[edges].fillna(0) != 0).any(axis=1).sum()),
    )


def _settings(stages: pd.DataFrame, kind: str) -> list[dict[str, Any]]:
    """Of the stages of a kind."""
    given = stages[(stages["kind"] == kind) & stages["settings"].notna()].drop_duplicates("id")["settings"]
    return [json.loads(each) for each in given.unique()]


def _held_losses(
    table: pd.DataFrame, stages: pd.DataFrame, read: Callable[[str], Losses | None]
) -> list[Losses | None]:
    """Of each row's checkpoint."""
    done = stages[(stages["kind"] == "heldout") & (stages["status"] == "done")].drop_duplicates("checkpoint")
    ids = done.set_index("checkpoint")["id"].to_dict()
    return [read(ids[checkpoint]) if checkpoint in ids else None for checkpoint in table["checkpoint"]]


def _error(table: pd.DataFrame, loss: str, from_lowest: Sequence[tuple[float, float]], is_in: np.ndarray) -> float:
    """See `SameLoss.error`."""
    if loss == GAP:
        return float(numbers(table, GAP_ERROR)[is_in].max()) if GAP_ERROR in table else math.nan
    return float(np.array([error for _, error in from_lowest])[is_in].max())


def _layers(grid: _Grid, table: pd.DataFrame, split: Sequence[tuple[str, Sequence[str]]]) -> Iterator[ProbedLayers]:
    for num_labels, layers in probes_by_layer(table).items():
        scores = {layer: grid.take(numbers(table, name)) for layer, name in layers.items()}
        traces = {}
        if HESSIAN_TRACE in table:
            for group, kept in split:
                rows = grid.only(kept)
                trace = rows.take(numbers(table, HESSIAN_TRACE))
                probed = [rows.take(numbers(table, name)) for name in layers.values()]
                traces[group] = tuple(
                    correlation(trace, each) if np.isfinite([trace, each]).all() else IntervalEstimate(math.nan)
                    for each in probed
                )
        yield ProbedLayers(
            num_labels=num_labels,
            layers=tuple(layers),
            scores={
                variant: tuple(float(scores[layer][:, at].mean()) for layer in layers)
                for at, variant in enumerate(grid.variants)
            },
            trace=traces,
        )


def _seconds(stages: pd.DataFrame) -> dict[str, float]:
    """By kind of stage, of those that finished: what a measure costs."""
    done = stages[stages["status"] == "done"].drop_duplicates("id")
    return {str(kind): float(seconds) for kind, seconds in done.groupby("kind")["wall_seconds"].mean().items()}


@dataclass(frozen=True)
class _Grid:
    """Which row of the table each variant of each base is."""

    variants: tuple[str, ...]
    bases: tuple[Any, ...]
    """Seeds."""
    rows: np.ndarray
    """[bases, variants]."""

    def only(self, variants: Sequence[str]) -> _Grid:
        """Some of the variants, in this order."""
        return replace(
            self, variants=tuple(variants), rows=self.rows[:, [self.variants.index(each) for each in variants]]
        )

    def row(self, variant: str) -> int:
        """That of a variant's first base."""
        return int(self.rows[0, self.variants.index(variant)])

    def take(self, values: Floats) -> Floats:
        """[bases, variants, ...] of [rows, ...]."""
        return np.asarray(values[self.rows], dtype=np.float64)


def _grid(names: Sequence[str], seeds: Sequence[Any], is_in: np.ndarray) -> _Grid:
    """Variants that are within the band in every base.

    Bases are the seeds of which at least `MIN_VARIANTS` are, so that more seeds of one variant do not leave out all
    others; all seeds where there are none.
    """
    place = {(name, seed): row for row, (name, seed) in enumerate(zip(names, seeds, strict=True)) if is_in[row]}
    nums = Counter(seed for _, seed in place)
    bases = sorted(seed for seed, num in nums.items() if num >= MIN_VARIANTS) or sorted(set(seeds))
    kept = [name for name in dict.fromkeys(names) if all((name, base) in place for base in bases)]
    rows = np.array([[place[name, base] for name in kept] for base in bases], dtype=np.int64)
    return _Grid(tuple(kept), tuple(bases), rows.reshape(len(bases), len(kept)))


def _variant_names(table: pd.DataFrame) -> list[str]:
    """What tells variants and steps apart, in words; a single axis by its values alone.

    Values that agree in the digits shown are told apart by all of theirs.
    """
    points = varying_points(table)
    several = table["step"].nunique() > 1 and table.groupby("trial")["step"].nunique().max() > 1
    rows = table.to_dict("records")
    keys = [(row["variant"], row["step"] if several else None) for row in rows]
    points_of = [
        {name.removeprefix("point."): row[name] for name in points if not is_missing(row[name])} for row in rows
    ]

    def texts(word: Callable[[Any], Any]) -> list[str]:
        found = []
        for point, (_, step) in zip(points_of, keys, strict=True):
            only = str(next(iter(point.values()))) if len(points) == 1 and point else ""
            text = only or formatting.point_text({name: word(value) for name, value in point.items()}) or "base"
            found.append(text if step is None else f"{text} · step {int(step)}")
        return found

    shown = names = texts(lambda value: value)
    finer: list[Callable[[], list[str]]] = [
        lambda: texts(lambda value: repr(float(value)) if isinstance(value, float) else value),
        lambda: [f"{name} ({variant})" for name, (variant, _) in zip(shown, keys, strict=True)],
    ]
    for others in finer:
        nums = Counter(name for name, _ in set(zip(names, keys, strict=True)))
        if max(nums.values(), default=1) > 1:
            names = [other if nums[name] > 1 else name for name, other in zip(names, others(), strict=True)]
    return names


def _places(table: pd.DataFrame, stages: pd.DataFrame, values: Mapping[str, Sequence[Any]]) -> list[tuple[float, ...]]:
    """Where each row stands in the sweep file, by one axis after another; of one variant the last step first.

    Of ranges, which list no values, by what was begun first.
    """
    begun = {stage: at for at, stage in enumerate(stages["id"].drop_duplicates())}
    axes = {f"point.{axis}": listed for axis, listed in values.items() if listed and f"point.{axis}" in table}
    return [
        (
            *(_index(row[column], listed) for column, listed in axes.items()),
            -float(row["step"]),
            begun.get(row["checkpoint"], math.inf),
        )
        for row in table.to_dict("records")
    ]


def _index(value: Any, listed: Sequence[Any]) -> float:
    """Of a table's cell among an axis' values; nothing is null, and what is no number may be in writing."""

    def is_it(each: Any) -> bool:
        if is_missing(value) or each is None:
            return bool(is_missing(value)) and each is None
        return value in (each, json.dumps(each, sort_keys=True))

    return next((at for at, each in enumerate(listed) if is_it(each)), math.inf)


def _roots(table: pd.DataFrame, stages: pd.DataFrame) -> list[str]:
    """What each checkpoint's training began with: settings and inputs of the first stage that it goes on from."""
    known: dict[str, dict[str, dict[str, Any]]] = {
        str(row["id"]): {name: json.loads(row[name]) for name in ("settings", "inputs") if not is_missing(row[name])}
        for row in stages[stages["kind"].isin(["fetch", "pretrain"])].drop_duplicates("id").to_dict("records")
    }
    for each in known.values():
        each.get("settings", {}).pop("step", None)  # Of one training, each step that is kept is a stage.
    roots = []
    for stage in table["checkpoint"]:
        while (start := known.get(stage, {}).get("inputs", {}).get("start")) in known:
            stage = start
        roots.append(json.dumps(known.get(stage), sort_keys=True))
    return roots


def _strengths(names: Sequence[str], table: pd.DataFrame, stages: pd.DataFrame) -> tuple[dict[str, float], str | None]:
    """Variant -> strength of the adversary that it was finished with, of those with one; and what doses compare with.

    The control is the variant of strength 0 whose last phase is that of a dose in all else.
    """
    settings = stages.drop_duplicates("id").set_index("id")["settings"]
    strengths: dict[str, float] = {}
    rest: dict[str, str] = {}
    for name, checkpoint in zip(names, table["checkpoint"], strict=True):
        recipe = json.loads(settings.get(checkpoint) or "{}").get("recipe", {})
        objective = dict(recipe.get("objective", {}))
        if objective.get("name") == "adversary":
            strengths[name] = float(objective.pop("strength"))
            rest[name] = json.dumps(recipe | {"objective": objective}, sort_keys=True)
    of_doses = {rest[name] for name, strength in strengths.items() if strength}
    controls = [name for name, strength in strengths.items() if not strength and rest[name] in of_doses]
    return strengths, controls[0] if controls else None


def _split(
    variants: Sequence[str], strengths: Mapping[str, float], control: str | None
) -> Iterator[tuple[str, list[str]]]:
    """Doses with their control, and what has no adversary: of variants of strength 0, the control is the first."""
    natural = [name for name in variants if not strengths.get(name)]
    doses = [name for name in variants if strengths.get(name) or name == control]
    if control:
        yield DOSES, doses
    yield "natural knobs", natural


def _group(
    name: str, grid: _Grid, table: pd.DataFrame, loss: str, targets: Sequence[Target], measures: Mapping[str, Floats]
) -> Group:
    losses = grid.take(numbers(table, loss))
    cells = {measure: grid.take(values) for measure, values in measures.items()}
    return Group(
        name=name,
        variants=grid.variants,
        num_bases=len(grid.rows),
        ordered=name == DOSES,
        spreads={target.name: _spread(grid, target) for target in targets},
        recipe_spreads={target.name: _spread(grid, target, of_recipe=True) for target in targets},
        associations={
            target.name: _associations(grid.variants, cells, grid.take(target.values), losses, loss, own=target.name)
            for target in targets
        },
    )


def _spread(grid: _Grid, target: Target, *, of_recipe: bool = False) -> Spread | None:
    return None if target.draws is None else true_spread(grid.take(target.draws), of_recipe=of_recipe)


def _pivot(variants: Sequence[str], measure: Floats, target: Floats) -> Pivot | None:
    """By leaving out one variant at a time: without which least is left of it; None where too few would be.

    Of a correlation of about 0, without which there is most.
    """
    whole = correlation(measure, target).value
    left = [
        Pivot(name, correlation(np.delete(measure, at, axis=1), np.delete(target, at, axis=1)).value)
        for at, name in enumerate(variants)
    ]
    told = [each for each in left if not math.isnan(each.rho - whole)]
    if abs(whole) < NO_CORRELATION:
        return max(told, key=lambda each: abs(each.rho), default=None)
    return min(told, key=lambda each: each.rho * math.copysign(1.0, whole), default=None)


def _associations(
    variants: Sequence[str],
    cells: Mapping[str, Floats],
    target: Floats,
    losses: Floats,
    loss: str,
    *,
    own: str,
) -> tuple[Association, ...]:
    # A probe says nothing of itself.
    names = [name for name in cells if not own.startswith("probe") or not name.startswith("probes/")]
    names = [name for name in names if np.ptp(cells[name]) > 0]
    given = [name for name in names if name != loss]
    p, p_given = _corrected(names, cells, target, ()), _corrected(given, cells, target, (losses,))
    p_recipe = _corrected_within_recipes(names, cells, target)
    found = [
        Association(
            measure=name,
            rho=correlation(cells[name], target),
            pivot=_pivot(variants, cells[name], target),
            given_loss=IntervalEstimate(math.nan) if name == loss else correlation(cells[name], target, (losses,)),
            same_recipe=within_recipes(cells[name], target),
            p=p[name],
            p_given_loss=p_given.get(name, math.nan),
            p_same_recipe=p_recipe[name],
            loss_tells=any(abs(correlation(losses, each).value) > 1 - 1e-9 for each in (cells[name], target)),
        )
        for name in names
    ]
    return tuple(sorted(found, key=lambda each: (math.isnan(each.p), each.p, -abs(each.rho.value))))


def _corrected(
    names: Sequence[str], cells: Mapping[str, Floats], target: Floats, given: Sequence[Floats]
) -> dict[str, float]:
    if not names or target.shape[1] < MIN_VARIANTS + len(given):
        return dict.fromkeys(names, math.nan)
    _, corrected = permutation_p(np.stack([cells[name] for name in names]), target, given)
    return dict(zip(names, map(float, corrected), strict=True))


def _corrected_within_recipes(names: Sequence[str], cells: Mapping[str, Floats], target: Floats) -> dict[str, float]:
    if not names:
        return {}
    _, corrected = within_recipes_p(np.stack([cells[name] for name in names]), target)
    return dict(zip(names, map(float, corrected), strict=True))


def _contrasts(
    grid: _Grid,
    table: pd.DataFrame,
    loss: str,
    targets: Sequence[Target],
    measures: Mapping[str, Floats],
    reference: str,
    held: Sequence[Losses | None],
) -> Iterator[Contrast]:
    """Each variant less the reference of the same seed."""
    at = grid.variants.index(reference)

    def over_bases(values: Floats, variant: int) -> IntervalEstimate:
        cells = grid.take(values)
        return student(cells[:, variant] - cells[:, at])

    traces = numbers(table, HESSIAN_TRACE) if HESSIAN_TRACE in table else np.full(len(table), math.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        logs = np.log(traces)
        sizes = {name: float(np.abs(grid.take(values)[:, at]).mean()) for name, values in measures.items()}
        shares = {name: values / (sizes[name] or math.nan) for name, values in measures.items()}
    for index, variant in enumerate(grid.variants):
        if index != at:
            yield Contrast(
                variant=variant,
                gap=over_bases(numbers(table, loss), index),
                gap_error=paired_difference(*([held[row] for row in grid.rows[:, each]] for each in (index, at)))[1],
                trace=over_bases(logs, index),
                transfer={target.name: over_bases(target.values, index) for target in targets},
                measures={name: over_bases(values, index) for name, values in shares.items()},
            )
