"""Held-out losses are paired where they are of the same text in the same shares, and nowhere else."""

import math

import numpy as np
import pytest

from raysweep.analysis.paired_losses import Losses, paired_difference
from raysweep.train.evaluate import HeldoutLosses

GIVEN = {"wiki": [30.0, 34.0, 31.0], "code": [12.0, 15.0, 11.0]}


def losses(shares: dict[str, float], *, more: float = 0.0, num: int = 10) -> Losses:
    counts = np.full(3, num)
    return {name: (share, HeldoutLosses(np.array(GIVEN[name]) + more, counts)) for name, share in shares.items()}


def test_what_is_the_same_for_both_cancels():
    even = {"wiki": 0.5, "code": 0.5}
    assert paired_difference([losses(even, more=1.0)], [losses(even)]) == pytest.approx((0.1, 0.0))


@pytest.mark.parametrize(
    "other", [losses({"wiki": 0.1, "code": 0.9}), losses({"wiki": 0.9}), losses({"wiki": 0.9, "code": 0.1}, num=9)]
)
def test_another_mix_or_text_has_no_pair(other):
    one = losses({"wiki": 0.9, "code": 0.1})
    assert all(map(math.isnan, paired_difference([one], [other])))
    assert all(map(math.isnan, paired_difference([other], [one])))
