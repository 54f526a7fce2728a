"""How far trainings of one recipe by several pretraining seeds end apart: a noise floor of pretraining.

A seed may come with a base of its own, which is better or worse for every recipe: that offset is no noise between
checkpoints of one base, and is told apart. Scores are fitted by a level of each recipe and an offset of each seed, over
the recipes that have several: what is left is of single trainings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raysweep.analysis.pairwise import Floats, IntervalEstimate

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class SeedTwins:
    """Differences in the target between two seeds of a recipe, as root mean squares."""

    num_variants: int
    """Those that have several seeds; of each the last checkpoint of a trajectory counts."""
    num_seeds: int
    difference: float
    beside_offset: IntervalEstimate
    """Without what a seed adds to all of them, with the 95 % interval for normal scores; NaN where these cannot be told
    apart, as of a single recipe."""
    of_finetuning: float
    """What the noise of fine-tuning alone would make of `difference`; NaN where it is not known."""


def seed_twins(table: pd.DataFrame, scores: Floats, variance: Floats) -> SeedTwins | None:
    """None where no variant has two seeds.

    Args:
        table: the scored rows of a checkpoint table.
        scores: [rows].
        variance: [rows, rows], of the noise of fine-tuning in a difference of two scores; NaN where it is not known.
    """
    if "seed" not in table:
        return None
    rows = table[["variant", "seed", "step"]].reset_index(drop=True)
    rows = rows.sort_values("step", kind="stable").groupby(["variant", "seed"]).tail(1)
    rows = rows[rows.groupby("variant")["seed"].transform("nunique") > 1]
    if rows.empty:
        return None
    own, (variants, names), (seeds, labels) = rows.index, rows["variant"].factorize(), rows["seed"].factorize()
    levels = (variants[:, None] == np.arange(len(names))).astype(np.float64)
    offsets = (seeds[:, None] == np.arange(len(labels))).astype(np.float64)
    twins = np.argwhere(np.triu(variants[:, None] == variants, k=1))
    both = variance[own[twins[:, 0]], own[twins[:, 1]]]
    return SeedTwins(
        num_variants=len(names),
        num_seeds=len(labels),
        difference=_spread(scores[own], levels).value,
        beside_offset=_spread(scores[own], np.concatenate([levels, offsets], axis=1)),
        of_finetuning=math.sqrt(float(both.mean())),
    )


def _spread(scores: Floats, regressors: Floats) -> IntervalEstimate:
    """Of differences of two scores, root mean square of what the regressors leave."""
    from scipy.special import chdtri

    fitted, _, rank, _ = np.linalg.lstsq(regressors, scores, rcond=None)
    freedom = len(scores) - int(rank)
    if not freedom:
        return IntervalEstimate(math.nan)
    total = 2 * float(((scores - regressors @ fitted) ** 2).sum())
    low, high = (math.sqrt(total / float(chdtri(freedom, tail))) for tail in (0.025, 0.975))
    return IntervalEstimate(math.sqrt(total / freedom), low, high)
