"""From a run's records to two tables: one row per stage result, one row per checkpoint."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, variance
from typing import TYPE_CHECKING, Any

from raysweep.analysis.derived import DERIVED, NUM_PARAMETERS, is_swept, setting_column
from raysweep.analysis.earlier import EARLIER_LOSS, earlier_losses
from raysweep.analysis.formatting import is_share
from raysweep.analysis.kept import keep, versions_of
from raysweep.analysis.objectives import LOSSES, VOCABULARY, losses_of
from raysweep.analysis.predictions import read_noise
from raysweep.analysis.uncertainty import EstimateArrays, TaskNoise, independent, mean_estimates
from raysweep.analysis.vocabularies import vocabularies_of
from raysweep.durable import replacing
from raysweep.record import Record
from raysweep.run_files import StageRow, TrialRow
from raysweep.runs import Run
from raysweep.scores import (
    FULL,
    Column,
    Result,
    by_method,
    by_task,
    checkpoint_metrics,
    column_name,
    finetuning_runs,
    mean_over_tasks,
    of_method,
    parts_of_means,
    pick,
    tunings_of,
    with_families,
)
from raysweep.spec import Metric
from raysweep.store import Store

if TYPE_CHECKING:
    import pandas as pd

RowValues = dict[Hashable, Any]
"""Column -> value, of one row."""

_STAGE = ("trial", "variant", "seed", "kind", "id", "step", "checkpoint", "task", "status", "lr", "stage_seed")
_PROVENANCE = (
    *("started", "wall_seconds", "peak_memory_bytes", "world_size", "device", "gpus_per_worker", "host"),
    "git_commit",
)
# Of a picked rate's place in its grid, as a number: metric columns hold nothing else.
_EDGES = {"lowest": -1.0, None: 0.0, "highest": 1.0}
# What tables tell beside the metrics of stages: of each task, of the mean over tasks, and of a stage that diverged.
_OF_TASKS = (
    Metric("score", "max", "share"),
    Metric("lr"),
    Metric("lr_edge"),
    Metric("num_seeds"),
    *(Metric(f"score_{end}", unit="share") for end in ("sd", "stderr", "low", "high")),
    *(Metric(f"log_likelihood_{end}", unit="nats/token") for end in ("low", "high")),
    *(Metric(f"ood_score_{end}", unit="share") for end in ("low", "high")),
    *(Metric(f"ood_log_likelihood_{end}", unit="nats/token") for end in ("low", "high")),
)
_OF_MEAN = (
    Metric("mean_score", "max", "share"),
    *(
        Metric(f"mean_{each}_{end}", unit=unit)
        for domain in ("", "ood_")
        for each, unit in ((f"{domain}score", "share"), (f"{domain}log_likelihood", "nats/token"))
        for end in ("stderr", "low", "high")
    ),
    Metric("mean_forgetting_stderr", unit="nats/token"),
    Metric("num_tasks_missing"),
)
_DIVERGED = (Metric("diverged_step", unit="steps"), Metric("diverged_loss", unit="nats/token"))
_CHECKPOINT = (
    *("trial", "variant", "seed", "checkpoint", "step", "status", "workers", "location", "sft_optimizer"),
    *LOSSES,
)


def stage_table(run: Run) -> pd.DataFrame:
    """One row per stage of each started trial.

    Columns: trial, variant, seed (of pretraining), `point.<path>`, kind, id, step, checkpoint, task, status, lr and
    stage_seed (of the stage itself), metrics as `<kind>/<metric>`, started (ISO 8601), wall_seconds, num_tokens,
    flops (as planned, of done stages), peak_memory_bytes, world_size, device, gpus_per_worker, host, git_commit,
    location (the stage's folder or URL), vocabulary (that its text was cut by), and as JSON text settings, inputs,
    versions.

    Status is done, diverged, failed, pruned (a scheduler stopped its trial before), or missing (not run). A stage that
    two trials share is a row of each.
    """
    known = dict.fromkeys(run.left_out(), "pruned") | {failure["stage"]: "failed" for failure in run.failures()}
    trials = run.trials()
    ids = sorted({stage.id for trial in trials for stage in trial.stages})
    records = {stage_id: run.store.get(stage_id) for stage_id in ids}
    rows = [
        _stage_row(trial, stage, records[stage.id], known.get(stage.id, "missing"))
        for trial in trials
        for stage in trial.stages
    ]
    vocabularies = vocabularies_of(run.store, filter(None, records.values()))
    for row in rows:
        if record := records[row["id"]]:
            row["location"] = run.store.location(row["id"])
            row[VOCABULARY] = vocabularies.get(record.inputs.get("tokens", row["id"]))
    last = (*_PROVENANCE, "location", VOCABULARY, "num_tokens", "flops", "settings", "inputs", "versions")
    return _frame(rows, first=_STAGE, last=last)


def noise_of(store: Store, stages: pd.DataFrame) -> dict[str, TaskNoise]:
    """Column -> the errors of a task's scores, from the test examples' scores that the stages of a stage table left."""
    results = {checkpoint: [result_of(row) for row in rows] for (_, checkpoint), rows in _by_checkpoint(stages).items()}
    return read_noise(store, results)


def checkpoint_table(run: Run) -> pd.DataFrame:
    """One row per checkpoint, with all that was measured on it.

    Columns: trial, variant, seed, checkpoint (its stage id), step, status, workers (that pretrained it), location;
    sft_optimizer (what fine-tuned it: the same in all of a run, a covariate where tables of several are put together);
    training_loss_of, perplexity_of, flatness_of, other_text_of and spans_of (in words, whose loss these numbers are);
    vocabulary (that its tokens are of);
    `point.<path>`; metrics of whole models as `<kind>/<metric>` and of tasks as `<kind>/<task>/<metric>` (mean over
    seeds). Of fine-tuning, `sft/<task>/`:
    `score` (test, mean over SFT seeds, at the learning rate with the best mean validation score), `score_sd` and
    `num_seeds` over these, `score_stderr` with `score_low` and `score_high` (a 95 % interval, over test examples and
    seeds), `lr`, and `lr_edge` (-1 where that is the lowest of its grid, 1 the highest, else 0); and over tasks
    `sft/mean_score` with its `_stderr`, `_low` and `_high`, NaN where a task is missing, and `sft/num_tasks_missing`;
    over those of a family `sft/<family>/mean_score`, likewise. Of `sft.likelihood` the same as `log_likelihood`; of
    `ood_test` of a task as `ood_score` and `ood_log_likelihood`. Of other methods of fine-tuning than full
    `sft/<method>/<task>/score`, `sft/<method>/mean_score`, and so on; of one training on a mixture of tasks
    `sft/<mixture>/<task>/score`, `sft/<method>/<mixture>/mean_score`.
    """
    stages = stage_table(run)
    return checkpoints_of(stages, noise_of(run.store, stages), columns_of(run))


def checkpoints_of(
    stages: pd.DataFrame, noise: Mapping[str, TaskNoise], columns: Sequence[Column] = ()
) -> pd.DataFrame:
    """`checkpoint_table` from a stage table, the errors of its scores and, for means over families, `columns_of`."""
    by_checkpoint = _by_checkpoint(stages)
    made = {(row["trial"], row["id"]): _known(row) for row in stages.to_dict("records")}
    names = {row["task"] for rows in by_checkpoint.values() for row in rows if row["kind"] == "sft"}
    tasks = sorted(tuning for name in names for tuning in tunings_of(name))
    rows = [_checkpoint_row(key, measured, made.get(key), tasks=tasks) for key, measured in by_checkpoint.items()]
    earlier = earlier_losses(stages)
    rows = [with_families(row | earlier.get((row["trial"], row["checkpoint"]), {}), columns) for row in rows]
    _add_errors(rows, tasks, noise, columns)
    table = _frame(rows, first=_CHECKPOINT)
    for derived in DERIVED:
        if set(derived.needs) <= set(table.columns):
            table[derived.column.name] = derived.function(table)
    return table


def columns_of(run: Run) -> tuple[Column, ...]:
    """What the metric columns of a checkpoint table are: as the stages of the run declare them, and what tables add."""
    stages = [stage for trial in run.trials() for stage in trial.stages]
    names = dict.fromkeys(str(stage.task) for stage in stages if stage.kind == "sft")
    tasks = dict.fromkeys(tuning for name in names for tuning in tunings_of(name))
    added = [Column("sft", metric, task) for task in tasks for metric in _OF_TASKS]
    methods = dict.fromkeys([None, *(method for method in by_method(tasks) if method != FULL)])
    added += [Column("sft", metric, method) for method in methods for metric in _OF_MEAN]
    families = dict.fromkeys(str(column.task) for column in run.columns() if column.tasks and column.kind == "sft")
    added += [
        Column("sft", metric, family) for family in families for metric in _OF_MEAN if "_missing" not in metric.name
    ]
    added += [Column(kind, metric) for kind in dict.fromkeys(stage.kind for stage in stages) for metric in _DIVERGED]
    added.append(Column("pretrain", Metric("num_parameters")))
    added += [derived.column for derived in DERIVED] + [EARLIER_LOSS]
    return tuple({column.name: column for column in [*added, *run.columns()]}.values())


def write_tables(
    run: Run, stages: pd.DataFrame, checkpoints: pd.DataFrame, columns: Sequence[Column]
) -> tuple[Path, Path]:
    """Writes tables/stages.parquet and tables/checkpoints.parquet in the run's folder, each whole; their paths."""
    folder = run.folder / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "stages.parquet", folder / "checkpoints.parquet"
    for path, table in zip(paths, (stages, keep(checkpoints, columns, versions_of(stages, columns))), strict=True):
        with replacing(path) as aside:
            table.to_parquet(aside, index=False)
    return paths


def _stage_row(trial: TrialRow, stage: StageRow, record: Record | None, otherwise: str) -> RowValues:
    row: RowValues = {"trial": trial.trial, "variant": trial.variant, "seed": trial.seed}
    row |= {f"point.{path}": value for path, value in trial.point.items()}
    for name, values in trial.settings.items():
        row |= {setting_column(name, path): value for path, value in values.items()}
    row |= {"kind": stage.kind, "id": stage.id, "step": stage.step, "checkpoint": stage.checkpoint, "task": stage.task}
    row |= {"status": record.status if record else otherwise, "inputs": json.dumps(dict(stage.inputs), sort_keys=True)}
    if record is None:
        return row
    known = record.provenance
    row |= {column_name(record.kind, name): float(value) for name, value in record.metrics.items()}
    row |= {name: known.get(name) for name in _PROVENANCE}
    return row | {
        "lr": record.spec.get("lr"),
        "stage_seed": record.spec.get("seed"),
        "num_tokens": record.metrics.get("num_tokens"),
        # As planned, which training that diverged has not come to.
        "flops": stage.flops if record.status == "done" else None,
        "settings": json.dumps(record.spec, sort_keys=True),
        "versions": json.dumps(known.get("versions", {}), sort_keys=True),
    }


def _checkpoint_row(
    key: tuple[str, str], measured: Sequence[RowValues], made: RowValues | None, *, tasks: Sequence[str]
) -> RowValues:
    _, checkpoint = key
    source = made or measured[0]
    row: RowValues = {name: source.get(name) for name in ("trial", "variant", "seed")}
    steps = [other["step"] for other in measured if other.get("step") is not None]
    row |= {"checkpoint": checkpoint, "step": steps[0] if steps else None}
    row["status"] = made["status"] if made else "done"
    row["workers"] = made.get("world_size") if made and made["kind"] == "pretrain" else None
    row["location"] = made.get("location") if made else None
    row |= {name: value for name, value in measured[0].items() if is_swept(str(name))}
    for other in [*([made] if made else []), *measured]:
        if VOCABULARY in other:
            row.setdefault(VOCABULARY, other[VOCABULARY])
        if "settings" in other:  # Else it is not finished.
            settings = json.loads(other["settings"])
            row.update(losses_of(other["kind"], settings))
            if other["kind"] == "sft":
                row["sft_optimizer"] = _optimizer_of(settings)
    known = {other["id"] for other in measured}
    rows = [*([made] if made and made["id"] not in known else []), *measured]
    results = by_task(map(result_of, rows))
    row.update(checkpoint_metrics(results))
    # A checkpoint taken as it is has no pretraining stage; its size counts all the same.
    if (taken := column_name("fetch", "num_parameters")) in row:
        row[NUM_PARAMETERS] = row[taken]
    for task in tasks:
        row |= _fine_tuned(task, results)
    for method, own in by_method(tasks).items():
        scores = [row[column_name("sft", "score", task)] for task in own]
        of_mean = {
            "mean_score": mean_over_tasks(scores),
            "num_tasks_missing": sum(math.isnan(score) for score in scores),
            **_forgetting_error(own, results),
        }
        row |= {of_method(column_name("sft", name), method): value for name, value in of_mean.items()}
    return row


def _optimizer_of(settings: Mapping[str, Any]) -> str:
    """Of fine-tuning, from its recorded spec: a field that this leaves out had its neutral value."""
    given = settings.get("hyperparameters")
    return str(given.get("optimizer", "adamw")) if isinstance(given, Mapping) else "adamw"


def _forgetting_error(tasks: Sequence[str], results: Sequence[Result]) -> dict[str, float]:
    """The standard error of the mean over tasks and seeds, by text and seeds; none where forgetting is not measured.

    Each seed reads text of its own, so that seeds differ by all there is of chance; but few seeds tell that badly, and
    then it is at least what the text alone makes. All tasks of a seed read the same: their errors add up.
    """
    by_id = {result.id: result.metrics for result in results}
    runs = [picked.runs if (picked := pick(finetuning_runs(results, task))) else () for task in tasks]
    of_seeds = [[by_id[run.id] for run in of_seed] for of_seed in zip(*runs, strict=False)]
    names = ("forgetting_nats_per_token", "forgetting_stderr")
    pairs = [[tuple(each.get(name, math.nan) for name in names) for each in of_seed] for of_seed in of_seeds]
    if not pairs or all(math.isnan(pair[0]) for of_seed in pairs for pair in of_seed):
        return {}
    values, errors = zip(*(map(fmean, zip(*of_seed, strict=True)) for of_seed in pairs), strict=True)
    of_text = fmean(error**2 for error in errors)
    of_all = variance(values) if len(values) > 1 else 0.0
    return {"mean_forgetting_stderr": math.sqrt(max(of_text, of_all) / len(values))}


def _fine_tuned(task: str, results: Sequence[Result]) -> RowValues:
    """Of one checkpoint and task, what belongs to the picked rate beside the metrics."""
    picked = pick(finetuning_runs(results, task))
    if picked is None:
        return {column_name("sft", "score", task): math.nan, column_name("sft", "num_seeds", task): 0}
    by_id = {result.id: result for result in results if result.task == task}
    scores = [by_id[run.id].metrics.get("score", math.nan) for run in picked.runs]
    values = {
        "lr": picked.lr,
        "lr_edge": _EDGES[picked.edge],
        "num_seeds": len(scores),
        # The form's own is over test examples of one run; of the mean over seeds, _add_errors says it.
        "score_stderr": math.nan,
        "score_sd": math.sqrt(variance(scores)) if len(scores) > 1 else math.nan,
    }
    return {column_name("sft", name, task): value for name, value in values.items()}


def result_of(row: Mapping[Hashable, Any]) -> Result:
    """What a row of a stage table says."""
    return Result(
        id=row["id"],
        kind=row["kind"],
        status=row["status"],
        task=row.get("task"),
        lr=row.get("lr"),
        seed=row.get("stage_seed"),
        metrics=_metrics(row),
    )


def _by_checkpoint(stages: pd.DataFrame) -> dict[tuple[str, str], list[RowValues]]:
    """(trial, checkpoint) -> its stages' rows, without the cells that hold nothing."""
    rows: dict[tuple[str, str], list[RowValues]] = defaultdict(list)
    for row in map(_known, stages.to_dict("records")):
        if checkpoint := row.get("checkpoint"):
            rows[row["trial"], checkpoint].append(row)
    return _each_once(dict(sorted(rows.items())))


def _each_once(rows: Mapping[tuple[str, str], list[RowValues]]) -> dict[tuple[str, str], list[RowValues]]:
    """A checkpoint that several trials have measured alike, as that of a phase that they share, is one of the first.

    What differs between their points is of later phases, and left out.
    """
    alike: dict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
    for key, measured in rows.items():
        alike[(key[1], *sorted(row["id"] for row in measured))].append(key)
    kept = {}
    for first, *others in alike.values():
        kept[first] = [
            {name: value for name, value in row.items() if all(_same(name, value, rows[key][0]) for key in others)}
            for row in rows[first]
        ]
    return kept


def _same(name: Hashable, value: Any, other: RowValues) -> bool:
    return not is_swept(str(name)) or other.get(name) == value


def _add_errors(
    rows: Sequence[RowValues], tasks: Sequence[str], noise: Mapping[str, TaskNoise], columns: Sequence[Column]
) -> None:
    """The errors and intervals of scores and likelihoods, of each task and of means over tasks."""
    parts = {name: [name] for name in noise} | parts_of_means(tasks, columns)
    known = {name: independent([noise[part] for part in of]) for name, of in parts.items() if noise.keys() >= {*of}}
    for row in rows:
        for name, of_name in known.items():
            places = [each.places.get(row["checkpoint"]) for each in of_name]
            there = [each.scores.at([place]) for each, place in zip(of_name, places, strict=True) if place is not None]
            if len(there) == len(of_name):
                row |= _errors(name, mean_estimates(there))


def _errors(name: str, score: EstimateArrays) -> RowValues:
    middle, half = float(score.value[0]), float(score.half_width()[0])
    low, high = middle - half, middle + half
    if is_share(name) and not math.isnan(half):  # max and min would make an end of a NaN.
        low, high = max(0.0, low), min(1.0, high)
    return {f"{name}_stderr": math.sqrt(score.variance[0]), f"{name}_low": low, f"{name}_high": high}


def _metrics(row: Mapping[Hashable, Any]) -> dict[str, float]:
    """Those of a row of the stage table, without the NaN of columns that other rows have."""
    prefix = column_name(row["kind"], "")
    there = {str(name): value for name, value in row.items() if str(name).startswith(prefix) and value == value}
    return {name.removeprefix(prefix): value for name, value in there.items()}


def _known(row: Mapping[Hashable, Any]) -> RowValues:
    """Without the cells pandas filled for want of a value."""
    import pandas as pd

    return {name: value for name, value in row.items() if not (pd.api.types.is_scalar(value) and pd.isna(value))}


def _frame(rows: Sequence[RowValues], *, first: Sequence[str], last: Sequence[str] = ()) -> pd.DataFrame:
    """Columns: `first`, what is swept, metrics by name, `last`; each of one type, so that Parquet takes it."""
    import pandas as pd

    names = {str(name) for row in rows for name in row} - {*first, *last}
    swept = sorted(filter(is_swept, names))
    columns = [*first, *swept, *sorted(names - set(swept)), *last]
    table = pd.DataFrame(index=range(len(rows)))
    series = {name: pd.Series([row.get(name) for row in rows], dtype=object) for name in columns}
    for name in columns:
        if is_swept(name):
            series[name] = _plain(series[name])
        elif "/" in name or name in ("lr", "wall_seconds", "num_tokens", "flops", "gpus_per_worker"):
            series[name] = series[name].map(_number).astype("float64")
        elif name in ("seed", "step", "stage_seed", "peak_memory_bytes", "world_size", "workers"):
            series[name] = series[name].map(_whole).astype("Int64")
        else:
            series[name] = series[name].astype("string")
    return pd.concat([table, pd.DataFrame(series)], axis=1)


def _number(value: object) -> float | None:
    """None too of what a record holds in a number's place, which no stage has written."""
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:
        return None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and abs(value) < 2**63 else None


def _plain(values: pd.Series) -> pd.Series:
    """Numbers, booleans or text as they are; anything else, or a mixture, as JSON text."""
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        return (
            values.astype("float64") if any(isinstance(value, float) for value in present) else values.astype("Int64")
        )
    if present and all(isinstance(value, bool) for value in present):
        return values.astype("boolean")
    if all(isinstance(value, str) for value in present):
        return values.astype("string")
    return values.map(lambda value: None if value is None else json.dumps(value, sort_keys=True)).astype("string")
