"""The checkpoints that no other beats in every goal of a search at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raysweep.analysis.pairwise import Floats
from raysweep.search import Goal

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Front:
    """The last checkpoint of each trial that has all goals, in the order of the table."""

    goals: tuple[Goal, ...]
    rows: tuple[dict[str, Any], ...]
    on_front: tuple[bool, ...]
    hypervolume: float
    """See `hypervolume`, of all goals scaled so that the worst of these rows is 0 and the best 1; NaN where all of them
    are equal in a goal."""


def front_of(table: pd.DataFrame, goals: Sequence[Goal]) -> Front | None:
    """The Pareto front; None where there are fewer than two goals, or no checkpoint has them all."""
    names = [goal.metric for goal in goals]
    if len(goals) < 2 or not set(names) <= set(table.columns):
        return None
    last = table.loc[table.sort_values("step").groupby("trial", sort=False).tail(1).index.sort_values()]
    last = last.dropna(subset=names)
    if last.empty:
        return None
    signs = np.array([1.0 if goal.mode == "max" else -1.0 for goal in goals])
    values = last[names].to_numpy(dtype="float64") * signs
    on_front = undominated(values)
    worst, best = values.min(axis=0), values.max(axis=0)
    # The others lie within what these dominate.
    share = hypervolume((values[on_front] - worst) / (best - worst)) if bool((best > worst).all()) else math.nan
    return Front(
        tuple(goals),
        tuple({str(name): value for name, value in row.items()} for row in last.to_dict("records")),
        tuple(map(bool, on_front)),
        hypervolume=share,
    )


def undominated(values: Floats) -> NDArray[np.bool_]:
    """[n] booleans for values [n, goals], more being better: no other row is as good in all and better in one."""
    as_good = np.all(values[None, :, :] >= values[:, None, :], axis=2)
    better = np.any(values[None, :, :] > values[:, None, :], axis=2)
    beaten: NDArray[np.bool_] = np.any(as_good & better, axis=1)
    return ~beaten


def hypervolume(values: Floats) -> float:
    """Volume of what is dominated by at least one row and lies above 0 in each goal (Zitzler and Thiele, 1998).

    Exact, by slices along the last goal: of n rows in g goals some n^(g - 1) steps.

    Args:
        values: [n, goals], none below 0, more being better.

    >>> hypervolume(np.array([[1.0, 3.0], [2.0, 1.0]]))
    4.0
    """
    if values.shape[1] == 1:
        return float(values.max())
    order = values[np.argsort(-values[:, -1], kind="stable")]
    heights = np.append(order[:, -1], 0.0)
    return float(
        sum(
            (heights[index] - heights[index + 1]) * hypervolume(order[: index + 1, :-1])
            for index in range(len(order))
            if heights[index] > heights[index + 1]
        )
    )
