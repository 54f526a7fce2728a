"""Which checkpoint fine-tunes best, and which indicator would have said so beforehand."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from raysweep.analysis import formats
from raysweep.analysis.indicators import Direction, direction_of, is_bookkeeping, is_config
from raysweep.analysis.pairwise import (
    Estimate,
    Floats,
    PairCounts,
    compare,
    draw_weights,
    interval,
    kendall,
    spearman,
)
from raysweep.scores import Side

if TYPE_CHECKING:
    import pandas as pd

FEW_VARIANTS = 8
"""Below it a bootstrap over variants has too few to draw from, and its intervals are too narrow."""

MEAN_SCORE = "sft/mean_score"
_LR = re.compile(r"sft/.+_lr")


@dataclass(frozen=True)
class Association:
    """How well one indicator orders the checkpoints as the target does; all statistics positive for agreement."""

    indicator: str
    source: Literal["measured", "config"]
    """config: known from the sweep file alone, the baseline that a measured indicator has to beat."""
    direction: Direction
    """Which values are better: declared for what is measured; for config, whichever fits this data (in hindsight)."""
    num_checkpoints: int
    num_missing: int
    """Scored checkpoints left out, for want of the indicator."""
    accuracy: Estimate
    """Share of all pairs ordered as by the target, ties half."""
    clear_accuracy: Estimate
    """The same over pairs whose target difference is beyond the noise between SFT seeds."""
    spearman: Estimate
    kendall: Estimate
    gain: Estimate
    """`accuracy` minus that of the best config baseline, on the same draws."""
    pairs: PairCounts
    same_order_as: str | None
    """An indicator listed before, with the same order of the same checkpoints (perplexity and its loss)."""


@dataclass(frozen=True)
class Tie:
    """A checkpoint that is not distinguishable from the best one."""

    checkpoint: str
    """Its stage id."""
    label: str
    difference: Estimate
    """The best one's score minus its, of one; the 95 % interval reaches down to zero."""
    cost_ratio: float
    """Its pretraining tokens over those of the best; NaN where either is not known."""


@dataclass(frozen=True)
class Edge:
    """A fine-tuning rate picked at an end of its grid: a better one may lie beyond."""

    checkpoint: str
    """Its stage id."""
    label: str
    task: str
    lr: float
    side: Side


@dataclass(frozen=True)
class Ranking:
    """Checkpoints and indicators, each best first.

    `checkpoints` is the checkpoint table by falling target, with `rank` and, for each indicator, `rank/<indicator>`
    (1 is best; equal values share the smaller rank). `skipped` says of each column why it is no indicator here.
    """

    target: str
    checkpoints: pd.DataFrame
    associations: tuple[Association, ...]
    skipped: Mapping[str, str]
    num_variants: int
    num_bootstrap: int
    num_unscored: int
    """Checkpoints without a target, diverged ones included."""
    diverged: tuple[str, ...]
    """Labels of the checkpoints whose pretraining diverged."""
    labels: Mapping[str, str]
    """Checkpoint id -> its point and step, in words."""
    ties: tuple[Tie, ...]
    """Not distinguishable from the best, by falling score."""
    gap: Estimate | None
    """The best score minus the second; None where fewer than two checkpoints have one."""
    chance: Mapping[str, float]
    """Task -> score of guessing, or of always giving the commonest answer; of the tasks that record it."""
    num_near_chance: int
    """Scores of a checkpoint on a task, of `num_against_chance`, that are not clearly above that task's chance."""
    num_against_chance: int
    num_comparisons: int
    """Pairs of scored checkpoints, for all of which at once the intervals of `ties` and `gap` hold."""
    edges: tuple[Edge, ...]
    """By the checkpoints' order."""

    @property
    def best(self) -> pd.Series | None:
        """The row of the best checkpoint; None if nothing is scored."""
        return None if self.num_unscored == len(self.checkpoints) else self.checkpoints.iloc[0]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, None for what is missing."""
        document = {
            "target": self.target,
            "checkpoints": [
                {"label": self.labels[row["checkpoint"]], **row} for row in self.checkpoints.to_dict("records")
            ],
            "indicators": [asdict(association) for association in self.associations],
            "skipped": dict(self.skipped),
            "num_variants": self.num_variants,
            "num_bootstrap": self.num_bootstrap,
            "num_unscored": self.num_unscored,
            "diverged": list(self.diverged),
            "ties": [asdict(tie) for tie in self.ties],
            "gap": asdict(self.gap) if self.gap else None,
            "chance": dict(self.chance),
            "num_near_chance": self.num_near_chance,
            "num_against_chance": self.num_against_chance,
            "num_comparisons": self.num_comparisons,
            "edges": [asdict(edge) for edge in self.edges],
        }
        return _json(document)  # type: ignore[no-any-return]


def rank(
    table: pd.DataFrame,
    *,
    target: str = MEAN_SCORE,
    num_bootstrap: int = 1000,
    seed: int = 0,
    directions: Mapping[str, Direction] | None = None,
) -> Ranking:
    """Rank the checkpoints of a checkpoint table by `target` (higher is better), and the indicators by agreement.

    Intervals are 95 % percentiles of a bootstrap that draws whole variants with all their seeds and checkpoints:
    checkpoints of one trajectory are no independent witnesses. All indicators see the same draws.

    Args:
        table: with the columns variant, trial, checkpoint, step, status, and `<target>_stderr` if noise is known.
        directions: of further columns to take as indicators, such as {"mine/sharpness": "lower"}.

    Raises:
        ValueError: if there is no column `target`, unless that is because nothing was fine-tuned at all.
    """
    import pandas as pd

    if target not in table.columns:
        there = [name for name in table.columns if name.startswith("sft/") and name.endswith("score")]
        if len(table) and (there or target != MEAN_SCORE):
            raise ValueError(f"no column {target!r} to rank by; scores: {', '.join(there) or 'none yet'}")
        table = table.assign(**{target: math.nan})
    # One order of rows, whatever the caller's: sums of floats, and so the last bits, depend on it.
    table = table.sort_values([target, "trial", "step", "checkpoint"], ascending=[False, True, True, True])
    table = table.reset_index(drop=True)
    scores: Floats = np.asarray(table[target], dtype=np.float64)
    scored = np.isfinite(scores)
    candidates, skipped = _candidates(table, scored, target=target, directions=directions or {})
    weights = (
        draw_weights(list(table["variant"][scored]), num_bootstrap=num_bootstrap, seed=seed) if scored.any() else None
    )
    stderr = table[f"{target}_stderr"].to_numpy(dtype="float64") if f"{target}_stderr" in table else None
    found = []
    for name, (values, source, direction) in candidates.items():
        have = np.isfinite(values[scored])
        if weights is None or have.sum() < 2 or len(np.unique(values[scored][have])) < 2:
            skipped[name] = "fewer than two different values"
            continue
        found.append(
            _associate(
                name,
                values=values[scored][have],
                scores=scores[scored][have],
                stderr=None if stderr is None else stderr[scored][have],
                weights=weights[:, have],
                source=source,
                direction=direction,
                num_missing=int((~have).sum()),
            )
        )
    columns: dict[str, Any] = {"rank": _ranks(-scores)}
    for name in (association.indicator for association, _ in found):
        values, _, direction = candidates[name]
        columns[f"rank/{name}"] = _ranks(values if direction == "lower" else -values)
    labels = checkpoint_labels(table)
    associations = _ordered(found, {name: ranks for name, ranks in columns.items() if name != "rank"})
    num_scored = int(scored.sum())
    chance = _chance(table)
    return Ranking(
        target=target,
        checkpoints=pd.concat([table, pd.DataFrame(columns)], axis=1),
        associations=associations,
        skipped=skipped,
        num_variants=int(table["variant"][scored].nunique()),
        num_bootstrap=num_bootstrap,
        num_unscored=int((~scored).sum()),
        diverged=tuple(labels[name] for name in table["checkpoint"][table["status"] == "diverged"]),
        labels=labels,
        ties=(),
        gap=Estimate(float(scores[0] - scores[1])) if num_scored > 1 else None,
        chance=chance,
        num_near_chance=0,
        num_against_chance=0,
        num_comparisons=num_scored * (num_scored - 1) // 2,
        edges=_edges(table, labels),
    )


def _chance(table: pd.DataFrame) -> dict[str, float]:
    """Task -> chance level. Every checkpoint has the same test examples, so any one's will do."""
    columns = {task: f"sft/{task}_chance_score" for task in _tasks(table)}
    known = {task: table[name].dropna() for task, name in columns.items() if name in table}
    return {task: float(values.iloc[0]) for task, values in known.items() if len(values)}


def _edges(table: pd.DataFrame, labels: Mapping[str, str]) -> tuple[Edge, ...]:
    return tuple(
        Edge(
            checkpoint=row["checkpoint"],
            label=labels[row["checkpoint"]],
            task=task,
            lr=row[f"sft/{task}_lr"],
            side="lowest" if row[f"sft/{task}_lr_edge"] < 0 else "highest",
        )
        for row in table.to_dict("records")
        for task in _tasks(table)
        if row.get(f"sft/{task}_lr_edge", 0.0) in (-1.0, 1.0)
    )


def _tasks(table: pd.DataFrame) -> list[str]:
    """Fine-tuning tasks of a checkpoint table; each has a column of the rate picked."""
    return [name.removeprefix("sft/").removesuffix("_lr") for name in table.columns if _LR.fullmatch(name)]


def checkpoint_labels(table: pd.DataFrame) -> dict[str, str]:
    """Checkpoint id -> what tells it from the others: the point's values that vary, the step, the seed."""
    points = [name for name in table.columns if name.startswith("point.") and table[name].nunique(dropna=False) > 1]
    several_seeds = table["seed"].nunique() > 1 if "seed" in table else False
    labels = {}
    for row in table.to_dict("records"):
        point = {name.removeprefix("point."): row[name] for name in points if not is_missing(row[name])}
        parts = [formats.point_text(point)] if point else []
        if not is_missing(row["step"]):
            parts.append(f"step {int(row['step'])}")
        if several_seeds:
            parts.append(f"seed {row['seed']}")
        labels[row["checkpoint"]] = " · ".join(parts) or str(row["checkpoint"])
    return labels


Candidate = tuple[Floats, Literal["measured", "config"], Direction]


def _candidates(
    table: pd.DataFrame, scored: Any, *, target: str, directions: Mapping[str, Direction]
) -> tuple[dict[str, Candidate], dict[str, str]]:
    import pandas as pd

    candidates: dict[str, Candidate] = {}
    skipped = {}
    for name in map(str, table.columns):
        direction = directions.get(name) or direction_of(name)
        if name == target or (name.startswith("sft/") and name not in directions):
            continue
        if direction is None and not is_config(name):
            if "/" in name and not is_bookkeeping(name):
                skipped[name] = "no direction declared in analysis/indicators.py"
            continue
        if not pd.api.types.is_numeric_dtype(table[name]):
            skipped[name] = "words have no order"
            continue
        values = np.array(table[name].astype("Float64").to_numpy(na_value=math.nan), dtype=np.float64)
        if direction:
            candidates[name] = values, "measured", direction
        else:
            both = scored & np.isfinite(values)
            tau = kendall(values[both], table[target].to_numpy(dtype="float64")[both], np.ones((1, int(both.sum()))))
            candidates[name] = values, "config", "lower" if tau[0] < 0 else "higher"
    return candidates, skipped


def _associate(
    name: str,
    *,
    values: Floats,
    scores: Floats,
    stderr: Floats | None,
    weights: Floats,
    source: Literal["measured", "config"],
    direction: Direction,
    num_missing: int,
) -> tuple[Association, Floats]:
    """The association but for its gain, and the bootstrap draws of its accuracy."""
    import scipy.stats

    oriented = -values if direction == "lower" else values
    pairs = compare(oriented, scores, stderr=stderr)
    once = np.ones((1, len(scores)))
    draws = pairs.accuracy(weights)
    varied = len(np.unique(scores)) > 1
    rho = float(scipy.stats.spearmanr(oriented, scores).statistic) if varied else math.nan
    tau = float(scipy.stats.kendalltau(oriented, scores).statistic) if varied else math.nan
    association = Association(
        indicator=name,
        source=source,
        direction=direction,
        num_checkpoints=len(scores),
        num_missing=num_missing,
        accuracy=interval(float(pairs.accuracy(once)[0]), draws),
        clear_accuracy=interval(float(pairs.clear_accuracy(once)[0]), pairs.clear_accuracy(weights)),
        spearman=interval(rho, spearman(oriented, scores, weights)),
        kendall=interval(tau, kendall(oriented, scores, weights)),
        gain=Estimate(math.nan),
        pairs=pairs.counts,
        same_order_as=None,
    )
    return association, draws


def _ordered(found: Sequence[tuple[Association, Floats]], ranks: Mapping[str, Any]) -> tuple[Association, ...]:
    """Best first, with the gain over the best config baseline, and repetitions of an order marked."""
    found = sorted(found, key=lambda item: (-item[0].accuracy.value, item[0].indicator))
    baseline = next((item for item in found if item[0].source == "config"), None)
    seen: dict[tuple[str, ...], str] = {}
    ordered = []
    for association, draws in found:
        fields = {name: getattr(association, name) for name in Association.__dataclass_fields__}
        # Over other checkpoints than the baseline's, a difference would compare two things at once.
        if baseline and association.source == "measured" and association.num_missing == baseline[0].num_missing:
            value = association.accuracy.value - baseline[0].accuracy.value
            fields["gain"] = interval(value, draws - baseline[1])
        order = (association.source, *map(str, ranks[f"rank/{association.indicator}"]))
        fields["same_order_as"] = seen.get(order)
        seen.setdefault(order, association.indicator)
        ordered.append(Association(**fields))
    return tuple(ordered)


def _ranks(values: Floats) -> Any:
    import pandas as pd

    return pd.Series(values).rank(method="min").astype("Int64")


def is_missing(value: Any) -> bool:
    """Whether a table's cell holds nothing: None, NaN or pandas' NA."""
    return value is None or value != value or str(value) == "<NA>"


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if is_missing(value) or (isinstance(value, float) and math.isinf(value)) else value


def shown_indicators(ranking: Ranking) -> list[str]:
    """The few whose values stand beside the scores: the classic ones, where there are any."""
    classic = ("flatness/hessian_trace", "indicators/ppl", "indicators/kshot_mean")
    there = [name for name in classic if f"rank/{name}" in ranking.checkpoints]
    return there or [item.indicator for item in ranking.associations if item.source == "measured"][:3]
