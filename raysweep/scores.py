"""What a checkpoint's stages amount to: the learning rate that counts, and one number for each metric.

Pure, and used by runners (what a searcher is told) and analysis (what a report shows) alike, so that they agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from statistics import fmean
from typing import Any, Literal, TypeVar

from raysweep.spec import Metric

Side = Literal["lowest", "highest"]
Value = TypeVar("Value")

SAME_LOSS_NATS = 0.01
"""Losses within so many nats per token of each other count as the same, unless the sweep file says otherwise."""
FULL = "full"
"""The method of fine-tuning whose columns do not name it."""


def column_name(kind: str, metric: str, task: str | None = None) -> str:
    """What a search and a table call a number of a checkpoint. Names of kinds and tasks hold no slash.

    An empty kind is that of a number which no stage made: it goes by its own name.

    >>> column_name("flatness", "hessian_trace"), column_name("sft", "score", "boolq")
    ('flatness/hessian_trace', 'sft/boolq/score')
    """
    return "/".join(part for part in (kind or None, task, metric) if part is not None)


def tuning_name(task: str, method: str = FULL) -> str:
    """What stands for a task in columns of its fine-tuning: the task, behind the method's name unless that is full.

    Names of tasks and methods hold no slash.

    >>> tuning_name("boolq"), tuning_name("boolq", "lora")
    ('boolq', 'lora/boolq')
    """
    return task if method == FULL else f"{method}/{task}"


TOGETHER = "+"
"""Between the tasks in the name of a stage that trains on several: see `mixture_name`. No task's name holds it."""


def mixture_name(mixture: str, tasks: Iterable[str]) -> str:
    """What stands in place of a task for a stage that trains on several: see `tunings_of`.

    >>> tuning_name(mixture_name("all", ["boolq", "arc"]), "lora")
    'lora/all/arc+boolq'
    """
    return f"{mixture}/{TOGETHER.join(sorted(tasks))}"


def tunings_of(name: str) -> list[str]:
    """The `tuning_name`s that a stage's task stands for: of a mixture, one for each of its tasks.

    In columns the mixture's name stands behind that of the method, as if it were one: sft/all/arc/score, and
    sft/lora/all/mean_score.

    >>> tunings_of("lora/arc"), tunings_of("lora/all/arc+boolq")
    (['lora/arc'], ['lora/all/arc', 'lora/all/boolq'])
    """
    method, slash, tasks = name.rpartition("/")
    return [f"{method}{slash}{task}" for task in tasks.split(TOGETHER)]


def by_tuning(metrics: Mapping[str, Value], name: str | None) -> Iterator[tuple[str | None, str, Value]]:
    """(task, metric, value) of each metric of a stage.

    Args:
        metrics: by name; where the stage stands for several tasks, a name with a slash is <task>/<metric>, and any
            other is of each of them.
        name: the task of the stage; None: it is of no task.

    >>> list(by_tuning({"arc/score": 1, "boolq/score": 2, "num_steps": 3}, "all/arc+boolq"))
    [('all/arc', 'score', 1), ('all/arc', 'num_steps', 3), ('all/boolq', 'score', 2), ('all/boolq', 'num_steps', 3)]
    """
    if name is None or len(tunings := tunings_of(name)) == 1:
        yield from ((name, metric, value) for metric, value in metrics.items())
        return
    for tuning, (metric, value) in product(tunings, metrics.items()):
        task, _, own = metric.rpartition("/")
        if task in ("", task_of(tuning)):
            yield tuning, own, value


def method_of(tuning: str) -> str:
    """The method in a `tuning_name`; of a mixture with the mixture behind it.

    >>> method_of("boolq"), method_of("lora/boolq")
    ('full', 'lora')
    """
    return tuning.rpartition("/")[0] or FULL


def task_of(tuning: str) -> str:
    """The task in a `tuning_name`.

    >>> task_of("boolq"), task_of("lora/boolq")
    ('boolq', 'boolq')
    """
    return tuning.rpartition("/")[2]


def by_method(tunings: Iterable[str]) -> dict[str, list[str]]:
    """Method -> its names among `tuning_name`s.

    >>> by_method(["arc", "boolq", "lora/arc"])
    {'full': ['arc', 'boolq'], 'lora': ['lora/arc']}
    """
    groups: dict[str, list[str]] = {}
    for tuning in tunings:
        groups.setdefault(method_of(tuning), []).append(tuning)
    return groups


def of_method(column: str, method: str) -> str:
    """The name of a method's own of a column that is of all tasks.

    >>> of_method("sft/mean_score", "full"), of_method("sft/mean_score", "lora")
    ('sft/mean_score', 'sft/lora/mean_score')
    """
    kind, _, metric = column.partition("/")
    return column if method == FULL else column_name(kind, metric, method)


@dataclass(frozen=True)
class Column:
    """A metric of a kind of stage, as one number of each checkpoint; of one task, where `task` names it.

    `task` of fine-tuning is a `tuning_name`; of the means over a method's tasks it is the method, unless that is full.
    `tasks`: those that it is the mean of, where `task` names a family of some.
    """

    kind: str
    metric: Metric
    task: str | None = None
    tasks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`kind/metric`, or `kind/task/metric`: what a search and a table call it."""
        return column_name(self.kind, self.metric.name, self.task)

    @property
    def may_be_target(self) -> bool:
        """Whether it says what a checkpoint is worth to who uses it: fine-tuned, or with few bits a weight."""
        return self.kind in ("sft", "quantization") and self.metric.direction is not None


@dataclass(frozen=True)
class Mean:
    """The mean of a metric over all tasks that have stages of the kind `tasks_of`; of fine-tuning, by each method."""

    column: Column
    each: str
    tasks_of: str


MEANS = (
    Mean(Column("sft", Metric("mean_score", "max", "share")), each="score", tasks_of="sft"),
    Mean(Column("sft", Metric("mean_log_likelihood", "max", "nats/token")), each="log_likelihood", tasks_of="sft"),
    Mean(Column("sft", Metric("mean_ood_score", "max", "share")), each="ood_score", tasks_of="sft"),
    Mean(
        Column("sft", Metric("mean_ood_log_likelihood", "max", "nats/token")),
        each="ood_log_likelihood",
        tasks_of="sft",
    ),
    Mean(
        Column("sft", Metric("mean_forgetting", "min", "nats/token")),
        each="forgetting_nats_per_token",
        tasks_of="sft",
    ),
    Mean(Column("probe", Metric("mean_score", "max", "share")), each="score", tasks_of="probe"),
    Mean(Column("indicators", Metric("zeroshot_mean", "max", "share")), each="zeroshot", tasks_of="sft"),
)


MEAN_SCORE, MEAN_LIKELIHOOD = MEANS[0].column.name, MEANS[1].column.name
EACH_OF_MEAN = {mean.column.name: mean.each for mean in MEANS if mean.tasks_of == "sft"}
"""Column of a mean over tasks -> the metric of each."""


def family_columns(columns: Iterable[Column], families: Mapping[str, Sequence[str]]) -> list[Column]:
    """The means over the tasks of each family: of what has a mean over fine-tuning's tasks, by each method, and of
    indicators that all its tasks have, whose metrics are called `<task>/<metric>`."""
    declared = {column.name: column for column in columns}
    means = []
    for (family, tasks), column in product(families.items(), declared.values()):
        task, _, metric = column.metric.name.rpartition("/")
        if column.kind == "sft" and column_name("sft", metric) in EACH_OF_MEAN:
            method = column.task or FULL
            of_tasks = tuple(tuning_name(each, method) for each in tasks)
            means.append(replace(column, task=tuning_name(family, method), tasks=of_tasks))
        elif column.metric.direction and task == tasks[0]:
            means.append(Column(column.kind, replace(column.metric, name=metric), family, tuple(tasks)))
    # A mixture may lack a task of a family.
    return [mean for mean in means if all(part in declared for part in columns_of_mean(mean))]


def columns_of_mean(column: Column) -> list[str]:
    """The columns that one of a family is the mean of."""
    name = column.metric.name
    each = EACH_OF_MEAN[column_name("sft", name)] if column.kind == "sft" else name
    return [column_name(column.kind, each, task) for task in column.tasks]


def parts_of_means(tunings: Iterable[str], columns: Iterable[Column]) -> dict[str, list[str]]:
    """Mean over fine-tuning's tasks, of all by a method or of a family -> the columns that it is the mean of."""
    methods = by_method(tunings)
    of_all = {
        of_method(mean, method): [column_name("sft", each, task) for task in own]
        for mean, each in EACH_OF_MEAN.items()
        for method, own in methods.items()
    }
    families = (column for column in columns if column.tasks and column.kind == "sft")
    return of_all | {column.name: columns_of_mean(column) for column in families}


def with_families(values: Mapping[Any, Any], columns: Iterable[Column]) -> dict[Any, Any]:
    """A checkpoint's numbers by column, with the means over families of tasks; NaN where one is missing."""
    means = {}
    for column in columns:
        parts = columns_of_mean(column) if column.tasks else []
        if any(part in values for part in parts):
            means[column.name] = mean_over_tasks(values.get(part, math.nan) for part in parts)
    return {**values, **means}


def of_methods(mean: str, tasks: Iterable[str]) -> list[str]:
    """The columns of a mean over tasks by each method of these `tuning_name`s; full fine-tuning's first.

    >>> of_methods("sft/mean_score", ["lora/arc", "arc"])
    ['sft/mean_score', 'sft/lora/mean_score']
    """
    return [of_method(mean, method) for method in sorted(by_method(tasks), key=lambda name: (name != FULL, name))]


def usual_target(columns: Iterable[Column]) -> str:
    """What checkpoints are ranked by where nothing else is asked for.

    The mean log-likelihood of right answers, where fine-tuning measures it and picks rates by it; else the mean score.
    Of full fine-tuning where there is some.
    """
    tuned = [column for column in columns if column.kind == "sft" and column.task and not column.tasks]
    has_likelihood = any(column.metric.name == "log_likelihood" for column in tuned)
    mean = MEAN_LIKELIHOOD if has_likelihood else MEAN_SCORE
    tasks = [str(column.task) for column in tuned if column.metric.name == "score"]
    return next(iter(of_methods(mean, tasks)), mean)


@dataclass(frozen=True)
class FinetuningRun:
    """One finished fine-tuning run of a checkpoint on a task. `id`: of its stage."""

    lr: float
    seed: int
    diverged: bool
    valid_score: float
    """Or the mean log-likelihood of right answers, where that is measured."""
    id: str


@dataclass(frozen=True)
class Pick:
    """The learning rate that counts for a checkpoint on a task, and its runs, by seed.

    `edge` says at which end of the grid the rate stands, if no rate within does as well: a better one may lie beyond.
    A rate at which a run diverged bounds the grid like any other, so that the best rate below it is inside. Where all
    score alike, as they do where none has learnt anything, nothing bounds the grid: the lowest is picked, and said to
    be at the edge. None also where there was no choice.
    """

    lr: float
    runs: tuple[FinetuningRun, ...]
    edge: Side | None


def pick(runs: Iterable[FinetuningRun]) -> Pick | None:
    """The rate with the highest mean validation score; of equal ones the smallest. None if there is none to pick.

    A rate at which a run diverged is not picked, since the mean of the seeds that survived would flatter it; nor is
    one whose mean is NaN, or one with fewer seeds than another that may be picked: a mean of few seeds is the highest
    by chance more often.

    >>> slow, good = FinetuningRun(1e-3, 0, False, 0.5, "a"), FinetuningRun(1e-2, 0, False, 0.7, "b")
    >>> runs = [slow, good, FinetuningRun(1e-1, 0, True, math.nan, "c")]
    >>> pick(runs).lr, pick(runs).edge
    (0.01, None)
    """
    grid = _by_rate(runs)
    valid = _validation_scores(grid)
    if not valid:
        return None
    most = max(len(grid[lr]) for lr in valid)
    valid = {lr: score for lr, score in valid.items() if len(grid[lr]) == most}
    best = max(valid, key=lambda lr: (valid[lr], -lr))
    lowest, *within, highest = sorted(grid) if len(grid) > 1 else (best, best)
    edge: Side | None = None
    is_flat = len(valid) == len(grid) and len(set(valid.values())) == 1
    if lowest < highest and (is_flat or not any(valid.get(lr) == valid[best] for lr in within)):
        edge = "lowest" if best == lowest else "highest"
    return Pick(lr=best, runs=grid[best], edge=edge)


def open_sides(runs: Iterable[FinetuningRun], *, num_valid: float | None = None) -> tuple[Side, ...]:
    """The ends of a grid beyond which a better rate may lie: those that no other rate beats beyond chance.

    Scores often stand still before they rise with the rate, so the upper end is open, too, where it is below the best
    rate by at most one standard error of the best one's score (the rule of Breiman et al., 1984):
    sqrt(s (1 - s) / num_valid), which is that of a share of right answers s, and no less than that of any score in
    [0, 1]. All rates alike leave both ends open. Where a run diverged at every rate, the lower one is.

    Args:
        runs: of one checkpoint and task.
        num_valid: examples that a validation score in [0, 1] is a mean over, the same for all seeds; None: it is none,
            as a likelihood is, which tells rates apart where scores do not: an end below the best is closed. Of means
            of several tasks' means, what `pooled_examples` says.

    >>> runs = [FinetuningRun(lr, 0, False, hits / 200, "") for lr, hits in ((1e-4, 110), (3e-4, 125), (1e-3, 123))]
    >>> open_sides(runs), open_sides(runs, num_valid=200)
    ((), ('highest',))
    """
    grid = _by_rate(runs)
    valid = _validation_scores(grid)
    if not valid:
        return ("lowest",) if any(run.diverged for runs_of_rate in grid.values() for run in runs_of_rate) else ()
    best = max(valid.values())
    error = math.sqrt(best * (1 - best) / num_valid) if num_valid else 0.0
    ends: dict[Side, tuple[float, float]] = {"lowest": (min(grid), best), "highest": (max(grid), best - error)}
    return tuple(side for side, (lr, least) in ends.items() if valid.get(lr, -math.inf) >= least)


def pooled_examples(nums: Sequence[float]) -> float:
    """Examples of one task whose mean score has the error that the mean of several tasks' mean scores has.

    Where their examples, `nums` of each, vary alike: the variance is sum(v / n) / k^2.

    >>> pooled_examples([200]), pooled_examples([200, 200]), round(pooled_examples([30, 200]), 1)
    (200.0, 400.0, 104.3)
    """
    return len(nums) ** 2 / sum(1 / num for num in nums)


def _by_rate(runs: Iterable[FinetuningRun]) -> dict[float, tuple[FinetuningRun, ...]]:
    ordered = sorted(runs, key=lambda run: (run.lr, run.seed))
    return {lr: tuple(runs_of_rate) for lr, runs_of_rate in groupby(ordered, key=lambda run: run.lr)}


def _validation_scores(grid: Mapping[float, Sequence[FinetuningRun]]) -> dict[float, float]:
    """Of the rates that may be picked: mean over seeds."""
    return {
        lr: fmean(run.valid_score for run in runs_of_rate)
        for lr, runs_of_rate in grid.items()
        if not any(run.diverged or math.isnan(run.valid_score) for run in runs_of_rate)
    }


def mean_over_tasks(scores: Iterable[float]) -> float:
    """Mean of a score of each task; NaN if one is missing, as means over different tasks do not compare."""
    of_tasks = list(scores)
    return fmean(of_tasks) if of_tasks else math.nan


@dataclass(frozen=True)
class Result:
    """What is known of one stage of a checkpoint.

    `status` is done, diverged, failed, pruned or missing; `metrics` are empty where the stage is not finished; `task`
    of fine-tuning is a `tuning_name`; `lr` and `seed` are the stage's own, where it has them.
    """

    id: str
    kind: str
    status: str
    metrics: Mapping[str, float]
    task: str | None = None
    lr: float | None = None
    seed: int | None = None


def by_task(results: Iterable[Result]) -> list[Result]:
    """Each result of a stage that trains on a mixture as one for each of its tasks, all with the stage's id."""
    return [
        replace(result, task=tuning, metrics={name: value for own, name, value in placed if own == tuning})
        for result in results
        for placed in [list(by_tuning(result.metrics, result.task))]
        for tuning in ([result.task] if result.task is None else tunings_of(result.task))
    ]


def finetuning_runs(results: Iterable[Result], task: str) -> list[FinetuningRun]:
    """The finished fine-tuning runs on one task."""
    return [
        FinetuningRun(
            lr=result.lr or math.nan,
            seed=result.seed or 0,
            diverged=result.status == "diverged",
            valid_score=result.metrics.get("valid_log_likelihood", result.metrics.get("valid_score", math.nan)),
            id=result.id,
        )
        for result in results
        if result.kind == "sft" and result.task == task and result.status in ("done", "diverged")
    ]


def checkpoint_metrics(results: Sequence[Result]) -> dict[str, float]:
    """Column -> number, over all stages of one checkpoint, finished or not.

    A metric is the mean over a stage's seeds; of fine-tuning, over the seeds of the rate that `pick` picks, and
    `sft/<task>/score` is NaN where there is none. Means over tasks are those of `MEANS`.
    """
    metrics: dict[str, float] = {}
    results = by_task(results)
    for task in _tasks(results, "sft"):
        picked = pick(finetuning_runs(results, task))
        ids = {run.id for run in picked.runs} if picked else set()
        metrics[column_name("sft", "score", task)] = math.nan
        metrics |= _means([result for result in results if result.id in ids and result.task == task])
    others = [result for result in results if result.kind != "sft" and result.metrics]
    for group in dict.fromkeys((result.kind, result.task) for result in others):
        metrics |= _means([result for result in others if (result.kind, result.task) == group])
    for mean, columns in means_of(results):
        if any(column in metrics for column in columns):
            metrics[mean.name] = mean_over_tasks(metrics.get(column, math.nan) for column in columns)
    return metrics


def means_of(results: Sequence[Result]) -> Iterator[tuple[Column, list[str]]]:
    """Each mean over tasks that results may have, and the columns that it is the mean of."""
    results = by_task(results)
    for mean in MEANS:
        tasks = _tasks(results, mean.tasks_of)
        if mean.column.kind != "sft":  # What else is of tasks is not of methods.
            tasks = list(dict.fromkeys(map(task_of, tasks)))
        for method, own in by_method(tasks).items():
            column = replace(mean.column, task=None if method == FULL else method)
            yield column, [column_name(column.kind, mean.each, task) for task in own]


def _tasks(results: Iterable[Result], kind: str) -> list[str]:
    return sorted({str(result.task) for result in results if result.kind == kind})


def _means(results: Sequence[Result]) -> dict[str, float]:
    """Of stages of one kind and task: column -> mean over them, NaN if one lacks the metric."""
    names = dict.fromkeys(name for result in results for name in result.metrics)
    return {
        column_name(results[0].kind, name, results[0].task): fmean(
            result.metrics.get(name, math.nan) for result in results
        )
        for name in names
    }
