"""Which checkpoint fine-tunes best, and which indicator would have said so beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from raysweep.analysis.associations import Association, associate, without_clear
from raysweep.analysis.bases import Groups, bases_of, within_bases
from raysweep.analysis.comparer import CompareError
from raysweep.analysis.cut_prompts import CutPrompts, cut_prompts
from raysweep.analysis.defects import Flag, find_flags
from raysweep.analysis.derived import HESSIAN_TRACE, KSHOT, NUM_TOKENS, OTHER_TEXT, PPL, SEED, is_axis
from raysweep.analysis.formatting import is_share
from raysweep.analysis.gaps import target_gaps
from raysweep.analysis.labels import Key, checkpoint_labels, is_missing, row_key
from raysweep.analysis.objectives import compares, loss_groups, with_bytes
from raysweep.analysis.pairwise import Floats, IntervalEstimate, of_one
from raysweep.analysis.score_differences import Differences, between
from raysweep.analysis.seed_twins import SeedTwins, seed_twins
from raysweep.analysis.uncertainty import TaskNoise
from raysweep.errors import DataError
from raysweep.scores import (
    FULL,
    MEAN_LIKELIHOOD,
    MEAN_SCORE,
    Column,
    Side,
    by_method,
    column_name,
    method_of,
    of_methods,
    parts_of_means,
    task_of,
    usual_target,
)

if TYPE_CHECKING:
    import pandas as pd

PROBE_MEAN = column_name("probe", "mean_score")

Errors = Literal["paired", "paired, one seed", "unpaired", "unknown"]
"""What the errors of differences hold: test examples and seeds; examples alone; or of each score by itself."""


@dataclass(frozen=True)
class Tie:
    """A checkpoint that is not distinguishable from the best one."""

    trial: str
    checkpoint: str
    """Its stage id."""
    label: str
    difference: IntervalEstimate
    """The best one's score minus its, of one; the 95 % interval reaches down to zero."""
    cost_ratio: float
    """Its pretraining tokens over those of the best; NaN where either is not known."""


@dataclass(frozen=True)
class Edge:
    """A fine-tuning rate picked at an end of its grid: a better one may lie beyond."""

    trial: str
    checkpoint: str
    """Its stage id."""
    label: str
    task: str
    lr: float
    side: Side
    runs: tuple[str, ...] = ()
    """Stage ids of the trainings at this rate, which the tasks of a mixture share; empty where they are not known."""


@dataclass(frozen=True)
class TargetGap:
    """Pairs whose targets differ by more than `low` and at most `high`."""

    low: float
    high: float
    num_pairs: int
    ceiling: float
    """Of these, as `Ranking.ceiling` is of all."""


@dataclass(frozen=True)
class Ranking:
    """Checkpoints and indicators, each best first.

    `checkpoints` is the checkpoint table by falling target, with `rank` and, for each measured indicator,
    `rank/<indicator>` (1 is best; equal values share the smaller rank; a loss has its rank among those of its
    objective, and none if it is alone there). `skipped` says of each column why it is no indicator here.

    So it is with the target, where it is a rise of each checkpoint's own loss, as forgetting is: only pairs of one
    objective and text count, `rank` is a place among these, and there is no best one, no tie with it and no gap.
    """

    target: str
    num_groups: int
    """Objectives and texts within which checkpoints compare by the target; 1 where all do."""
    checkpoints: pd.DataFrame
    associations: tuple[Association, ...]
    skipped: Mapping[str, str]
    num_variants: int
    num_bases: int
    """Pretraining seeds of the scored checkpoints; agreement is counted over pairs within one."""
    num_unscored: int
    """Checkpoints without a target, diverged ones included."""
    diverged: tuple[str, ...]
    """Labels of the checkpoints whose pretraining diverged."""
    labels: Mapping[Key, str]
    """Trial and checkpoint id -> the point and step, in words."""
    target_tasks: tuple[str, ...]
    """Those that the target is of: one, a family's, or all by its method."""
    sign: float
    """-1 where a lower target is better: differences are then of its negative."""
    tasks: tuple[str, ...]
    """Those fine-tuned on, by each method: see `scores.tuning_name`."""
    ties: tuple[Tie, ...]
    """Not distinguishable from the best, by falling score."""
    gap: IntervalEstimate | None
    """The best score minus that of `second`; None where fewer than two checkpoints have one."""
    chance: Mapping[str, float]
    """Task -> score of guessing, or of always giving the commonest answer; of the tasks that record it."""
    num_near_chance: int
    """Scores of a checkpoint on a task, of `num_against_chance`, that are not clearly above that task's chance."""
    num_against_chance: int
    num_comparisons: int
    """Pairs of scored checkpoints, for all of which at once the intervals of `ties` and `gap` hold."""
    num_clear: int | None
    """Of these, the pairs whose difference is clear: at most one in twenty of them is expected to be none. None where
    errors are not known."""
    errors: Errors
    edges: tuple[Edge, ...]
    """By the checkpoints' order."""
    ceiling: float
    """Pairs right that an indicator which knew the true scores is expected to have: the rest is noise of fine-tuning.
    Of pairs of one base, as all that is said of agreement.
    NaN where the scores' errors are not known."""
    target_gaps: tuple[TargetGap, ...]
    """Fifths of the pairs, by which `by_target_gap` of the indicators goes."""
    seed_twins: SeedTwins | None
    """How far pretraining seeds of one recipe end apart; None where no recipe has several."""
    cut_prompts: tuple[CutPrompts, ...]
    """Few-shot scores some of whose prompts did not fit."""
    gaps_of: str | None
    """The column by whose differences `by_gap` of the indicators parts the pairs."""
    flags: tuple[Flag, ...]
    """Copies, collapsed numbers and leaks of the target, found from the numbers alone."""

    @property
    def has_scores(self) -> bool:
        """Whether any checkpoint has a target."""
        return self.num_unscored < len(self.checkpoints)

    @property
    def best(self) -> pd.Series | None:
        """The row of the best checkpoint; None if nothing is scored, or not all compare."""
        return self.checkpoints.iloc[0] if self.has_scores and self.num_groups == 1 else None

    @property
    def second(self) -> pd.Series | None:
        """The row of the best of the other checkpoints; None if none is scored."""
        if self.best is None or self.gap is None:
            return None
        return self.checkpoints[self.checkpoints["checkpoint"] != self.best["checkpoint"]].iloc[0]  # type: ignore[no-any-return]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, None for what is missing."""
        document = {
            "target": self.target,
            "num_groups": self.num_groups,
            "checkpoints": [{"label": self.labels[row_key(row)], **row} for row in self.checkpoints.to_dict("records")],
            "indicators": [asdict(association) for association in self.associations],
            "skipped": dict(self.skipped),
            "num_variants": self.num_variants,
            "num_bases": self.num_bases,
            "num_unscored": self.num_unscored,
            "diverged": list(self.diverged),
            "ties": [asdict(tie) for tie in self.ties],
            "gap": asdict(self.gap) if self.gap else None,
            "chance": dict(self.chance),
            "num_near_chance": self.num_near_chance,
            "num_against_chance": self.num_against_chance,
            "num_comparisons": self.num_comparisons,
            "num_clear": self.num_clear,
            "errors": self.errors,
            "edges": [asdict(edge) for edge in self.edges],
            "ceiling": self.ceiling,
            "target_gaps": [asdict(each) for each in self.target_gaps],
            "seed_twins": asdict(self.seed_twins) if self.seed_twins else None,
            "cut_prompts": [asdict(each) for each in self.cut_prompts],
            "gaps_of": self.gaps_of,
            "flags": [asdict(flag) for flag in self.flags],
        }
        return plain_json(document)  # type: ignore[no-any-return]


def rank(
    table: pd.DataFrame,
    *,
    columns: Sequence[Column],
    noise: Mapping[str, TaskNoise] | None = None,
    target: str = MEAN_SCORE,
    gaps_of: str | None = None,
) -> Ranking:
    """Rank the checkpoints of a checkpoint table by `target`, best first, and the indicators by agreement.

    Higher is better, unless the target's column declares otherwise, as that of forgetting does: then all differences
    are of its negative, so that what is better is above 0 here, too.

    Where it is a rise of each checkpoint's own loss, only pairs of one objective and text count; see `Ranking`.

    Agreement is over pairs of one pretraining seed, see `bases`. Its intervals leave out whole variants with all their
    seeds and checkpoints: checkpoints of one trajectory are no independent witnesses.

    Args:
        table: with the columns variant, trial, checkpoint, step, status.
        columns: what its metric columns are, as `columns_of` gives them; one that has a direction is an indicator. To
            take another, add its column to the table and here: Column("mine", Metric("sharpness", "min")).
        noise: column -> errors of a task's scores and of their differences, as `noise_of` gives them. Where the target
            is none of these columns or their mean, `<target>_stderr` is taken, and differences are not paired.
        gaps_of: the column by whose differences pairs are looked at apart; None: the mean loss on other
            corpora, which is one for all objectives, or else the held-out perplexity, between checkpoints of one loss.

    Raises:
        ValueError: if there is no column `target`, unless that is because nothing was fine-tuned at all.
        DataError: if the target is by token, and checkpoints of several vocabularies have one.
    """
    import pandas as pd

    own = next((column for column in columns if column.name == target and target in table), None)
    if own and own.metric.direction == "min":
        higher = replace(own, metric=replace(own.metric, direction="max"))
        others = [higher if column.name == target else column for column in columns]
        given: dict[str, Any] = {"noise": noise, "target": target, "gaps_of": gaps_of}
        turned = rank(table.assign(**{target: -table[target]}), columns=others, **given)
        shown = turned.checkpoints
        return replace(turned, checkpoints=shown.assign(**{target: -shown[target]}), sign=-1.0)
    columns = with_bytes(columns, table)
    tasks = _tasks(table, columns)
    table = _sorted(table, target, tasks)
    if not compares(table, target):
        shares = (*of_methods(MEAN_SCORE, tasks), *map(score, tasks))
        known = next((f", as with --target {name}" for name in shares if name in table), "")
        raise DataError(
            f"{target} is by token, and does not compare checkpoints of several vocabularies: rank by a share, such as "
            f"of right answers{known}"
        )
    scores: Floats = np.asarray(table[target], dtype=np.float64)
    scored = table[np.isfinite(scores)]
    groups = loss_groups(table, own) if own else np.zeros(len(table), dtype=np.int64)
    own_groups = groups[: len(scored)]
    num_groups, comparable = len(set(own_groups)) or 1, of_one(own_groups)
    errors = f"{target}_stderr"
    differences = between(
        scores[: len(scored)],
        errors=scored[errors].to_numpy(dtype="float64") if errors in scored else None,
        noise=_noise_of(target, noise or {}, columns, tasks),
        checkpoints=list(scored["checkpoint"]),
        comparable=comparable,
    )
    clear, bases = differences.clear(), bases_of(scored)
    one_base = comparable & of_one(bases)
    by_name = {column.name: column for column in columns}
    there = [name for name in (OTHER_TEXT, PPL) if name in table and scored[name].notna().any()]
    gaps_of = gaps_of or next(iter(there), None)
    associations, skipped = associate(
        scored, target=target, clear=clear, columns=by_name, gaps_of=gaps_of, groups=own_groups
    )
    kind_of_errors = _errors(differences)
    if kind_of_errors == "unknown":
        associations = tuple(map(without_clear, associations))
    places: dict[str, Any] = {"rank": _ranks(-scores, groups if num_groups > 1 else None)}
    losses: dict[str, Groups] = {}
    for item in associations:
        if item.source == "measured":
            losses[item.indicator] = loss_groups(table, by_name[item.indicator])
            values = table[item.indicator] * (1 if item.direction == "min" else -1)
            places[f"rank/{item.indicator}"] = _ranks(values, losses[item.indicator])
    labels = checkpoint_labels(table)
    estimates = differences.from_first() if len(scored) and num_groups == 1 else []
    is_other = list(scored["checkpoint"] != scored["checkpoint"].iloc[0]) if estimates else []
    chance = _chance(table, tasks)
    target_tasks = _target_tasks(target, tasks, columns)
    num_near, num_against = _near_chance(scored, {task: chance[task] for task in target_tasks if task in chance})
    return Ranking(
        target=target,
        num_groups=num_groups,
        target_tasks=target_tasks,
        sign=1.0,
        checkpoints=pd.concat([table, pd.DataFrame(places)], axis=1),
        associations=associations,
        skipped=skipped,
        num_variants=int(scored["variant"].nunique()),
        num_bases=len(set(bases)),
        num_unscored=len(table) - len(scored),
        diverged=tuple(labels[row_key(row)] for row in table[table["status"] == "diverged"].to_dict("records")),
        labels=labels,
        tasks=tasks,
        ties=_ties(scored, estimates, labels) if estimates else (),
        gap=next((each for each, other in zip(estimates, is_other, strict=True) if other), None),
        chance=chance,
        num_near_chance=num_near,
        num_against_chance=num_against,
        num_comparisons=differences.num_pairs,
        num_clear=None if kind_of_errors == "unknown" else int(clear.sum()) // 2,
        errors=kind_of_errors,
        edges=_edges(table, tasks, labels, noise or {}),
        ceiling=differences.ceiling(counted=one_base),
        target_gaps=tuple(
            TargetGap(
                each.low, each.high, int(each.pairs.sum()) // 2, differences.ceiling(each.pairs, counted=one_base)
            )
            for each in target_gaps(scores[: len(scored)], one_base)
        ),
        # Offsets of seeds are one for all recipes, in one unit.
        seed_twins=seed_twins(scored, scores[: len(scored)], differences.moments.variance) if num_groups == 1 else None,
        cut_prompts=cut_prompts(table),
        gaps_of=gaps_of,
        flags=_flags(
            scored,
            associations,
            target,
            labels,
            groups={name: within_bases(own_groups, each[: len(scored)]) for name, each in losses.items()},
        ),
    )


def default_target(table: pd.DataFrame, columns: Sequence[Column]) -> str:
    """What a checkpoint table is ranked by where nothing else is asked for: see `usual_target`.

    A score where the likelihood is of several vocabularies.
    """
    there = [column for column in columns if column.name in table]
    target = usual_target(there)
    if target not in table or compares(table, target):
        return target
    return usual_target(column for column in there if is_share(column.name))


def check_compares(ranking: Ranking) -> None:
    """See that any two checkpoints compare by the target, as who learns from it needs. Raises CompareError."""
    if ranking.num_groups > 1:
        raise CompareError(
            f"{ranking.target} is a rise of each checkpoint's own loss, which does not compare over the "
            f"{ranking.num_groups} objectives and texts there are; take a target that compares all, such as --target "
            f"{MEAN_SCORE}"
        )


def _flags(
    scored: pd.DataFrame,
    associations: Sequence[Association],
    target: str,
    labels: Mapping[Key, str],
    *,
    groups: Mapping[str, Groups],
) -> tuple[Flag, ...]:
    config = [item.indicator for item in associations if item.source == "config" and is_axis(item.indicator)]
    config += [SEED] * (SEED in scored and scored[SEED].nunique() > 1)
    named = {checkpoint: label for (_, checkpoint), label in labels.items()}
    # Rows of a table that somebody gave may be alike in all their settings.
    told = named if len(set(named.values())) == len(named) else None
    given: dict[str, Any] = {"config": sorted(config), "groups": groups, "labels": told}
    return tuple(find_flags(scored, target=target, indicators=sorted(groups), **given))


def _sorted(table: pd.DataFrame, target: str, tasks: Sequence[str]) -> pd.DataFrame:
    """By falling target, those without one last; raises ValueError if there is no such column."""
    if target not in table.columns:
        means = (MEAN_SCORE, MEAN_LIKELIHOOD)
        known = dict.fromkeys(name for mean in means for name in (mean, *of_methods(mean, tasks)))
        there = [*(name for name in known if name in table), *map(score, tasks)]
        if len(table) and (there or target.rpartition("/")[2] not in {mean.rpartition("/")[2] for mean in means}):
            raise ValueError(f"no column {target!r} to rank by; scores: {', '.join(there) or 'none yet'}")
        table = table.assign(**{target: math.nan})
    # One order of rows, whatever the caller's: sums of floats, and so the last bits, depend on it.
    table = table.sort_values([target, "trial", "step", "checkpoint"], ascending=[False, True, True, True])
    return table.reset_index(drop=True)


def _noise_of(
    target: str, noise: Mapping[str, TaskNoise], columns: Sequence[Column], tasks: Sequence[str]
) -> list[TaskNoise]:
    """Of the tasks that `target` is the mean of; none where it is another number."""
    parts = parts_of_means(tasks, columns).get(target, [target])
    return [noise[part] for part in parts] if all(part in noise for part in parts) else []


def _errors(differences: Differences) -> Errors:
    if not differences.known:
        return "unknown"
    if not differences.knows_seeds:
        return "paired, one seed" if differences.paired else "unpaired"
    return "paired" if differences.paired else "unpaired"


def _ties(scored: pd.DataFrame, estimates: Sequence[IntervalEstimate], labels: Mapping[Key, str]) -> tuple[Tie, ...]:
    """Those whose difference from the best may be none; the best itself, measured by another trial, is none of them."""
    rows = scored.to_dict("records")
    tokens = [row.get(NUM_TOKENS, math.nan) for row in rows]
    return tuple(
        Tie(
            trial=row["trial"],
            checkpoint=row["checkpoint"],
            label=labels[row_key(row)],
            difference=estimate,
            cost_ratio=spent / tokens[0] if tokens[0] else math.nan,
        )
        for row, estimate, spent in list(zip(rows, estimates, tokens, strict=True))[1:]
        if estimate.low <= 0 and row["checkpoint"] != rows[0]["checkpoint"]
    )


def _near_chance(scored: pd.DataFrame, chance: Mapping[str, float]) -> tuple[int, int]:
    """Of the scores on tasks of known chance: how many have intervals that reach down to it, and how many there are."""
    lows = {task: scored[f"{score(task)}_low"] for task in chance if f"{score(task)}_low" in scored}
    near = sum(int((low <= scored[column_name("sft", "chance_score", task)]).sum()) for task, low in lows.items())
    return near, sum(int(low.notna().sum()) for low in lows.values())


def _chance(table: pd.DataFrame, tasks: Sequence[str]) -> dict[str, float]:
    """Task -> chance level, the mean of its levels where checkpoints of several grammars have several."""
    columns = {task: column_name("sft", "chance_score", task) for task in tasks}
    known = {task: table[name].dropna() for task, name in columns.items() if name in table}
    # Without repetition, as a mean of equal floats may end on another last bit.
    return {task: float(np.mean(values.unique())) for task, values in known.items() if len(values)}


def _edges(
    table: pd.DataFrame, tasks: Sequence[str], labels: Mapping[Key, str], noise: Mapping[str, TaskNoise]
) -> tuple[Edge, ...]:
    runs = {
        (each.checkpoint, task): each.runs
        for task in tasks
        for each in (noise[score(task)].samples if score(task) in noise else ())
    }
    return tuple(
        Edge(
            trial=row["trial"],
            checkpoint=row["checkpoint"],
            label=labels[row_key(row)],
            task=task,
            lr=row[column_name("sft", "lr", task)],
            side="lowest" if edge < 0 else "highest",
            runs=runs.get((row["checkpoint"], task), ()),
        )
        for row in table.to_dict("records")
        for task in tasks
        if (edge := row.get(column_name("sft", "lr_edge", task), 0.0)) in (-1.0, 1.0)
    )


def _tasks(table: pd.DataFrame, columns: Sequence[Column]) -> tuple[str, ...]:
    """Those with a score in the table, each by every method, full first."""
    names = {column.task for column in columns if column.kind == "sft" and column.task is not None}
    there = (name for name in names if score(name) in table)
    return tuple(sorted(there, key=lambda name: (task_of(name), method_of(name) != FULL, name)))


def of_task(target: str, task: str) -> str:
    """The column of one task that a target is the mean of, or stands beside."""
    return column_name("sft", "log_likelihood" if target.endswith("log_likelihood") else "score", task)


def _target_tasks(target: str, tasks: Sequence[str], columns: Sequence[Column]) -> tuple[str, ...]:
    if not target.startswith("sft/"):  # It is of the checkpoint as it is.
        return ()
    column = next((column for column in columns if column.name == target and column.kind == "sft"), None)
    if column and column.tasks:
        return column.tasks
    return (str(column.task),) if column and column.task in tasks else tuple(tasks_beside(target, tasks))


def tasks_beside(target: str, tasks: Sequence[str]) -> list[str]:
    """Of the tasks by all methods, those by the target's own.

    >>> tasks_beside("sft/lora/mean_score", ["arc", "lora/arc"]), tasks_beside("sft/mean_score", ["arc", "lora/arc"])
    (['lora/arc'], ['arc'])
    """
    methods = by_method(tasks)
    words = target.split("/")[1:-1]  # No task has the name of a method, or of a mixture.
    behind = ("/".join(words[:num]) for num in range(len(words), 0, -1))
    return methods.get(next((name for name in behind if name in methods), FULL), [])


def score(task: str, kind: str = "sft") -> str:
    """The column of a task's score, of fine-tuning or of a linear probe."""
    return column_name(kind, "score", task)


def _ranks(values: Any, groups: Any = None) -> Any:
    """1 for the smallest; within each group, where there are `groups`, none for a member that is alone."""
    import pandas as pd

    values = pd.Series(values)
    if groups is None:
        return values.rank(method="min").astype("Int64")
    by_group = values.groupby(groups)
    return by_group.rank(method="min").where(by_group.transform("count") > 1).astype("Int64")


def plain_json(value: Any) -> Any:
    """As JSON has it: None for what is missing or not finite."""
    if isinstance(value, Mapping):
        return {str(name): plain_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if is_missing(value) or (isinstance(value, float) and math.isinf(value)) else value


def shown_indicators(ranking: Ranking) -> list[str]:
    """The few whose values stand beside the scores: the classic ones, where there are any."""
    classic = (HESSIAN_TRACE, PPL, KSHOT)
    there = [name for name in classic if f"rank/{name}" in ranking.checkpoints]
    return there or [item.indicator for item in ranking.associations if item.source == "measured"][:3]
