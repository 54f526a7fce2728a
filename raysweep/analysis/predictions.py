"""From the store to the errors of fine-tuned scores: the test examples' scores of the runs that count."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np

from raysweep.analysis.pairwise import Floats
from raysweep.analysis.uncertainty import Sample, TaskNoise, recorded, sample, task_noise
from raysweep.errors import LostError
from raysweep.scores import Result, by_method, column_name, finetuning_runs, pick
from raysweep.store import Store

logger = logging.getLogger(__name__)

MANY_EXAMPLES = 10**6
"""Test examples of a record that does not say how many: enough for the normal quantile."""


def read_noise(store: Store, results: Mapping[str, Sequence[Result]]) -> dict[str, TaskNoise]:
    """Column -> errors of a task's scores, or likelihoods of its right answers, and of their differences.

    Over the checkpoints that have some. Of each checkpoint and task the predictions of the picked rate's seeds are
    read. Records without them, or whose examples have no names, still have errors, but unpaired ones.

    Args:
        results: checkpoint -> what its stages gave.
    """
    tuned = [result for own in results.values() for result in own if result.kind == "sft"]
    tasks = sorted({str(result.task) for result in tuned})
    noise = {}
    for metric, averaged in product(("score", "log_likelihood"), by_method(tasks).values()):
        for task in averaged if metric == "score" or any(metric in result.metrics for result in tuned) else []:
            samples = [_sample(store, checkpoint, own, task, metric) for checkpoint, own in sorted(results.items())]
            noise[column_name("sft", metric, task)] = task_noise(
                [each for each in samples if each is not None], num_tasks=len(averaged), are_shares=metric == "score"
            )
    return noise


def read_scores(path: Path, metric: str = "score") -> tuple[str, Floats] | None:
    """(what tells these examples from others, score of each) of a predictions.jsonl, by the examples' ids.

    The first is empty where the examples have no ids, or share some: they are then in the file's order. None where
    there is no such file, or no score in it.
    """
    import pyarrow as pa
    from pyarrow import json as arrow

    wanted = pa.schema([("id", pa.string()), (metric, pa.float64())])
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
    scores = table[metric].to_numpy().astype(np.float64)
    if len(scores) == 0 or not np.isfinite(scores).all():
        return None
    ids = table["id"].to_pylist()
    if None in ids or len(set(ids)) < len(ids):
        return "", scores
    order = sorted(range(len(ids)), key=ids.__getitem__)
    digest = hashlib.sha256("\n".join(ids[row] for row in order).encode()).hexdigest()
    return digest, scores[order]


def _sample(store: Store, checkpoint: str, results: Sequence[Result], task: str, metric: str) -> Sample | None:
    picked = pick(finetuning_runs(results, task))
    if picked is None:
        return None
    metrics = {result.id: result.metrics for result in results}
    if any(math.isnan(metrics[run.id].get(metric, math.nan)) for run in picked.runs):
        return None
    by_seed = [_scores_of(store, run.id, metric) for run in picked.runs]
    seeds = [run.seed for run in picked.runs]
    there = [each for each in by_seed if each is not None]
    if len(there) == len(by_seed) and len({(examples, len(scores)) for examples, scores in there}) == 1:
        return sample(checkpoint, seeds=seeds, scores=np.stack([each for _, each in there]), examples=there[0][0])
    return _from_records(checkpoint, seeds, [metrics[run.id] for run in picked.runs], metric)


def _scores_of(store: Store, stage_id: str, metric: str) -> tuple[str, Floats] | None:
    """Those of its predictions; None if they are lost: its score is still in its record."""
    try:
        return read_scores(store.file(stage_id, "predictions.jsonl"), metric)
    except LostError as error:
        logger.warning("%s", error)
        return None


def _from_records(checkpoint: str, seeds: Sequence[int], metrics: Sequence[Mapping[str, float]], metric: str) -> Sample:
    return recorded(
        checkpoint,
        seeds=seeds,
        means=[each[metric] for each in metrics],
        errors=[each.get(f"{metric}_stderr", math.nan) for each in metrics],
        num_examples=min(int(each.get("num_test_examples", MANY_EXAMPLES)) for each in metrics),
    )
