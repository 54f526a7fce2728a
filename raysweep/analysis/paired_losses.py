"""Held-out losses of checkpoints on the same text, whose difference is far surer than either."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from raysweep.train.evaluate import HeldoutLosses

Losses = Mapping[str, tuple[float, HeldoutLosses]]
"""Domain -> its share of the mean loss, and the losses of its batches."""


def read_losses(path: Path) -> Losses | None:
    """Those of a `heldout.LOSSES`; None where there is no such file, or it cannot be read."""
    try:
        document = json.loads(path.read_bytes())
        return {name: (float(each["share"]), HeldoutLosses.of(each)) for name, each in document.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def paired_difference(left: Sequence[Losses | None], right: Sequence[Losses | None]) -> tuple[float, float]:
    """Mean over pairs of the loss of one checkpoint less that of another, and its standard error over the text.

    All pairs have read the same text, so that what a batch makes of their mean difference is one draw; how pairs differ
    is no part of this error.

    Args:
        left, right: [pairs], of the same text.

    Returns:
        (difference, error) in nats per predicted token; NaN where losses are not known, or of another mix or text.
    """
    pairs = [(one, other) for one, other in zip(left, right, strict=True) if one is not None and other is not None]
    if not pairs or len(pairs) < len(left):
        return math.nan, math.nan
    total, variance, first = 0.0, 0.0, pairs[0][0]
    if not all(_is_same_text(first, other) for pair in pairs for other in pair):
        return math.nan, math.nan
    for name, (share, known) in first.items():
        sums = [one[name][1].losses - other[name][1].losses for one, other in pairs]
        of_none = replace(known, losses=np.zeros_like(known.losses))
        value, error = replace(known, losses=np.mean(sums, axis=0)).less(of_none)
        total, variance = total + share * value, variance + (share * error) ** 2
    return total, math.sqrt(variance)


def _is_same_text(one: Losses, other: Losses) -> bool:
    """Whether domains are the same, in the same shares, as far as the numbers tell."""
    return one.keys() == other.keys() and all(
        share == other[name][0] and np.array_equal(known.num_predicted, other[name][1].num_predicted)
        for name, (share, known) in one.items()
    )
