"""From the store to the errors of fine-tuned scores: the test examples' scores of the runs that count."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from raysweep.analysis.pairwise import Floats
from raysweep.analysis.uncertainty import Sample, TaskNoise, recorded, sample, task_noise
from raysweep.errors import LostError
from raysweep.scores import Result, by_method, by_task, column_name, finetuning_runs, pick, task_of
from raysweep.store import Store
from raysweep.tasks.base import OOD

logger = logging.getLogger(__name__)

METRICS = ("score", "log_likelihood")
"""Of an example, whose means over examples are ranked by."""
MANY_EXAMPLES = 10**6
"""Test examples of a record that does not say how many: enough for the normal quantile."""


def read_noise(store: Store, results: Mapping[str, Sequence[Result]]) -> dict[str, TaskNoise]:
    """Column -> errors of a task's scores, or likelihoods of its right answers, and of their differences.

    Over the checkpoints that have some. Of each checkpoint and task the predictions of the picked rate's seeds are
    read. Records without them, or whose examples have no names, still have errors, but unpaired ones.

    Args:
        results: checkpoint -> what its stages gave.
    """
    results = {checkpoint: by_task(own) for checkpoint, own in results.items()}
    tuned = [result for own in results.values() for result in own if result.kind == "sft"]
    tasks = sorted({str(result.task) for result in tuned})
    noise = {}
    read = cache(partial(_scores_of, store))  # Once for all metrics.
    for metric, averaged in product((*METRICS, *(f"{OOD}_{each}" for each in METRICS)), by_method(tasks).values()):
        for task in averaged if metric == "score" or any(metric in result.metrics for result in tuned) else []:
            samples = [_sample(read, checkpoint, own, task, metric) for checkpoint, own in sorted(results.items())]
            noise[column_name("sft", metric, task)] = task_noise(
                [each for each in samples if each is not None],
                num_tasks=len(averaged),
                are_shares=metric.endswith("score"),
            )
    return noise


class Scores(NamedTuple):
    """Of the test examples of one fine-tuning, of its own domain or of another."""

    examples: str
    """What tells them from others, whose ids order them; empty where they have none, or share some: as in the file."""
    by_metric: dict[str, Floats]
    """Of `METRICS` those that each example has as a finite number."""


def read_scores(path: Path, task: str = "", split: str | None = None) -> Scores | None:
    """Those of a predictions.jsonl; None where there is no such file, or it cannot be read.

    Args:
        path: of the file.
        task: whose examples, where those of several stand in it.
        split: OOD for those of another domain.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import json as arrow

    texts = ((name, pa.string()) for name in ("id", "task", "split"))
    wanted = pa.schema([*texts, *((metric, pa.float64()) for metric in METRICS)])
    try:
        table = arrow.read_json(
            path,
            read_options=arrow.ReadOptions(use_threads=False),
            parse_options=arrow.ParseOptions(explicit_schema=wanted, unexpected_field_behavior="ignore"),
        )
    except FileNotFoundError:
        return None
    except pa.ArrowInvalid as error:
        logger.warning("%s: its scores are not read: %s", path, error)
        return None
    table = table.filter(pc.or_kleene(pc.is_null(table["task"]), pc.equal(table["task"], task)))
    table = table.filter(pc.equal(table["split"], split) if split else pc.is_null(table["split"]))
    every = {metric: table[metric].to_numpy().astype(np.float64) for metric in METRICS}
    there = {metric: scores for metric, scores in every.items() if len(scores) and np.isfinite(scores).all()}
    ids = table["id"].to_pylist()
    if None in ids or len(set(ids)) < len(ids):
        return Scores("", there)
    order = sorted(range(len(ids)), key=ids.__getitem__)
    digest = hashlib.sha256("\n".join(ids[row] for row in order).encode()).hexdigest()
    return Scores(digest, {metric: scores[order] for metric, scores in there.items()})


def _sample(
    read: Callable[[str, str, str | None], Scores | None],
    checkpoint: str,
    results: Sequence[Result],
    task: str,
    metric: str,
) -> Sample | None:
    picked = pick(finetuning_runs(results, task))
    if picked is None:
        return None
    metrics = {result.id: result.metrics for result in results if result.task == task}
    if any(math.isnan(metrics[run.id].get(metric, math.nan)) for run in picked.runs):
        return None
    split = OOD if metric.startswith(f"{OOD}_") else None
    by_seed = [read(run.id, task_of(task), split) for run in picked.runs]
    seeds, ids = [run.seed for run in picked.runs], [run.id for run in picked.runs]
    own = metric.removeprefix(f"{OOD}_")
    there = [(each.examples, each.by_metric[own]) for each in by_seed if each and own in each.by_metric]
    if len(there) == len(by_seed) and len({(examples, len(scores)) for examples, scores in there}) == 1:
        scores = np.stack([each for _, each in there])
        return sample(checkpoint, seeds=seeds, scores=scores, examples=there[0][0], runs=ids)
    return _from_records(checkpoint, seeds, {id_: metrics[id_] for id_ in ids}, metric, split or "test")


def _scores_of(store: Store, stage_id: str, task: str, split: str | None) -> Scores | None:
    """Those of its predictions; None if they are lost: its score is still in its record."""
    try:
        return read_scores(store.file(stage_id, "predictions.jsonl"), task, split)
    except LostError as error:
        logger.warning("%s", error)
        return None


def _from_records(
    checkpoint: str, seeds: Sequence[int], by_run: Mapping[str, Mapping[str, float]], metric: str, split: str
) -> Sample:
    metrics = by_run.values()
    return recorded(
        checkpoint,
        seeds=seeds,
        means=[each[metric] for each in metrics],
        errors=[each.get(f"{metric}_stderr", math.nan) for each in metrics],
        num_examples=min(int(each.get(f"num_{split}_examples", MANY_EXAMPLES)) for each in metrics),
        runs=[*by_run],
    )
