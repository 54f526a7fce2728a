"""What a learner is told of a pair of checkpoints: differences, products and values of normalised indicators.

Features as in "Can Pre-training Indicators Reliably Predict Fine-tuning Outcomes of LLMs?" (learning to compare): of
each indicator p the four numbers p_a - p_b, p_a p_b, p_a and p_b.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raysweep.analysis.pairwise import SMALL, Floats

KINDS = ("difference", "product", "first", "second")
WIDE = 10.0
"""A positive indicator whose largest value is so many times its least is taken by its logarithm."""


@dataclass(frozen=True)
class Scale:
    """How an indicator is normalised: to mean 0 and standard deviation 1 over the checkpoints that were learnt from."""

    name: str
    is_log: bool
    mean: float
    deviation: float

    def of(self, values: Floats) -> Floats:
        """Normalised values; NaN where one is missing or infinite, or has no logarithm."""
        fine = np.isfinite(values) & (values > 0) if self.is_log else np.isfinite(values)
        plain = np.log(np.where(fine, values, 1.0)) if self.is_log else np.where(fine, values, 0.0)
        scaled: Floats = np.where(fine, (plain - self.mean) / self.deviation, np.nan)
        return scaled


def fit_scale(name: str, values: Floats) -> Scale:
    """By the values that are there; one that does not vary is left at 0.

    >>> fit_scale("trace", np.array([1.0, 10.0, 100.0])).of(np.array([10.0, 0.0]))
    array([ 0., nan])
    """
    known = values[np.isfinite(values)]
    is_log = bool(len(known) and (known > 0).all() and known.max() >= WIDE * known.min())
    plain = np.log(known) if is_log else known
    deviation = float(plain.std()) if len(plain) else 0.0
    return Scale(name, is_log, float(plain.mean()) if len(plain) else 0.0, deviation if deviation > SMALL else 1.0)


def normalised(scales: Sequence[Scale], values: Floats) -> Floats:
    """[n, indicators], from values of the same shape."""
    return np.stack([scale.of(column) for scale, column in zip(scales, values.T, strict=True)], axis=1)


def features(first: Floats, second: Floats) -> Floats:
    """[pairs, 4 indicators], kind by kind, from normalised values [pairs, indicators] of either side."""
    return np.concatenate([first - second, first * second, first, second], axis=1)


def ordered_pairs(rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every two different rows, in both orders."""
    rows = np.asarray(rows, dtype=np.int64)
    first, second = np.repeat(rows, len(rows)), np.tile(rows, len(rows))
    apart = first != second
    return first[apart], second[apart]


def logistic(logit: float) -> float:
    """Probability; `logistic(-x) == 1 - logistic(x)` to the last bit, as 1 - p is exact for p of 1/2 or more.

    >>> logistic(-0.3) == 1 - logistic(0.3), 1 - logistic(-0.3) == logistic(0.3)
    (True, True)
    """
    above = 1 / (1 + math.exp(-abs(logit)))
    return above if logit >= 0 else 1 - above
