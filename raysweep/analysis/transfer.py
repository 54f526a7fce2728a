"""What models of the same loss are compared by: ways to measure transfer, and measures that may go with it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raysweep.analysis.objectives import loss_groups
from raysweep.analysis.pairwise import Floats
from raysweep.scores import FULL, MEAN_SCORE, MEANS, Column, by_method, column_name, of_method, tunings_of

if TYPE_CHECKING:
    import pandas as pd

_FORGETTING = next(mean.column for mean in MEANS if mean.each == "forgetting_nats_per_token")
FORGETTING = _FORGETTING.name

WITHOUT_DIRECTION = frozenset({"flatness/effective_rank", "flatness/stable_rank"})
"""Measures, of which no side is declared to be flatter."""

NO_MEASURES = frozenset({"tokenize", "fetch", "pretrain", "heldout", "probe", "probes", "sft"})
"""Kinds of stage that prepare, or that tell of transfer: what they have for measures is named one by one."""


@dataclass(frozen=True)
class Target:
    """A way to measure transfer.

    `draws` [checkpoints, draws] are shared by all, and hold the chance of a score given the labelled examples there are
    to train on: fine-tuning takes the same ones under every seed but where they are drawn by it, a probe of as many
    labels as there are has one fit, and those of fewer overlap where there are not enough for all draws.
    """

    name: str
    values: Floats
    """[checkpoints]; NaN where it is missing."""
    draws: Floats | None

    @property
    def is_complete(self) -> bool:
        """Whether no checkpoint lacks it."""
        return bool(np.isfinite(self.values).all())


def transfer_targets(table: pd.DataFrame, runs: pd.DataFrame, read: Callable[[str], Floats | None]) -> Iterator[Target]:
    """Probes by number of labels; fine-tuning at the tuned rate, what that forgets, and at each fixed rate.

    Of single tasks: those of a mixture are of one training, and none of their own. Those that a checkpoint of `table`
    lacks are given all the same, with NaN, so that they can be named; so is forgetting where losses do not compare.
    """
    runs = runs[runs["task"].map(lambda name: len(tunings_of(name)) == 1).astype(bool)]
    runs = runs[runs["checkpoint"].isin(table["checkpoint"])]
    for name in _probes(table):
        draws = [other for other in table if str(other).startswith(f"{name}_draw_")]
        if draws:
            label = f"probe, {name.removeprefix('probes/labels_')} labels"
            yield Target(label, numbers(table, name), table[draws].to_numpy(dtype=np.float64))
    for method, tasks in by_method(sorted(runs["task"].unique())).items():
        yield from _tuned_targets(table, runs, read, method=method, tasks=tasks)


def _tuned_targets(
    table: pd.DataFrame,
    runs: pd.DataFrame,
    read: Callable[[str], Floats | None],
    *,
    method: str,
    tasks: Sequence[str],
) -> Iterator[Target]:
    """Of one method of fine-tuning, over all its tasks."""
    mean, forgetting = of_method(MEAN_SCORE, method), of_method(FORGETTING, method)
    by = "" if method == FULL else f" by {method}"
    if mean not in table:
        return
    runs = runs[runs["task"].isin(tasks)]
    missing = np.full(len(table), math.nan)
    tuned = {task: numbers(table, column_name("sft", "lr", task)) for task in tasks}
    ids = _run_ids(runs, table, tuned)
    yield Target(f"fine-tuned{by}, rate tuned", numbers(table, mean), _draws(ids, read) if ids else None)
    if forgetting in table:
        name = f"pretraining loss kept{by} (a point: 0.01 nats)"
        # Losses of two objectives, or on two texts, rise by amounts that do not compare.
        is_one_loss = len(set(loss_groups(table, _FORGETTING))) == 1
        if ids and is_one_loss and table[forgetting].notna().all():
            rises = runs.set_index("id")["sft/forgetting_nats_per_token"].to_dict()
            # Below 0, so that higher is better here, too. Each seed has read text of its own.
            kept = -np.array([[[rises[each] for each in of_seed] for of_seed in row] for row in ids]).mean(axis=2)
            yield Target(name, kept.mean(axis=1), kept if kept.shape[1] > 1 else None)
        else:
            yield Target(name, missing, None)
    known = runs.set_index("id")["sft/score"].to_dict()
    for lr in sorted(runs["lr"].unique()):
        ids = _run_ids(runs, table, {task: np.full(len(table), lr) for task in tasks})
        name = f"fine-tuned{by} at {lr:g}"
        if ids:
            scores = np.array([[[known[each] for each in of_seed] for of_seed in row] for row in ids])
            yield Target(name, scores.mean(axis=(1, 2)), _draws(ids, read))
        else:
            yield Target(name, missing, None)


def _run_ids(runs: pd.DataFrame, table: pd.DataFrame, rates: Mapping[str, Floats]) -> list[list[list[str]]] | None:
    """Stages by checkpoint, seed of fine-tuning and task, at a rate of each; None if one is missing."""
    known = runs.set_index(["checkpoint", "task", "lr", "stage_seed"])["id"].to_dict()
    seeds = sorted(runs["stage_seed"].dropna().unique())
    keys = [
        [[(checkpoint, task, rates[task][row], seed) for task in rates] for seed in seeds]
        for row, checkpoint in enumerate(table["checkpoint"])
    ]
    if any(key not in known for row in keys for each in row for key in each):
        return None
    return [[[str(known[key]) for key in each] for each in row] for row in keys]


def _draws(ids: Sequence[Sequence[Sequence[str]]], read: Callable[[str], Floats | None]) -> Floats | None:
    """Scores of each seed on test examples of its own, [checkpoints, seeds]; None where predictions are lost.

    With the same examples for all seeds, what a model has of luck with them would pass for skill.
    """
    num_seeds = len(ids[0])
    if num_seeds < 2:
        return None
    draws = np.empty((len(ids), num_seeds))
    for row, of_checkpoint in enumerate(ids):
        for seed, of_seed in enumerate(of_checkpoint):
            scores = [read(each) for each in of_seed]
            draws[row, seed] = np.mean([math.nan if each is None else each[seed::num_seeds].mean() for each in scores])
    return None if np.isnan(draws).any() else draws


def probes_by_layer(table: pd.DataFrame) -> dict[int, dict[int | None, str]]:
    """Number of labels -> layer -> column, both rising; of numbers that single layers were probed with.

    The last is None: that of all blocks' states, and the norm that follows.

    >>> import pandas as pd
    >>> names = ["probes/labels_64", "probes/labels_8", "probes/labels_64_layer_2", "probes/labels_64_layer_2_stderr"]
    >>> probes_by_layer(pd.DataFrame(columns=names))
    {64: {2: 'probes/labels_64_layer_2', None: 'probes/labels_64'}}
    """
    found = {}
    for name in _probes(table):
        layers = (re.fullmatch(rf"{name}_layer_(\d+)", str(other)) for other in table)
        by_layer: dict[int | None, str] = {int(each[1]): each[0] for each in filter(None, layers)}
        if by_layer:
            rising = sorted(by_layer.items(), key=lambda item: item[0] or 0)
            found[int(name.rpartition("_")[2])] = {**dict(rising), None: name}
    return found


def _probes(table: pd.DataFrame) -> list[str]:
    """Columns of probes, by rising number of labels."""
    sizes = (re.fullmatch(r"probes/labels_(\d+)", str(name)) for name in table)
    return [each[0] for each in sorted(filter(None, sizes), key=lambda each: int(each[1]))]


def transfer_measures(table: pd.DataFrame, columns: Sequence[Column], loss: str) -> dict[str, Floats]:
    """What may go with transfer: every number of the measurements, the loss, and downstream scores that are had early.

    Of what is measured on several tasks the mean alone counts: each more is one more that is tried. NaN where a
    checkpoint lacks it.
    """
    others = [
        each
        for each in columns
        if each.kind not in NO_MEASURES and (each.metric.direction or each.name in WITHOUT_DIRECTION)
    ]
    names = [each.name for each in others if "/" not in each.metric.name]
    early = _probes(table)[:1]
    wanted = dict.fromkeys([*names, loss, *early])
    return {name: numbers(table, name) for name in wanted if name in table}


def numbers(table: pd.DataFrame, name: str) -> Floats:
    """A column [rows], NaN where a cell is empty."""
    return np.array(table[name].astype("Float64").to_numpy(na_value=math.nan), dtype=np.float64)
