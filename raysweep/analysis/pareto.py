"""The checkpoints that no other beats in every goal of a search at once."""

from __future__ import annotations

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
    on_front = undominated(last[names].to_numpy(dtype="float64") * signs)
    return Front(
        tuple(goals),
        tuple({str(name): value for name, value in row.items()} for row in last.to_dict("records")),
        tuple(map(bool, on_front)),
    )


def undominated(values: Floats) -> NDArray[np.bool_]:
    """[n] booleans for values [n, goals], more being better: no other row is as good in all and better in one."""
    as_good = np.all(values[None, :, :] >= values[:, None, :], axis=2)
    better = np.any(values[None, :, :] > values[:, None, :], axis=2)
    beaten: NDArray[np.bool_] = np.any(as_good & better, axis=1)
    return ~beaten
